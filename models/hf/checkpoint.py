"""A checkpoint of Hugging Face's, whose tensors can be asked for as ours, and the other way round."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...configs.schema import ModelConfig
from ..foreign import ForeignCheckpoint, Joined, described
from .families import read_config, write_config
from .files import CONFIG, SHARD_BYTES, Described, TensorFiles, new_folder, read_json, write_folder
from .tensors import HEAD, hf_tensors, usual_name


class HFCheckpoint(ForeignCheckpoint):
    """A folder with config.json and safetensors, each tensor read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError: what is not supported, missing, too much, or of another shape."""
        self.values = read_json(folder / CONFIG)
        model = read_config(self.values, str(folder / CONFIG))
        self.model_type: str = self.values["model_type"]
        files = TensorFiles(folder, lambda name: usual_name(name, self.model_type), {HEAD} if model.tied_embeddings else set())
        super().__init__(folder, model, hf_tensors(model, self.model_type), files, f"a {self.model_type}", CONFIG)


def write_checkpoint(
    folder: Path,
    model: ModelConfig,
    read: Callable[[str], Tensor],
    dtypes: dict[str, torch.dtype],
    original: dict[str, Any] | None = None,
    model_type: str | None = None,
    extra: Callable[[Path], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Writes our tensors as a checkpoint of Hugging Face's, complete or not at all -> its model_type.

    read: one of our tensors by name; dtypes: of each. original: the config.json that the model came with, for the keys that the
    model does not know. model_type: of the family, None: the first that computes the same. extra: writes more into the folder.
    Raises UserError where no family computes the same, the folder exists, or it cannot be written; and AssertionError where what
    would be written is not what `HFCheckpoint` reads.
    """
    original = original or {}
    values = write_config(model, model_type or original.get("model_type"))
    if values["model_type"] == original.get("model_type"):
        values = original | values
    theirs = {tensor.name: tensor for tensor in hf_tensors(model, values["model_type"])}
    like = described(model, [*theirs.values()], dtypes)
    table = [Described(name, tensor.dtype, tensor.shape) for name, tensor in like.items()]
    values["dtype"] = str(Counter(dtypes.values()).most_common(1)[0][0]).removeprefix("torch.")
    joined = Joined(read)
    with new_folder(folder) as partial:
        write_folder(partial, table, lambda name: joined.read(theirs[name]).to(like[name].dtype), shard_bytes)
        if extra is not None:
            extra(partial)
        (partial / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    return values["model_type"]
