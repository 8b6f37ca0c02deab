"""`baton bench kernels`: the static model against the real launches, what is printed and kept of measurements, and bad input."""

import json
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import interpreter
from baton.configs.errors import UserError
from baton.kernels import dispatch
from baton.kernels.cross_entropy.op import CHUNK_BYTES
from baton.kernels.launches import Launch, record
from baton.launcher.benchmarks import kernels, peers
from baton.launcher.benchmarks.kernel_cases import (
    CASES,
    SSD,
    AddRMSNorm,
    Conv,
    CrossEntropy,
    GatedNorm,
    MoE,
    RMSNorm,
    SelectiveScan,
    SwiGLU,
    differentiated,
)
from baton.launcher.benchmarks.kernel_model import MODELS, costs
from baton.launcher.cli import app
from helpers import DEVICE

README = Path(__file__).resolve().parents[2] / "docs" / "performance" / "README.md"

SMALL = [
    SSD(200, heads=6, head_dim=32, groups=2, state_dim=16),
    SelectiveScan(100, channels=72, state_dim=4),
    Conv(100, channels=70),
    RMSNorm(50, channels=60),
    AddRMSNorm(50, channels=60),
    GatedNorm(50, channels=64),
    CrossEntropy(300, channels=16, vocabulary=50),
    SwiGLU(30, hidden=70),
    MoE(33, channels=16, hidden=20, experts=4),
]
"""One of each, ragged, and small enough to run in the interpreter."""
OTHERS = [
    SSD(8192),
    SSD(700, torch.float32, heads=4, head_dim=32, state_dim=256),
    SelectiveScan(8192),
    SelectiveScan(128, torch.float32, channels=64),
    Conv(100, torch.float32, channels=70),
    RMSNorm(9, torch.float32, channels=6000),
    GatedNorm(5000, channels=5120),
    CrossEntropy(40000, vocabulary=32768),
    CrossEntropy(50, torch.float32, channels=16, vocabulary=40),
    SwiGLU(8192),
    MoE(8192),
]
"""Counted only."""


@pytest.fixture(autouse=True)
def _without_a_device(monkeypatch):
    """Tensors of shapes alone are cut into chunks as on a GPU, and go to the kernels also where there is one."""
    monkeypatch.setitem(CHUNK_BYTES, "meta", CHUNK_BYTES["cuda"])
    monkeypatch.setattr(dispatch, "INTERPRETED", True)


def launches(case, device, execute):
    """Forward's and backward's."""
    with dispatch.chosen("triton"):
        operands = case.operands(torch.device(device))
        leaves = differentiated(operands)
        with record(execute) as forward:
            results = case.call(*operands)
        gradients = [torch.ones_like(result) for result in results]
        with record(execute) as backward:
            torch.autograd.grad(results, leaves, gradients)
    return forward, backward


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_model_has_the_real_launches(case):
    """Executed, and counted without executing."""
    modelled = costs(case)
    expected = modelled.forward.launches, modelled.backward.launches
    assert launches(case, "meta", execute=False) == expected
    assert launches(case, DEVICE, execute=True) == expected


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: f"{case.name} {case.tokens} {case.dtype}")
def test_the_model_has_the_launches_at_other_sizes(case):
    modelled = costs(case)
    assert launches(case, "meta", execute=False) == (modelled.forward.launches, modelled.backward.launches)


def test_every_case_has_a_model():
    assert list(MODELS) == list(CASES) == [case.name for case in SMALL]


def test_ssd_at_262144_tokens():
    """The limits of the kernels' design, by the launches themselves."""
    forward, backward = launches(SSD(262144), "meta", execute=False)
    assert costs(SSD(262144)) == (
        costs(SSD(262144)).forward._replace(launches=forward),
        costs(SSD(262144)).backward._replace(launches=backward),
    )
    assert len(forward) <= 5
    assert sum(launch.bytes for launch in forward) <= 10.5e9
    assert len(backward) <= 9
    assert sum(launch.bytes for launch in backward) <= 37e9


def test_windows_of_the_selective_scan():
    """A window's launch counts with its own part: as many launches as there are, and fewer bytes than tensors are passed."""
    case = SelectiveScan(65536)
    _, backward = launches(case, "meta", execute=False)
    modelled = costs(case).backward
    assert [launch.name for launch in backward] == [launch.name for launch in modelled.launches]
    assert Counter(launch.name for launch in backward)["main_grads_kernel"] > 1
    assert modelled.bytes < sum(launch.bytes for launch in backward)


