"""What a comparison found: errors, what is allowed, and where the first difference is.

In fp64 only the order of sums differs, so every error is compared with EXACT. Below it a mesh may be twice as far from fp64 as one
rank in the same dtype is, by the largest errors over all tensors of one kind of module: the error of one small tensor alone is so
much a matter of chance that in bf16 the rule by tensor fails on sound meshes. A parameter that begins at zero is after the step its
gradient, and is compared among these.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ...configs.schema import Config, ModelConfig
from ...models.hybrid import HybridModel
from ...models.initialization import zeros
from .cases import mesh_of
from .differences import Errors

EXACT = 1e-10
"""Allowed in fp64, where only the order of sums differs."""
FLOOR = 1e-5
"""Below fp64 always allowed: one rank in fp32 is itself about as far from fp64."""
QUANTITIES = ("loss", "logits", "gradients", "parameters")


class Flips(NamedTuple):
    """Tokens whose own choice of experts is not that of the reference, of `of` tokens over all MoE layers."""

    one_rank: int
    mesh: int
    of: int


class Over(NamedTuple):
    """A tensor whose error is over what is allowed."""

    quantity: str
    name: str
    error: float
    limit: float


class Worst(NamedTuple):
    """A tensor and its error."""

    name: str
    error: float


@dataclass(frozen=True)
class Verdict:
    """One mesh against one rank: errors of QUANTITIES, against fp64; `one_rank`: of one rank in the same dtype, below fp64."""

    config: Config
    errors: Errors
    one_rank: Errors | None
    flips: Flips | None
    seconds: float
    chosen: dict[str, str] | None = None
    """Over cp, the "strategy" and "attention" that ran: what `auto` has chosen."""
    first_difference: str | None = None
    """Where a mesh that is not ok goes wrong first."""

    @property
    def ok(self) -> bool:
        """Whether every error is within its limit."""
        return not self.over

    @property
    def tolerance(self) -> str:
        """What is allowed, in words."""
        return f"{EXACT:g}" if self.one_rank is None else f"twice one rank's error, at least {FLOOR:g}"

    @functools.cached_property
    def over(self) -> list[Over]:
        """The tensors that are over their limits, in order of QUANTITIES and of the forward."""
        return over_limit(self.errors, self.one_rank, self.config.model)

    def worst(self, quantity: str, names: set[str] | None = None) -> Worst:
        """The largest error of a quantity, of all tensors or those in `names`."""
        return _largest(self.errors[quantity], names)

    def worst_of_one_rank(self, quantity: str, names: set[str] | None = None) -> float | None:
        """The largest error of one rank in the same dtype; None in fp64."""
        return None if self.one_rank is None else _largest(self.one_rank[quantity], names).error


def over_limit(errors: Errors, one_rank: Errors | None, model: ModelConfig) -> list[Over]:
    """The tensors whose error is over the limit; one that is nan is."""
    limits: dict[str, float] = {}
    steps = set() if one_rank is None else _begin_at_zero(model)
    for quantity, names in (one_rank or {}).items():
        for name, error in names.items():
            peers = _peers("gradients" if name in steps else quantity, name, model)
            # A rank that overflows itself allows nothing.
            limits[peers] = max(limits.get(peers, FLOOR), 2 * error if math.isfinite(error) else FLOOR)
    over = []
    for quantity, names in errors.items():
        for name, error in names.items():
            limit = EXACT if one_rank is None else limits[_peers("gradients" if name in steps else quantity, name, model)]
            if not error <= limit:
                over.append(Over(quantity, name, error, limit))
    return over


def _begin_at_zero(model: ModelConfig) -> set[str]:
    """The names of the parameters that are zero before the step."""
    with torch.device("meta"):
        built = HybridModel(model)
    fills = ((path, getattr(module, "initializers", {})) for path, module in built.named_modules())
    return {f"{path}.{name}" for path, initializers in fills for name, fill in initializers.items() if fill is zeros}


def _peers(quantity: str, name: str, model: ModelConfig) -> str:
    """What the limit is shared by: a kind of module, loss and logits, or nothing, for outputs, which are large."""
    if quantity == "outputs":
        return name
    return f"{quantity} {kind_of(name, model)}" if quantity in ("gradients", "parameters") else "forward"


def _largest(errors: dict[str, float], names: set[str] | None) -> Worst:
    among = [Worst(name, error) for name, error in errors.items() if names is None or name in names]
    return max(among, key=lambda worst: (worst.error != worst.error, worst.error))


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to: layers.0.mixer.ssm.D -> layers.0.mixer."""
    pieces = name.split(".")
    return ".".join(pieces[:3] if pieces[0] == "layers" else pieces[:1])


def kind_of(name: str, model: ModelConfig) -> str:
    """The kind of module that a parameter, or a part, belongs to: embedding, norms, mamba2, attention, mlp, moe, head."""
    part = part_of(name)
    if part.endswith("norm") or name.startswith("head.norm"):
        return "norms"
    if not part.startswith("layers"):
        return part
    _, number, place = part.split(".")
    kinds = model.layers[int(number)]
    return kinds.mixer if place == "mixer" else str(kinds.feed_forward)


def to_json(verdict: Verdict) -> dict[str, Any]:
    """A case of the file that --json writes; an error that is not finite is null."""
    config = verdict.config
    parallel, worst = config.parallel, {quantity: verdict.worst(quantity) for quantity in QUANTITIES}
    case: dict[str, Any] = {
        "mesh": mesh_of(parallel),
        "layout": parallel.layout,
        "strategy": parallel.strategy,
        "attention": parallel.attention,
        "documents": config.data.documents,
        "dtype": config.precision,
        "context": config.data.context,
        "sequences": config.batch.sequences,
        "micro_steps": config.batch.micro_steps,
        "ok": verdict.ok,
        "max_relative_error": {quantity: finite(worst[quantity].error) for quantity in QUANTITIES},
        "worst": {q: {"name": worst[q].name, "error": finite(worst[q].error)} for q in ("gradients", "parameters")},
        "tolerance": verdict.tolerance,
        "chosen": verdict.chosen,
        "first_difference": verdict.first_difference,
        "seconds": round(verdict.seconds, 3),
    }
    if verdict.one_rank is not None:
        case["one_rank_error"] = {quantity: finite(verdict.worst_of_one_rank(quantity)) for quantity in QUANTITIES}
    if verdict.flips is not None:
        case["flips"] = verdict.flips._asdict()
    return case


def finite(error: float | None) -> float | None:
    """JSON has neither inf nor nan."""
    return None if error is None or error - error != 0 else error
