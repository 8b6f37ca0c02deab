"""`baton verify`: finds nothing on a sound mesh, and on a broken one says where."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from typer.testing import CliRunner

from baton.configs.errors import UserError
from baton.kernels.cross_entropy import IGNORED
from baton.kernels.scan import LocalScan
from baton.launcher.cli import app
from baton.launcher.environment import Environment
from baton.launcher.files import check_writable
from baton.launcher.verification import verifier
from baton.launcher.verification.batch import Share, draw_batch, pack
from baton.launcher.verification.cases import plan_matrix, plan_one
from baton.launcher.verification.choices import record_choices, replay_choices
from baton.launcher.verification.differences import Differences
from baton.launcher.verification.report import failure, write_json
from baton.launcher.verification.steps import Alone
from baton.launcher.verification.verdict import QUANTITIES, to_json
from baton.launcher.verification.verifier import Verifier
from baton.models.hybrid import build_model
from baton.models.stages import build_stages
from baton.parallel.affine_scan import SequenceScan
from baton.parallel.gradients import local_part
from baton.parallel.layout import Layout
from baton.parallel.mesh import build_mesh
from helpers import TINY, compare, tiny_config

MESH = {"tp", "cp", "pp", "ep", "dp", "schedule", "stages_per_rank", "sequence_parallel", "replicate", "zero"}


def check_case(case):
    """What the file of --json says of one comparison."""
    assert set(case["mesh"]) == MESH
    assert {"layout", "strategy", "documents", "dtype", "ok", "max_relative_error", "worst"} <= set(case)
    assert set(case["max_relative_error"]) == {"loss", "logits", "gradients", "parameters"}
    assert set(case["worst"]) == {"gradients", "parameters"}


def compare_packed(rank, config):
    """The verdict, once a model of packed data has refused to run without knowing where documents lie."""
    mesh, device = build_mesh(config.parallel, "cpu"), torch.device("cpu")
    stages = build_stages(config, mesh, device)
    batch = draw_batch(config.model_copy(update={"data": config.data.model_copy(update={"documents": "single"})}), 4)
    with pytest.raises(ValueError, match="no documents came with it"):
        stages.forward(batch.micro_steps(Share.of(mesh, config.parallel)[0], device)[0])
    return compare(rank, config)


def test_a_sound_mesh(pool, tmp_path):
    overrides = ["precision=fp64", "parallel={tp: 2, cp: 2, layout: zigzag}", "data.documents=packed"]
    verdicts = pool.run(4, compare_packed, tiny_config(overrides, 4))
    assert len({str(verdict.errors) for verdict in verdicts}) == 1
    verdict = verdicts[0]
    assert verdict.ok
    assert failure([verdict]) is None
    for quantity in QUANTITIES:
        assert 0 < verdict.worst(quantity).error <= 1e-10 or quantity == "loss"
    write_json(tmp_path / "out.json", [verdict], [])
    written = json.loads((tmp_path / "out.json").read_text())
    check_case(written["cases"][0])
    assert written["ok"]
    assert written["cases"][0]["mesh"].items() >= {"tp": 2, "cp": 2, "pp": 1, "ep": 1, "dp": 1, "replicate": 1}.items()
    assert (written["cases"][0]["sequences"], written["cases"][0]["micro_steps"]) == (2, 1)
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]


def broken(rank, config, backward):
    """The verdict where states do not pass between ranks, in the forward or in the backward."""
    sound = SequenceScan.start

    def start(self, T, U, initial, reverse=False):
        return LocalScan().start(T, U, initial, reverse) if reverse is backward else sound(self, T, U, initial, reverse)

    SequenceScan.start = start
    try:
        return compare(rank, config)
    finally:
        SequenceScan.start = sound


@pytest.mark.parametrize(
    ("backward", "where"),
    [
        (False, "the output of layers.0.mixer (mamba2) is the first that differs"),
        (True, "all outputs agree, so it is the backward: layers.2.mixer (mamba2) is the last part"),
    ],
)
def test_a_broken_mesh(pool, backward, where):
    config = tiny_config(["precision=fp64", "parallel={tp: 2, cp: 2, layout: contiguous}"], 4)
    verdict = pool.run(4, broken, config, backward)[0]
    assert not verdict.ok
    assert verdict.first_difference.startswith(where)
    assert not to_json(verdict)["ok"]
    assert where in failure([verdict])


def damaged(rank, config, name):
    """The verdict where one of the ranks that hold a parameter has other values there."""

    def build(*args):
        stages = build_stages(*args)
        for found, parameter in stages.named_parameters():
            if found == name:
                local_part(parameter.detach())[:1].add_(0.1)
        return stages

    verifier.build_stages = build
    try:
        return compare(rank, config)
    finally:
        verifier.build_stages = build_stages


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("layers.3.mixer.q_proj.weight", "the output of layers.3.mixer (attention) is the first that differs"),
        ("layers.1.feed_forward.experts.stacked.up_proj", "the output of layers.1.feed_forward (moe) is the first that differs"),
        ("head.projection.weight", "the output of head is the first that differs"),
    ],
)
def test_a_damaged_stage(pool, name, where):
    """Each rank of a pipeline knows its own parts; together they know which is the first."""
    mesh = "{tp: 2, cp: 1, pp: 2, schedule: interleaved_1f1b, stages_per_rank: 2, sequence_parallel: true}"
    config = tiny_config(["precision=fp64", f"parallel={mesh}", "batch={sequences: 4, micro_steps: 2}"], 4)
    verdicts = pool.run(4, damaged, config, name)
    assert {verdict.first_difference.partition(":")[0] for verdict in verdicts} == {where}
    assert ("gradients", name) in {(over.quantity, over.name) for over in verdicts[0].over}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_below_fp64(pool, precision):
    """Both sides are measured against fp64, with its expert choices; bf16 would choose others for some tokens."""
    overrides = [f"precision={precision}", "parallel={tp: 2, cp: 2}", "data.documents=packed", "model.pattern=MEM-*E"]
    verdict = pool.run(4, compare, tiny_config(overrides, 4))[0]
    assert verdict.ok, verdict.over
    assert verdict.flips.of == 2 * 2 * 48
    least = {"fp32": 1e-8, "bf16": 1e-4}[precision]
    assert min(verdict.worst("gradients").error, verdict.worst_of_one_rank("gradients")) > least
    assert precision == "fp32" or max(verdict.flips.mesh, verdict.flips.one_rank) > 0
    case = to_json(verdict)
    check_case(case)
    assert case["flips"]["of"] == verdict.flips.of
    assert set(case["one_rank_error"]) == set(QUANTITIES)


def threads_after(rank, meshes):
    """Of this process, after the comparison of each mesh."""
    verifier, counts = Verifier(Environment(rank, 4, torch.device("cpu")), 4), []
    for mesh in meshes:
        verifier.verify(tiny_config(["precision=fp64", f"parallel={mesh}"], 4))
        counts.append(len(os.listdir("/proc/self/task")))
    return counts


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_meshes_end_with_their_threads(pool):
    """Each group of gloo has some, which wake up a hundred times a second: what a matrix took would grow with its square."""
    meshes = ["{tp: 2, cp: 2}", "{cp: 4}", "{tp: 4}", "{tp: 2, cp: 2}"]
    for first, *_, last in pool.run(4, threads_after, meshes):
        assert last == first


def test_choices_are_replayed():
    """A model goes by the choices that each micro-step is given, and counts the tokens that would have gone elsewhere."""
    config = tiny_config(["batch={sequences: 2, micro_steps: 2}"])
    micro_steps = draw_batch(config, 1).micro_steps(Share.all(), torch.device("cpu"))

    def run(attach, *args):
        alone = Alone(build_model(config.model, 0, torch.float64))
        seen = attach(alone.named_moes(), *args)
        return [alone.forward(micro_step._replace(labels=None)) for micro_step in micro_steps], seen

    reference, recorded = run(record_choices)
    chosen = {name: torch.stack(choices) for name, choices in recorded.items()}
    assert {tuple(choices.shape) for choices in chosen.values()} == {(2, 1, 48, 2)}
    same, flips = run(replay_choices, chosen)
    assert torch.equal(torch.stack(same), torch.stack(reference))
    assert set(flips.values()) == {0}
    # In the second micro-step the best expert of the first token gives its place to one that was not chosen.
    name = next(iter(chosen))
    others = chosen[name].clone()
    others[1, 0, 0, 0] = next(expert for expert in range(4) if expert not in others[1, 0, 0])
    found, flips = run(replay_choices, chosen | {name: others})
    assert torch.equal(found[0], reference[0])
    assert not torch.equal(found[1][0, 0], reference[1][0, 0])
    assert (flips[name, 0], flips[name, 1]) == (0, 1)


def test_differences():
    """Of the largest reference value; of an all-zero one the difference itself; what is not finite is within no limit."""
    cases = {
        "a": (torch.tensor([1.0, 4.5]), torch.tensor([1.0, 4.0])),
        "zero": (torch.tensor([0.25, 0.0]), torch.zeros(2)),
        "nan": (torch.tensor([torch.nan, 0.0]), torch.ones(2)),
        "both": (torch.tensor([torch.nan, 0.0]), torch.tensor([torch.nan, 0.0])),
    }
    found = Differences([("gradients", name) for name in (*cases, "nowhere")])
    for name, tensors in cases.items():
        found.add(("gradients", name), *tensors)
    errors = found.errors()["gradients"]
    assert (errors["a"], errors["zero"]) == (0.125, 0.25)
    for name in ("nan", "both", "nowhere"):
        assert not errors[name] <= 1e300
    with pytest.raises(ValueError, match="gradients of a"):
        found.add(("gradients", "a"), torch.ones(3), torch.ones(2))


def differences_of_parts(rank, shape):
    """Errors of DTensors that tp and FSDP have cut: of the values themselves, and with an element that is wrong on rank 3."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    whole = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    found = Differences([("parameters", name) for name in ("same", "wrong")])
    for name, added in (("same", 0.0), ("wrong", 0.5)):
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(distribute_tensor(whole, mesh["tp"], [Shard(0)]))
        weight = fully_shard(module, mesh=mesh["dp"]).weight.detach()
        if rank == 3:
            weight.to_local().view(-1)[-1] += added
        found.add(("parameters", name), weight, whole)
    return found.errors(torch.device("cpu"))["parameters"]


