"""A checkpoint here becomes a distributed one of Megatron-LM's, with the options of its training script."""

import json
from pathlib import Path

import torch

from ...models.foreign import Joined, described, is_exact
from ...models.hf.files import new_folder
from ...models.megatron_config import MegatronConfig, megatron_config
from ...models.megatron_tensors import megatron_objects, megatron_tensors
from ..checkpoints.contents import read_contents
from ..checkpoints.manifest import find_checkpoint
from ..checkpoints.model import read_model
from ..checkpoints.tensors import CheckpointTensors, write_stored
from .from_megatron import TRACKER
from .report import counted

RELEASE = "release"
"""What Megatron calls a checkpoint of no iteration, and its folder."""
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
"""What its metadata.json has."""


def convert_to_megatron(checkpoint: Path, out: Path, dtype: torch.dtype | None = None) -> MegatronConfig:
    """Writes the folder `out`, complete or not at all; it is for --load, with --finetune. Raises UserError.

    checkpoint: or a run's folder, of which the newest is taken. dtype: of what need not be fp32; None: as it is.
    """
    contents = read_contents(find_checkpoint(checkpoint))
    model = read_model(contents.folder)
    config, theirs = megatron_config(model), {each.name: each for each in megatron_tensors(model)}
    reader = CheckpointTensors(contents)
    dtypes = {name: dtype if dtype and not is_exact(name) else entry.dtype for name, entry in reader.entries.items()}
    tensors = described(model, [*theirs.values()], dtypes)
    with new_folder(out) as partial, counted(reader.read, len(dtypes)) as read:
        (partial / RELEASE).mkdir()
        joined = Joined(read)
        state = tensors | megatron_objects(model)
        write_stored(partial / RELEASE, state, lambda name: joined.read(theirs[name]).to(tensors[name].dtype))
        torch.save({"checkpoint_version": 3.0, "iteration": 0}, partial / RELEASE / "common.pt")
        (partial / RELEASE / "metadata.json").write_text(json.dumps(FORMAT))
        (partial / TRACKER).write_text(RELEASE)
    return config
