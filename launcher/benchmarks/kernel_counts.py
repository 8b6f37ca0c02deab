"""Prints what the static model counts, without a device."""

from rich import box
from rich.table import Table

from ...configs.errors import UserError
from ...kernels import dispatch
from .kernel_cases import CASES, Case
from .kernel_model import Cost, costs
from .report import console

BANDWIDTH, FLOPS = 4.3e12, 790e12
"""Bytes and FLOP a second, assumed: about what copies and bf16 products reach on an H200."""
MAMBA_SSM = {("ssd", 262144, "forward"): (5, 0, 17.5), ("ssd", 262144, "backward"): (14, 23, 60.8)}
"""Launches of Triton and of ATen, and GB, counted once around mamba_ssm's own at the same shapes; not timed."""


def print_counts(names: list[str], lengths: list[int]) -> None:
    """A table of launches, bytes and FLOPs, and of the time that they take at the least. Raises UserError."""
    if not dispatch.INSTALLED:
        raise UserError("--model reads the kernels' tiles, and the package triton is not installed")
    console.print(f"Counted, not measured. ms: the least at an assumed {BANDWIDTH / 1e12} TB/s and {FLOPS / 1e12:.0f} TFLOP/s.")
    console.print("launches: Triton's + ATen's. least: each operand once, each result once.")
    columns = ["operation", "tokens", "direction", "launches", "GB", "least", "TFLOP", "ms"]
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        for tokens in lengths:
            case = CASES[name](tokens)
            for direction, cost in zip(("forward", "backward"), costs(case), strict=True):
                table.add_row(*_row(case, direction, cost))
                if (name, tokens, direction) in MAMBA_SSM:
                    table.add_row(*_peer(*MAMBA_SSM[name, tokens, direction]))
    console.print(table)


def _row(case: Case, direction: str, cost: Cost) -> list[str]:
    of_torch = sum(launch.name.startswith(("aten::", "baton::")) for launch in cost.launches)
    launches = _launches(len(cost.launches) - of_torch, of_torch)
    least = cost.seconds(BANDWIDTH, FLOPS) * 1e3
    numbers = [f"{cost.bytes / 1e9:.3g}", f"{cost.least / 1e9:.3g}", f"{cost.flops / 1e12:.3g}", f"{least:.3g}"]
    return [case.name, str(case.tokens), direction, launches, *numbers]


def _peer(triton: int, aten: int, gigabytes: float) -> list[str]:
    return ["", "", "  mamba_ssm", _launches(triton, aten), f"{gigabytes:.3g}", "", "", f"{gigabytes * 1e12 / BANDWIDTH:.3g}"]


def _launches(triton: int, aten: int) -> str:
    return f"{triton} + {aten}" if aten else str(triton)
