"""Installs the repository root as the package `baton` (editable: `pip install -e .`)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PARTS = ["launcher", "parallel", "models", "kernels", "configs"]
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "__init__.py").read_text()).group(1)

setup(
    name="baton-train",
    version=VERSION,
    description="Trains Jamba-style hybrid models on 256K tokens and more, the sequence sharded by state passing",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"baton": "."},
    py_modules=["baton.__init__"],
    packages=["baton." + name for name in find_packages(include=[n for p in PARTS for n in (p, p + ".*")])],
    package_data={"baton.configs": ["*.yaml"], "baton.launcher.planner": ["*.yaml"]},
    install_requires=[
        "torch>=2.11",
        "triton; sys_platform == 'linux'",
        "megatron-core>=0.16,<0.17",
        "pydantic>=2.7",
        "pyyaml>=6",
        "typer>=0.12",
        "rich>=13",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
        "safetensors>=0.4",
        "tokenizers>=0.20",
        "numpy>=1.26",
    ],
    extras_require={
        "hf": ["transformers>=5.20", "mambapy>=1.2"],
        "dev": [
            "transformers>=5.20",
            "mambapy>=1.2",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "ruff>=0.12",
            "mypy>=1.11",
            # Of Megatron's own mixer and checkpoints, beside which ours are tested.
            "einops",
            "psutil",
            "types-PyYAML",
            "setuptools>=70",
            "wheel",
        ],
    },
    entry_points={"console_scripts": ["baton = baton.launcher.cli:main"]},
)
