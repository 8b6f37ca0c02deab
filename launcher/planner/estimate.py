"""What one mesh would hold and how long its step would take: memory by stage, time by cause."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...configs.pattern import RECURRENT, LayerKinds, repeats
from ...configs.schema import Config, ParallelConfig
from ...kernels.cross_entropy.op import CHUNK_BYTES
from ...models.flops import HEAD, TRAINING, model_flops, stage_layers
from ...models.memory import EMBEDDING, Terms, Unit, kept, parameter_shapes, part_keeps, units
from ...models.parallelize import COMPUTE_DTYPES
from ...models.traffic import Message, boundary_sends, layer_sends, part_sends, unit_copies, unit_gathers, unit_scatters
from ...models.workload import Workload
from .cost import PartCost, Times, UnitCost, add, axis_link, part_cost, units_cost
from .machine import CPU, MEMORY, GiB, Machine
from .schedule import gathers, in_flight, simulate

RESERVE = 2 * GiB
"""Of a GPU: the driver's context, NCCL's buffers. Assumed."""
FRAGMENTED = 0.05
"""Of what is allocated: lost between blocks. Assumed."""

SIMULATED_ACTIONS = 20000
"""Beyond so many forwards a schedule is not simulated: its bubble is next to nothing."""

Part = LayerKinds | str
"""A layer by its kinds, the EMBEDDING or the HEAD."""
Stage = tuple[tuple[Part, int], ...]
"""How many of each part, the EMBEDDING first."""


class Estimate(NamedTuple):
    """Of one mesh."""

    config: Config
    memory: list[Terms]
    """Bytes of a rank at each place of the pipeline, by what they are of."""
    seconds: float
    """Of a step."""
    times: Times
    """Seconds of a step by cause, on the rank that works longest; with "bubble" they are all of the step."""
    mfu: float | None
    """FLOPs of the model over what the GPUs could, by their vendor's numbers."""
    tokens_per_second: float

    @property
    def largest(self) -> int:
        """Bytes of the rank that holds most."""
        return max(sum(terms.values()) for terms in self.memory)


