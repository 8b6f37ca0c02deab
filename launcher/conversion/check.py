"""Whether a checkpoint computes what transformers, or a file of what that computed, says."""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...configs.errors import UserError
from ...models.hf import HFModel
from ...models.hf.checkpoint import HFCheckpoint
from ...models.hf.families import difference
from ...models.hf.files import TensorFiles
from ...models.hf.model import build_hf
from ...models.hf.tensors import usual_name
from ...models.hybrid import moe_layers
from ..checkpoints.contents import read_contents
from ..checkpoints.manifest import find_checkpoint
from ..checkpoints.model import read_model
from ..checkpoints.tensors import CheckpointTensors
from .report import console

TOKENS = 64
"""Drawn at random where none are given."""
GRADIENT = "gradient."
"""How names of gradients begin in a reference."""


class Found(NamedTuple):
    """What was compared."""

    name: str
    error: float
    of: str = ""
    """The tensor with the largest error."""


def check_conversion(
    folder: Path,
    checkpoint: Path,
    tokens: Path | None,
    reference: Path | None,
    write_reference: Path | None,
    tolerance: float,
    out: Path | None,
) -> None:
    """Prints the largest errors of logits, losses and gradients. Raises UserError where one is over `tolerance`."""
    theirs = HFCheckpoint(folder)
    for file in (write_reference, out):
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{file.parent} is no folder; allowed: a file in one that exists")
    if reference is not None and write_reference is not None:
        raise UserError("--reference and --write-reference: allowed: one of them, what is written being of transformers")
    if reference is not None and tokens is not None:
        raise UserError("--tokens and --reference: allowed: one of them, the reference being of its own tokens")
    if reference is None:
        expected = _transformers(folder, theirs.values, moe_layers(theirs.model) > 0, _tokens(tokens, theirs.model.vocab_size))
    else:
        expected = _read_reference(reference)
    if write_reference is not None:
        save_file(expected, write_reference)
    model = _load(checkpoint, theirs)
    found = _compute(model, expected["input_ids"])
    for name, tensor in found.items():
        if name in expected or name.startswith(GRADIENT):
            there = expected.get(name)
            if there is None or there.shape != tensor.shape:
                raise UserError(f"{reference or folder}: {name} of {list(tensor.shape)} is not in it; it is of another model")
    compared = [Found(name, _error(found[name], expected[name])) for name in ("logits", "loss", "aux_loss") if name in expected]
    gradients = [Found(name, _error(t, expected[name])) for name, t in found.items() if name.startswith(GRADIENT)]
    worst = max(gradients, key=lambda each: (each.error != each.error, each.error))
    compared.append(Found(f"{len(gradients)} gradients", worst.error, worst.name.removeprefix(GRADIENT)))
    _print(compared, tolerance)
    if out is not None:
        out.write_text(json.dumps([each._asdict() for each in compared], indent=1))
    wrong = [each for each in compared if not each.error <= tolerance]
    if wrong:
        first = wrong[0]
        raise UserError(f"{checkpoint} differs from {reference or folder}: {first.name} {first.error:.1e}, allowed: {tolerance:g}")


def _tokens(file: Path | None, vocab_size: int) -> Tensor:
    if file is None:
        return torch.randint(0, vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    try:
        ids = [int(word) for word in file.read_text().split()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: no token ids: {error}") from None
    if len(ids) < 2 or min(ids) < 0 or max(ids) >= vocab_size:
        raise UserError(f"{file}: allowed: two token ids and more, from 0 to {vocab_size - 1}")
    return torch.tensor([ids])


def _transformers(folder: Path, values: dict[str, Any], experts: bool, ids: Tensor) -> dict[str, Tensor]:
    """Logits, losses and gradients of transformers' own model, gradients by the names of files.

    experts: whether it has any, so that its loss is to have their part.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise UserError(
            "transformers is not installed (pip install baton-train[hf]); allowed without it: --reference with a file that "
            "--write-reference made"
        ) from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    # Without experts it would fail over it.
    model.config.output_router_logits = experts
    out = model(ids, labels=ids)
    out.loss.backward()
    found = {"input_ids": ids, "logits": out.logits.detach(), "loss": out.loss.detach()}
    if getattr(out, "aux_loss", None) is not None:
        found["aux_loss"] = out.aux_loss.detach()
    return found | {GRADIENT + name: grad for name, grad in _gradients(model, values["model_type"]).items()}


def _gradients(model: Any, model_type: str) -> dict[str, Tensor]:
    """By the names of files, which are not those in memory: the model is saved with them in place of its numbers."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = TensorFiles(Path(folder), lambda name: usual_name(name, model_type))
        return {name: files.read(name).clone() for name in files.places}


def _read_reference(file: Path) -> dict[str, Tensor]:
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    if missing := {"input_ids", "logits", "loss"} - found.keys():
        raise UserError(f"{file}: {', '.join(sorted(missing))} missing; --write-reference writes such a file")
    return found


def _load(checkpoint: Path, theirs: HFCheckpoint) -> HFModel:
    """The checkpoint in fp32, as the family that it is to be."""
    contents = read_contents(find_checkpoint(checkpoint))
    model = read_model(contents.folder)
    if key := difference(model, theirs.model):
        raise UserError(f"{contents.folder} is of another model than {theirs.folder}: its model.{key} is another")
    return build_hf(theirs.values, model, CheckpointTensors(contents).read, torch.float32)


def _compute(model: HFModel, ids: Tensor) -> dict[str, Tensor]:
    losses = model.loss(ids, ids)
    losses["loss"].backward()
    found = {"logits": model(ids), **losses} | {GRADIENT + k: t for k, t in model.hf_tensors(gradients=True).items()}
    return {name: tensor.detach() for name, tensor in found.items()}


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value; of what is zero there, the largest value."""
    largest = expected.abs().max()
    return float((found - expected).abs().max() / (largest if largest > 0 else 1))


def _print(compared: list[Found], tolerance: float) -> None:
    table = Table("what", "error", "where", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for each in compared:
        table.add_row(each.name, f"{each.error:.1e}", each.of)
    console.print(table)
    console.print(f"allowed: {tolerance:g}")
