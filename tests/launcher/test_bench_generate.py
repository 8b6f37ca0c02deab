"""`baton bench generate`: what it measures, by a clock that the test moves, and where it goes."""

import json

import pytest
from typer.testing import CliRunner

from baton.launcher.benchmarks import generation
from baton.launcher.cli import app
from helpers import TINY

MODEL = [*TINY, "model.pattern=M-m*E", "model.mamba.state_dim=4"]


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "generate", "quickstart", *MODEL, *map(str, arguments)])


@pytest.fixture
def clock(monkeypatch):
    """A second passes before each look at it."""
    seconds = [0.0]

    def now():
        seconds[0] += 1.0
        return seconds[0]

    monkeypatch.setattr(generation, "perf_counter", now)


def test_numbers(tmp_path, clock):
    """Speeds by the clock; bytes by the model's sizes; the table, the file and the plot of one run."""
    file, plot = tmp_path / "out.json", tmp_path / "out.png"
    result = run("--tokens", "20,50", "--max-new", 6, "--json", file, "--plot", plot)
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())
    assert [row["tokens"] for row in rows] == [20, 50]
    # A second until the first token, and one for each of the others.
    assert [(row["read_tokens_per_second"], row["written_tokens_per_second"]) for row in rows] == [(20, 1), (50, 1)]
    d, inner, groups = 32, 64, 2
    mamba2 = (inner // 8) * 8 * 8 + 3 * (inner + 2 * groups * 8)
    mamba = inner * 4 + 3 * inner
    assert [row["state_bytes"] for row in rows] == [4 * (mamba2 + mamba)] * 2
    assert [row["cache_bytes"] for row in rows] == [4 * 2 * 2 * 8 * (tokens + 5) for tokens in (20, 50)]
    assert d * 2 == inner
    assert {row["pattern"] for row in rows} == {"M-m*E"}
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["20", "20", "1.0"] in [line[:3] for line in lines]
    assert ["50", "50", "1.0"] in [line[:3] for line in lines]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stat().st_size > 20_000


def test_bad_input(tmp_path):
    for options, message in (
        (["--tokens", "20,x"], "--tokens is '20,x', allowed: numbers from 1 to "),
        (["--plot", tmp_path / "out.txt"], f"--plot {tmp_path / 'out.txt'}: allowed: a .png"),
        (["--json", tmp_path / "no" / "out.json"], "cannot be written; allowed: a file in a folder that exists"),
        (["model.pattern=X"], "model.pattern"),
    ):
        result = run(*options)
        assert result.exit_code == 1
        assert message in result.stderr.splitlines()[-1]
        assert list(tmp_path.iterdir()) == []
