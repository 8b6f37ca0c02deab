"""A checkpoint's model for generation, on this rank."""

import warnings

import torch
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError
from torch.distributed.checkpoint.api import CheckpointException

from ...configs.errors import KeyedError, UserError
from ...configs.schema import BatchConfig, Config, ParallelConfig
from ...kernels import dispatch
from ...models.hybrid import HybridModel
from ...models.parallelize import build_replica
from ...parallel.mesh import Mesh
from ..checkpoints.contents import MODEL, Contents
from ..checkpoints.tensors import reason


def generation_config(contents: Contents, tp: int, cp: int, longest: int) -> Config:
    """The run's config on another mesh, with the zigzag layout, for prompts of up to so many tokens. Raises UserError."""
    try:
        config = Config.model_validate(contents.config)
    except ValidationError:
        raise UserError(f"{contents.folder}/config.yaml: is damaged, or of another version of baton") from None
    parallel = ParallelConfig(tp=tp, cp=cp, dp=1, layout="zigzag")
    unit = parallel.segments * config.model.mamba2.chunk_size
    # As many tokens as a batch needs to be one: what the ways over ranks are chosen for.
    experts = config.model.moe.experts
    data = config.data.model_copy(update={"documents": "single", "context": -(-max(longest, experts) // unit) * unit})
    config = config.model_copy(update={"parallel": parallel, "data": data, "batch": BatchConfig()})
    try:
        config.check()
    except KeyedError as error:
        raise UserError(f"{error.key} {error}") from None
    return config


def load_model(contents: Contents, config: Config, mesh: Mesh, device: torch.device) -> HybridModel:
    """This rank's part of the model, each tensor in the dtype of the computation. All ranks call it. Raises UserError."""
    dispatch.choose(config.kernels, config.norms)
    model = build_replica(config, mesh, device)
    saved = {entry.name for entry in contents.entries}
    kept = model.state_dict().keys()
    tensors = {**dict(model.named_parameters()), **{name: b for name, b in model.named_buffers() if name in kept}}
    if missing := sorted(tensors.keys() - saved):
        raise UserError(f"{contents.folder}: {missing[0]} is missing")
    state = {MODEL + name: tensor for name, tensor in tensors.items()}
    with warnings.catch_warnings():
        # Every rank reads what it needs: there is nothing to agree on.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            dcp.load(state, checkpoint_id=contents.folder, no_dist=True)
        except (Exception, CheckpointException) as error:  # the library's own is no Exception
            raise UserError(f"{contents.folder}: cannot be read: {reason(error)}") from None
    return model
