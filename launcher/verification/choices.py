"""Which experts each token goes to: recorded in one run, replayed in another, whose own choices are counted where they differ.

Two experts of nearly the same probability change places with the last bit, and everything after differs: below fp64 a comparison
means something only with the same choices.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from ...models.hybrid import HybridModel
from ...models.moe import MoE


def record_choices(model: HybridModel) -> dict[int, Tensor]:
    """Fills the returned dict at each forward from now on: by number of the MoE layer, the chosen experts [t, k]."""
    chosen: dict[int, Tensor] = {}

    def record(number: int, choose: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def recorded(probabilities: Tensor) -> Tensor:
            chosen[number] = choose(probabilities)
            return chosen[number]

        return recorded

    for number, moe in enumerate(_moes(model)):
        moe.choose = record(number, moe.choose)
    return chosen


def replay_choices(model: HybridModel, choices: Sequence[Tensor]) -> dict[int, int]:
    """At each forward from now on MoE layer i uses choices[i], [t, k] on the model's device.

    Fills the returned dict: by number of the layer, how many tokens would have chosen another set of experts.
    """
    flips: dict[int, int] = {}

    def replay(number: int, choose: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def replayed(probabilities: Tensor) -> Tensor:
            own, given = (chosen.sort(-1).values for chosen in (choose(probabilities), choices[number]))
            flips[number] = int((own != given).any(-1).sum())
            return choices[number]

        return replayed

    for number, moe in enumerate(_moes(model)):
        moe.choose = replay(number, moe.choose)
    return flips


def _moes(model: HybridModel) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]
