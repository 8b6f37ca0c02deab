"""Plans against what really happens: bytes sent, the order and the bubble of schedules; and what changes a plan."""

import time
from collections import Counter

import pytest
import torch
import yaml
from models.test_memory import WIDE, cpus, in_balance
from models.test_stages import build, micro_steps_of
from typer.testing import CliRunner

from baton.configs.loading import load_config
from baton.launcher.cli import app
from baton.launcher.planner import picture
from baton.launcher.planner.estimate import Estimator
from baton.launcher.planner.machine import GiB, Measured, build_machine, facts, read_rates, write_rates
from baton.launcher.planner.schedule import Action, actions, gathers, in_flight, simulate
from baton.launcher.planner.search import search
from baton.models.flops import Work, causal_pairs, stage_layers
from helpers import small_run, tiny_config

PRESETS = ["jamba_1b", "jamba_52b", "jamba_52b_256k", "jamba_52b_1m"]


def h200(gpus, precision="bf16"):
    return build_machine("h200", gpus, precision, None, "ib_ndr", [])


def sent(rank, config):
    """By group of this rank: what it sends in a second step; the groups' names by axis; its place."""
    from baton.parallel.recorder import record

    stages, mesh = build(config)
    for _, moe in stages.named_moes():
        in_balance(moe)
    micro_steps = micro_steps_of(config, stages, mesh)
    # The first sets a pipeline's connections up.
    stages.forward_backward(micro_steps, torch.tensor(96))
    for parameter in stages.parameters():
        parameter.grad = None
    with record() as traffic:
        stages.forward_backward(micro_steps, torch.tensor(96))
    totals = Counter()
    for (_, group), total in traffic.summary().items():
        totals[group] += total.sent
    groups = {axis: mesh.group(axis) for axis in ("tp", "cp", "ep", "pp", "dp_cp", "dp_cp_tp")}
    groups |= {"data": mesh.data.get_group(mesh.data.ndim - 1)}
    groups |= {"expert_data": mesh.expert_data.get_group(mesh.expert_data.ndim - 1)}
    if mesh.data.ndim == 2:
        groups |= {"copies": mesh.data.get_group(0), "expert_copies": mesh.expert_data.get_group(0)}
    groups |= {"states": mesh.states} if mesh.states else {}
    groups |= dict.fromkeys(["neighbours"] * len(mesh.neighbours), next(iter(mesh.neighbours.values()), None))
    names = {axis: g.group_desc if g.group_desc not in ("", "undefined") else g.group_name for axis, g in groups.items()}
    return totals, names, mesh.rank("pp"), mesh.rank("cp")


TRAFFIC = {
    "data": (2, "{cp: 1, dp: 2}", 2),
    "data kept": (2, "{cp: 1, dp: 2, zero: 2, recompute: layer}", 2),
    "experts, feed-forwards again": (2, "{cp: 1, dp: 2, ep: 2, recompute: feed_forward}", 1),
    "tensor, mixers again": (2, "{cp: 1, tp: 2, recompute: mixer}", 1),
    "tokens shared out, layers again": (4, "{cp: 1, tp: 4, sequence_parallel: true, recompute: layer}", 1),
    "states by doubling": (4, "{cp: 4, strategy: doubling, attention: ring}", 1),
    "states by ring": (4, "{cp: 4, strategy: ring, attention: usp, layout: contiguous}", 1),
    "states sliced": (4, "{cp: 4, strategy: sliced, attention: allgather, layout: zigzag, recompute: mixer}", 1),
    "mamba sliced": (4, "{cp: 2, tp: 2, strategy: sliced, attention: ring, recompute: mixer}", 1),
    "mamba tensor": (2, "{cp: 1, tp: 2, recompute: feed_forward}", 1),
    "mamba by ring": (4, "{cp: 4, strategy: ring, attention: ring, layout: zigzag}", 1),
    "pipeline": (4, "{cp: 1, pp: 2, dp: 2}", 4),
    "interleaved": (
        8,
        """{cp: 2, pp: 2, tp: 2, ep: 2, schedule: interleaved_1f1b, stages_per_rank: 2, sequence_parallel: true,
        strategy: allgather, attention: ulysses}""",
        4,
    ),
    "one matrix at both ends": (2, "{cp: 1, dp: 2}", 2),
    "copies": (8, "{cp: 1, pp: 2, dp: 4, ep: 2, replicate: 2, zero: 2}", 4),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if TRAFFIC[case][0] == 8 else ()) for case in TRAFFIC])
