"""What there is to run on: GPUs and links as `machines.yaml` has them, and rates that `baton plan --calibrate` measured."""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

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
    rates: dict[str, float]
    """FLOP/s of a kind of `Work`, bytes/s of MEMORY."""
    memory: float = Field(gt=0)
    """GiB of the device; of a CPU, of the machine."""
    latency: float | None = None
    bandwidth: float | None = None
    """Of the link between two ranks here, where it was measured: seconds a round, bytes/s."""

    @property
    def link(self) -> Link | None:
        """Between ranks of the machine."""
        return Link(self.latency, self.bandwidth) if self.latency and self.bandwidth else None


_MEASURED = TypeAdapter(list[Measured])


def read_rates(path: Path) -> list[Measured]:
    """Of a file. Raises UserError."""
    try:
        return _MEASURED.validate_python(yaml.safe_load(path.read_text()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'is no text'}") from None
    except (yaml.YAMLError, ValidationError):
        raise UserError(f"{path}: holds no rates; `baton plan --calibrate` writes them") from None


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


def find_gpu(torch_name: str) -> Gpu | None:
    """That of which torch's name is; None where it is unknown."""
    return next((gpu for gpu in facts().gpus.values() if any(name in torch_name for name in gpu.names)), None)


def peak_flops(torch_name: str, precision: str) -> float | None:
    """FLOP/s of a GPU as its vendor gives them; None where they are not known."""
    gpu = find_gpu(torch_name)
    return None if gpu is None else gpu.flops[precision]


def build_machine(gpu: str, gpus: int, precision: str, nodes: int | None, link: str, rates: list[Measured]) -> Machine:
    """Of options, and what was measured. Raises UserError for names that are not known."""
    known = facts()
    own = next((entry for entry in rates if entry.device == gpu and entry.precision == precision), None)
    if gpu not in known.gpus and (own is None or gpu != CPU):
        extra = "" if gpu != CPU else f" (cpu in {precision} has to be measured: baton plan --calibrate --precision {precision})"
        raise UserError(f"--gpu is {gpu!r}, allowed: {', '.join(known.gpus)}, or cpu once `--calibrate` has measured it{extra}")
    if link not in known.links:
        raise UserError(f"--link is {link!r}, allowed: {', '.join(known.links)}")
    per_node = _per_node(known.gpus[gpu].per_node if gpu in known.gpus else gpus, gpus, nodes)
    attained = known.assumed["links"]

    def nominal(name: str) -> Link:
        return Link(known.links[name].latency, known.links[name].bandwidth * attained)

    between = nominal(link)
    inside = own.link if own is not None and own.link is not None else nominal(known.gpus[gpu].link if gpu != CPU else link)
    measured = own is not None and own.link is not None
    linked = f"{'measured' if measured else known.gpus[gpu].link if gpu != 'cpu' else link} on a node, {link} between"
    linked += f" (of vendors' numbers {attained:.0%} are assumed)"
    if gpu == CPU:
        assert own is not None
        return Machine(gpu, gpus, per_node, own.memory * GiB / per_node, None, own.rates, inside, between, True, linked)
    facts_of = known.gpus[gpu]
    peak = facts_of.flops[precision]
    assumed = {str(work): known.assumed[work] * peak for work in Work} | {MEMORY: known.assumed[MEMORY] * facts_of.bandwidth}
    rates_of = assumed | (own.rates if own is not None else {})
    return Machine(gpu, gpus, per_node, facts_of.memory * GiB, peak, rates_of, inside, between, own is not None, linked)


def _per_node(usual: int, gpus: int, nodes: int | None) -> int:
    if nodes is None:
        return min(usual, gpus)
    if gpus % nodes:
        raise UserError(f"--nodes is {nodes}, allowed: a divisor of --gpus, {gpus}")
    return gpus // nodes
