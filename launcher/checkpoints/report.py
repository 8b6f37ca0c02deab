"""A checkpoint's contents as the user sees them."""

import os
import sys
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ...configs.pattern import CUT, parse_pattern
from ...configs.schema import ParallelConfig
from ..benchmarks.report import size
from .contents import Contents, Entry

WIDTH = 140
"""Columns where the output is no terminal."""


def print_contents(contents: Contents, each: bool) -> None:
    """What it is of, and a table of its parts, or of each tensor."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH
    console = Console(highlight=False, width=width)
    for line in describe(contents):
        console.print(line, markup=False, soft_wrap=True)
    console.print(_tensors(contents) if each else _parts(contents))


def describe(contents: Contents) -> list[str]:
    """How far the run was, where it ran, how much there is."""
    facts, config, entries = contents.facts, contents.config, contents.entries
    parallel, model = config["parallel"], config["model"]
    mesh = [" x ".join(f"{axis} {parallel.get(axis, 1)}" for axis in ("dp", "cp", "tp", "pp", "ep"))]
    mesh += [f"{key} {parallel[key]}" for key in _further(parallel)]
    tokens = facts["consumed"] * config["data"]["context"]
    files = facts["files"]
    return [
        f"{contents.folder}",
        f"  step        {facts['step']:,}: {facts['consumed']:,} samples, {tokens:,} tokens",
        f"  written by  baton {facts['baton']}, torch {facts['torch']}",
        f"  on          {facts['world']} rank{'s' * (facts['world'] > 1)}: {', '.join([*mesh, parallel['layout']])}",
        f"  precision   {config['precision']}",
        f"  pattern     {model['pattern']}" + (f" x {model['repeat']}" if model["repeat"] > 1 else ""),
        f"  model       {_sum('count', entries):,} parameters, {size(_sum('bytes', entries))}",
        f"  optimizer   {size(_sum('optimizer_bytes', entries))}",
        f"  files       {len(files) + 1}, {size(sum(files.values()))}, complete",
    ]


def _further(parallel: dict[str, Any]) -> list[str]:
    """Keys of the mesh beyond its degrees that are not at their default; an older config may lack them."""
    default = ParallelConfig().model_dump()
    pipeline = ["schedule"] if parallel.get("pp", 1) > 1 and "schedule" in parallel else []
    keys = ("stages_per_rank", "replicate", "zero", "sequence_parallel")
    return pipeline + [key for key in keys if parallel.get(key, default[key]) != default[key]]


def _parts(contents: Contents) -> Table:
    table = _table(["part", "what", "dtype"], "tensors")
    for part, entries in _by_part(contents.entries):
        dtypes = sorted({_dtype(entry) for entry in entries})
        table.add_row(part, _kinds(contents, part), ", ".join(dtypes), str(len(entries)), *_amounts(entries))
    return table


def _tensors(contents: Contents) -> Table:
    table = _table(["tensor", "shape", "dtype"], "pieces")
    for entry in contents.entries:
        shape = " x ".join(map(str, entry.shape)) or "scalar"
        table.add_row(entry.name, shape, _dtype(entry), str(entry.pieces), *_amounts([entry]))
    return table


def _table(texts: list[str], number: str) -> Table:
    table = Table(*texts, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in (number, "parameters", "bytes", "optimizer's"):
        table.add_column(column, justify="right")
    return table


def _amounts(entries: list[Entry]) -> list[str]:
    sizes = [size(_sum(what, entries)) for what in ("bytes", "optimizer_bytes")]
    return [f"{_sum('count', entries):,}", *sizes]


def _by_part(entries: list[Entry]) -> list[tuple[str, list[Entry]]]:
    return [(part, list(run)) for part, run in groupby(entries, key=lambda entry: entry.part)]


def _kinds(contents: Contents, part: str) -> str:
    """Of a layer: `mamba2, moe`."""
    if not part.startswith("layers."):
        return ""
    model = contents.config["model"]
    layers = parse_pattern(model["pattern"].replace(CUT, "") * model["repeat"])
    return ", ".join(kind for kind in layers[int(part.removeprefix("layers."))] if kind)


def _dtype(entry: Entry) -> str:
    return str(entry.dtype).removeprefix("torch.")


def _sum(what: str, entries: list[Entry]) -> int:
    return sum(getattr(entry, what) for entry in entries)