def test_every_axis_sends_what_is_planned(pool, case):
    """To the byte, on every rank."""
    world, parallel, micro_steps = TRAFFIC[case]
    batch = f"batch={{sequences: {4 * micro_steps}, micro_steps: {micro_steps}}}"
    tied = f"model.tied_embeddings={case == 'one matrix at both ends'}"
    pattern = "m-ME*E" if "mamba" in case else "M-MEM-*E"
    config = tiny_config(
        [*WIDE, f"model.pattern={pattern}", "model.mamba2.groups=2", tied, "data.context=64", f"parallel={parallel}", batch], world
    )
    named = {"strategy": "sliced", "attention": "ring"}
    named = {
        key: value if getattr(config.parallel, key) == "auto" else getattr(config.parallel, key) for key, value in named.items()
    }
    planned = config.model_copy(update={"parallel": config.parallel.model_copy(update=named)})
    estimator = Estimator(planned, cpus(world))
    for found, names, pp_rank, cp_rank in pool.run(world, sent, config):
        expected = Counter()
        for axis, number in estimator.traffic(planned, pp_rank, cp_rank).items():
            expected[names[axis]] += number
        if config.parallel.pp > 1:
            # The losses, two numbers in fp64, which every rank of a pipeline gets.
            expected[names["pp"]] += 16 * 2 * (config.parallel.pp - 1) // config.parallel.pp
        assert {group: number for group, number in found.items() if number} == {g: n for g, n in expected.items() if n}


def torch_order(rank, ranks, each, micro_steps):
    """A rank's actions as torch's schedule has them."""
    from torch import nn
    from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B

    x = torch.empty(1, 1)
    stages = [
        PipelineStage(nn.Linear(1, 1), rank + ranks * i, ranks * each, torch.device("cpu"), input_args=(x,), output_args=(x,))
        for i in range(each)
    ]
    schedule = ScheduleInterleaved1F1B(stages, micro_steps, loss_fn=lambda *_: None)
    order = schedule.pipeline_order[rank]
    return [(a.stage_index, a.microbatch_index, "B" in str(a.computation_type)) for a in order if a is not None]


@pytest.mark.parametrize(("ranks", "each", "micro_steps"), [(2, 2, 4), (4, 2, 4), (4, 3, 8), (2, 2, 1)])
def test_interleaved_stages_work_in_torchs_order(pool, ranks, each, micro_steps):
    for rank, found in enumerate(pool.run(ranks, torch_order, ranks, each, micro_steps)):
        assert [tuple(action) for action in actions(rank, ranks, each, micro_steps)] == found


FORWARD, BACKWARD = 0.1, 0.2


