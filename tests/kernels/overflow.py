"""Runs kernels at 262,144-token strides in the interpreter, which finds integers that overflow; only a grid's corners run.

    python tests/kernels/overflow.py [--op NAME]

The modules of compiled/ say in `huge()` which host functions are called with what. A case is at fault when it fails, or when none
of its kernels reaches an element past 2^31, since then it shows nothing.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIMIT = 2**31
SECONDS = 120

sys.path[:0] = [str(HERE), str(HERE.parent)]

# First of all, before whatever imports triton.
import interpreter  # isort: skip

import case_modules


def run(name: str, call: Callable[[], object]) -> None:
    """Writes how far the case's kernels reach, or its fault, and ends the process with 1 at a fault."""
    reach: dict[str, int] = {}
    try:
        with interpreter.overflow() as reach, interpreter.order("corners"):
            call()
        fault = "" if max(reach.values(), default=0) >= LIMIT else f"no element past 2^31 is reached: {reach}"
    except Exception as failure:
        fault = case_modules.one_line(failure)
    sys.stdout.write(f"fault: {name}: {fault}\n" if fault else f"{name}: reaches {reach}\n")
    sys.stdout.flush()
    sys.exit(bool(fault))


def main() -> int:
    """0, or 1 where a case is at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="a module of the cases' folder, more than once for several; all")
    parser.add_argument("--cases", type=Path, default=case_modules.FOLDER, help="the folder of the modules with huge()")
    chosen = parser.parse_args()
    ops = chosen.op or case_modules.names(chosen.cases)
    cases = [(f"{op} {label}", call) for op in ops for label, call in case_modules.cases_of(chosen.cases, op, "huge")]
    passed = [passes(*case) for case in cases]
    return not all(passed)


def passes(name: str, call: Callable[[], object]) -> bool:
    """`run` in a process of its own: an offset that wrapped, and that nothing noticed, is a segmentation fault."""
    process = multiprocessing.get_context("fork").Process(target=run, args=(name, call), daemon=True)
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        sys.stdout.write(f"fault: {name}: took more than {SECONDS} s; a program here must not loop over so much\n")
    elif process.exitcode < 0:
        sys.stdout.write(f"fault: {name}: the process died of signal {-process.exitcode}\n")
    sys.stdout.flush()
    return process.exitcode == 0


if __name__ == "__main__":
    sys.exit(main())
