"""How fast a run is: tokens, FLOPs of the model, and how much of what its GPUs could that is."""

import itertools

import torch

from ...configs.schema import Config
from ...models.flops import TRAINING, causal_pairs, model_flops, recomputed_flops
from ...models.hybrid import MicroStep
from ..planner.machine import peak_flops


class Throughput:
    """Of a config on so many ranks of a device."""

    def __init__(self, config: Config, world: int, device: torch.device) -> None:
        self.config, self.world = config, world
        self.peak = peak_flops(torch.cuda.get_device_name(device), config.precision) if device.type == "cuda" else None
        """FLOP/s of a rank as its GPU's vendor gives them; None: not known."""
        model, context = config.model, config.data.context
        self._single = sum(model_flops(model, context).values())
        """FLOPs of a sequence that is one document."""
        self._pair = sum(model_flops(model, context, causal_pairs(context) + 1).values()) - self._single
        """FLOPs of one pair of tokens, in all attention layers."""

    def attended(self, micro_step: MicroStep) -> int:
        """Pairs of tokens that see each other in one layer's attention, of all of this dp rank's sequences."""
        if micro_step.documents is None:
            return len(micro_step.ids) * causal_pairs(self.config.data.context)
        rows = micro_step.documents.cu_seqlens
        return sum(causal_pairs(stop - start) for row in rows for start, stop in itertools.pairwise(row))

    def of_step(self, tokens: float, pairs: float, seconds: float) -> dict[str, float]:
        """tokens: with a label; pairs: of all ranks. MFU (arXiv 2204.02311): without what is computed again."""
        sequences = self.config.batch.sequences
        whole = sequences * causal_pairs(self.config.data.context)
        flops = TRAINING * (sequences * self._single + (pairs - whole) * self._pair)
        rate = flops / seconds / self.world
        found = {"tokens_per_second": tokens / seconds, "teraflops_per_rank": rate / 1e12}
        return found | ({"mfu": rate / self.peak} if self.peak else {})

    def describe(self) -> str:
        """FLOPs of a token in training, by kind of part."""
        config = self.config
        flops = model_flops(config.model, config.data.context)
        whole = sum(flops.values())
        shares = ", ".join(f"{kind} {own / whole:.0%}" for kind, own in sorted(flops.items(), key=lambda item: -item[1]))
        again = recomputed_flops(config.model, config.data.context, config.parallel.recompute)
        more = f", and {again / whole / TRAINING:.0%} more computed again" if again else ""
        return f"{TRAINING * whole / config.data.context / 1e6:.3g} MFLOP a token ({shares}{more})"
