"""What holds the house together: imports point down, help is quick, the wheel installs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {
    "launcher": {"launcher", "models", "parallel", "kernels", "configs"},
    "models": {"models", "parallel", "kernels", "configs"},
    "parallel": {"parallel", "kernels", "configs"},
    "kernels": {"kernels", "configs"},
    "configs": {"configs"},
}
FILES = [path for part in BELOW for path in sorted((ROOT / part).rglob("*.py"))]


def imported(path):
    """Dotted names that a file imports, relative ones made absolute, as parts below the package."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            if node.module:
                yield (*base, *node.module.split("."))
            else:
                yield from ((*base, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    part = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        assert name[0] != "baton", f"{path}: imports inside are relative"
        if name[0] in BELOW:
            assert name[0] in BELOW[part], f"{path}: {part} may not import {name[0]}"
        if part == "configs":
            assert name[0] not in {"torch", "numpy"}, f"{path}: configs imports no {name[0]}"


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-P", *arguments], capture_output=True, text=True, timeout=120, env=os.environ | environment, check=False
    )


@pytest.mark.parametrize("command", ["", "train", "data prepare", "verify", "bench exchange"])
def test_help_needs_no_torch(command):
    code = f"import sys; sys.argv = ['baton', *{command.split()}, '--help']\nfrom baton.launcher.cli import app\n"
    code += "try: app()\nfinally: print('heavy:', sorted({'torch', 'megatron', 'numpy', 'yaml'} & set(sys.modules)))"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "Usage: baton" in done.stdout
    assert "heavy: []" in done.stdout


@pytest.mark.slow
def test_the_wheel_installs(tmp_path):
    """Built without the working tree's own install, put into a fresh folder beside this environment's packages."""
    pip = [sys.executable, "-m", "pip", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, timeout=240)
    code = f"import sys; sys.path.insert(0, {str(target)!r})\nimport baton\nassert baton.__file__.startswith({str(target)!r})\n"
    code += "".join(f"import baton.{part}\n" for part in BELOW)
    code += "import baton.models.parallelize, baton.kernels.ssd\nfrom baton.configs.loading import load_config\n"
    code += (
        "print(load_config('quickstart').model.pattern)\nsys.argv = ['baton', '--help']\nfrom baton.launcher.cli import app; app()"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("M-MEM-*E\n")
    assert "Usage: baton" in done.stdout
