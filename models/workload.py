"""What a rank has of one micro-step: the sizes that memory, traffic and time are counted from."""

from typing import NamedTuple

from ..configs.pattern import RECURRENT
from ..configs.schema import ModelConfig, ParallelConfig
from ..parallel.attention import ulysses_degree
from ..parallel.layout import Layout


def state_numbers(model: ModelConfig, mixer: str) -> tuple[int, int]:
    """Of a sequence's boundary state in a recurrent mixer: numbers of the state, and of the decays that travel with it."""
    if mixer == "mamba":
        return model.mamba_inner * model.mamba.state_dim, model.mamba_inner
    return model.inner * model.mamba2.state_dim, model.mamba2_heads


def largest_state(model: ModelConfig) -> tuple[int, int]:
    """`state_numbers` of the mixer that sends most; of a model without recurrent ones zeros."""
    mixers = {layer.mixer for layer in model.layers}
    return max((state_numbers(model, mixer) for mixer in RECURRENT if mixer in mixers), default=(0, 0))


class Workload(NamedTuple):
    """Of a mesh whose degrees are numbers, and whose strategy and attention have names."""

    model: ModelConfig
    parallel: ParallelConfig
    b: int
    """Sequences."""
    context: int
    """Tokens of a whole sequence."""
    size: int
    """Bytes of an activation's number."""
    fused: bool
    """Whether the Triton kernels run, else their PyTorch references."""

    @property
    def wide(self) -> int:
        """Bytes of a number where statistics and states are computed."""
        return max(4, self.size)

    @property
    def tokens(self) -> int:
        """In regions of tp."""
        return self.b * (self.context // self.cp)

    @property
    def own_tokens(self) -> int:
        """Between regions of tp, whose ranks share tokens out under sequence_parallel."""
        return self.tokens // (self.parallel.tp if self.parallel.sequence_parallel else 1)

    @property
    def cp(self) -> int:
        """Ranks of the cp axis."""
        assert self.parallel.cp != "auto"
        return self.parallel.cp

    @property
    def dp(self) -> int:
        """Ranks of the dp axis."""
        assert self.parallel.dp != "auto"
        return self.parallel.dp

    @property
    def layout(self) -> Layout:
        """Of the sequence."""
        return Layout(self.parallel.layout, self.cp)

    @property
    def inner(self) -> int:
        """Channels of a Mamba-2 mixer."""
        return self.model.inner // self.parallel.tp

    @property
    def mamba_heads(self) -> int:
        """Of a Mamba-2 mixer."""
        return self.inner // self.model.mamba2.head_dim

    @property
    def mamba_inner(self) -> int:
        """Channels of a Mamba mixer."""
        return self.model.mamba_inner // self.parallel.tp

    @property
    def groups(self) -> int:
        """That a rank has B and C of, whole or in part."""
        return max(1, self.model.mamba2.groups // self.parallel.tp)

    @property
    def shared(self) -> int:
        """Channels of B and C together."""
        return 2 * self.groups * self.model.mamba2.state_dim

    @property
    def heads(self) -> int:
        """Of attention."""
        return self.model.attention.heads // self.parallel.tp

    @property
    def kv_heads(self) -> int:
        """Of attention's keys."""
        return max(1, self.model.attention.kv_heads // self.parallel.tp)

    @property
    def ulysses(self) -> int:
        """Ranks that exchange heads for tokens."""
        strategy = self.parallel.attention
        return ulysses_degree(strategy, self.cp, self.heads) if self.cp > 1 else 1  # type: ignore[arg-type]

    @property
    def rows(self) -> int:
        """Choices of experts, which are rows of the experts' matrices: as many on each rank, the experts being in balance."""
        return self.tokens * self.model.moe.top_k
