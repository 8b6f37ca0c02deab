"""`baton plan` from its options to what it prints and writes."""

import itertools
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...configs.checks import check_tensor_degree
from ...configs.errors import KeyedError, UserError
from ...configs.loading import check_section, load_config, parse_override
from ...configs.schema import BatchConfig, Config, ParallelConfig
from ..benchmarks.report import console
from .estimate import Estimator
from .machine import RATES, Machine, build_machine, check_names, read_rates
from .report import as_json, explain, show, why_not
from .search import Found, divisors, families, search

KEPT = ("transport", "links")
"""Keys of `parallel` that no plan chooses: the one changes results, the other says what `auto` chooses by."""
FEW = 24
"""Numbers of GPUs that are tried on each side of one that makes no mesh."""


class Asked(NamedTuple):
    """Options of `baton plan`."""

    config: str
    overrides: list[str]
    gpus: int
    gpu: str
    nodes: int | None
    link: str
    context: int | None
    explain: int | None
    write: Path | None
    json: Path | None
    rates: Path | None
    calibrate: bool
    draw: Path | None


def run_plan(asked: Asked) -> None:
    """Plans, shows, writes. Raises UserError, before anything is written, where nothing fits."""
    _check_target(asked.write, [".yaml", ".yml"], new=True)
    _check_target(asked.json, [".json"])
    _check_target(asked.draw, [".png", ".svg"])
    check_names(asked.gpu, asked.gpus, asked.nodes, asked.link)
    config, fixed = _config(asked, asked.context), _fixed(asked.overrides)
    if asked.calibrate:
        from .calibration import calibrate

        path = asked.rates or RATES
        if not calibrate(path, config.precision, ["plan", asked.config, *asked.overrides, "--calibrate", "--rates", str(path)]):
            return
    machine = _machine(asked, config.precision)
    if asked.rates is not None and not machine.calibrated:
        raise UserError(f"--rates {asked.rates}: has nothing for {asked.gpu} in {config.precision}")
    found = search(config, machine, fixed)
    if not found.best:
        raise UserError(_refusal(asked, config, machine, fixed, found))
    if asked.explain is not None and asked.explain > len(found.best):
        raise UserError(f"--explain is {asked.explain}, allowed: 1 to {len(found.best)}")
    show(config, machine, found, fixed)
    if asked.explain is not None:
        explain(Estimator(config, machine), found.best[asked.explain - 1])
    _write(asked, config, machine, found)


def _write(asked: Asked, config: Config, machine: Machine, found: Found) -> None:
    """What is asked for, each said in a line."""
    if asked.json is not None:
        _save(asked.json, json.dumps(as_json(config, machine, found), indent=1) + "\n")
        console.print(f"Wrote {asked.json}.", soft_wrap=True, markup=False)
    if asked.write is not None:
        made_for = f"# The mesh is planned by `baton plan` for {machine.gpus} {machine.name}.\n"
        _save(asked.write, made_for + found.best[0].config.to_yaml())
        train = f"baton train {shlex.quote(str(asked.write))}"
        if machine.nodes == 1:
            train += f" --nproc {machine.gpus}"
        else:
            train = f"torchrun --nnodes {machine.nodes} --nproc-per-node {machine.per_node} ... --no-python {train}"
        console.print(f"Wrote {asked.write}: {train}", soft_wrap=True, markup=False)
    if asked.draw is not None:
        from .picture import draw

        draw(asked.draw, config, machine)
        console.print(f"Drew {asked.draw}.", soft_wrap=True, markup=False)


