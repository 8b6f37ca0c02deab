"""The table of compiled kernels: its rows, which of them may ship, and how it differs from the committed one."""

import csv
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

SHARED = {"sm80": 166912, "sm90": 232448, "sm100": 232448, "gfx942": 65536}
"""The GPUs that kernels are compiled for, and the bytes of shared memory that a block may have there."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one kernel of one case.

    spills: instructions that load from or store to local memory; on AMD, registers. shared: bytes. large_dots: products in 16 bits
    of 64 rows or more. matrix: matrix instructions of the target's largest kind.
    """

    op: str
    case: str
    kernel: str
    target: str
    warps: int = 0
    registers: int = 0
    spills: int = 0
    shared: int = 0
    large_dots: int = 0
    matrix: int = 0
    fits: bool = False
    error: str = ""

    @property
    def name(self) -> str:
        """Names the row in the table."""
        return f"{self.op} {self.case} {self.kernel} {self.target}"

    @property
    def line(self) -> str:
        """The row in the table."""
        return _csv_line(map(str, dataclasses.astuple(self)))

    def faults(self) -> Iterator[str]:
        """Why the kernel may not ship. Spills on AMD are shown alone: nothing was ever tuned there."""
        if self.error:
            yield f"does not compile: {self.error}"
            return
        if self.spills and self.target.startswith("sm"):
            yield f"spills: {self.spills} instructions, with {self.registers} registers and {self.warps} warps"
        if not self.fits:
            yield f"needs {self.shared} bytes of shared memory, there are {SHARED[self.target]}"
        if self.target == "sm90" and self.large_dots and not self.matrix:
            yield f"{self.large_dots} products in 16 bits of 64 rows or more, and no HGMMA"


def _csv_line(cells: Iterator[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue()


def table_text(rows: list[Row], version: str) -> str:
    """The table: the version of triton, the columns' names, the rows."""
    names = _csv_line(field.name for field in dataclasses.fields(Row))
    return "\n".join([f"# triton {version}", names, *(row.line for row in rows)]) + "\n"


def differences(rows: list[Row], version: str, table: Path, ops: list[str], targets: list[str]) -> Iterator[str]:
    """How the rows, of these ops and targets, differ from the table by the same version of triton; a line each."""
    if not table.exists():
        yield f"{table.name} is not there; make compiled writes it"
        return
    heading, _, *lines = table.read_text().splitlines()
    if heading != f"# triton {version}":
        return
    committed = {tuple(next(csv.reader([line]))[:4]): line for line in lines}
    found = {(row.op, row.case, row.kernel, row.target): row.line for row in rows}
    for key, line in found.items():
        if key not in committed:
            yield f"{' '.join(key)}: not in {table.name}; make compiled writes it"
        elif line != committed[key]:
            yield f"{' '.join(key)}: {table.name} has {committed[key]}, found {line}"
    for key in committed.keys() - found.keys():
        if key[0] in ops and key[3] in targets:
            yield f"{' '.join(key)}: in {table.name}, but nothing compiles it; make compiled writes it"


def compares(version: str, table: Path) -> bool:
    """Whether figures by this version of triton can be compared with the table's."""
    return not table.exists() or table.read_text().startswith(f"# triton {version}\n")
