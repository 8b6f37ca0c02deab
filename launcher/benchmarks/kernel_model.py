"""What the kernels cost, by counting: launches, bytes of device memory, and operations of matrix products. Needs no device.

Each model below lists the launches of one operation, forward as in training and backward, in order. A row names the Triton kernel,
or PyTorch's operation as `aten::...`, and the tensors that it goes through; every one counts once, with all its elements, and once
more where it is changed in place and so listed twice. Tensors of the same bytes share a name: a gradient has its operand's. These
are the bytes that `kernels.launches.record` counts around the real launches, with one exception: selective_scan's backward goes
through windows of the sequence, and a launch counts here with its window alone, there with the whole tensors that it is passed.

Not counted: what a kernel reads again and a cache does not have, and what caches save. FLOPs are those of matrix products, two for
a multiplication with its addition, ssd's over whole chunks as its kernels compute them; element-wise arithmetic is left out.
`least` is what no implementation can save: every operand and gradient read once, every result written once.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ...kernels.cross_entropy.op import chunk_size
from ...kernels.launches import Launch
from .kernel_cases import Case

F32 = 4
I32 = 4
I64 = 8


class Cost(NamedTuple):
    """Of one operation in one direction."""

    launches: list[Launch]
    flops: int
    least: int
    """Bytes."""

    @property
    def bytes(self) -> int:
        """Of all launches."""
        return sum(launch.bytes for launch in self.launches)

    def then(self, other: "Cost") -> "Cost":
        """One after the other."""
        return Cost(self.launches + other.launches, self.flops + other.flops, self.least + other.least)

    def seconds(self, bandwidth: float, flops: float) -> float:
        """The least that memory of so many bytes a second, or products of so many FLOP/s, take: whichever is more."""
        return max(self.bytes / bandwidth, self.flops / flops)


class Costs(NamedTuple):
    """Of an operation in training."""

    forward: Cost
    backward: Cost


def costs(case: Case) -> Costs:
    """What the case costs."""
    return MODELS[case.name](case)


Sizes = dict[str, int]


def _launches(sizes: Sizes, rows: str) -> list[Launch]:
    """Each row is a launch's name and those of its tensors, whose bytes `sizes` has."""
    split = [row.split() for row in rows.splitlines() if row.strip()]
    return [Launch(name, sum(sizes[tensor] for tensor in tensors)) for name, *tensors in split]


def _costs(
    sizes: Sizes,
    operands: str,
    results: str,
    forward: str | list[Launch],
    backward: str | list[Launch],
    flops: tuple[int, int] = (0, 0),
    least: str = "",
) -> Costs:
    """least: what backward must read and write, unless that is the results' gradients, the operands and their gradients."""
    given, made, again = (sum(sizes[name] for name in names.split()) for names in (operands, results, least))
    launched = [_launches(sizes, rows) if isinstance(rows, str) else rows for rows in (forward, backward)]
    return Costs(Cost(launched[0], flops[0], given + made), Cost(launched[1], flops[1], again or 2 * given + made))


def _cast(case: Case, name: str) -> str:
    """The row that makes of the fp32 tensor `<name>_sum` one of the operands' dtype, `name`; none if that is fp32."""
    return "" if case.dtype == torch.float32 else f"aten::_to_copy {name}_sum {name}\n"