def _save(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _check_target(path: Path | None, suffixes: Sequence[str], new: bool = False) -> None:
    if path is None:
        return
    if path.suffix not in suffixes:
        raise UserError(f"{path}: allowed: a name that ends in {' or '.join(suffixes)}")
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise UserError(f"{path}: cannot be written; allowed: a file in a folder that exists")
    if new and path.exists():
        raise UserError(f"--write {path}: exists; allowed: a new file")


def _config(asked: Asked, context: int | None) -> Config:
    """What is planned, its mesh open. With another context than the file's a step has about as many tokens."""
    others, parallel, batch = _split(asked.overrides)
    # What the file says of the mesh is not asked, and must not be refused beside the overrides.
    open_mesh = ["parallel={}", "batch.micro_steps=1"]
    of_file = load_config(asked.config).parallel
    kept = {key: parallel.get(key, getattr(of_file, key)) for key in KEPT}
    config = load_config(asked.config, [*others, *open_mesh])
    if context is not None:
        further = [f"data.context={context}"]
        if not any(parse_override(override)[0][0] == "batch" for override in others):
            further += [f"batch.sequences={_sequences(config, context)}"]
        config = load_config(asked.config, [*others, *open_mesh, *further])
    check_section(ParallelConfig, "parallel", parallel)
    check_section(BatchConfig, "batch", {"sequences": config.batch.sequences, **batch})
    try:
        check_tensor_degree(config.model, parallel.get("tp", 1))
    except KeyedError as error:
        raise UserError(f"override {error.key} {error}") from None
    return config.model_copy(update={"parallel": ParallelConfig(**kept)})


def _sequences(config: Config, context: int) -> int:
    """Of a step with as many tokens as the config's: one of its divisors or multiples."""
    if context <= config.data.context:
        return config.batch.sequences * (config.data.context // context)
    wanted = config.batch.sequences * config.data.context / context
    return max((n for n in divisors(config.batch.sequences) if n <= wanted), default=1)


def _split(overrides: list[str]) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Overrides of anything else; values of `parallel`; batch.micro_steps, if it is given."""
    others: list[str] = []
    parallel: dict[str, Any] = {}
    batch: dict[str, Any] = {}
    for override in overrides:
        keys, value = parse_override(override)
        if keys[0] not in ("parallel", "batch"):
            others.append(override)
            continue
        values = value if len(keys) == 1 else {keys[1]: value}
        if len(keys) > 2 or not isinstance(values, dict):
            raise UserError(f"override {override!r}: allowed: {keys[0]}.key=value")
        if keys[0] == "parallel":
            parallel |= values
        else:
            batch |= {key: each for key, each in values.items() if key == "micro_steps"}
            others += [f"batch.{key}={json.dumps(each)}" for key, each in values.items() if key != "micro_steps"]
    return others, parallel, batch


def _fixed(overrides: list[str]) -> dict[str, Any]:
    """What overrides say of the mesh."""
    _, parallel, batch = _split(overrides)
    return {key: value for key, value in parallel.items() if value != "auto" and key not in KEPT} | batch


def _machine(asked: Asked, precision: str, gpus: int | None = None) -> Machine:
    path = asked.rates or (RATES if RATES.exists() else None)
    measured = read_rates(path) if path is not None else []
    nodes = asked.nodes if gpus is None else None
    return build_machine(asked.gpu, gpus or asked.gpus, precision, nodes, asked.link, measured)


def _refusal(asked: Asked, config: Config, machine: Machine, fixed: dict[str, Any], found: Found) -> str:
    """Why nothing fits, and what would."""
    named = f"; kept: {', '.join(f'{key} {value}' for key, value in fixed.items())}" if fixed else ""
    if found.nearest is None:
        near = _allowed_values(asked, config, fixed) or _near_gpus(asked, config, fixed)
        return (
            f"--gpus is {asked.gpus}: no mesh of so many ranks divides the model's sizes, {config.batch.sequences} sequences of "
            f"{config.data.context:,} tokens and {len(config.model.layers)} layers{named}{near}"
        )
    reason = why_not(found.nearest, machine)
    ways = [*_longest_context(asked, config, machine, fixed), *_enough_gpus(asked, config, fixed)]
    held = f"{asked.gpus} {asked.gpu} do not hold {config.data.context:,} tokens of context{named}"
    return f"{held}: {reason}; what fits: {_listed(ways)}"


def _listed(ways: list[str]) -> str:
    return ", or ".join(ways) or "nothing found with fewer tokens or up to 64 times as many GPUs"


def _allowed_values(asked: Asked, config: Config, fixed: dict[str, Any]) -> str:
    """Of the first key that others could make room for: its values that there are meshes with."""
    estimator = Estimator(config, _machine(asked, config.precision))
    for key in fixed:
        rest = {other: value for other, value in fixed.items() if other != key}
        configs = (candidate for family in families(estimator, rest) for candidate in family)
        values = {c.batch.micro_steps if key == "micro_steps" else getattr(c.parallel, key) for c in configs}
        if values:
            return f"; allowed beside the others: {key} of {', '.join(map(str, sorted(values)))}"
    return ""


def _near_gpus(asked: Asked, config: Config, fixed: dict[str, Any]) -> str:
    """Below and above, the nearest numbers for which there is a mesh; of those with small divisors alone, and of a few."""

    def any_mesh(gpus: int) -> bool:
        estimator = Estimator(config, _machine(asked, config.precision, gpus))
        return any(True for family in families(estimator, fixed) for _ in family)

    ways = range(asked.gpus - 1, 0, -1), range(asked.gpus + 1, 2 * asked.gpus + 1)
    tried = (itertools.islice(filter(_smooth, way), FEW) for way in ways)
    near = [next((gpus for gpus in numbers if any_mesh(gpus)), None) for numbers in tried]
    return "; the nearest numbers of GPUs that do: " + (", ".join(str(n) for n in near if n is not None) or "none found")


def _smooth(number: int) -> bool:
    for divisor in (2, 3, 5, 7):
        while number % divisor == 0:
            number //= divisor
    return number == 1


def _longest_context(asked: Asked, config: Config, machine: Machine, fixed: dict[str, Any]) -> list[str]:
    """The longest power of two that fits, of at least 1024."""
    context = 1 << (config.data.context - 1).bit_length() - 1
    while context >= 1024:
        shorter = _config(asked, context)
        if search(shorter, machine, fixed, first=True).best:
            return [f"--context {context}"]
        context //= 2
    return []


def _enough_gpus(asked: Asked, config: Config, fixed: dict[str, Any]) -> list[str]:
    """The fewest that are enough, of the GPUs doubled again and again."""
    for gpus in (asked.gpus * 2**k for k in range(1, 7)):
        if search(config, _machine(asked, config.precision, gpus), fixed, first=True).best:
            return [f"--gpus {gpus}"]
    return []