@pytest.mark.skipif(not interpreter.INTERPRETED, reason="counts the products that the interpreter computes")
def test_flops_of_ssd(monkeypatch):
    """The products of every program, whatever they are for."""
    done = Counter()
    dot = interpreter.builder.create_dot

    def counting(a, b, *rest):
        done["flops"] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(a, b, *rest)

    monkeypatch.setattr(interpreter.builder, "create_dot", counting)
    case = SSD(200, heads=6, head_dim=32, groups=2, state_dim=16)
    launches(case, DEVICE, execute=True)
    assert done["flops"] == costs(case).forward.flops + costs(case).backward.flops


def test_bytes_of_operations():
    """Views and memory that is only taken are no launches; what is changed in place counts twice, what is overwritten once."""
    x, y = torch.ones(4, 6), torch.ones(6)
    with record() as counted:
        x[:, :3].t().reshape(3, 4)[None]
        torch.empty_like(x)
        x.add_(y)
        x.copy_(y)
        torch.mm(x.t(), x, out=torch.empty(6, 6))
        x.to(torch.bfloat16)
        x.contiguous()
        x.new_zeros(5)
    assert counted == [
        Launch("aten::add_", (24 + 24 + 6) * 4),
        Launch("aten::copy_", (24 + 6) * 4),
        Launch("aten::mm", (24 + 24 + 36) * 4),
        Launch("aten::_to_copy", 24 * 4 + 24 * 2),
        Launch("aten::new_zeros", 5 * 4),
    ]


def run(*options):
    return CliRunner().invoke(app, ["bench", "kernels", *options])


def rows(text):
    """{(operation, tokens, direction): cells}"""
    cells = [line.split() for line in text.splitlines()]
    return {tuple(row[:3]): row[3:] for row in cells if row and row[0] in CASES}


def test_printed_model():
    result = run("--model", "--op", "ssd", "--op", "swiglu", "--tokens", "8192,262144")
    assert result.exit_code == 0, result.output
    assert "at an assumed 4.3 TB/s and 790 TFLOP/s" in result.stdout
    printed = rows(result.stdout)
    assert [place[:2] for place in printed][::2] == [(op, n) for op in ("ssd", "swiglu") for n in ("8192", "262144")]
    modelled = costs(SSD(262144))
    *_, gigabytes, least, teraflops, milliseconds = printed["ssd", "262144", "backward"]
    assert float(gigabytes) == pytest.approx(modelled.backward.bytes / 1e9, rel=6e-3)
    assert float(teraflops) == pytest.approx(modelled.backward.flops / 1e12, rel=6e-3)
    assert float(milliseconds) == pytest.approx(modelled.backward.bytes / 4.3e9, rel=6e-3)
    assert float(printed["ssd", "262144", "forward"][-3]) + float(least) == pytest.approx(14, rel=0.01)
    counted = [line.split() for line in result.stdout.splitlines() if "mamba_ssm" in line]
    assert counted == [["mamba_ssm", "5", "17.5", "4.07"], ["mamba_ssm", "14", "+", "23", "60.8", "14.1"]]


