"""Which experts each token goes to: recorded in one run, replayed in another, whose own choices are counted where they differ.

Two experts of nearly the same probability change places with the last bit, and everything after differs: below fp64 a comparison
means something only with the same choices.
"""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from ...models.moe import MoE
from ...models.recompute import recomputing

NamedMoEs = Iterable[tuple[str, MoE]]
"""Mixtures of experts by their names in the whole model."""


def record_choices(moes: NamedMoEs) -> dict[str, list[Tensor]]:
    """Fills the returned dict from now on: by name of the MoE layer, the experts [b, l, k] of one micro-step after another."""
    chosen: dict[str, list[Tensor]] = {}

    def record(name: str, choose: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def recorded(probabilities: Tensor) -> Tensor:
            choice = choose(probabilities)
            if not recomputing():
                chosen[name].append(choice)
            return choice

        return recorded

    for name, moe in moes:
        chosen[name] = []
        moe.choose = record(name, moe.choose)
    return chosen


def replay_choices(moes: NamedMoEs, choices: Mapping[str, Tensor]) -> dict[tuple[str, int], int]:
    """Makes each MoE layer use choices[name], [m, b, l, k] on its device, of m micro-steps in turn.

    Fills the returned dict: by layer and micro-step, how many tokens would have chosen another set of experts.
    """
    flips: dict[tuple[str, int], int] = {}

    def replay(name: str, choose: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        calls, recomputed = enumerate(choices[name]), iter(choices[name])

        def replayed(probabilities: Tensor) -> Tensor:
            if recomputing():
                return next(recomputed)
            number, given = next(calls)
            # Without gradient, for nothing must be kept here that is not kept when it is computed again.
            own = choose(probabilities.detach()).sort(-1).values
            flips[name, number] = int((own != given.sort(-1).values).any(-1).sum())
            return given

        return replayed

    for name, moe in moes:
        moe.choose = replay(name, moe.choose)
    return flips