def sleeping_pipeline(rank, ranks, each, micro_steps):
    """Of some steps by torch's schedule, of stages that sleep instead of computing: seconds, and those of the sleeps."""
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

    slept = []

    def sleep(seconds):
        start = time.perf_counter()
        time.sleep(seconds)
        slept.append((seconds, time.perf_counter() - start))

    class Sleep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            sleep(FORWARD)
            return x * weight

        @staticmethod
        def backward(ctx, grad):
            sleep(BACKWARD)
            return grad, grad.sum().view(1)

    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return Sleep.apply(x, self.weight)

    x = torch.ones(1, 4, requires_grad=True)
    stages = [
        PipelineStage(Stage(), rank + ranks * i, ranks * each, torch.device("cpu"), input_args=(x,), output_args=(x,))
        for i in range(each)
    ]
    options = {"n_microbatches": micro_steps, "loss_fn": lambda out, target: out.sum()}
    schedule = ScheduleInterleaved1F1B(stages, **options) if each > 1 else Schedule1F1B(stages[0], **options)
    arguments = [torch.ones(micro_steps, 4)] if rank == 0 else []
    steps = []
    for _ in range(4):
        slept.clear()
        dist.barrier()
        start = time.perf_counter()
        schedule.step(*arguments, target=torch.zeros(micro_steps), return_outputs=False)
        dist.barrier()
        steps.append((time.perf_counter() - start, [*slept]))
    return steps


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "each", "micro_steps"), [(4, 1, 4), (2, 2, 4)])
def test_the_bubble_is_as_simulated(pool, ranks, each, micro_steps):
    """In the planned order, and within 3 points of the quickest step, of stages that take as long as they slept."""
    by_rank = pool.run(ranks, sleeping_pipeline, ranks, each, micro_steps)
    quickest = min(zip(*by_rank, strict=True), key=lambda step: step[0][0])
    for rank, (_, sleeps) in enumerate(quickest):
        planned_order = [action.backward for action in actions(rank, ranks, each, micro_steps)]
        assert [asked == BACKWARD for asked, _ in sleeps] == planned_order
    slept = [sleep for _, sleeps in quickest for sleep in sleeps]
    means = [sum(taken for asked, taken in slept if asked == way) / len(slept) * 2 for way in (FORWARD, BACKWARD)]
    planned = simulate(ranks, each, micro_steps, [means[0]] * ranks * each, [means[1]] * ranks * each)
    bubble = 1 - sum(taken for _, taken in slept) / ranks / max(seconds for seconds, _ in quickest)
    assert planned.bubble > 0.1
    assert bubble == pytest.approx(planned.bubble, abs=0.03)


def test_what_schedules_keep_and_gather():
    """1F1B of 4 ranks (Narayanan et al., figure 4): the first has 4 micro-steps in flight, the last 1; all idle 3 turns."""
    assert [in_flight(rank, 4, 1, 8) for rank in range(4)] == [{rank: 4 - rank} for rank in range(4)]
    assert simulate(4, 1, 8, [1.0] * 4, [2.0] * 4).seconds == (8 + 3) * 3
    assert simulate(4, 2, 8, [0.5] * 8, [1.0] * 8).seconds == 8 * 3 + 3 * 1.5
    assert actions(3, 4, 1, 2) == [Action(3, 0, False), Action(3, 0, True), Action(3, 1, False), Action(3, 1, True)]
    # F B F B of the last: whole after a backward, so that only the first forward and each backward gather.
    assert gathers(3, 4, 1, 2, 3) == {3: 3}
    assert gathers(3, 4, 1, 2, 2) == {3: 1}
    assert gathers(0, 1, 1, 2, 3) == {0: 4}


def test_links_by_where_a_group_lies():
    machine = h200(64)
    within, port = machine.inside.bandwidth, machine.between.bandwidth
    assert machine.link(1, 8, "all_gather").bandwidth == within
    assert machine.link(1, 16, "ring").bandwidth == port
    assert machine.link(1, 16, "all_gather").bandwidth == pytest.approx(min(within, 8 * port))
    assert machine.link(8, 8, "all_gather").bandwidth == port
    assert machine.link(1, 16, "all_to_all").bandwidth == pytest.approx(port * 15 / 8)


def plan(name, gpus, context=None, *overrides):
    further = [f"data.context={context}"] if context else []
    return search(load_config(name, ["parallel={}", *further, *overrides]), h200(gpus), {})


@pytest.mark.parametrize(("name", "gpus"), [("jamba_1b", 8), ("jamba_52b_256k", 64), ("jamba_52b_1m", 512)])
def test_presets_are_planned_in_seconds(name, gpus):
    start = time.perf_counter()
    found = plan(name, gpus)
    assert time.perf_counter() - start < 20
    assert len(found.best) == 10
    for estimate in found.best:
        assert estimate.largest <= 139 * GiB
        assert estimate.seconds == pytest.approx(sum(estimate.times.values()))
        assert 0.05 < estimate.mfu < 0.7
        assert estimate.config.resolved(gpus) == estimate.config
    assert [e.seconds for e in found.best] == sorted(e.seconds for e in found.best)