def _ssd(case: Any) -> Costs:
    from ...kernels.ssd.fused import R, Sizes, config

    h, p, g, n, e = case.heads, case.head_dim, case.groups, case.state_dim, case.dtype.itemsize
    s = Sizes(1, case.tokens, h, p, g, n, config(p, n, case.dtype, 9))
    q, block, length = s.chunk, s.block, s.padded
    parts, tiles = s.parts(R * (R + 1) // 2 * s.blocks), n // s.config.group_dims
    of_token = h * length * F32
    sizes = {
        "x": case.tokens * h * p * e,
        "dt_raw": case.tokens * h * e,
        "head": h * F32,  # of A, D, dt_bias
        "B": case.tokens * g * n * e,
        # Of prepare: dt, the decays within chunks, and C Bᵀ.
        "dt": of_token,
        "cs": of_token,
        "scores": g * length * q * F32,
        # Of segments, and of the edges of blocks.
        "log_T": s.segments * h * F32,
        "U": s.segments * h * p * n * F32,
        "final": h * p * n * F32,
        "S": s.blocks * h * p * n * e,
        "past": s.blocks * h * p * F32,
        # The flow of gradient over each edge between tokens, in parts.
        "dscores": parts * g * length * block * F32,
        "inside": of_token,
        "own": of_token,
        "between": (R - 1) * of_token,
        "xdy": length // q * h * F32,
        "entering": tiles * of_token,
        "dB": case.tokens * g * n * e,
        "dB_parts": parts * case.tokens * g * n * (e if parts == 1 else F32),
        "dB_sum": case.tokens * g * n * F32,
        "sums": 3 * s.blocks * h * F32,
    }
    prepare = "prepare_kernel dt_raw head head B B dt cs scores"
    forward = f"""
        {prepare}
        segment_kernel x B dt cs U log_T
        walk_kernel log_T U U final
        output_kernel x B B dt cs scores head U x
    """
    sum_parts = f"aten::sum dB_parts dB_sum\n{_cast(case, 'dB')}"
    backward = f"""
        {prepare}
        segment_kernel x B dt cs U log_T
        walk_kernel log_T U U final
        output_kernel x B B dt cs scores head U x S
        segment_kernel x B dt cs U S S past
        scores_kernel x x B B dt cs dscores inside own between xdy
        group_kernel x x B B dt cs dscores S S dB_parts dB_parts entering entering
        {2 * sum_parts if parts > 1 else ""}
        decay_kernel inside own between entering entering past xdy dt cs dt_raw head head dt_raw sums
        reduce_kernel sums head head head
    """
    # Products of a token, 2 FLOPs each: with the state; with the tokens of its chunk or block, as whole tiles.
    state, within = 2 * length * h * p * n, 2 * length * q * h * p
    scores = 2 * length * q * g * n
    flops_forward = scores + state + 2 * state + within
    # Chunks of a block in pairs, R (R + 1) / 2 of them: C Bᵀ anew in each of the parts, and dy xᵀ.
    pairs = (R + 1) / 2
    of_pairs = pairs * (parts * scores + within)
    of_groups = 2 * (parts * scores * R + 2 * state)
    flops_backward = scores + state + 2 * state + within + state + int(of_pairs) + of_groups
    return _costs(sizes, "x dt_raw B B head head head", "x", forward, backward, (flops_forward, flops_backward))


def _selective_scan(case: Any) -> Costs:
    from ...kernels.selective_scan.fused import MAIN_CHANNELS, WORKSPACE, Q, cut_sequence

    l, d, n, e = case.tokens, case.channels, case.state_dim, case.dtype.itemsize
    cut = cut_sequence(torch.empty(1, l, d, device="meta"), 1)
    blocks, segments, covered = math.ceil(d / MAIN_CHANNELS), cut.total, cut.total * cut.length
    window = min(segments, max(1, WORKSPACE // (4 * n * (cut.length // Q * d + 2 * blocks * cut.length))))
    sizes = {
        "x": l * d * e,  # and dt, z, their gradients, y
        "B": l * n * e,
        "A": d * n * F32,
        "channel": d * F32,  # of D, dt_bias
        "T": segments * d * F32,
        "U": segments * d * n * F32,
        "final": d * n * F32,
        "dBC": 2 * covered * n * F32,
        "B_sum": l * n * F32,
        "channel_parts": segments * d * F32,
    }

    def window_grads(here: int) -> list[Launch]:
        """Of so many segments."""
        rows = """
            states_kernel x x A B B channel x channel U x states x
            main_grads_kernel x x A B B channel x channel U x states flow flow dA dA x x parts channel_parts channel_parts
            aten::sum parts dBC
        """
        own = {name: sizes[name] * here // segments for name in ("x", "B", "U", "channel_parts", "dBC")}
        own["states"] = here * cut.length // Q * n * d * F32
        own["flow"] = own["dA"] = own["U"]
        own["parts"] = blocks * own["dBC"]
        return _launches(sizes | own, rows)

    forward = """
        aten::clone A A
        maps_kernel x x A B channel T U
        walk_kernel T U A U final
        aten::clone A A
        outputs_kernel x x A B B channel x channel U x
    """
    before = """
        aten::zeros final
        aten::clone A A
        state_grads_kernel x A B x channel x U
        walk_kernel T U A final U final
        aten::clone A A
    """
    after = """
        aten::sum U A
        aten::clone A A
        aten::_to_copy B_sum B
        aten::_to_copy B_sum B
        aten::sum channel_parts channel
        aten::sum channel_parts channel
    """
    backward = _launches(sizes, before)
    for first in range(0, segments, window):
        backward += window_grads(min(window, segments - first))
    return _costs(sizes, "x x x B B A channel channel", "x", forward, backward + _launches(sizes, after))


def _conv(case: Any) -> Costs:
    from ...kernels.conv.fused import Launch

    l, c, w, e = case.tokens, case.channels, case.width, case.dtype.itemsize
    x, weight = torch.empty(1, l, c, device="meta"), torch.empty(c, w, device="meta")
    stripes = Launch(x, weight, None).stripes
    sizes = {
        "x": l * c * e,
        "weight": c * w * e,
        "weight_sum": c * w * F32,
        "bias": c * e,
        "bias_sum": c * F32,
        "weight_partials": stripes * c * w * F32,
        "bias_partials": stripes * c * F32,
    }
    backward = f"""
        backward_kernel x x weight bias x weight_partials bias_partials
        aten::sum weight_partials weight_sum
        {_cast(case, "weight")}
        aten::sum bias_partials bias_sum
        {_cast(case, "bias")}
        aten::clone weight weight
    """
    return _costs(sizes, "x weight bias", "x", "forward_kernel x weight bias x", backward)


def _norm_sizes(case: Any) -> Sizes:
    from ...kernels.norm.fused import WEIGHT_PROGRAMS, row_tile

    l, d, e = case.tokens, case.channels, case.dtype.itemsize
    programs = min(WEIGHT_PROGRAMS, math.ceil(l / row_tile(d)["ROWS"]))
    return {"x": l * d * e, "weight": d * e, "weight_sum": d * F32, "rstd": l * F32, "partials": programs * d * F32}


def _weight_sum(case: Any) -> str:
    return f"\naten::sum partials weight_sum\n{_cast(case, 'weight')}"


def _rms_norm(case: Any) -> Costs:
    backward = f"norm_backward_kernel x x weight rstd x partials{_weight_sum(case)}"
    return _costs(_norm_sizes(case), "x weight", "x", "norm_forward_kernel x weight x rstd", backward)


def _add_rms_norm(case: Any) -> Costs:
    forward = "norm_forward_kernel x x weight x x rstd"
    backward = f"norm_backward_kernel x x x weight rstd x partials{_weight_sum(case)}"
    # The sum's gradient is that of both operands.
    return _costs(_norm_sizes(case), "x x weight", "x x", forward, backward, least="x x x weight weight x")


def _gated_norm(case: Any) -> Costs:
    backward = f"gated_backward_kernel x x x weight rstd x x partials{_weight_sum(case)}"
    return _costs(_norm_sizes(case), "x x weight", "x", "gated_forward_kernel x x weight x rstd", backward)


def _swiglu(case: Any) -> Costs:
    sizes = {"x": case.tokens * case.hidden * case.dtype.itemsize}
    return _costs(sizes, "x x", "x", "forward_kernel x x x", "backward_kernel x x x x x")


def _moe(case: Any) -> Costs:
    from ...kernels.moe.fused import PAIRS

    pairs, e = case.tokens * case.chosen, case.dtype.itemsize
    hits = case.experts * math.ceil(pairs / PAIRS)
    sizes = {
        "x": case.tokens * case.channels * e,
        "rows": pairs * case.channels * e,
        "hidden": pairs * case.hidden * e,
        "matrix": case.experts * case.channels * case.hidden * e,
        "weights": pairs * e,  # as the router has them, and in the rows' order
        "number": pairs * I64,  # of each copy: its expert, its row; of each row its copy
        "hits": hits * I32,
        "ends": hits * I64,
        "counts": case.experts * I64,
    }
    forward = """
        count_kernel number hits
        aten::cumsum hits ends
        place_kernel number hits ends number number
        aten::sum hits counts
        spread_kernel x number rows
        aten::index_select weights number weights
        linear_kernel rows matrix counts hidden
        linear_kernel rows matrix counts hidden
        forward_kernel hidden hidden weights hidden
        linear_kernel hidden matrix counts rows
        gather_kernel rows number x
    """
    linear_grads = """
        linear_kernel hidden matrix counts rows
        weight_gradient_kernel hidden rows counts matrix
    """
    backward = f"""
        spread_kernel x number rows
        linear_kernel rows matrix counts hidden
        weight_gradient_kernel rows hidden counts matrix
        backward_kernel hidden hidden hidden weights hidden hidden weights
        {2 * linear_grads}
        aten::add rows rows rows
        aten::new_zeros weights
        aten::index_add weights weights number weights
        gather_kernel rows number x
    """
    product = 2 * pairs * case.channels * case.hidden
    return _costs(sizes, "x weights number matrix matrix matrix", "x", forward, backward, (3 * product, 6 * product))


def _cross_entropy(case: Any) -> Costs:
    l, d, v, e = case.tokens, case.channels, case.vocabulary, case.dtype.itemsize
    sizes = {
        "x": l * d * e,
        "weight": v * d * e,
        "dweight": v * d * F32,
        "losses": l * F32,
        "scalar": F32,
    }
    add_product = "aten::addmm_" if case.dtype == torch.float32 else "baton::add_wide_product_"

    def chunk(t: int) -> list[Launch]:
        """Of t tokens: logits, what ranks that share a vocabulary combine, the logits' gradient, and the products with it."""
        rows = f"""
            aten::mm x weight logits
            statistics_kernel logits labels vector vector vector
            aten::amax vector vector
            aten::sub vector vector vector
            aten::exp vector vector
            aten::mul vector vector vector
            aten::sum vector vector
            aten::ne labels mask
            aten::amax vector vector
            aten::sub vector vector vector
            aten::log vector vector
            aten::add vector vector vector
            aten::scalar_tensor scalar
            aten::where mask vector scalar vector
            aten::sub vector vector vector
            aten::exp vector vector
            aten::div vector vector vector
            aten::scalar_tensor scalar
            aten::where mask vector scalar vector
            gradient_kernel logits logits labels vector vector
            aten::copy_ vector vector
            aten::mm logits weight x
            {add_product} dweight dweight logits x
        """
        own = {"x": t * d * e, "logits": t * v * e, "labels": t * I64, "mask": t, "vector": t * F32}
        return _launches(sizes | own, rows)

    size = chunk_size(l, v * e, "cuda")
    forward = _launches(sizes, "aten::zeros dweight")
    for start in range(0, l, size):
        forward += chunk(min(size, l - start))
    forward += _launches(sizes, "aten::sum losses scalar")
    backward = """
        aten::mul x scalar x
        aten::mul dweight scalar weight
    """
    return _costs(sizes, "x weight", "scalar", forward, backward, (3 * 2 * l * d * v, 0))


MODELS: dict[str, Callable[[Any], Costs]] = {
    "ssd": _ssd,
    "selective_scan": _selective_scan,
    "conv": _conv,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "gated_norm": _gated_norm,
    "cross_entropy": _cross_entropy,
    "swiglu": _swiglu,
    "moe": _moe,
}
