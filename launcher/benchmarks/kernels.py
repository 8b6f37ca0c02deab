"""Measures the kernels on this machine's GPU, beside their PyTorch references and other projects' kernels."""

import gc
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from ...configs.errors import UserError
from ...kernels.dispatch import chosen
from .kernel_cases import CASES, Case, Operands, differentiated
from .kernel_model import Cost, costs
from .peers import Call, Peer, find
from .report import console

LENGTHS = [8192, 32768, 131072, 262144]
QUICK_LENGTHS = [8192]
SECONDS = 420
"""After which nothing more is begun. What was, a peer's autotuning at worst, has two minutes until nine are over."""
SLOW = 8
"""Seconds of one reference's measurement that are too many."""
REPETITIONS = 3, 20
"""At least, and at most: as many as take about MEASURING seconds."""
MEASURING = 0.25
FLUSHED = 1 << 30
"""Bytes written between repetitions: more than the L2 cache of any GPU, and work for as long as the host takes to launch."""


class Roofline(NamedTuple):
    """What this GPU gave in this run."""

    bandwidth: float
    """Bytes a second, read and written, of a copy of 2 GiB."""
    flops: float
    """FLOP/s of a bf16 product of 8192 x 8192 matrices."""


@dataclass
class Measurement:
    """One line of the JSON."""

    operation: str
    tokens: int
    direction: str
    """forward, or forward+backward."""
    implementation: str
    milliseconds: float | None = None
    repetitions: int = 0
    note: str = ""
    """Why there is no time."""
    gigabytes: float | None = None
    """And the two below: of our kernels, by the static model's counts."""
    gigabytes_per_second: float | None = None
    teraflops_per_second: float | None = None
    roofline: float | None = None
    """The least time that the counted bytes and FLOPs take on this GPU over the measured one."""

    @property
    def place(self) -> tuple[str, int, str]:
        """What is compared."""
        return self.operation, self.tokens, self.direction

    def __str__(self) -> str:
        parts = [f"{self.milliseconds:.4g} ms" if self.milliseconds is not None else self.note]
        if self.roofline is not None:
            parts.append(f"{self.gigabytes_per_second:.0f} GB/s, {self.teraflops_per_second:.3g} TFLOP/s")
            parts.append(f"{self.roofline:.0%} of the roofline")
        return f"{self.operation} {self.tokens} {self.direction}, {self.implementation}: {', '.join(parts)}"


