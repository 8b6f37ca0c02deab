"""The short convolution before a recurrence, of one or more inputs whose channels shard differently."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...kernels.conv import causal_conv
from ...kernels.documents import Documents
from ...parallel.halo import Halo, SequenceHalo
from ..initialization import Initializers, uniform_fan_in, zeros
from ..sharding import Sharding, Split, SplitGroups
from .state import RecurrentState


class ShortConv(nn.Module):
    """Causal depthwise convolution and SiLU of several inputs, which share one halo."""

    def __init__(self, width: int, **inputs: tuple[int, Split | SplitGroups]) -> None:
        """width: taps. inputs: by name, the channels of each and how tp cuts them; `NAME_weight` [c, width], `NAME_bias` [c]."""
        super().__init__()
        self.names, self.reach = list(inputs), width - 1
        self.sharding: Sharding = {}
        self.initializers: Initializers = {}
        for name, (channels, split) in inputs.items():
            self.register_parameter(f"{name}_weight", nn.Parameter(torch.empty(channels, width)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(channels)))
            self.sharding |= {f"{name}_weight": split, f"{name}_bias": split}
            self.initializers |= {f"{name}_weight": uniform_fan_in, f"{name}_bias": zeros}
        self.halo: SequenceHalo | None = None

    def start_halo(self, *inputs: Tensor) -> Halo | None:
        """Sends the last tokens of each segment on to the next; None where the whole sequence is here."""
        return None if self.halo is None else self.halo.start_last(inputs, self.reach)

    def forward(
        self, *inputs: Tensor, halo: Tensor | None, documents: Documents | None, state: RecurrentState | None = None
    ) -> list[Tensor]:
        """Each [b, l, c], the tokens before each segment or None, documents if packed -> as many of the same shapes.

        state: of generation; what it knows of is before the first token.
        """
        if state is not None:
            halo = self._continue(inputs, halo, state)
        halos = [None] * len(inputs) if halo is None else halo.split([x.shape[-1] for x in inputs], -1)
        positions = None if documents is None else documents.positions
        return [
            causal_conv(x, weight, bias, before, positions)
            for x, (weight, bias), before in zip(inputs, self._taps(), halos, strict=True)
        ]

    def _continue(self, inputs: Sequence[Tensor], halo: Tensor | None, state: RecurrentState) -> Tensor:
        """What is before the inputs, each [b, l, c]; their last tokens are the state's from here on."""
        last = torch.cat([x[:, -self.reach :] for x in inputs], -1)
        before = last.new_zeros(len(last), self.reach, last.shape[-1]) if state.tail is None else state.tail
        tail = torch.cat([before, last], 1)[:, -self.reach :].clone()
        halo = before.clone()[:, None] if halo is None else halo
        state.keep("tail", tail)
        return halo

    def _taps(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of each input."""
        return [(getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")) for name in self.names]