def test_documented_model():
    """The table in the documents is the one that is printed now."""
    printed = run("--model", "--op", "ssd").stdout
    lines = [line.rstrip() for line in printed.splitlines() if line.strip()]
    documented = [line.rstrip() for line in README.read_text().splitlines() if line.strip()]
    start = documented.index(lines[0])
    assert documented[start : start + len(lines)] == lines


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--op", "attention"], "--op is 'attention', allowed: ssd, selective_scan, conv,"),
        (["--tokens", "8192,many"], "--tokens is '8192,many', allowed: numbers from 1 to 16777216"),
        (["--tokens", "0"], "--tokens is '0', allowed"),
        (["--tokens", "9" * 5000], "allowed: numbers from 1"),
        (["--peers", "nowhere"], "--peers is nowhere, which is no folder"),
        (["--model", "--json", "numbers.json"], "--json measures, which --model does not"),
        (["--model", "--quick"], "--quick measures, which --model does not"),
        ([], "finds no GPU, allowed: a CUDA or ROCm device, or --model, which needs none"),
    ],
)
def test_bad_input_is_one_line(options, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(*options)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


def measured(monkeypatch, capsys, file, times, cases, others=()):
    """Measures with these instead of times -> what was printed, and what was kept."""
    outcomes = iter(times)

    def median(call, cache, most):
        call()
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome, most

    monkeypatch.setattr(kernels, "median", median)
    report = kernels.Report(file, {"gpu": "none"}, kernels.Roofline(1e12, 1e15))
    try:
        kernels.measure(report, kernels.Runs(DEVICE, time.monotonic() + 100, 3), cases, list(others))
        error = None
    except UserError as raised:
        error = str(raised)
    assert next(outcomes, None) is None
    return capsys.readouterr().out, json.loads(file.read_text()), error


def test_measurements(monkeypatch, capsys, tmp_path):
    """Times become rates by the model's counts; what failed or was left out says why; the slower kernel is named."""
    cases = [SwiGLU(8, hidden=64), SwiGLU(16, hidden=64)]
    times = [2.0, 3.0, 1.0, 4000.0, 4.0, torch.OutOfMemoryError(), 8.0]
    monkeypatch.setattr(kernels, "table", lambda measurements: "")
    out, kept, error = measured(monkeypatch, capsys, tmp_path / "numbers.json", times, cases)
    assert error is None
    assert kept["gpu"] == "none"
    assert kept["roofline"] == {"bandwidth": 1e12, "flops": 1e15}
    lines = {(m["tokens"], m["direction"], m["implementation"]): m for m in kept["measurements"]}
    assert len(lines) == len(kept["measurements"]) == 8
    cost = costs(cases[0])
    both = lines[8, "forward+backward", "triton"]
    assert both["gigabytes"] == (cost.forward.bytes + cost.backward.bytes) / 1e9
    assert both["gigabytes_per_second"] == pytest.approx(both["gigabytes"] / 3e-3)
    assert both["roofline"] == pytest.approx(both["gigabytes"] * 1e9 / 1e12 / 3e-3)
    assert lines[8, "forward", "reference"]["roofline"] is None
    assert lines[16, "forward+backward", "triton"]["note"] == "out of memory"
    assert lines[16, "forward+backward", "reference"]["note"] == "skipped: 8 tokens took 4000 ms"
    assert "swiglu 16 forward+backward, triton: out of memory\n" in out
    assert "Slower than reference: swiglu 8 forward, 2 ms against 1 ms\n" in out
    assert out.count("Slower than") == 1


def test_a_failure_and_a_peer(monkeypatch, capsys, tmp_path):
    """The rest is still measured, and the command fails at its end."""
    peer = peers.Peer("other", "rms_norm", lambda operands: [t.detach().clone() for t in operands], lambda x, w: (x * w,))
    times = [RuntimeError("broken\nbadly"), 3.0, 5.0, 6.0, 7.0, 9.0]
    monkeypatch.setattr(kernels.console, "width", 150)
    out, kept, error = measured(monkeypatch, capsys, tmp_path / "numbers.json", times, [RMSNorm(8, channels=64)], [peer])
    assert error == "1 of our kernels' measurements failed, as printed above"
    assert [m["milliseconds"] for m in kept["measurements"]] == [None, 3.0, 5.0, 6.0, 7.0, 9.0]
    assert "rms_norm 8 forward, triton: failed: RuntimeError: broken\n" in out
    shown = rows(out[out.index(" operation") :])
    assert shown["rms_norm", "8", "forward"] == ["failed", "5", "7"]
    assert shown["rms_norm", "8", "forward+backward"][-4:] == ["6", "(2.00x)", "9", "(3.00x)"]
    assert "No kernel slower than its PyTorch reference in 1 comparisons\n" in out


def test_peers_are_imported_without_their_package(monkeypatch, tmp_path):
    """As mamba_ssm without its extensions; what is not there at all is named."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mamba_ssm", "fla")]:
        monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / "mamba_ssm" / "ops" / "triton"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import an_extension_that_was_not_built")
    scan = "from mamba_ssm.ops import triton\ndef mamba_chunk_scan_combined(x, *rest, dt_softplus, **more):\n    return x * 2\n"
    (folder / "ssd_combined.py").write_text(scan)
    found, missing = peers.find(tmp_path)
    assert [peer.name for peer in found] == ["mamba_ssm"]
    assert missing == ["fla is left out: ModuleNotFoundError: No module named 'fla'"]
    operands = SSD(4, heads=2, head_dim=4, state_dim=4).operands(torch.device("cpu"))
    assert torch.equal(found[0].call(*found[0].prepare(operands))[0], operands[0] * 2)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        del sys.modules[name]


def test_operands_of_simple_gla():
    """Its recurrence, token by token, is that of ssd without D."""
    case = SSD(20, torch.float32, heads=4, head_dim=4, groups=2, state_dim=3)
    operands = case.operands(torch.device("cpu"))
    (y,) = case.call(*operands[:5], None, operands[6])
    q, k, v, g = (t[0] for t in peers._simple_gla(operands))
    state, outputs = torch.zeros(4, 3, 4), []
    for t in range(20):
        state = g[t].exp()[:, None, None] * state + k[t][:, :, None] * v[t][:, None]
        outputs.append((q[t][:, :, None] * state).sum(1))
    torch.testing.assert_close(torch.stack(outputs), y[0], rtol=1e-4, atol=1e-4)
