"""What there is to run on: GPUs and links as `machines.yaml` has them, and rates that `baton plan --calibrate` measured."""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from ...configs.errors import UserError
from ...models.flops import Work
from ...parallel.links import Link

GiB = 2**30
RATES = Path("runs/rates.yaml")
"""Where measured rates lie unless a path is given."""
CPU = "cpu"
"""The name of what has no GPU."""
MEMORY = "memory"
"""Among rates: bytes/s of element-wise work."""


class Gpu(BaseModel):
    """One kind of GPU."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    names: list[str]
    memory: float = Field(gt=0)
    """GiB that a process sees."""
    flops: dict[str, float]
    """FLOP/s by precision, dense."""
    bandwidth: float = Field(gt=0)
    """Bytes/s of its memory."""
    per_node: int = Field(ge=1)
    link: str


class _LinkEntry(BaseModel):
    latency: float
    bandwidth: float


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid")
    gpus: dict[str, Gpu]
    node_links: dict[str, _LinkEntry]
    links: dict[str, _LinkEntry]
    assumed: dict[str, float]


@functools.cache
def facts() -> _Facts:
    """Of `machines.yaml`."""
    return _Facts.model_validate(yaml.safe_load(Path(__file__).with_name("machines.yaml").read_text()))


class Measured(BaseModel):
    """Rates of one device and precision."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    device: str
    """cpu, or a GPU's name in `machines.yaml`, or what torch calls it."""
    precision: Literal["fp32", "bf16", "fp64"]
    rates: dict[str, Annotated[float, Field(gt=0)]]
    """FLOP/s of each kind of `Work`, bytes/s of MEMORY."""
    memory: float = Field(gt=0)
    """GiB of the device; of a CPU, of the machine."""
    latency: float | None = None
    bandwidth: float | None = None
    """Of the link between two ranks here, where it was measured: seconds a round, bytes/s."""

    @field_validator("rates")
    @classmethod
    def _all_rates(cls, rates: dict[str, float]) -> dict[str, float]:
        if rates.keys() != {*Work, MEMORY}:
            raise ValueError(f"allowed: all of {', '.join((*Work, MEMORY))}")
        return rates

    @property
    def link(self) -> Link | None:
        """Between ranks of the machine."""
        return Link(self.latency, self.bandwidth) if self.latency and self.bandwidth else None


_MEASURED = TypeAdapter(list[Measured])


def read_rates(path: Path) -> list[Measured]:
    """Of a file. Raises UserError."""
    try:
        return _MEASURED.validate_python(yaml.safe_load(path.read_text()) or [])
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'is no text'}") from None
    except yaml.YAMLError:
        raise UserError(f"{path}: no YAML; `baton plan CONFIG --calibrate --rates FILE` writes rates") from None
    except ValidationError as errors:
        first = errors.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc'])) or 'no list'}: {first['msg']}") from None


def write_rates(path: Path, measured: list[Measured]) -> None:
    """To a file, which is never seen half written. Raises UserError."""
    partial = path.with_name(f"{path.name}.partial")
    text = "# Written by `baton plan --calibrate`. FLOP/s of a forward and a backward together; memory in rates: bytes/s.\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text + yaml.safe_dump([entry.model_dump() for entry in measured], sort_keys=False))
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


