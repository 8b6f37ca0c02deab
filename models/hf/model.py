"""A model of Hugging Face's on one device, with their definition of its losses."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...configs.errors import UserError
from ...configs.schema import ModelConfig
from ...kernels.cross_entropy import IGNORED
from ...kernels.documents import Documents, pack_documents
from ..foreign import is_exact, our_tensors
from ..hybrid import HybridModel, Losses
from .checkpoint import HFCheckpoint, write_checkpoint
from .files import DTYPES
from .tensors import hf_tensors

Boundaries = Sequence[int] | Sequence[Sequence[int]] | Tensor


class HFModel(nn.Module):
    """`HybridModel` as Hugging Face's models are called: ids -> logits, and labels that are not shifted -> losses."""

    def __init__(self, checkpoint_values: dict[str, Any], model: HybridModel, aux_loss: float) -> None:
        """checkpoint_values: of config.json. aux_loss: weight of the auxiliary loss, of which the model's own is 1 or 0."""
        super().__init__()
        self.values, self.model, self.aux_loss = checkpoint_values, model, aux_loss

    def forward(self, input_ids: Tensor, cu_seqlens: Boundaries | None = None) -> Tensor:
        """Logits [b, l, vocab] of ids [b, l]; cu_seqlens as `loss`."""
        return self.model(input_ids, documents=_documents(input_ids, cu_seqlens))

    def loss(self, input_ids: Tensor, labels: Tensor, cu_seqlens: Boundaries | None = None) -> dict[str, Tensor]:
        """ids and labels [b, l], of which IGNORED (-100) counts nothing -> the scalars loss, cross_entropy and aux_loss.

        Token t is to predict label t + 1; cross_entropy is the mean over the labels that count. aux_loss is E Σ_e f_e p_e over the
        tokens of all layers with experts (`moe.auxiliary_loss`), 0 for models that have none; loss adds it to the cross entropy
        with the weight of config.json (router_aux_loss_coef), as theirs does with output_router_logits.

        cu_seqlens: the boundaries of packed documents, [0, ..., l] of one sequence or a row of them for each. Documents do not see
        each other, and the first token of one is no other's label. Raises ValueError for other boundaries. As theirs, cross_entropy
        is nan where no label counts; labels beyond the vocabulary are not looked for.
        """
        documents = _documents(input_ids, cu_seqlens)
        if documents is not None:
            labels = labels.masked_fill(documents.resets, IGNORED)
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        losses: Losses = self.model(input_ids, shifted, documents=documents)
        cross_entropy = losses.cross_entropy / (shifted != IGNORED).sum()
        return {
            "loss": cross_entropy + self.aux_loss * losses.auxiliary,
            "cross_entropy": cross_entropy,
            "aux_loss": losses.auxiliary,
        }

    def hf_tensors(self, gradients: bool = False) -> dict[str, Tensor]:
        """The parameters, or their gradients, by the names and in the shapes of Hugging Face's files."""
        ours = dict(self.model.named_parameters())
        found = {name: p.grad if gradients else p.detach() for name, p in ours.items()}
        found |= {} if gradients else dict(self.model.named_buffers())
        theirs = hf_tensors(self.model.config, self.values["model_type"])
        known = {name: tensor for name, tensor in found.items() if tensor is not None}
        return {t.name: t.join(known) for t in theirs if all(part.ours in known for part in t.parts)}


def load_hf(folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> HFModel:
    """A checkpoint folder of Hugging Face's (Jamba, Mamba2, Bamba, GraniteMoeHybrid, NemotronH) on one device.

    dtype: of the parameters, None: as they are stored; A_log, D and dt_bias are in fp32 at least. Raises UserError where the folder
    is damaged or has what is not supported, with the key of config.json, and for another dtype than safetensors here are read in.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"load_hf: dtype is {dtype!r}, allowed: {', '.join(map(str, DTYPES))}, None")
    checkpoint = HFCheckpoint(Path(folder))
    return build_hf(checkpoint.values, checkpoint.model, checkpoint.read, dtype, device)


def build_hf(
    values: dict[str, Any],
    config: ModelConfig,
    read: Callable[[str], Tensor],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> HFModel:
    """The model of a config.json's values, each tensor of ours as `read` gives it; dtype as `load_hf`."""
    weight = config.moe.aux_loss
    unweighted = config.moe.model_copy(update={"aux_loss": 1.0 if weight else 0.0, "balance": "pooled"})
    with torch.device("meta"):
        model = HybridModel(config.model_copy(update={"moe": unweighted}))
    model.to_empty(device=device)
    kept = our_tensors(config)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in kept:
            # What a step counts, such as the experts' load.
            tensor.data.zero_()
            continue
        found = read(name)
        wanted = found.dtype if dtype is None else torch.promote_types(dtype, torch.float32) if is_exact(name) else dtype
        tensor.data = found.to(device, wanted)
    model.tie()
    return HFModel(values, model, weight)


def save_hf(model: HFModel, folder: str | Path) -> None:
    """Writes the model's config.json and safetensors, in the dtypes that it has; the folder must not be there.

    Raises UserError where it cannot be written.
    """
    inside = model.model
    config = inside.config.model_copy(update={"moe": inside.config.moe.model_copy(update={"aux_loss": model.aux_loss})})
    tensors = {name: tensor.detach() for name, tensor in inside.state_dict().items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    write_checkpoint(Path(folder), config, tensors.__getitem__, dtypes, model.values)


def _documents(ids: Tensor, cu_seqlens: Boundaries | None) -> Documents | None:
    if cu_seqlens is None:
        return None
    rows = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else [*cu_seqlens]
    if rows and not isinstance(rows[0], (Sequence, Tensor)):
        rows = [rows]
    rows = [row.tolist() if isinstance(row, Tensor) else row for row in rows]
    if len(rows) != len(ids):
        raise ValueError(f"cu_seqlens are of {len(rows)} sequences, allowed: a row for each of the {len(ids)}")
    if ends := [row[-1:] for row in rows if [*row[-1:]] != [ids.shape[1]]]:
        raise ValueError(f"cu_seqlens end at {ends[0]}, allowed: {ids.shape[1]}")
    return pack_documents(rows, torch.arange(ids.shape[1], device=ids.device))