@pytest.mark.parametrize("shape", [(8,), (6, 5), (10, 2)])
def test_differences_of_sharded_tensors(pool, shape):
    """Each rank looks at its own part; uneven ones too."""
    for errors in pool.run(4, differences_of_parts, shape):
        assert errors["same"] == 0.0
        assert errors["wrong"] == 0.5 / torch.Size(shape).numel()


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 8, 16])
def test_packed_documents_hit_every_border(segments):
    rows = [pack(192, segments, row, np.random.default_rng(row)) for row in range(4)]
    assert len({tuple(row) for row in rows}) == 4
    borders = {segment * 192 // segments for segment in range(1, segments)}
    lengths = [end - start for row in rows for start, end in itertools.pairwise(row)]
    assert {0, 192} <= set(rows[0])
    assert lengths.count(1) > 8
    assert len(lengths) > 80
    assert max(lengths) >= 2 * 192 // (segments * -(-4 // segments))
    for border in borders:
        assert any(border in row and (border - 1 in row or border + 1 in row) for row in rows)
        assert any(start < border < end for row in rows for start, end in itertools.pairwise(row))


def test_labels_end_with_their_documents():
    batch = draw_batch(tiny_config(["data.documents=packed"]), 4)
    for ids, labels, boundaries in zip(batch.ids[0], batch.labels[0], batch.cu_seqlens[0], strict=True):
        for start, end in itertools.pairwise(boundaries):
            assert labels[end - 1] == IGNORED
            inside = labels[start : end - 1]
            assert ((inside == ids[start + 1 : end]) | (inside == IGNORED)).all()
    assert 0 < batch.labelled < batch.ids.numel()


def test_micro_steps_are_parts_of_the_batch():
    """Each has its own sequences, and the documents of these."""
    batch = draw_batch(tiny_config(["data.documents=packed", "batch={sequences: 4, micro_steps: 2}"]), 4)
    own = Share(Layout("contiguous", 2), cp=1, dp=1, dp_ranks=2)
    for number, micro_step in enumerate(batch.micro_steps(own, torch.device("cpu"))):
        assert torch.equal(micro_step.ids, batch.ids[number, 1:, 24:])
        assert torch.equal(micro_step.labels, batch.labels[number, 1:, 24:])
        assert micro_step.documents.cu_seqlens == (tuple(batch.cu_seqlens[number][1]),)
    assert len({str(row) for rows in batch.cu_seqlens for row in rows}) == 4


def test_degrees_that_are_left_open():
    """cp takes what the others leave, whatever the file says; chunks get shorter than segments."""
    assert plan_one("quickstart", [*TINY, "parallel.tp=2"], 8).configs[0].parallel.cp == 4
    plan = plan_one("quickstart", [*TINY, "parallel.cp=2", "parallel.layout=contiguous"], 8)
    assert (plan.configs[0].parallel.dp, plan.configs[0].batch.sequences, plan.segments) == (4, 8, 2)
    plan = plan_one("quickstart", [*TINY, "parallel.cp=4", "parallel.layout=zigzag", "precision=fp64"], 4)
    assert plan.configs[0].model.mamba2.chunk_size == 3
    assert "model.mamba2.chunk_size is 3 here, for segments of 6 tokens" in plan.notes[0]
    with pytest.raises(UserError, match="sequences"):
        plan_one("quickstart", [*TINY, "parallel.cp=1"], 4, 3)


def test_pipelines_get_micro_steps():
    interleaved = ["parallel.schedule=interleaved_1f1b", "parallel.stages_per_rank=2"]
    for overrides in ([], interleaved):
        (config,) = plan_one("quickstart", [*TINY, "parallel.pp=2", "parallel.tp=2", *overrides], 8).configs
        assert (config.parallel.cp, config.batch.sequences, config.batch.micro_steps) == (2, 4, 2)
    (config,) = plan_one("quickstart", [*TINY, "parallel.pp=2"], 4, 12, 6).configs
    assert (config.batch.sequences, config.batch.micro_steps) == (12, 6)
    with pytest.raises(UserError, match="batch.micro_steps is 1, allowed: at least one for each of the 2 stages"):
        plan_one("quickstart", [*TINY, "parallel.pp=2"], 4, 4, 1)
    with pytest.raises(UserError, match="parallel.pp gives .* on 4 ranks"):
        plan_one("quickstart", [*TINY, "parallel.pp=3"], 4)


def shapes(plan):
    """What each case of a plan is, without the axes."""
    found = {}
    for config in plan.configs:
        p = config.parallel
        if (p.strategy, p.attention, p.zero, p.replicate) == ("auto", "auto", 3, 1):
            found.setdefault((p.tp, p.cp, p.dp, p.pp, p.ep, p.schedule), []).append((p.layout, config.data.documents))
    return found


def test_matrix_has_every_mesh():
    plan = plan_matrix("quickstart", TINY, 8)
    expected = {
        (tp, cp, dp, pp, ep, schedule)
        for tp, cp, dp, pp in itertools.product((1, 2, 4, 8), repeat=4)
        for ep in (1, 2, 4)
        for schedule in ("1f1b", "interleaved_1f1b")
        if tp * cp * dp * pp == 8 and dp * cp % ep == 0
        # 4 heads, 4 layers.
        if tp <= 4 and pp * (2 if schedule == "interleaved_1f1b" else 1) <= 4 and (schedule == "1f1b" or pp > 1)
    }
    found = shapes(plan)
    assert set(found) == expected
    for (_, cp, *_), cases in found.items():
        layouts = ["contiguous", "zigzag"] if cp > 1 else ["contiguous"]
        assert sorted(cases) == sorted(itertools.product(layouts, ("single", "packed")))
    skipped = {(skip.mesh["tp"], skip.mesh["pp"], skip.mesh["ep"], skip.mesh["schedule"]) for skip in plan.skipped}
    assert {(8, 1, 1, "1f1b"), (1, 8, 1, "1f1b"), (1, 1, 8, "1f1b"), (2, 4, 1, "interleaved_1f1b")} <= skipped
    assert all("parallel." in skip.reason for skip in plan.skipped)
    # One after another, so that a mesh is built once.
    meshes = [(config.parallel.degrees(8), config.parallel.replicate) for config in plan.configs]
    assert len(list(itertools.groupby(meshes))) == len(set(meshes))


def test_matrix_has_every_way():
    """Of sharing activations out over tp, of passing states and keys over cp, of holding parameters over dp."""
    configs = plan_matrix("quickstart", TINY, 4).configs
    parallel = [config.parallel for config in configs]
    for mesh in {(p.degrees(4), p.schedule) for p in parallel if p.tp > 1}:
        both = {p.sequence_parallel for p in parallel if (p.degrees(4), p.schedule) == mesh}
        assert both == {False, True}
    whole = [p for p in parallel if p.cp == 4]
    for layout in ("contiguous", "zigzag"):
        assert {p.strategy for p in whole if p.layout == layout} == {"auto", "ring", "allgather", "doubling", "sliced"}
        assert {p.attention for p in whole if p.layout == layout} == {"auto", "ring", "allgather", "ulysses", "usp"}
    assert {(p.zero, p.replicate, p.ep) for p in parallel if p.dp == 4} >= {(2, 1, 1), (3, 2, 2)}
    assert {(p.tp, p.pp) for p in parallel if p.replicate == 2} == {(1, 1), (1, 2), (2, 1)}
    batches = {(c.parallel.pp, c.batch.sequences, c.batch.micro_steps) for c in configs}
    assert batches == {(1, 4, 1), (1, 8, 2), (2, 8, 2), (4, 16, 4)}
    assert {(c.batch.sequences, c.batch.micro_steps) for c in plan_matrix("quickstart", TINY, 4, 24, 6).configs} == {(24, 6)}
    few = plan_matrix("quickstart", TINY, 4, 4)
    assert {(c.batch.sequences, c.batch.micro_steps) for c in few.configs} == {(4, 1), (4, 2), (4, 4)}
    assert max(c.parallel.dp for c in few.configs if c.batch.micro_steps == 2) == 2
    assert "parallel.dp is 4, allowed: a divisor of a micro-step's sequences, 2" in {skip.reason for skip in few.skipped}
    with pytest.raises(
        UserError, match="no mesh of 4 ranks fits: batch.micro_steps is 2, allowed: a divisor of batch.sequences, 3"
    ):
        plan_matrix("quickstart", TINY, 4, 3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pp", "8", "--nproc", "8"], "parallel.pp gives 8 stages, allowed: at most one for each of the 4 layers"),
        (["--ep", "3", "--nproc", "3"], "parallel.ep is 3, allowed: a divisor of model.moe.experts, 4"),
        (["parallel.schedule=zero_bubble", "--nproc", "2"], "not zero-bubble schedules"),
        (["--matrix", "parallel.stages_per_rank=2"], "so parallel.stages_per_rank is not for you to give"),
        (["--matrix", "parallel={tp: 2}"], "so parallel is not for you to give"),
        (["--matrix", "parallel.replicate=2"], "so parallel.replicate is not for you to give"),
        (["--tp", "3", "--nproc", "3"], "parallel.tp is 3, which does not divide"),
        (["--layout", "spiral", "--nproc", "2"], "parallel.layout is 'spiral', allowed: 'contiguous' or 'zigzag'"),
        (["--matrix", "--cp", "2"], "--matrix compares every mesh, so parallel.cp is not for you to give"),
        (["--json", "/nowhere/out.json"], "--json /nowhere/out.json: cannot be written"),
    ],
)
def test_bad_input(options, message):
    done = CliRunner().invoke(app, ["verify", "quickstart", *options])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_json_is_checked_first(tmp_path):
    check_writable(tmp_path / "out.json")
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(tmp_path)


