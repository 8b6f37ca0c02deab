"""What a model knows of what it has read, as a file: a long prompt is read once."""

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ... import __version__
from ...configs.errors import UserError
from ...models.generation import GenerationState, restore
from ...models.hf.files import Described, write_file
from ...models.hybrid import HybridModel
from ...parallel.gradients import local_part
from ..checkpoints.model import describe_model
from ..files import whole_file

DIGEST, LENGTHS = "model", "lengths"
"""Keys of the file's metadata: the digest of the model that has read, and how many tokens of each sequence."""
SAMPLES = 4096
"""Numbers of a tensor that its digest is made of, at most."""


def digest_model(model: HybridModel) -> str:
    """Tells models apart that a state is not of both: what they compute, in which dtypes, and numbers out of every tensor.

    A step of training changes some of these: A_log, D and dt_bias are in fp32, and of others there are thousands.
    """
    tensors = model.state_dict()
    dtypes = {name: str(tensor.dtype) for name, tensor in tensors.items()}
    found = hashlib.sha256(json.dumps([describe_model(model.config), dtypes], sort_keys=True).encode())
    for tensor in tensors.values():
        numbers = local_part(tensor).flatten()
        # An odd stride: sizes are even, and every column is met.
        found.update(numbers[:: -(-len(numbers) // SAMPLES) | 1].double().cpu().numpy().tobytes())
    return found.hexdigest()


def save_states(file: Path, states: list[GenerationState], digest: str) -> None:
    """Writes the states of sequences, each on its own, complete or not at all. Raises UserError."""
    named = {f"{row}/{name}": tensor for row, state in enumerate(states) for name, tensor in state.tensors().items()}
    # Wide numbers first: each tensor then begins at a multiple of its numbers' size.
    names = sorted(named, key=lambda name: -named[name].itemsize)
    table = [Described(name, named[name].dtype, named[name].shape) for name in names]
    metadata = {DIGEST: digest, LENGTHS: json.dumps([int(state.lengths) for state in states]), "baton": __version__}
    with whole_file(file, "--save-state") as unfinished:
        write_file(unfinished, table, (named[name].contiguous().cpu() for name in names), metadata)


def load_states(file: Path, digest: str, model: HybridModel, more: int) -> list[GenerationState]:
    """The states in a file of `save_states`, with room for so many more tokens. Raises UserError: another model's, damaged."""
    device = next(model.parameters()).device
    try:
        with safe_open(file, "pt", str(device)) as opened:
            metadata = opened.metadata() or {}
            if DIGEST not in metadata:
                raise UserError(f"--state {file}: is no state; --save-state writes one")
            if metadata[DIGEST] != digest:
                raise UserError(f"--state {file}: is of another model, or of other weights of it")
            lengths = list(json.loads(metadata[LENGTHS]))
            states = []
            for row, length in enumerate(lengths):
                tensors = {key: opened.get_tensor(f"{row}/{key}") for key in _keys(model)}
                if any(tensor.shape[2] != length for key, tensor in tensors.items() if key.endswith((".keys", ".values"))):
                    raise ValueError(f"keys and values of sequence {row} are not of its {length} tokens")
                states.append(restore(tensors, length, length + more))
    except UserError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--state {file}: is damaged, or cannot be read: {error}") from None
    if not states:
        raise UserError(f"--state {file}: is damaged: of no sequence")
    return states


def _keys(model: HybridModel) -> list[str]:
    """By which a state of the model has its tensors."""
    inside = {"attention": ("keys", "values")}
    return [
        *(f"layers.{name}.{key}" for name, layer in model.layers.items() for key in inside.get(layer.kinds.mixer, ("tail", "ssm"))),
        "logits",
    ]
