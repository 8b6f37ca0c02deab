"""`baton verify`: finds nothing on a sound mesh, and on a broken one says where."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from baton.configs.errors import UserError
from baton.kernels.cross_entropy import IGNORED
from baton.kernels.scan import LocalScan
from baton.launcher.cli import app
from baton.launcher.verification.batch import Share, draw_batch, pack
from baton.launcher.verification.cases import plan_matrix, plan_one
from baton.launcher.verification.choices import record_choices, replay_choices
from baton.launcher.verification.differences import Differences
from baton.launcher.verification.report import check_writable, failure, write_json
from baton.launcher.verification.steps import Found
from baton.launcher.verification.verdict import QUANTITIES, to_json
from baton.models.hybrid import build_model
from baton.models.parallelize import build_sharded_model
from baton.parallel.affine_scan import SequenceScan
from baton.parallel.mesh import build_mesh
from helpers import TINY, compare, tiny_config


def check_case(case):
    """What the file of --json says of one comparison."""
    assert set(case["mesh"]) == {"tp", "cp", "pp", "ep", "dp"}
    assert {"layout", "strategy", "documents", "dtype", "ok", "max_relative_error", "worst"} <= set(case)
    assert set(case["max_relative_error"]) == {"loss", "logits", "gradients", "parameters"}
    assert set(case["worst"]) == {"gradients", "parameters"}


def compare_packed(rank, config):
    """The verdict, once a model of packed data has refused to run without knowing where documents lie."""
    model = build_sharded_model(config, build_mesh(config.parallel, "cpu"), torch.device("cpu"))
    inputs = draw_batch(config.model_copy(update={"data": config.data.model_copy(update={"documents": "single"})}), 4)
    share = Share.of(build_mesh(config.parallel, "cpu"), "zigzag")[0]
    with pytest.raises(ValueError, match="no documents came with it"):
        model(*inputs.inputs(share, torch.device("cpu")))
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
    assert written["cases"][0]["mesh"] == {"tp": 2, "cp": 2, "pp": 1, "ep": 1, "dp": 1}
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


def test_choices_are_replayed():
    """A model that is given choices goes by them, and counts the tokens that would have gone elsewhere."""
    config = tiny_config([])
    model = build_model(config.model, 0, torch.float64)
    batch = draw_batch(config, 1)
    inputs = batch.inputs(Share.all(), torch.device("cpu"))
    chosen = record_choices(model)
    reference = model(inputs.ids)
    others = [chosen[number].clone() for number in sorted(chosen)]
    # The best expert of the first token gives its place to one that was not chosen.
    others[0][0, 0] = next(expert for expert in range(4) if expert not in chosen[0][0])
    flips = replay_choices(model, others)
    assert not torch.equal(model(inputs.ids)[0, 0], reference[0, 0])
    assert flips[0] == 1
    model = build_model(config.model, 0, torch.float64)
    flips = replay_choices(model, [chosen[number].clone() for number in sorted(chosen)])
    assert torch.equal(model(inputs.ids), reference)
    assert set(flips.values()) == {0}


def test_differences():
    """Of the largest reference value; of an all-zero one the difference itself; what is not finite is within no limit."""
    found = Differences()
    found.add(Found("gradients", "a", torch.tensor([1.0, 4.5])), torch.tensor([1.0, 4.0]))
    found.add(Found("gradients", "zero", torch.tensor([0.25, 0.0])), torch.zeros(2))
    found.add(Found("gradients", "nan", torch.tensor([torch.nan, 0.0])), torch.ones(2))
    found.add(Found("gradients", "both", torch.tensor([torch.nan, 0.0])), torch.tensor([torch.nan, 0.0]))
    errors = found.errors(over_ranks=False)["gradients"]
    assert errors["a"] == 0.125
    assert errors["zero"] == 0.25
    assert not errors["nan"] <= 1e300
    assert not errors["both"] <= 1e300
    with pytest.raises(ValueError, match="gradients of a"):
        found.add(Found("gradients", "a", torch.ones(3)), torch.ones(2))


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 8, 16])
def test_packed_documents_hit_every_border(segments):
    rows = [pack(192, segments, row, np.random.default_rng(row)) for row in range(4)]
    assert len({tuple(row) for row in rows}) == 4
    borders = {segment * 192 // segments for segment in range(1, segments)}
    lengths = [end - start for row in rows for start, end in pairwise(row)]
    assert {0, 192} <= set(rows[0])
    assert lengths.count(1) > 8
    assert len(lengths) > 80
    assert max(lengths) >= 2 * 192 // (segments * -(-4 // segments))
    for border in borders:
        assert any(border in row and (border - 1 in row or border + 1 in row) for row in rows)
        assert any(start < border < end for row in rows for start, end in pairwise(row))


def test_labels_end_with_their_documents():
    batch = draw_batch(tiny_config(["data.documents=packed"]), 4)
    for ids, labels, boundaries in zip(batch.ids, batch.labels, batch.cu_seqlens, strict=True):
        for start, end in pairwise(boundaries):
            assert labels[end - 1] == IGNORED
            inside = labels[start : end - 1]
            assert ((inside == ids[start + 1 : end]) | (inside == IGNORED)).all()
    assert 0 < batch.labelled < batch.ids.numel()


def test_degrees_that_are_left_open():
    """cp takes what the others leave, whatever the file says; chunks get shorter than segments."""
    assert plan_one("quickstart", [*TINY, "parallel.tp=2"], 8, None).configs[0].parallel.cp == 4
    plan = plan_one("quickstart", [*TINY, "parallel.cp=2", "parallel.layout=contiguous"], 8, None)
    assert (plan.configs[0].parallel.dp, plan.configs[0].batch.sequences, plan.segments) == (4, 8, 2)
    plan = plan_one("quickstart", [*TINY, "parallel.cp=4", "parallel.layout=zigzag", "precision=fp64"], 4, None)
    assert plan.configs[0].model.mamba2.chunk_size == 3
    assert "model.mamba2.chunk_size is 3 here, for segments of 6 tokens" in plan.notes[0]
    with pytest.raises(UserError, match="sequences"):
        plan_one("quickstart", [*TINY, "parallel.cp=1"], 4, 3)


def test_matrix_has_every_mesh():
    plan = plan_matrix("quickstart", TINY, 4, None)
    meshes = {(c.parallel.tp, c.parallel.cp, c.parallel.dp) for c in plan.configs}
    assert meshes == {(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)}
    for documents in ("single", "packed"):
        whole = [c.parallel for c in plan.configs if c.parallel.cp == 4 and c.data.documents == documents]
        for layout in ("contiguous", "zigzag"):
            assert {p.strategy for p in whole if p.layout == layout} == {"auto", "ring", "allgather", "doubling", "sliced"}
            assert {p.attention for p in whole if p.layout == layout} == {"auto", "ring", "allgather", "ulysses", "usp"}
    assert {c.batch.sequences for c in plan.configs} == {4}
    skipped = plan_matrix("quickstart", [*TINY, "data.context=36"], 8, None).skipped
    assert {(s.mesh["tp"], s.mesh["cp"], s.layout) for s in skipped} >= {
        (8, 1, "contiguous"),
        (1, 8, "contiguous"),
        (1, 8, "zigzag"),
    }
    assert all("parallel." in s.reason for s in skipped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pp", "2"], "parallel.pp is 2: degrees beyond 1 on this axis are not available yet"),
        (["--ep", "2"], "parallel.ep is 2: degrees beyond 1 on this axis are not available yet"),
        (["--tp", "3", "--nproc", "3"], "parallel.tp is 3, which does not divide"),
        (["--layout", "spiral"], "parallel.layout is 'spiral', allowed: 'contiguous' or 'zigzag'"),
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


def test_the_command(tmp_path):
    """Every mesh of two ranks in one set of workers, which talk through the host as on one device."""
    done, written = baton_verify(
        tmp_path, "--matrix", "--share-device", "--nproc", "2", "model.pattern=M*E", "model.mamba2.groups=1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert written["ok"]
    for case in written["cases"]:
        check_case(case)
        assert max(case["max_relative_error"].values()) <= 1e-10
    assert f"OK: {len(written['cases'])} comparisons, largest error" in done.stdout
    assert done.stderr.count(": ok, ") == len(written["cases"])


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
