"""Which meshes there are for so many GPUs, and the best of them."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, get_args

from ...configs.errors import KeyedError
from ...configs.pattern import RECURRENT
from ...configs.schema import Config, ParallelConfig
from ...models.memory import Terms
from ...parallel.attention import Strategy
from ...parallel.links import STRATEGIES
from .cost import PartCost, part_cost
from .estimate import Estimate, Estimator
from .machine import Machine

SHOWN = 10
"""Meshes that a search returns."""
SIMULATED = 30
"""Of the best by formula: those whose schedule is run, of which the best are shown."""
MODES = [
    [(2, "none")],
    [(3, "none"), (2, "feed_forward"), (2, "mixer")],
    [(3, "feed_forward"), (3, "mixer"), (2, "layer")],
    [(3, "layer")],
]
"""Keys zero and recompute, the fastest first: of the first lot in which something fits, the fastest."""
ENOUGH_TOKENS = 65536
"""Of a micro-step on a rank: beyond, more than one sequence does not make a GPU any faster. Assumed."""


class Lacking(NamedTuple):
    """A config that does not fit."""

    config: Config
    memory: list[Terms]

    @property
    def largest(self) -> int:
        """Bytes of the rank that would hold most."""
        return max(sum(terms.values()) for terms in self.memory)


class Found(NamedTuple):
    """What a search came to."""

    best: list[Estimate]
    """Those that fit, the fastest first, one of each mesh."""
    nearest: Lacking | None
    """Where none fits: that which lacks least memory."""
    tried: int
    """Ways to lay the job out that were estimated."""
    fitting: int
    """Of them."""


def search(config: Config, machine: Machine, fixed: dict[str, Any], first: bool = False) -> Found:
    """The best meshes of a config. fixed: values of `parallel` and of micro_steps that are not to be chosen.

    first: whether the first that fits is enough.
    """
    estimator = Estimator(config, machine)
    found: dict[tuple[int, ...], Estimate] = {}
    nearest: Lacking | None = None
    tried = fitting = 0
    for family in families(estimator, fixed):
        for candidate in family:
            tried += 1
            fits, lacking = _best_mode(estimator, candidate, fixed)
            if fits is None:
                if lacking is not None and (nearest is None or lacking.largest < nearest.largest):
                    nearest = lacking
                continue
            fitting += 1
            key = _mesh_key(fits.config.parallel)
            if key not in found or fits.seconds < found[key].seconds:
                found[key] = fits
            if first or (fits.config.parallel.pp == 1 and fits.config.parallel.recompute == "none"):
                # Smaller micro-steps would only gather the parameters more often.
                break
        if first and found:
            break
    best = sorted(found.values(), key=lambda estimate: estimate.seconds)[:SIMULATED]
    exact = sorted((estimator.estimate(each.config, exact=True) for each in best), key=lambda estimate: estimate.seconds)
    return Found(exact[:SHOWN], nearest if not exact else None, tried, fitting)


def _mesh_key(parallel: ParallelConfig) -> tuple[int, ...]:
    degrees = (parallel.tp, parallel.cp, parallel.dp, parallel.pp)
    return tuple(int(degree) for degree in degrees)


def families(estimator: Estimator, fixed: dict[str, Any]) -> Iterator[Iterator[Config]]:
    """Configs of every mesh that the checks allow, each with the fastest layout and strategies, but for MODES.

    Those of a family differ in their micro-steps, ascending.
    """
    strategies: dict[tuple[int, ...], dict[str, Any] | None] = {}
    for degrees in _degrees(estimator.machine, fixed):
        if micro_steps := _micro_steps(estimator.config, degrees, fixed):
            for options in _options(estimator.config, estimator.machine, degrees, fixed):
                yield _family(estimator, degrees | options, micro_steps, strategies, fixed)


def _family(
    estimator: Estimator,
    mesh: dict[str, Any],
    micro_steps: list[int],
    strategies: dict[tuple[int, ...], dict[str, Any] | None],
    fixed: dict[str, Any],
) -> Iterator[Config]:
    config = estimator.config
    for number in micro_steps:
        plain = _with(config, mesh, number)
        key = mesh["tp"], mesh["cp"], config.batch.sequences // number // mesh["dp"], mesh["sequence_parallel"]
        if key not in strategies:
            strategies[key] = _strategies(estimator, plain, fixed)
        candidate = _with(config, mesh | (strategies[key] or {}), number)
        if strategies[key] is not None and _allowed(candidate):
            yield candidate


def _with(config: Config, parallel: dict[str, Any], micro_steps: int) -> Config:
    batch = config.batch.model_copy(update={"micro_steps": micro_steps})
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel), "batch": batch})


def _allowed(config: Config) -> bool:
    try:
        config.check()
    except KeyedError:
        return False
    return True


def _choices(fixed: dict[str, Any], key: str, choices: Iterable[Any]) -> list[Any]:
    return [fixed[key]] if key in fixed else [*choices]


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _degrees(machine: Machine, fixed: dict[str, Any]) -> Iterator[dict[str, int]]:
    """tp, pp, cp and dp whose product are the GPUs; tp stays on a node."""
    for tp in _choices(fixed, "tp", [n for n in divisors(machine.gpus) if machine.per_node % n == 0]):
        for pp in _choices(fixed, "pp", divisors(max(1, machine.gpus // tp))):
            for cp in _choices(fixed, "cp", divisors(max(1, machine.gpus // (tp * pp)))):
                dp = machine.gpus // (tp * pp * cp)
                if tp * pp * cp * dp == machine.gpus and fixed.get("dp", dp) == dp:
                    yield {"tp": tp, "pp": pp, "cp": cp, "dp": dp}


def _micro_steps(config: Config, degrees: dict[str, int], fixed: dict[str, Any]) -> list[int]:
    """So that each dp rank has as many sequences in each."""
    sequences = config.batch.sequences
    if sequences % degrees["dp"]:
        return []
    each, tokens = sequences // degrees["dp"], config.data.context // degrees["cp"]
    few = [n for n in divisors(each) if n == each or each // n * tokens <= ENOUGH_TOKENS]
    if degrees["pp"] > 1:
        # More of them, shorter bubbles.
        few = few[-3:]
    return [n for n in _choices(fixed, "micro_steps", few) if each % n == 0]


def _options(config: Config, machine: Machine, degrees: dict[str, int], fixed: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What else there is to choose of a mesh, but for MODES and strategies."""
    tp, tokens = degrees["tp"], degrees["dp"] * degrees["cp"]
    experts = any(layer.feed_forward == "moe" for layer in config.model.layers)
    shared_out = fixed.get("sequence_parallel", tp > 1 and config.data.context % (tp * degrees["cp"]) == 0)
    node = max(1, machine.per_node // tp)
    copies = sorted({1, degrees["dp"], tokens // math.gcd(tokens, node)} & set(divisors(degrees["dp"])))
    for replicate in _choices(fixed, "replicate", copies):
        for ep in _choices(fixed, "ep", divisors(math.gcd(config.model.moe.experts, tokens // replicate)) if experts else [1]):
            for each in _choices(fixed, "stages_per_rank", _stages_per_rank(config, degrees["pp"])):
                schedule = "interleaved_1f1b" if each > 1 else "1f1b"
                if fixed.get("schedule", schedule) == schedule:
                    pipeline = {"stages_per_rank": each, "schedule": schedule}
                    yield {"ep": ep, "replicate": replicate, "sequence_parallel": shared_out, **pipeline}


def _stages_per_rank(config: Config, pp: int) -> list[int]:
    """Those that are tried; where the pattern cuts the layers, what its cuts make."""
    if pp == 1:
        return [1]
    if stages := len(config.model.cuts):
        return [(stages + 1) // pp] if (stages + 1) % pp == 0 else []
    return [1, 2, 4]


def _strategies(estimator: Estimator, config: Config, fixed: dict[str, Any]) -> dict[str, Any] | None:
    """The layout and strategies over cp with which mixers take the least time together; None where none is allowed."""
    if config.parallel.cp == 1:
        return {key: fixed[key] for key in ("layout", "strategy", "attention") if key in fixed}
    found = [_of_layout(estimator, config, layout, fixed) for layout in _choices(fixed, "layout", ["contiguous", "zigzag"])]
    return min((each for each in found if each is not None), key=lambda each: each[0], default=(0.0, None))[1]


def _of_layout(
    estimator: Estimator, config: Config, layout: str, fixed: dict[str, Any]
) -> tuple[float, dict[str, Any] | None] | None:
    """Seconds of all mixers, and the fastest strategies."""
    kinds = [layer.mixer for layer in config.model.layers]
    total, chosen = 0.0, {"layout": layout, "strategy": "sliced", "attention": "ring"}
    for those, key, names in ((RECURRENT, "strategy", STRATEGIES), (("attention",), "attention", get_args(Strategy))):
        times, present = {}, {kind: kinds.count(kind) for kind in those if kind in kinds}
        for name in _choices(fixed, key, names) if present else []:
            tried = _with(config, chosen | {key: name}, config.batch.micro_steps)
            if _allowed(tried):
                w = estimator.workload(tried)
                times[name] = sum(count * _seconds(part_cost(kind, w, estimator.machine)) for kind, count in present.items())
        if present:
            if not times:
                return None
            chosen[key] = min(times, key=times.__getitem__)
            total += times[chosen[key]]
    return total, chosen


def _seconds(cost: PartCost) -> float:
    return sum(cost.forward.values()) + sum(cost.backward.values())


def _best_mode(estimator: Estimator, candidate: Config, fixed: dict[str, Any]) -> tuple[Estimate | None, Lacking | None]:
    """The fastest way that fits, or None and that which lacks least."""
    lacking: Lacking | None = None
    for lot in MODES:
        fitting = []
        for zero, recompute in lot:
            if fixed.get("zero", zero) != zero or fixed.get("recompute", recompute) != recompute:
                continue
            config = _with(candidate, {"zero": zero, "recompute": recompute}, candidate.batch.micro_steps)
            tried = Lacking(config, estimator.memory(config))
            if tried.largest <= estimator.machine.memory:
                fitting.append(estimator.estimate(config, memory=tried.memory))
            elif lacking is None or tried.largest < lacking.largest:
                lacking = tried
        if fitting:
            return min(fitting, key=lambda estimate: estimate.seconds), None
    return None, lacking