class Estimator:
    """Estimates meshes for one config on one machine, and remembers what they have in common."""

    def __init__(self, config: Config, machine: Machine) -> None:
        self.config, self.machine = config, machine
        self.fused = machine.name != CPU and config.kernels != "reference" and config.precision != "fp64"
        """Whether the Triton kernels run."""
        model, context = config.model, config.data.context
        self.tied = model.tied_embeddings
        different: list[Part] = [*dict.fromkeys(model.layers), EMBEDDING, HEAD]
        self.parts = {part: parameter_shapes(model, part) for part in different}
        self.flops = TRAINING * config.batch.sequences * sum(model_flops(model, context).values())
        self._cuts: dict[int, list[Stage]] = {}
        self._costs: dict[tuple, PartCost] = {}
        self._kept: dict[tuple, dict[str, Terms]] = {}
        self._units: dict[tuple, list[Unit]] = {}
        self._unit_costs: dict[tuple, UnitCost] = {}

    def workload(self, config: Config) -> Workload:
        """What a rank has of a micro-step of a config whose degrees are numbers."""
        batch, parallel = config.batch, config.parallel
        assert parallel.dp != "auto"
        b = batch.sequences // batch.micro_steps // parallel.dp
        return Workload(config.model, parallel, b, config.data.context, COMPUTE_DTYPES[config.precision].itemsize, self.fused)

    def stages(self, stages: int) -> list[Stage]:
        """What each stage is made of."""
        if stages not in self._cuts:
            model = self.config.model
            cuts = [[model.layers[i] for i in run] for run in stage_layers(model, stages, self.config.data.context)]
            ends: tuple[list[Part], list[Part]] = [EMBEDDING], [HEAD]
            parts = [[*ends[0] * (i == 0), *own, *ends[1] * (i == stages - 1)] for i, own in enumerate(cuts)]
            self._cuts[stages] = [tuple(Counter(own).items()) for own in parts]
        return self._cuts[stages]

    def rank_stages(self, parallel: ParallelConfig, rank: int) -> dict[int, Stage]:
        """The stages of a pipeline's rank, by their numbers."""
        stages = self.stages(parallel.stages)
        return {number: stages[number] for number in range(rank, parallel.stages, parallel.pp)}

    def rank_parts(self, parallel: ParallelConfig, rank: int) -> Stage:
        """All that a pipeline's rank has."""
        total: Counter[Part] = Counter()
        for stage in self.rank_stages(parallel, rank).values():
            total.update(dict(stage))
        return tuple(total.items())

    def part_units(self, part: Part, w: Workload) -> list[Unit]:
        """FSDP's units of a part."""
        parallel = w.parallel
        data = w.dp * w.cp // parallel.replicate
        key = part, parallel.tp, parallel.ep, data, self._one_matrix(parallel)
        if key not in self._units:
            shapes = self.parts[part]
            if part == HEAD and self._one_matrix(parallel):
                shapes = [shape for shape in shapes if shape.name != "projection.weight"]
            self._units[key] = units(shapes, parallel, data)
        return self._units[key]

    def _one_matrix(self, parallel: ParallelConfig) -> bool:
        """Whether the head has none of its own; the two ends of a pipeline have a copy each."""
        return self.tied and parallel.pp == 1

    def keeps(self, part: Part, w: Workload) -> dict[str, Terms]:
        """What a part keeps of a micro-step, by kind."""
        p = w.parallel
        key = part, w.b, w.cp, p.tp, p.sequence_parallel, p.attention, p.layout, p.recompute
        if key not in self._kept:
            self._kept[key] = {part: part_keeps(part, w)} if isinstance(part, str) else kept(part, w, p.recompute)
        return self._kept[key]

    def cost(self, kind: str, w: Workload) -> PartCost:
        """What a kind of part takes."""
        p = w.parallel
        passing = dict.fromkeys(RECURRENT, (p.strategy, p.layout))
        own: tuple[Any, ...] = {**passing, "attention": (p.attention, p.layout), "moe": (w.dp, p.ep)}.get(kind, ())
        key = kind, w.b, w.cp, p.tp, p.sequence_parallel, *own
        if key not in self._costs:
            self._costs[key] = part_cost(kind, w, self.machine)
        return self._costs[key]

    def unit_cost(self, part: Part, w: Workload) -> UnitCost:
        """What FSDP sends for a part."""
        p = w.parallel
        key = part, p.tp, p.ep, w.cp, w.dp, p.replicate, self._one_matrix(p)
        if key not in self._unit_costs:
            self._unit_costs[key] = units_cost(self.part_units(part, w), w, self.machine)
        return self._unit_costs[key]

    def memory(self, config: Config) -> list[Terms]:
        """Bytes of a rank at each place of the pipeline, by what they are of."""
        w = self.workload(config)
        same: dict[tuple, Terms] = {}
        by_parts: dict[Stage, Terms] = {}
        found = []
        for rank in range(config.parallel.pp):
            flights = {0: 1}
            if config.parallel.pp > 1:
                flights = in_flight(rank, config.parallel.pp, config.parallel.stages_per_rank, config.batch.micro_steps)
            stages = self.rank_stages(config.parallel, rank)
            ends = sum((number > 0) + (number < config.parallel.stages - 1) for number in stages)
            held = tuple((stage, flights.get(number, 0)) for number, stage in stages.items())
            if (held, ends) not in same:
                parts = self.rank_parts(config.parallel, rank)
                if parts not in by_parts:
                    by_parts[parts] = self._parts_memory(parts, w)
                same[held, ends] = self._rank_memory(config, w, by_parts[parts], held, ends)
            found.append(same[held, ends])
        return found

    def _parts_memory(self, parts: Stage, w: Workload) -> Terms:
        """What does not depend on the schedule."""
        held = self._held(parts, w)
        terms = {"parameters": held, "gradients": held, "optimizer": 2 * held, "gathered": self._gathered(parts, w)}
        return terms | {"working memory": self._working(parts, w)}

    def _rank_memory(self, config: Config, w: Workload, terms: Terms, flights: tuple[tuple[Stage, int], ...], ends: int) -> Terms:
        """flights: of each stage, and of how many micro-steps it keeps activations; ends: of stages that others send to."""
        terms = {**terms}
        for stage, times in flights:
            for part, count in stage:
                # The loss keeps its gradients for one micro-step: backward follows at once.
                number = count * (1 if part == HEAD else times)
                for kind, own in self.keeps(part, w).items():
                    name = f"activations of {kind}"
                    terms[name] = terms.get(name, 0) + number * sum(own.values())
        if ends:
            # Of every micro-step what comes in and the gradient that comes back; of those in flight what went out. A layer that
            # keeps what came in has it in such a buffer.
            out = sum(times * ((EMBEDDING, 1) in stage) - times * ((HEAD, 1) in stage) for stage, times in flights)
            terms["pipeline's buffers"] = ends * config.batch.micro_steps * boundary_sends(w) + out * boundary_sends(w)
        terms["reserve"] = 0 if self.machine.name == CPU else int(RESERVE + FRAGMENTED * sum(terms.values()))
        return terms

    def _held(self, parts: Stage, w: Workload) -> int:
        """Bytes of this rank's share of the parameters."""
        return sum(count * unit.held for part, count in parts for unit in self.part_units(part, w)) * w.wide

    def _gathered(self, parts: Stage, w: Workload) -> int:
        """Two parts' parameters as they compute, and the sums of their gradients; in a pipeline those of all parts.

        One part computes while the next one's parameters come, or the gradients of the one before go.
        """
        wholes, gradients = [], []
        for part, count in parts:
            own = self.part_units(part, w)
            wholes += [sum(unit.gathered * (w.wide if unit.name == "fp32" else w.size) for unit in own)] * count
            gradients += [sum(unit.gathered for unit in own) * w.wide] * count
        two = [sum(sorted(sizes)[-2:]) for sizes in (wholes, gradients)]
        if w.parallel.pp > 1:
            return sum(wholes) + sum(gradients) + max(gradients)
        return two[1] + (sum(wholes) if w.parallel.zero == 2 else two[0])

    def _working(self, parts: Stage, w: Workload) -> int:
        """What is there for a while: gradients as large as what the largest part keeps, and what is computed again of a layer.

        PyTorch's own operations put what they give together from pieces: its largest tensor, and the gradient, are there twice.
        """
        recompute, plain = w.parallel.recompute, self._plain(w)
        largest = again = fetched = pieces = 0
        for part, _ in parts:
            if isinstance(part, str):
                continue
            kept_of = self.keeps(part, plain)
            sizes = {kind: sum(terms.values()) for kind, terms in kept_of.items()}
            if not w.fused:
                pieces = max(pieces, *(2 * max(terms.values()) for terms in kept_of.values()))
            largest = max(largest, *sizes.values())
            again = max(again, sum(size for kind, size in sizes.items() if repeats(kind, part, recompute)))
            if part.mixer == "attention" and w.cp > 1 and w.parallel.attention == "allgather":
                fetched = 2 * w.cp * w.tokens * w.kv_heads * w.model.attention.head_dim * (w.size + w.wide)
        logits = w.tokens * (w.model.vocab_size // w.parallel.tp) * w.size
        loss = 2 * min(logits, CHUNK_BYTES["cpu" if self.machine.name == CPU else "cuda"]) if HEAD in dict(parts) else 0
        return max(largest + again + fetched + pieces, loss)

    def _plain(self, w: Workload) -> Workload:
        """The same without computing anything again."""
        if w.parallel.recompute == "none":
            return w
        return w._replace(parallel=w.parallel.model_copy(update={"recompute": "none"}))

    def estimate(self, config: Config, exact: bool = False, memory: list[Terms] | None = None) -> Estimate:
        """Memory, unless it is given, and time; exact: the pipeline's schedule is simulated, not put into a formula."""
        seconds, times = self._step(config, self.workload(config), exact)
        flops = self.flops / self.machine.gpus / seconds
        mfu = flops / self.machine.peak if self.machine.peak else None
        tokens = config.batch.sequences * config.data.context / seconds
        return Estimate(config, memory or self.memory(config), seconds, times, mfu, tokens)

    def stage_times(self, config: Config, stage: int, w: Workload) -> tuple[Times, Times]:
        """Forward and backward of one of a pipeline's stages for a micro-step, by cause, FSDP's exposed part among them."""
        parallel, micro_steps = config.parallel, config.batch.micro_steps
        rank = stage % parallel.pp
        often = gathers(rank, parallel.pp, parallel.stages_per_rank, micro_steps, parallel.zero)[stage] / micro_steps
        forward: Times = {"data": 0.0}
        backward: Times = {"data": 0.0}
        for part, count in self.stages(parallel.stages)[stage]:
            costs, unit = self._part_times(part, w), self.unit_cost(part, w)
            for total, own in zip((forward, backward), costs, strict=True):
                add(total, own, count)
            # Gathers hide behind what is computed; without a pipeline gradients are added up in every micro-step as well.
            gathered = unit.gather * min(1.0, often), unit.gather * max(0.0, often - 1.0)
            scattered = unit.scatter if parallel.pp == 1 else 0.0
            forward["data"] += count * max(0.0, gathered[0] - sum(costs[0].values()))
            backward["data"] += count * max(0.0, gathered[1] + scattered - sum(costs[1].values()))
        return forward, backward

    def _part_times(self, part: Part, w: Workload) -> tuple[Times, Times]:
        forward: Times = {}
        backward: Times = {}
        kinds = [part] if isinstance(part, str) else [kind for kind in part if kind is not None]
        for kind in kinds:
            cost = self.cost(kind, w)
            add(forward, cost.forward)
            add(backward, cost.backward)
            if not isinstance(part, str) and repeats(kind, part, w.parallel.recompute):
                follows = w.parallel.recompute == "layer" and kind == part.mixer and part.feed_forward is not None
                again = cost.forward if follows else cost.again
                add(backward, {f"{cause} again": time for cause, time in again.items()})
        return forward, backward

    def _step(self, config: Config, w: Workload, exact: bool) -> tuple[float, Times]:
        parallel, micro_steps = config.parallel, config.batch.micro_steps
        same: dict[tuple, tuple[Times, Times]] = {}
        ways = []
        for number, stage in enumerate(self.stages(parallel.stages)):
            rank = number % parallel.pp
            often = gathers(rank, parallel.pp, parallel.stages_per_rank, micro_steps, parallel.zero)[number]
            if (stage, often) not in same:
                same[stage, often] = self.stage_times(config, number, w)
            ways.append(same[stage, often])
        forward, backward = ([sum(way.values()) for way in direction] for direction in zip(*ways, strict=True))
        of_rank = [sum(forward[r :: parallel.pp]) + sum(backward[r :: parallel.pp]) for r in range(parallel.pp)]
        longest = of_rank.index(max(of_rank))
        times: Times = {}
        for stage_number in range(longest, parallel.stages, parallel.pp):
            for way in ways[stage_number]:
                add(times, way, micro_steps)
        if parallel.pp > 1:
            times["bubble"] = self._pipeline(config, w, forward, backward, exact) - micro_steps * of_rank[longest]
        add(times, self._end(config, w, longest, backward))
        return sum(times.values()), times

    def _pipeline(self, config: Config, w: Workload, forward: list[float], backward: list[float], exact: bool) -> float:
        """Seconds of a step's forwards and backwards."""
        parallel, micro_steps = config.parallel, config.batch.micro_steps
        if exact and micro_steps * parallel.stages <= SIMULATED_ACTIONS:
            link = axis_link("pp", "ring", w, self.machine)
            hop = link.latency + boundary_sends(w) / link.bandwidth
            return simulate(parallel.pp, parallel.stages_per_rank, micro_steps, forward, backward, hop).seconds
        each = [f + b for f, b in zip(forward, backward, strict=True)]
        of_rank = [sum(each[r :: parallel.pp]) for r in range(parallel.pp)]
        # The longest rank works without a pause, but for when the first micro-step comes and the last one goes.
        return micro_steps * max(of_rank) + sum(each[: parallel.pp]) - max(each[: parallel.pp])

    def _end(self, config: Config, w: Workload, rank: int, backward: list[float]) -> Times:
        """After the last backward: gradients that nothing hides any more, and the optimizer."""
        parallel = config.parallel
        parts = self.rank_parts(parallel, rank)
        costs = [(self.unit_cost(part, w), count) for part, count in parts]
        copies = sum(count * cost.copies for cost, count in costs)
        if parallel.pp == 1:
            # The first part's gathering and its gradients have nothing to hide behind, not even what it computes itself.
            first, (ahead, back) = costs[0][0], (sum(way.values()) for way in self._part_times(parts[0][0], w))
            exposed = min(first.gather, ahead) + min(first.scatter, back) + max(0.0, copies - sum(backward))
        else:
            exposed = sum(count * cost.scatter for cost, count in costs) + copies
        # Reads parameter, gradient and two moments, writes three of them.
        return {"data": exposed, "optimizer": 7 * self._held(parts, w) / self.machine.rates[MEMORY]}

    def traffic(self, config: Config, rank: int, cp_rank: int) -> Counter[str]:
        """Bytes that a rank at a place of the pp and cp axes sends in a step's forward and backward, by axis.

        Not the 16 bytes and the copy of a tied embedding that a pipeline adds up, nor scalars such as the gradients' norm.
        """
        w, micro_steps, parallel = self.workload(config), config.batch.micro_steps, config.parallel
        sent: Counter[str] = Counter()
        often = gathers(rank, parallel.pp, parallel.stages_per_rank, micro_steps, parallel.zero)
        for number, stage in self.rank_stages(parallel, rank).items():
            for part, count in stage:
                for message, times in self._part_messages(part, w, cp_rank, micro_steps, often[number]):
                    sent[message.axis] += count * times * message.sent
            if parallel.pp > 1:
                sent["pp"] += micro_steps * boundary_sends(w) * ((number > 0) + (number < parallel.stages - 1))
        return sent

    def _part_messages(
        self, part: Part, w: Workload, cp_rank: int, micro_steps: int, gathered: int
    ) -> Iterator[tuple[Message, int]]:
        sends = part_sends(part, w, cp_rank) if isinstance(part, str) else layer_sends(part, w, cp_rank)
        yield from ((message, micro_steps) for message in (*sends.forward, *sends.backward))
        for unit in self.part_units(part, w):
            yield from ((message, gathered) for message in unit_gathers(unit, w))
            yield from ((message, micro_steps if w.parallel.pp == 1 else 1) for message in unit_scatters(unit, w))
            yield from ((message, 1) for message in unit_copies(unit, w))