def test_parameters_of_the_presets():
    from baton.launcher.training.description import count_parameters

    assert [count_parameters(load_config(name).model) for name in PRESETS] == [1295502096, *[51316861696] * 3]


def test_the_length_changes_the_plan():
    """From 4K to 1M tokens attention comes to take most of the time, and hides a ring: stages move, and keys pass otherwise."""
    cuts, ways = {}, {}
    for context, sequences in ((4096, 1024), (65536, 64), (1048576, 4)):
        batch = f"batch={{sequences: {sequences}, micro_steps: 1}}"
        config = load_config("jamba_52b", ["parallel={}", f"data.context={context}", batch])
        cuts[context] = [len(stage) for stage in stage_layers(config.model, 16, context)]
        best = search(config, h200(64), {"tp": 2, "cp": 32}).best[0].config.parallel
        ways[context] = best.attention, best.recompute
    assert cuts == {4096: [2] * 16, 65536: [2] * 14 + [3, 1], 1048576: [3, 1] * 8}
    assert ways == {4096: ("usp", "none"), 65536: ("usp", "none"), 1048576: ("ring", "feed_forward")}


def test_layers_that_fit_no_more_are_computed_again():
    config = load_config("jamba_52b_1m", ["batch={sequences: 8, micro_steps: 8}"])
    modes = {gpus: search(config, h200(gpus), {"dp": 1, "pp": 1}).best[0].config.parallel.recompute for gpus in (64, 128)}
    assert modes == {64: "feed_forward", 128: "none"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["plan", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["jamba_1b", "--gpu", "h300"], ["--gpu is 'h300'", "h100, h200"]),
        (["jamba_1b", "--link", "string"], ["--link is 'string'", "ib_ndr"]),
        (["jamba_1b", "--gpus", 8, "--nodes", 3], ["--nodes is 3", "a divisor of --gpus, 8"]),
        (["jamba_1b", "--gpu", "cpu"], ["--gpu is cpu, whose rates in bf16", "--calibrate"]),
        (["jamba_1b", "--gpus", 1009], ["--gpus is 1009: no mesh", "896, 1024"]),
        (
            ["jamba_52b_1m", "--gpus", 8],
            ["8 h200 do not hold 1,048,576", "GiB more than one h200 has", "--context 262144", "--gpus 16"],
        ),
        (["jamba_1b", "--gpus", 8, "parallel.tp=3"], ["override parallel.tp is 3", "allowed: 1, 2, 4"]),
        (
            ["jamba_1b", "--gpus", 8, "parallel.pp=5"],
            ["no mesh of so many ranks", "beside the others: pp of 1, 2, 4"],
        ),
        (["jamba_1b", "--gpus", 8, "--explain", 50], ["--explain is 50", "1 to 10"]),
        (["jamba_1b", "batch.micro_steps=3"], ["override batch.micro_steps is 3", "a divisor of batch.sequences, 64"]),
        (["jamba_1b", "parallel.zero=4"], ["override parallel.zero is 4, allowed: 2 or 3"]),
        (["jamba_1b", "--draw", "plan.doc"], ["plan.doc: allowed: a name that ends in .png or .svg"]),
        (["jamba_1b", "parallel=3"], ["override 'parallel=3': allowed: parallel.key=value"]),
        (["jamba_1b", "batch.micro_steps="], ["override batch.micro_steps is None"]),
        (["jamba_1b", "--gpus", 64, "--nodes", 2], ["--nodes is 2, allowed: 8 and more for 64 h200"]),
        (["jamba_1b", "--json", "/proc/full.json"], ["/proc/full.json: cannot be written"]),
        (["jamba_1b", "--rates", "none.yaml"], ["none.yaml: cannot be read"]),
        (["nothing.yaml"], ["nothing.yaml: no such file"]),
        (["jamba_1b", "--write", "missing/plan.yaml"], ["missing/plan.yaml", "a folder that exists"]),
    ],
)
def test_bad_input_ends_in_one_line(run, arguments, words):
    result = run(*arguments)
    assert result.exit_code == 1
    said = [line for line in result.output.splitlines() if line.startswith("error")]
    assert len(said) == 1, result.output
    for word in words:
        assert word in said[0]


