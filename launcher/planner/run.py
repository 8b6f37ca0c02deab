"""`baton plan` from its options to what it prints and writes."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ...configs.checks import check_tensor_degree
from ...configs.errors import KeyedError, UserError
from ...configs.loading import check_section, load_config, parse_override
from ...configs.schema import BatchConfig, Config, ParallelConfig
from ..benchmarks.report import console
from .estimate import Estimator
from .machine import RATES, Machine, build_machine, read_rates
from .report import as_json, explain, show, why_not
from .search import Found, divisors, families, search

KEPT = ("transport", "links")
"""Keys of `parallel` that no plan chooses: the one changes results, the other says what `auto` chooses by."""


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
    for path in (asked.write, asked.json, asked.draw):
        _check_target(path, new=path is asked.write)
    config = _config(asked, asked.context)
    fixed = _fixed(asked.overrides)
    if asked.calibrate:
        from .calibration import calibrate

        path = asked.rates or RATES
        if not calibrate(path, config.precision, ["plan", asked.config, *asked.overrides, "--calibrate", "--rates", str(path)]):
            return
    machine = _machine(asked, config.precision)
    found = search(config, machine, fixed)
    if not found.best:
        raise UserError(_refusal(asked, config, machine, fixed, found))
    show(config, machine, found)
    if asked.explain is not None:
        if asked.explain > len(found.best):
            raise UserError(f"--explain is {asked.explain}, allowed: 1 to {len(found.best)}")
        explain(Estimator(config, machine), found.best[asked.explain - 1])
    if asked.json is not None:
        asked.json.write_text(json.dumps(as_json(config, machine, found), indent=1) + "\n")
        console.print(f"Wrote {asked.json}.", soft_wrap=True)
    if asked.write is not None:
        _write(asked.write, found.best[0].config, machine)
    if asked.draw is not None:
        from .picture import draw

        draw(asked.draw, config, machine)
        console.print(f"Drew {asked.draw}.", soft_wrap=True)


def _check_target(path: Path | None, new: bool) -> None:
    if path is None:
        return
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise UserError(f"{path}: cannot be written; allowed: a file in a folder that exists")
    if new and path.exists():
        raise UserError(f"--write {path}: exists; allowed: a new file")


def _config(asked: Asked, context: int | None) -> Config:
    """What is planned, its mesh open. With another context than the file's a step has about as many tokens."""
    others, parallel, micro_steps = _split(asked.overrides)
    # What the file says of the mesh is not asked, and must not be refused beside the overrides.
    open_mesh = ["parallel={}", "batch.micro_steps=1"]
    kept = {key: value for key, value in parallel.items() if key in KEPT}
    config = load_config(asked.config, [*others, *open_mesh])
    if context is not None:
        further = [f"data.context={context}"]
        if not any(parse_override(override)[0][0] == "batch" for override in others):
            further += [f"batch.sequences={_sequences(config, context)}"]
        config = load_config(asked.config, [*others, *open_mesh, *further])
    check_section(ParallelConfig, "parallel", parallel)
    if micro_steps is not None:
        check_section(BatchConfig, "batch", {"sequences": config.batch.sequences, "micro_steps": micro_steps})
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


def _split(overrides: list[str]) -> tuple[list[str], dict[str, Any], int | None]:
    """Overrides of anything else; values of `parallel`; batch.micro_steps."""
    others: list[str] = []
    parallel: dict[str, Any] = {}
    micro_steps = None
    for override in overrides:
        keys, value = parse_override(override)
        if keys == ("parallel",) and isinstance(value, dict):
            parallel |= value
        elif keys[0] == "parallel" and len(keys) == 2:
            parallel[str(keys[1])] = value
        elif keys == ("batch", "micro_steps"):
            micro_steps = value
        elif keys == ("batch",) and isinstance(value, dict) and "micro_steps" in value:
            micro_steps = value["micro_steps"]
            others += [f"batch.{key}={json.dumps(each)}" for key, each in value.items() if key != "micro_steps"]
        else:
            others.append(override)
    return others, parallel, micro_steps


def _fixed(overrides: list[str]) -> dict[str, Any]:
    """What overrides say of the mesh."""
    _, parallel, micro_steps = _split(overrides)
    fixed = {key: value for key, value in parallel.items() if value != "auto" and key not in KEPT}
    return fixed | ({} if micro_steps is None else {"micro_steps": micro_steps})


def _machine(asked: Asked, precision: str, gpus: int | None = None) -> Machine:
    path = asked.rates or (RATES if RATES.exists() else None)
    measured = read_rates(path) if path is not None else []
    nodes = asked.nodes if gpus is None else None
    return build_machine(asked.gpu, gpus or asked.gpus, precision, nodes, asked.link, measured)


def _refusal(asked: Asked, config: Config, machine: Machine, fixed: dict[str, Any], found: Found) -> str:
    """Why nothing fits, and what would."""
    named = f"; kept: {', '.join(f'{key} {value}' for key, value in fixed.items())}" if fixed else ""
    if found.nearest is None:
        near = _near_gpus(asked, config, fixed)
        allowed = f"; the nearest numbers of GPUs that do: {near}" if near else ""
        return (
            f"--gpus is {asked.gpus}: no mesh of so many ranks divides the model's sizes, {config.batch.sequences} sequences of "
            f"{config.data.context:,} tokens and {len(config.model.layers)} layers{named}{allowed}"
        )
    reason = why_not(found.nearest, machine)
    ways = [*_longest_context(asked, config, machine, fixed), *_enough_gpus(asked, config, fixed)]
    held = f"{asked.gpus} {asked.gpu} do not hold {config.data.context:,} tokens of context{named}"
    return f"{held}: {reason}; what fits: {_listed(ways)}"


def _listed(ways: list[str]) -> str:
    return ", or ".join(ways) or "nothing found with fewer tokens or up to 64 times as many GPUs"


def _near_gpus(asked: Asked, config: Config, fixed: dict[str, Any]) -> str:
    """Below and above, the nearest numbers for which there is a mesh."""

    def any_mesh(gpus: int) -> bool:
        estimator = Estimator(config, _machine(asked, config.precision, gpus))
        return any(True for family in families(estimator, fixed) for _ in family)

    below = next((n for n in range(asked.gpus - 1, 0, -1) if any_mesh(n)), None)
    above = next((n for n in range(asked.gpus + 1, 2 * asked.gpus + 1) if any_mesh(n)), None)
    return ", ".join(str(n) for n in (below, above) if n is not None)


def _longest_context(asked: Asked, config: Config, machine: Machine, fixed: dict[str, Any]) -> list[str]:
    """The longest that fits, of the context halved again and again."""
    context = config.data.context // 2
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


def _write(path: Path, config: Config, machine: Machine) -> None:
    path.write_text(f"# The mesh is planned by `baton plan` for {machine.gpus} {machine.name}.\n{config.to_yaml()}")
    console.print(f"Wrote {path}: `baton train {path}` on {machine.gpus} ranks trains it.", soft_wrap=True)
