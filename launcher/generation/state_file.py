"""What a model knows of what it has read, as a file: a long prompt is read once."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ... import __version__
from ...configs.errors import UserError
from ...models.generation import GenerationState, restore
from ...models.hybrid import HybridModel
from ...parallel.gradients import local_part
from ..files import whole_file

MODEL = "model"
"""Key of the file's metadata: the digest of the model that has read."""


def digest_model(model: HybridModel) -> str:
    """Tells models apart: by all shapes, and by the norms' weights, which every step of training changes."""
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    found = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            found.update(local_part(parameter.detach()).float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def save_states(file: Path, states: list[GenerationState], digest: str) -> None:
    """Writes the states of sequences, each on its own, complete or not at all. Raises UserError."""
    tensors = {f"{row}/{name}": t.contiguous() for row, state in enumerate(states) for name, t in state.tensors().items()}
    with whole_file(file, "--save-state") as unfinished:
        try:
            save_file(tensors, unfinished, {MODEL: digest, "baton": __version__})
        except SafetensorError as error:
            raise OSError(str(error)) from None


def load_states(file: Path, digest: str, device: torch.device, more: int) -> list[GenerationState]:
    """The states in a file of `save_states`, with room for so many more tokens. Raises UserError: another model's, damaged."""
    try:
        with safe_open(file, "pt", str(device)) as opened:
            owner = (opened.metadata() or {}).get(MODEL)
            rows: dict[int, dict[str, torch.Tensor]] = {}
            if owner == digest:
                for name in opened.keys():  # noqa: SIM118 (it is no dict)
                    row, _, key = name.partition("/")
                    rows.setdefault(int(row), {})[key] = opened.get_tensor(name)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"--state {file}: cannot be read: {error}") from None
    if owner is None:
        raise UserError(f"--state {file}: is no state; --save-state writes one")
    if owner != digest:
        raise UserError(f"--state {file}: is of another model, or of other weights of it")
    return [restore(rows[row], int(rows[row]["lengths"]) + more) for row in sorted(rows)]