class Machine(NamedTuple):
    """The GPUs of a job."""

    name: str
    gpus: int
    per_node: int
    memory: float
    """Bytes of one."""
    peak: float | None
    """FLOP/s of one as the vendor gives it, in the precision that is planned; None: not known."""
    rates: Mapping[str, float]
    """FLOP/s that one attains in each kind of `Work`, and bytes/s under MEMORY."""
    inside: Link
    """Between GPUs of a node."""
    between: Link
    """Between nodes, for one GPU."""
    calibrated: bool
    """Whether the rates were measured."""
    linked: str
    """Where the links' numbers are from, in words."""

    @property
    def nodes(self) -> int:
        """That the GPUs are on."""
        return math.ceil(self.gpus / self.per_node)

    def link(self, stride: int, ranks: int, kind: str) -> Link:
        """Of a group whose neighbours are `stride` apart: seconds of a round of one kind, bytes/s that a rank sends in it.

        What goes to all others takes as many latencies as a tree has levels: assumed.
        """
        here = ranks
        """Ranks of the group on one node."""
        if self.nodes > 1:
            here = math.gcd(ranks, self.per_node // stride) if self.per_node % stride == 0 else 1
        rounds = math.ceil(math.log2(ranks)) if ranks > 1 and kind != "ring" else 1
        if ranks == here:
            return Link(self.inside.latency * rounds, self.inside.bandwidth)
        bandwidth = self.between.bandwidth
        if kind in COLLECTIVES:
            # Rings through the node's ports side by side.
            bandwidth *= here
        elif kind == "all_to_all":
            # Some of it stays on the node.
            bandwidth *= (ranks - 1) / (ranks - here)
        return Link(self.between.latency * rounds, min(bandwidth, self.inside.bandwidth))


COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")


def find_gpu(torch_name: str) -> str | None:
    """The name here of what torch calls so; None where it is unknown."""
    return next((name for name, gpu in facts().gpus.items() if any(part in torch_name for part in gpu.names)), None)


def peak_flops(torch_name: str, precision: str) -> float | None:
    """FLOP/s of a GPU as its vendor gives them; None where they are not known."""
    name = find_gpu(torch_name)
    return None if name is None else facts().gpus[name].flops[precision]


def check_names(gpu: str, gpus: int, nodes: int | None, link: str) -> None:
    """Raises UserError for what is not known, and for nodes that there are not."""
    known = facts()
    if gpu not in (*known.gpus, CPU):
        raise UserError(f"--gpu is {gpu!r}, allowed: {', '.join(known.gpus)}, {CPU}")
    if link not in known.links:
        raise UserError(f"--link is {link!r}, allowed: {', '.join(known.links)}")
    if nodes is not None and gpus % nodes:
        raise UserError(f"--nodes is {nodes}, allowed: a divisor of --gpus, {gpus}")
    if nodes is not None and gpu != CPU and gpus // nodes > known.gpus[gpu].per_node:
        raise UserError(f"--nodes is {nodes}, allowed: {math.ceil(gpus / known.gpus[gpu].per_node)} and more for {gpus} {gpu}")


def build_machine(gpu: str, gpus: int, precision: str, nodes: int | None, link: str, rates: list[Measured]) -> Machine:
    """Of options, and what was measured. Raises UserError for names that are not known."""
    check_names(gpu, gpus, nodes, link)
    known = facts()
    own = next((entry for entry in rates if entry.device == gpu and entry.precision == precision), None)
    if gpu == CPU and own is None:
        measure = f"`baton plan CONFIG precision={precision} --calibrate` measures them"
        raise UserError(f"--gpu is {CPU}, whose rates in {precision} are not known; {measure}")
    usual = min(known.gpus[gpu].per_node if gpu != CPU else gpus, gpus)
    per_node = usual if nodes is None else gpus // nodes
    attained = known.assumed["links"]

    def nominal(name: str) -> Link:
        entry = (known.node_links | known.links)[name]
        return Link(entry.latency, entry.bandwidth * attained)

    own_link = own.link if own is not None else None
    node_link = known.gpus[gpu].link if gpu != CPU else link
    inside, between = own_link or nominal(node_link), nominal(link)
    linked = f"{'measured' if own_link else node_link} on a node, {link} between"
    linked += f" (of vendors' numbers {attained:.0%} are assumed)"
    if gpu == CPU:
        assert own is not None
        return Machine(gpu, gpus, per_node, own.memory * GiB / per_node, None, own.rates, inside, between, True, linked)
    has = known.gpus[gpu]
    peak = has.flops[precision]
    assumed = {str(work): known.assumed[work] * peak for work in Work} | {MEMORY: known.assumed[MEMORY] * has.bandwidth}
    attains = own.rates if own is not None else assumed
    return Machine(gpu, gpus, per_node, has.memory * GiB, peak, attains, inside, between, own is not None, linked)