@dataclass
class Report:
    """A run, which is written anew after each measurement."""

    file: Path | None
    machine: dict[str, str | None]
    roofline: Roofline
    measurements: list[Measurement] = field(default_factory=list)

    def add(self, measurement: Measurement) -> None:
        """Prints it, and writes all."""
        self.measurements.append(measurement)
        console.print(str(measurement), soft_wrap=True)
        self.write()

    def write(self) -> None:
        """Raises UserError where the file cannot be written."""
        if self.file is None:
            return
        whole = self.machine | {"roofline": self.roofline._asdict(), "measurements": [asdict(m) for m in self.measurements]}
        try:
            self.file.write_text(json.dumps(whole, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{self.file}: cannot be written: {error.strerror}") from error


def bench_kernels(names: list[str], lengths: list[int], quick: bool, folder: Path | None, file: Path | None) -> None:
    """Prints each time as it is measured, a table and a verdict, and keeps the numbers in the file. Raises UserError."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"--peers is {folder}, which is no folder")
    if not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} finds no GPU, allowed: a CUDA or ROCm device, or --model, which needs none")
    runs = Runs(torch.device("cuda"), time.monotonic() + SECONDS, REPETITIONS[0] if quick else REPETITIONS[1])
    report = Report(file, _machine(), _measure_roofline(runs))
    report.write()
    console.print(", ".join(f"{name} {value}" for name, value in report.machine.items() if value), soft_wrap=True)
    bandwidth, flops = report.roofline.bandwidth / 1e9, report.roofline.flops / 1e12
    console.print(f"A copy moves {bandwidth:.0f} GB/s, a bf16 product makes {flops:.0f} TFLOP/s: the roofline", soft_wrap=True)
    peers, missing = find(folder)
    for line in missing:
        console.print(line, soft_wrap=True)
    measure(report, runs, [CASES[name](tokens) for name in names for tokens in lengths], peers)


def measure(report: Report, runs: "Runs", cases: list[Case], peers: list[Peer]) -> None:
    """Measures the cases and prints the table and the verdict. Raises UserError where one of our kernels fails."""
    for case in cases:
        for implementation in ("triton", "reference"):
            with chosen(implementation):
                runs.both(report, case, implementation, list, case.call)
    # Last: a kernel that reads past its tensors' ends leaves a GPU on which nothing runs any more.
    for case in cases:
        for peer in peers:
            if peer.operation == case.name:
                runs.both(report, case, peer.name, peer.prepare, peer.call)
    console.print(table(report.measurements))
    for line in verdict(report.measurements):
        console.print(line, soft_wrap=True)
    failed = [m for m in report.measurements if m.note.startswith("failed") and m.implementation == "triton"]
    if failed:
        raise UserError(f"{len(failed)} of our kernels' measurements failed, as printed above")


class Runs:
    """Where, until when and how often to measure."""

    def __init__(self, device: torch.device, end: float, repetitions: int) -> None:
        self.device, self.end, self.repetitions = device, end, repetitions
        self.cache = torch.empty(FLUSHED, dtype=torch.uint8, device=device)

    def both(self, report: Report, case: Case, implementation: str, prepare: Callable[[Operands], Operands], call: Call) -> None:
        """Forward, and forward with backward; peers prepare operands of their own."""
        for direction in ("forward", "forward+backward"):
            measurement = Measurement(case.name, case.tokens, direction, implementation)
            measurement.note = self._skipped(measurement, report.measurements)
            if not measurement.note:
                self._try(measurement, case, prepare, call)
            if implementation == "triton" and measurement.milliseconds is not None:
                _rate(measurement, _cost(case, direction), report.roofline)
            report.add(measurement)

    def _skipped(self, measurement: Measurement, others: list[Measurement]) -> str:
        """Why not to measure it, if so."""
        if time.monotonic() > self.end:
            return f"skipped: {SECONDS} s are over"
        if measurement.implementation == "triton":
            return ""
        for other in reversed(others):
            same = other.place[::2] == measurement.place[::2] and other.implementation == measurement.implementation
            if same and other.milliseconds is not None and other.tokens < measurement.tokens:
                expected = other.milliseconds / 1e3 * measurement.tokens / other.tokens * (REPETITIONS[0] + 3)
                return f"skipped: {other.tokens} tokens took {other.milliseconds:.0f} ms" if expected > SLOW else ""
        return ""

    def _try(self, measurement: Measurement, case: Case, prepare: Callable[[Operands], Operands], call: Call) -> None:
        try:
            measurement.milliseconds, measurement.repetitions = self._time(measurement.direction, case, prepare, call)
        except torch.OutOfMemoryError:
            measurement.note = "out of memory"
        except Exception as error:
            measurement.note = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def _time(self, direction: str, case: Case, prepare: Callable[[Operands], Operands], call: Call) -> tuple[float, int]:
        """Milliseconds, the median of how many repetitions."""
        # Here, since it may raise what the case before has done to the GPU.
        gc.collect()
        torch.cuda.empty_cache()
        torch.manual_seed(0)
        with torch.no_grad():
            operands = prepare(case.operands(self.device))
        leaves = differentiated(operands)
        gradients = [torch.randn_like(result) for result in call(*operands)] if direction != "forward" else []

        def run() -> None:
            results = call(*operands)
            if gradients:
                torch.autograd.grad(results, leaves, gradients)

        return median(run, self.cache, self.repetitions)


def median(run: Callable[[], object], cache: Tensor, most: int) -> tuple[float, int]:
    """Milliseconds that a call takes on the GPU with a cold cache, and of how many repetitions after two calls for warming up."""
    run()
    (first,) = _times(run, cache, 1)
    repetitions = max(REPETITIONS[0], min(most, int(MEASURING * 1e3 / first)))
    return sorted(_times(run, cache, repetitions))[repetitions // 2], repetitions


def _times(run: Callable[[], object], cache: Tensor, count: int) -> list[float]:
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, stop in pairs:
        cache.zero_()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in pairs]


def _cost(case: Case, direction: str) -> Cost:
    forward, backward = costs(case)
    return forward if direction == "forward" else forward.then(backward)


def _rate(measurement: Measurement, cost: Cost, roofline: Roofline) -> None:
    assert measurement.milliseconds is not None
    seconds = measurement.milliseconds / 1e3
    measurement.gigabytes = cost.bytes / 1e9
    measurement.gigabytes_per_second = cost.bytes / seconds / 1e9
    measurement.teraflops_per_second = cost.flops / seconds / 1e12
    measurement.roofline = cost.seconds(*roofline) / seconds


def _measure_roofline(runs: Runs) -> Roofline:
    source, target = (torch.zeros(1 << 30, dtype=torch.bfloat16, device=runs.device) for _ in range(2))
    copied, _ = median(lambda: target.copy_(source), runs.cache, runs.repetitions)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=runs.device) for _ in range(2))
    multiplied, _ = median(lambda: torch.mm(a, b), runs.cache, runs.repetitions)
    return Roofline(2 * source.nbytes / (copied / 1e3), 2 * 8192**3 / (multiplied / 1e3))


def _machine() -> dict[str, str | None]:
    """When, and with what."""
    import triton

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "gpu": torch.cuda.get_device_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": triton.__version__,
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"),
    }


def _output(*command: str) -> str | None:
    """The program's first line; None where there is none."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def table(measurements: list[Measurement]) -> Table:
    """A row for each operation, length and direction, beside one another the implementations."""
    others = [name for name in dict.fromkeys(m.implementation for m in measurements) if name != "triton"]
    columns = ["operation", "tokens", "direction", "ms", "GB/s", "TFLOP/s", "roofline", *others]
    shown = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, row in _by_place(measurements):
        own = row.get("triton")
        rated = ["", "", ""]
        if own and own.roofline is not None:
            rated = [f"{own.gigabytes_per_second:.0f}", f"{own.teraflops_per_second:.3g}", f"{own.roofline:.0%}"]
        operation, tokens, direction = place
        cells = [_cell(row.get(name), own) for name in others]
        shown.add_row(operation, str(tokens), direction, _cell(own, None), *rated, *cells)
    return shown


def _by_place(measurements: list[Measurement]) -> Iterator[tuple[tuple[str, int, str], dict[str, Measurement]]]:
    for place in dict.fromkeys(m.place for m in measurements):
        yield place, {m.implementation: m for m in measurements if m.place == place}


def _cell(measurement: Measurement | None, own: Measurement | None) -> str:
    """A time in milliseconds, and how many times our own that is."""
    if measurement is None or measurement.milliseconds is None:
        return "" if measurement is None else measurement.note.partition(":")[0]
    times = f" ({measurement.milliseconds / own.milliseconds:.2f}x)" if own and own.milliseconds else ""
    return f"{measurement.milliseconds:.4g}{times}"


def verdict(measurements: list[Measurement]) -> list[str]:
    """A line for each measurement in which the reference is faster; one line if it is in none."""
    compared, slower = 0, []
    for place, row in _by_place(measurements):
        own, reference = (row[name].milliseconds if name in row else None for name in ("triton", "reference"))
        if own is None or reference is None:
            continue
        compared += 1
        if own > reference:
            slower.append(f"Slower than reference: {' '.join(map(str, place))}, {own:.4g} ms against {reference:.4g} ms")
    return slower or [f"No kernel slower than its PyTorch reference in {compared} comparisons"]