def trained(rank, file):
    """Metrics of the steps that a planned config trains."""
    from baton.launcher.environment import Environment
    from baton.launcher.training.loop import run_training
    from baton.launcher.training.metrics import read_metrics

    world = torch.distributed.get_world_size()
    config = load_config(file, [], world)
    run_training(config, Environment(rank, world, torch.device("cpu")), False, 1)
    return [line for line in read_metrics(config.run) if "loss" in line]


@pytest.mark.slow
def test_what_is_written_trains(run, pool, tmp_path):
    """The best plan as a config, for the ranks it is planned for; it is not written over."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} squared is {i * i}; " for i in range(700)))
    config = small_run(tmp_path, ["parallel.cp=1"], text)
    source, target = tmp_path / "small.yaml", tmp_path / "planned.yaml"
    source.write_text(config.to_yaml())
    arguments = [source, "--gpus", 4, "--write", target, "parallel.recompute=feed_forward"]
    result = run(*arguments, "--json", tmp_path / "plan.json", "--explain", 1)
    assert result.exit_code == 0, result.output
    planned = load_config(target, [], 4)
    best = yaml.safe_load((tmp_path / "plan.json").read_text())["plans"][0]
    assert planned.parallel.model_dump(mode="json") == best["parallel"]
    assert (planned.batch.micro_steps, planned.parallel.recompute) == (best["micro_steps"], "feed_forward")
    assert planned.model == config.model
    assert run(*arguments).exit_code == 1
    assert load_config(target, [], 4) == planned
    for (metrics,) in pool.run(4, trained, target):
        assert metrics["loss"] > 1
        assert metrics["teraflops_per_rank"] > 0
        # Each of 2 sequences of 64 tokens chose 2 experts a token, once: what backward computes again is not counted.
        assert {sum(counts) for counts in metrics["expert_tokens"].values()} == {2 * 64 * 2}


def test_another_length_keeps_the_tokens_of_a_step(run, tmp_path):
    result = run("jamba_52b", "--gpus", 64, "--context", 262144, "parallel={tp: 8, pp: 1}", "--json", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    found = yaml.safe_load((tmp_path / "plan.json").read_text())
    assert (found["context"], found["sequences"]) == (262144, 16)
    assert {(p["parallel"]["tp"], p["parallel"]["pp"]) for p in found["plans"]} == {(8, 1)}


def test_measured_rates_count(run, tmp_path):
    """A GPU whose attention is half as fast as another's takes longer, and a plan says that it was measured."""
    rates = {**{str(work): 1e14 for work in Work}, "memory": 1e12}
    seconds = []
    for number, attention in enumerate((1e14, 5e13)):
        path = tmp_path / f"rates{number}.yaml"
        write_rates(path, [Measured(device="h200", precision="bf16", rates=rates | {"attention": attention}, memory=139)])
        result = run("jamba_52b_256k", "--gpus", 64, "--rates", path, "parallel={tp: 8, cp: 8}", "--json", tmp_path / "plan.json")
        assert "rates: as measured" in result.output.replace("\n", " ")
        seconds.append(yaml.safe_load((tmp_path / "plan.json").read_text())["plans"][0])
    first, second = (plan["times"]["attention"] for plan in seconds)
    assert 1.5 < second / first < 2
    assert seconds[0]["times"]["moe"] == seconds[1]["times"]["moe"]


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ("[", "no YAML"),
        ("[{device: h200, precision: bf16, memory: 1, rates: {matmul: 1.0}}]", "0.rates"),
        ("[{device: h200, precision: bf16, memory: 1, rates: {matmul: -1.0}}]", "0.rates.matmul"),
        ("", "has nothing for h200 in bf16"),
    ],
)
def test_rates_that_are_none(run, tmp_path, rates, words):
    path = tmp_path / "rates.yaml"
    path.write_text(rates)
    result = run("jamba_1b", "--rates", path)
    assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
    assert words in result.output


