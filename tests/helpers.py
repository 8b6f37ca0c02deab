"""What distributed tests share: a tiny hybrid, its data, and how far results are from a reference."""

from pathlib import Path

import torch
from click.testing import Result
from typer.testing import CliRunner

from baton.configs.loading import load_config
from baton.configs.schema import Config
from baton.launcher.cli import app
from baton.launcher.environment import Environment
from baton.launcher.verification.verdict import Verdict
from baton.launcher.verification.verifier import Verifier
from interpreter import INTERPRETED

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
"""Where tests of kernels put their tensors: the GPU if there is one."""

SEQUENCES, CONTEXT, VOCAB = 2, 48, 64

TINY = [
    f"model.vocab_size={VOCAB}",
    "model.d_model=32",
    "model.mamba2={head_dim: 8, state_dim: 8, groups: 2, chunk_size: 7}",
    "model.attention={heads: 4, kv_heads: 2, head_dim: 8, rope: {}}",
    "model.mlp.hidden=32",
    "model.moe={experts: 4, top_k: 2, hidden: 16, aux_loss: 0.1}",
    "model.initializer_range=0.2",
    f"data.context={CONTEXT}",
    f"batch.sequences={SEQUENCES}",
]
"""Overrides of the quickstart: every kind of layer, chunks that do not divide a segment, an aux loss that counts."""


def tiny_config(overrides: list[str], world: int = 1, **paths: Path) -> Config:
    """The tiny hybrid, with paths such as run=... as further overrides."""
    named = [f"{key.replace('__', '.')}={value}" for key, value in paths.items()]
    return load_config("quickstart", [*TINY, *overrides, *named], world)


def compare(rank: int, config: Config) -> Verdict:
    """The config's mesh over the default group against one rank, as `baton verify` does it; every rank returns the same."""
    environment = Environment(rank, torch.distributed.get_world_size(), torch.device("cpu"))
    return Verifier(environment, config.parallel.segments).verify(config)


def relative_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference over the largest reference value; nan and inf stay, so that comparisons with them fail."""
    assert found.shape == reference.shape, (found.shape, reference.shape)
    largest = reference.abs().max()
    assert largest > 0, "a reference that is all zero shows nothing"
    return ((found.double() - reference.double()).abs().max() / largest).item()


def run_command(*arguments: object) -> Result:
    """`baton` with these arguments, in this process."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def error_of_command(*arguments: object) -> str:
    """The one line with which a command fails."""
    result = run_command(*arguments)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line]
    return line


SMALL_RUN = [
    "model.vocab_size=288",
    "model.initializer_range=0.1",
    "data.tokenizer.kind=byte",
    "data.context=64",
    "data.validation_fraction=0.1",
    "batch={sequences: 2, micro_steps: 1}",
    "schedule={steps: 6, warmup: 2}",
    "checkpoint={every: 2, keep: 2}",
    "evaluation={every: 3, sequences: 3}",
    "logging.sample_tokens=4",
]
"""Overrides of the tiny hybrid with which training takes a moment."""


def small_run(tmp_path: Path, overrides: list[str], text: Path | None, world: int = 1, name: str = "run") -> Config:
    """A config whose run and data folders lie in tmp_path."""
    paths = [f"run={tmp_path / name}", f"data.folder={tmp_path / 'data'}", f"data.input=[{text}]" if text else "data.input=[]"]
    return load_config("quickstart", [*TINY, *SMALL_RUN, *paths, *overrides], world)
