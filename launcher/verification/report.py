"""What the user sees of a comparison: tables on stdout, progress on stderr, and the file of --json."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ...configs.schema import ParallelConfig
from ..files import whole_file
from .cases import Skipped, mesh_of
from .verdict import QUANTITIES, Verdict, kind_of, to_json

WIDTH = 150
"""Columns where the output is no terminal."""


class Report:
    """Prints verdicts as they come and the whole at the end; only the leading rank has one."""

    def __init__(self, cases: int) -> None:
        # Narrow tables would cut the parameters' names off.
        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH
        self.console = Console(highlight=False, width=width)
        self.progress = Console(stderr=True, highlight=False)
        self.cases, self.done = cases, 0

    def notes(self, texts: list[str]) -> None:
        """A line on each thing that differs from what the config says."""
        for text in texts:
            self.progress.print(f"note: {text}", markup=False, soft_wrap=True)

    def case(self, verdict: Verdict) -> None:
        """One comparison: a table where it is the only one, else a line of progress."""
        self.done += 1
        if self.cases == 1:
            self._print_case(verdict)
            return
        result = "ok" if verdict.ok else f"FAILED, {verdict.first_difference}"
        text = f"{self.done}/{self.cases}  {describe(verdict)}: {result}, {_largest(verdict):.1e}, {verdict.seconds:.1f} s"
        self.progress.print(text, markup=False, soft_wrap=True)

    def end(self, verdicts: list[Verdict], skipped: list[Skipped]) -> None:
        """A table of all comparisons, where there were several, and whether all are good."""
        if self.cases > 1:
            self._print_cases(verdicts)
            for skip in skipped:
                self._line(f"skipped: {_mesh(skip.mesh)}, {skip.layout}: {skip.reason}")
        if all(verdict.ok for verdict in verdicts):
            worst = max(_largest(verdict) for verdict in verdicts)
            count = "" if self.cases == 1 else f"{len(verdicts)} comparisons, "
            self._line(f"OK: {count}largest error {worst:.1e}, allowed: {verdicts[0].tolerance}")

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def _print_case(self, verdict: Verdict) -> None:
        below = verdict.one_rank is not None
        self._line(describe(verdict))
        table = Table("part")
        for column in ("tensors", "gradients", *["one rank"] * below, "parameters", *["one rank"] * below):
            table.add_column(column, justify="right")
        table.add_column("worst gradient")
        for kind, names in _by_kind(verdict).items():
            cells = [kind, str(len(names))]
            for quantity in ("gradients", "parameters"):
                cells += _errors(verdict, quantity, names)
            table.add_row(*cells, verdict.worst("gradients", names).name)
        self.console.print(table)
        for quantity in ("loss", "logits"):
            error, *one_rank = _errors(verdict, quantity)
            self.console.print(f"{quantity}: {error}" + "".join(f", one rank: {other}" for other in one_rank))
        if verdict.flips is not None:
            alone, mesh, of = verdict.flips
            text = f"of {of} expert choices, all replayed from fp64, the mesh would have made {mesh} otherwise, one rank {alone}"
            self._line(text)

    def _print_cases(self, verdicts: list[Verdict]) -> None:
        table = Table(*("tp", "cp", "dp", "pp", "ep", "layout", "strategy", "attention", "documents", "with"))
        for quantity in QUANTITIES:
            table.add_column(quantity, justify="right")
        table.add_column("")
        for verdict in verdicts:
            parallel, chosen = verdict.config.parallel, verdict.chosen
            over_cp = [parallel.layout, chosen["strategy"], chosen["attention"]] if chosen else [""] * 3
            errors = [f"{verdict.worst(quantity).error:.1e}" for quantity in QUANTITIES]
            result = "ok" if verdict.ok else "[red]FAILED[/red]"
            degrees = [str(getattr(parallel, axis)) for axis in ("tp", "cp", "dp", "pp", "ep")]
            options = ", ".join(_options(mesh_of(parallel)))
            table.add_row(*degrees, *over_cp, verdict.config.data.documents, options, *errors, result)
        self.console.print(table)


def failure(verdicts: list[Verdict]) -> str | None:
    """One line on what is over its limit; None where nothing is."""
    failed = [verdict for verdict in verdicts if not verdict.ok]
    if not failed:
        return None
    first = failed[0]
    over = first.over[0]
    what = over.quantity if over.quantity == over.name else f"{over.quantity} of {over.name}"
    text = f"{what}: {over.error:.1e}, allowed: {over.limit:.1e}; {first.first_difference}"
    where = "" if len(verdicts) == 1 else f"{len(failed)} of {len(verdicts)} comparisons; {describe(first)}: "
    return f"verify FAILED: {where}{text}"


def describe(verdict: Verdict) -> str:
    """A mesh and what runs on it."""
    config, parallel, data = verdict.config, verdict.config.parallel, verdict.config.data
    over_cp = (
        [parallel.layout, *(f"{key} {_strategy(verdict, key)}" for key in ("strategy", "attention"))] if verdict.chosen else []
    )
    steps = config.batch.micro_steps
    shape = f"{config.batch.sequences} x {data.context} tokens" + (f" in {steps} micro-steps" if steps > 1 else "")
    return ", ".join([_mesh(mesh_of(parallel)), *over_cp, data.documents, config.precision, shape])


def _strategy(verdict: Verdict, key: str) -> str:
    """As the config has it, and what `auto` has chosen."""
    asked = getattr(verdict.config.parallel, key)
    return f"auto ({verdict.chosen[key]})" if asked == "auto" and verdict.chosen else asked


def write_json(file: Path, verdicts: list[Verdict], skipped: list[Skipped]) -> None:
    """The whole as one JSON object, complete or not at all. Raises UserError."""
    content = {
        "ok": all(verdict.ok for verdict in verdicts),
        "cases": [to_json(verdict) for verdict in verdicts],
        "skipped": [skip._asdict() for skip in skipped],
    }
    with whole_file(file, "--json") as unfinished:
        unfinished.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def _by_kind(verdict: Verdict) -> dict[str, set[str]]:
    kinds: dict[str, set[str]] = {}
    for name in verdict.errors["gradients"]:
        kinds.setdefault(kind_of(name, verdict.config.model), set()).add(name)
    return kinds


def _errors(verdict: Verdict, quantity: str, names: set[str] | None = None) -> list[str]:
    """The largest on the mesh, and below fp64 on one rank; red where one is over its limit."""
    over = any(quantity == one.quantity and (names is None or one.name in names) for one in verdict.over)
    text = f"{verdict.worst(quantity, names).error:.1e}"
    one_rank = verdict.worst_of_one_rank(quantity, names)
    return [f"[red]{text}[/red]" if over else text, *([] if one_rank is None else [f"{one_rank:.1e}"])]


def _largest(verdict: Verdict) -> float:
    return max((verdict.worst(quantity).error for quantity in QUANTITIES), key=lambda error: (error != error, error))


def _mesh(mesh: dict[str, Any]) -> str:
    axes = ["tp", "cp", "dp", *(axis for axis in ("pp", "ep") if mesh[axis] > 1)]
    return ", ".join([" x ".join(f"{axis} {mesh[axis]}" for axis in axes), *_options(mesh)])


def _options(mesh: dict[str, Any]) -> list[str]:
    """What is not as it is by default, beside the axes."""
    usual = mesh_of(ParallelConfig())
    options = {key: mesh[key] for key in ("schedule", "sequence_parallel", "replicate", "zero") if mesh[key] != usual[key]}
    return [key if value is True else value if isinstance(value, str) else f"{key} {value}" for key, value in options.items()]