def baton_verify(tmp_path, *options, **environment):
    command = [sys.executable, "-P", "-m", "baton.launcher.cli", "verify", "quickstart", *TINY, *options]
    settings = {"COLUMNS": "160", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | settings,
        check=False,
    )
    return done, json.loads((tmp_path / "out.json").read_text())


@pytest.mark.slow
def test_the_command(tmp_path):
    """Every mesh of two ranks in one set of workers, which talk through the host as on one device."""
    options = ["--matrix", "--share-device", "--nproc", "2", "--micro-steps", "2"]
    done, written = baton_verify(tmp_path, *options, "model.pattern=M*E", "model.mamba2.groups=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert written["ok"]
    for case in written["cases"]:
        check_case(case)
        assert max(case["max_relative_error"].values()) <= 1e-10
    assert f"OK: {len(written['cases'])} comparisons, largest error" in done.stdout
    assert done.stderr.count(": ok, ") == len(written["cases"])


@pytest.mark.slow
def test_the_command_fails(tmp_path):
    """Workers that start with a broken exchange: one line says so, and nothing else goes wrong."""
    (tmp_path / "sitecustomize.py").write_text(
        "from baton.kernels.scan import LocalScan\n"
        "from baton.parallel.affine_scan import SequenceScan\n"
        "SequenceScan.start = lambda self, *args, **kwargs: LocalScan().start(*args, **kwargs)\n"
    )
    done, written = baton_verify(tmp_path, "--cp", "2", "model.pattern=M-M", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "verify FAILED: " in errors[0]
    assert "the output of layers.0.mixer (mamba2) is the first that differs" in errors[0]
    assert not written["ok"]
    assert written["cases"][0]["max_relative_error"]["gradients"] > 1e-10
    assert "layers.0.mixer" in written["cases"][0]["first_difference"]