def calibrated(rank, path):
    """What ranks that measure at once write, of little."""
    from baton.launcher.environment import Environment
    from baton.launcher.planner import calibration

    calibration.SECONDS = 0.0
    calibration.SIZES = {"cpu": calibration.Sizes(64, 64, 2, 16)}
    calibration._calibrate_together(path, "fp32", [], Environment(rank, 2, torch.device("cpu")))


def test_what_is_measured_is_planned_with(run, pool, tmp_path):
    """Rates of the slowest rank, and the link, for --gpu cpu; the config's transport stays."""
    path = tmp_path / "rates.yaml"
    pool.run(2, calibrated, path)
    (measured,) = read_rates(path)
    assert measured.rates.keys() == {*Work, "memory"}
    assert measured.link is not None
    source = tmp_path / "own.yaml"
    source.write_text(load_config("quickstart", ["parallel.transport=bf16"]).to_yaml())
    result = run(source, "--gpu", "cpu", "--gpus", 2, "--rates", path, "--json", tmp_path / "plan.json", "--explain", 1)
    assert result.exit_code == 0, result.output
    found = yaml.safe_load((tmp_path / "plan.json").read_text())
    assert found["machine"]["rates"] == measured.rates
    assert {plan["parallel"]["transport"] for plan in found["plans"]} == {"bf16"}
    for words in ("memory of a rank", "entering states", "sent by a rank in a step", "GFLOP a token"):
        assert words in result.output


def test_the_picture_shows_who_wins(run, tmp_path):
    """A ring of few ranks at 1M tokens, which attention hides; heads are exchanged at 64K; small states are gathered, large cut."""
    estimator = Estimator(load_config("jamba_52b"), h200(64))
    attention, states = picture._attention_times(estimator), picture._state_times(estimator.machine)
    fastest = {place: min(times, key=times.__getitem__) for place, times in attention.items()}
    assert (fastest[2**20, 8], fastest[65536, 32], fastest[4096, 32]) == ("ring", "ulysses", "allgather")
    fastest = {place: min(times, key=times.__getitem__) for place, times in states.items()}
    assert (fastest[1024, 32], fastest[2**24, 32]) == ("allgather", "sliced")
    result = run("jamba_1b", "parallel={tp: 1, pp: 1}", "--draw", tmp_path / "plan.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "plan.png").read_bytes()[1:4] == b"PNG"


def test_facts_of_every_gpu_are_whole():
    known = facts()
    assert {"a100", "h100", "h200", "b200", "mi300x"} <= set(known.gpus)
    for gpu in known.gpus.values():
        assert gpu.link in known.node_links
        assert {"bf16", "fp32", "fp64"} == set(gpu.flops)


def test_pairs_of_packed_documents():
    """What MFU counts: documents of 3 and 5 tokens see 6 + 15 pairs; a sequence of one document all of its 36."""
    from baton.kernels.documents import pack_documents
    from baton.launcher.training.throughput import Throughput
    from baton.models.hybrid import MicroStep

    config = load_config("quickstart", ["data.context=8", "model.mamba2.chunk_size=8"], 1)
    throughput, ids = Throughput(config, 2, torch.device("cpu")), torch.zeros(2, 8, dtype=torch.int64)
    packed = pack_documents([[0, 3, 8], [0, 8]], torch.arange(8))
    assert throughput.attended(MicroStep(ids, None, None, packed)) == 6 + 15 + causal_pairs(8)
    assert throughput.attended(MicroStep(ids, None, None, None)) == 2 * causal_pairs(8)
    single = throughput.of_step(8, causal_pairs(8), 2.0)
    assert single["tokens_per_second"] == 4
    assert single["teraflops_per_rank"] == pytest.approx(Estimator(config, h200(1, "fp32")).flops / 2 / 2 / 1e12)
    assert throughput.of_step(8, 21, 2.0)["teraflops_per_rank"] < single["teraflops_per_rank"]
