"""Compiles every kernel and shipped config for GPUs that are not here, and says what became of them.

    python tests/kernels/ahead_of_time.py [--op NAME] [--target TARGET] [--first CASES] [--write | --check]

The modules of compiled/ say which host functions are called with what. Their launches are compiled with the specialization that
they would have on the device, and nothing runs. --write keeps the table in docs/performance/compiled.csv. --check compares with
it and fails where a figure differs, or where a kernel may not ship (`Row.faults`). By another version of triton than the table's
the figures may differ.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TABLE = HERE.parents[1] / "docs" / "performance" / "compiled.csv"
PROCESSES = 2

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("ahead_of_time.py compiles: run it without TRITON_INTERPRET")
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import case_modules
from baton.kernels.target import compiled_for
from compiled_table import SHARED, Row, compares, differences, table_text

GPUS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX = {"sm80": r"HMMA\w*", "sm90": r"HGMMA\w*", "sm100": r"UTC\w*MMA\w*", "gfx942": r"v_mfma\w*"}


class NoDevice(DriverBase):
    """A driver for compiling to `target`; there is nothing to launch on."""

    def __init__(self, target: str) -> None:
        # A number of its own: triton keeps kernels, and what they were compiled for, by the device's number.
        self.number = list(GPUS).index(target)
        self.gpu = GPUS[target]
        self.utils = types.SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": SHARED[target]})

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.gpu

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("there is no device to measure on")


Launch = tuple[str, Any, str]


@contextlib.contextmanager
def captured(target: str) -> Iterator[list[Launch]]:
    """Launches within are compiled for `target` instead -> (the kernel's name, what triton compiled or None, the error or "")."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        try:
            kernel, error = run(self, *args, grid=grid, warmup=True, **options), ""
        except Exception as failure:
            kernel, error = None, case_modules.one_line(failure)
        launches.append((self.fn.__name__, kernel, error))
        return kernel

    gpu = GPUS[target]
    JITFunction.run = compile_only
    driver.set_active(NoDevice(target))
    try:
        with compiled_for(gpu.backend, gpu.arch // 10 if gpu.backend == "cuda" else 0):
            yield launches
    finally:
        JITFunction.run = run


def rows_of(folder: Path, op: str, target: str, first: int | None) -> list[Row]:
    """The kernels of the first or all cases of folder/op.py, each once: in the first case that compiles it so."""
    rows, seen = [], set()
    for label, call in itertools.islice(case_modules.cases_of(folder, op, "cases"), first):
        count: Counter[str] = Counter()
        with captured(target) as launches:
            try:
                call()
            except Exception as failure:
                launches.append(("(host)", None, case_modules.one_line(failure)))
        for name, kernel, error in launches:
            if kernel and kernel.hash in seen:
                continue
            count[name] += 1
            figures = figures_of(kernel, target) if kernel else {"error": error}
            rows.append(Row(op, label, f"{name}#{count[name]}" if count[name] > 1 else name, target, **figures))
            seen.add(kernel.hash if kernel else None)
    return rows


def figures_of(kernel: Any, target: str) -> dict[str, Any]:
    """A compiled kernel's columns, as `Row` has them."""
    shared = kernel.metadata.shared
    figures = {"warps": kernel.metadata.num_warps, "shared": shared, "fits": shared <= SHARED[target]}
    machine = _amd(kernel.asm["amdgcn"]) if GPUS[target].backend == "hip" else _nvidia(kernel.asm["cubin"])
    matrix = sum(count for name, count in machine.pop("instructions").items() if re.fullmatch(MATRIX[target], name))
    return figures | machine | {"large_dots": _large_dots(kernel.asm["ttir"]), "matrix": matrix}


def _large_dots(ttir: str) -> int:
    rows = re.findall(r"tt\.dot .*: tensor<(\d+)x\d+x(?:bf16|f16)> \*", ttir)
    return sum(int(count) >= 64 for count in rows)


def _nvidia(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = _output(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    instructions = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", code, re.MULTILINE))
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    return {"registers": registers, "spills": instructions["LDL"] + instructions["STL"], "instructions": instructions}


def _amd(code: str) -> dict[str, Any]:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "instructions": Counter(re.findall(r"^\s+(\w+)", code, re.MULTILINE)),
    }


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_all(folder: Path, ops: list[str], targets: list[str], first: int | None) -> list[Row]:
    """Every op for every target, in processes of their own; sorted as the table is."""
    # Spawned: triton's compiler has threads. Its cache is new: what comes out does not hang on what was compiled before.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
            parts = [(op, target, pool.submit(rows_of, folder, op, target, first)) for op in ops for target in targets]
            return [row for part in parts for row in _result(*part)]


def _result(op: str, target: str, rows: Future[list[Row]]) -> list[Row]:
    try:
        return rows.result()
    except BrokenProcessPool:
        return [Row(op, "(process)", "", target, error="a process died, here or at an op or target beside it")]


def main() -> int:
    """0, or 1 where --check finds something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="a module of the cases' folder, more than once for several; all")
    parser.add_argument("--target", action="append", choices=list(GPUS), help="likewise; all")
    parser.add_argument("--first", type=int, metavar="CASES", help="of each module, its first cases; all")
    parser.add_argument("--cases", type=Path, default=case_modules.FOLDER, help="the folder of the modules with cases()")
    parser.add_argument("--table", type=Path, default=TABLE, help="the committed table")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="writes the table")
    action.add_argument("--check", action="store_true", help="compares with the table")
    chosen = parser.parse_args()
    ops = chosen.op or case_modules.names(chosen.cases)
    targets = chosen.target or list(GPUS)
    if chosen.write and (chosen.op or chosen.target or chosen.first):
        parser.error("--write is for the whole table: leave --op, --target and --first out")

    rows = compile_all(chosen.cases, ops, targets, chosen.first)
    text = table_text(rows, triton.__version__)
    sys.stdout.write(text)
    if chosen.write:
        chosen.table.parent.mkdir(parents=True, exist_ok=True)
        chosen.table.write_text(text)
    if not chosen.check:
        return 0
    faults = [f"{row.name}: {fault}" for row in rows for fault in row.faults()]
    faults += differences(rows, triton.__version__, chosen.table, [] if chosen.first else ops, targets)
    sys.stdout.writelines(f"fault: {fault}\n" for fault in faults)
    if not compares(triton.__version__, chosen.table):
        sys.stdout.write(f"{chosen.table.name} is of another triton than {triton.__version__}: figures were not compared\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
