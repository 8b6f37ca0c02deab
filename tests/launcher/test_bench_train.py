"""`baton bench train`: what it measures, what it prints and keeps of that, and what it refuses."""

import json
import multiprocessing
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="transformers, the peer, is not installed: pip install -e .[dev]")
pytest.importorskip("mambapy", reason="mambapy, the peer's scan, is not installed: pip install -e .[dev]")

from baton.configs.errors import UserError
from baton.launcher.benchmarks import training
from baton.launcher.cli import app
from baton.models.hf import load_hf

MIB = 2**20


def run(*options):
    return CliRunner().invoke(app, ["bench", "train", *options])


def row(text, model):
    """The table's cells of one model."""
    (line,) = (line for line in text.splitlines() if line.startswith(f" {model} "))
    return line.split()


@pytest.fixture
def threads():
    """Two, until the command says otherwise; as before after the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_command(tmp_path, monkeypatch, threads):
    """The table and the file say the same, and both what was measured."""
    monkeypatch.setattr(training, "SECONDS", 0.01)
    file = tmp_path / "train.json"
    file.write_text("of an earlier run")
    result = run("--peer", "hf", "--model", "mamba2", "--tokens", "512", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]
    (found,) = json.loads(file.read_text())
    versions = {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()}
    assert found.items() >= {"model": "mamba2", "tokens": 512, "threads": 1, "steps": 3, **versions}.items()
    assert torch.get_num_threads() == 1
    theirs, ours = found["theirs_tokens_per_second"], found["ours_tokens_per_second"]
    assert found["ratio"] == pytest.approx(ours / theirs)
    assert found["loss_difference"] <= 1e-4
    # Their logits and the gradient of those; the inputs of our layers.
    assert 2 * 512 * 512 * 4 / MIB < found["theirs_mib"] < 300
    assert 4 * 512 * 64 * 4 / MIB < found["ours_mib"] < 300
    memory = [f"{found[f'{side}_mib']:.1f}" for side in ("theirs", "ours")]
    assert row(result.stdout, "mamba2") == ["mamba2", "512", f"{theirs:.0f}", f"{ours:.0f}", f"{found['ratio']:.2f}", *memory]
    assert f"mamba2, 512 tokens: losses agree to {found['loss_difference']:.1e}, 3 steps of each" in result.stdout
    assert f"cpu {found['cpu']}, threads 1, python {platform.python_version()}" in result.stdout


@pytest.mark.parametrize("name", training.MODELS)
def test_both_sides_train_one_model(name, tmp_path, monkeypatch):
    """Their losses agree over steps, as gradients and optimizers do, and each side's numbers are under its name."""
    losses = {}

    def alternate(steps):
        losses.update({side: [step() for _ in range(3)] for side, step in steps.items()})
        return {"theirs": [4.0, 1.0, 2.0], "ours": [0.5, 1.5, 0.25]}

    monkeypatch.setattr(training, "alternate", alternate)
    monkeypatch.setattr(training, "step_mib", lambda side, folder, tokens: {"theirs": 31.25, "ours": None}[side])
    training.save_model(name, tmp_path)
    found = training.compare(name, tmp_path, 100)
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-5)
    assert losses["ours"][2] < losses["ours"][1] < losses["ours"][0] - 0.05
    assert (found.theirs_tokens_per_second, found.ours_tokens_per_second, found.ratio) == (50, 200, 4)
    shown = [list(column.cells) for column in training.table([found]).columns]
    assert shown == [[name], ["100"], ["50"], ["200"], ["4.00"], ["31.2"], ["-"]]


@pytest.mark.parametrize("side", training.SIDES)
def test_step(side, tmp_path):
    """As plain AdamW does it; gradients are gone when the next one begins."""
    training.save_model("bamba", tmp_path)
    one, ids = training.Training(side, tmp_path), torch.randint(512, (1, 40))
    model, loss = training.SIDES[side](tmp_path)
    expected = loss(ids)
    expected.backward()
    torch.optim.AdamW(model.parameters(), foreach=False).step()
    assert one.step(ids) == expected.item()
    parameters = one.optimizer.param_groups[0]["params"]
    torch.testing.assert_close(parameters, list(model.parameters()))
    assert all(parameter.grad is None for parameter in parameters)


def test_jamba_has_its_auxiliary_loss_and_the_fast_scan(tmp_path):
    """What the library leaves out unless it is asked for it."""
    training.save_model("jamba", tmp_path)
    model, ids = load_hf(tmp_path), torch.randint(512, (1, 100))
    losses = model.loss(ids, ids)
    assert losses["loss"] > losses["cross_entropy"] * (1 + 2 * training.AGREEMENT)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["use_mambapy"]
    assert not written["use_cache"]


def test_sides_take_turns_until_each_has_enough(monkeypatch):
    """By a clock that only the steps move."""
    clock, order = [0.0], []

    def step(side, seconds):
        order.append(side)
        clock[0] += seconds

    monkeypatch.setattr(training, "perf_counter", lambda: clock[0])
    steps = {"theirs": lambda: step("theirs", 2.0), "ours": lambda: step("ours", 0.5)}
    assert training.alternate(steps) == {"theirs": [2.0] * 6, "ours": [0.5] * 6}
    assert order == ["theirs", "ours"] * 6
    slow = {"theirs": lambda: step("theirs", 60.0), "ours": lambda: step("ours", 20.0)}
    assert training.alternate(slow) == {"theirs": [60.0] * 3, "ours": [20.0] * 3}


def peak_of_three():
    """Of 64 MiB three times, one after another, where 100 MiB were there before and 300 MiB had been."""
    kept = torch.ones(100 * MIB // 4)
    torch.ones(300 * MIB // 4)

    def work():
        for _ in range(3):
            torch.ones(64 * MIB // 4)

    return training.peak_memory(work), kept.sum() > 0


def test_peak_memory():
    """What is held at once, neither what was before, nor what follows what has been freed.

    In a new process: one that has freed much may give that again, and is none the larger.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the kernel has no /proc/self/clear_refs")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        assert 60 * MIB < process.submit(peak_of_three).result(timeout=60)[0] < 80 * MIB


def test_no_peak_memory_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "Path", lambda _: tmp_path / "proc" / "clear_refs")
    assert training.peak_memory(list) is None


def die(*_):
    """As the kernel kills where memory is full."""
    os._exit(9)


def test_process_that_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "step_memory", die)
    with pytest.raises(UserError, match="ours, 64 tokens: the process that measured memory was killed; is there enough?"):
        training.step_mib("ours", tmp_path, 64)


@pytest.mark.parametrize("change", [3.0, float("nan")])
def test_other_weights_are_no_comparison(change, monkeypatch, tmp_path):
    """One layer's, on our side alone."""

    def changed(folder):
        model = load_hf(folder)
        weight = next(p for name, p in model.named_parameters() if name.endswith("out_proj.weight"))
        weight.data.mul_(change)
        return model

    monkeypatch.setattr(training, "load_hf", changed)
    file = tmp_path / "train.json"
    result = run("--peer", "hf", "--model", "mamba2", "--tokens", "64", "--json", str(file))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: mamba2, 64 tokens: the loss is ")
    assert result.stderr.endswith(" here, allowed: 0.0001 of it apart\n")
    assert result.stderr.count("\n") == 1
    assert not file.exists()


def test_missing_package(monkeypatch):
    def without_mambapy(name):
        if name == "mambapy":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(training, "version", without_mambapy)
    result = run("--peer", "hf")
    assert (result.exit_code, result.stderr) == (1, "error: mambapy is not installed; pip install baton-train[hf]\n")
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = run("--peer", "hf", "--model", "bamba")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: transformers cannot be imported: ")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--peer", "nemo"], "--peer is 'nemo', allowed: hf"),
        (["--peer", "hf", "--model", "mamba"], "--model is 'mamba', allowed: jamba, mamba2, bamba"),
        (["--peer", "hf", "--tokens", "2k"], "--tokens is '2k', allowed: numbers from 2 to 16777216 with commas between them"),
        (["--peer", "hf", "--tokens", "64,1"], "--tokens is '64,1', allowed: numbers from 2 to"),
        (["--peer", "hf", "--threads", "0"], "--threads is 0, allowed: 1 to "),
        (["--peer", "hf", "--threads", "1000000"], "--threads is 1000000, allowed: 1 to "),
        (["--peer", "hf", "--json", f"{__file__}/train.json"], f"--json {__file__}/train.json: cannot be written"),
    ],
)
def test_bad_input_is_one_line(options, says):
    result = run(*options)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {says}")
    assert result.stderr.count("\n") == 1


def test_no_peer_is_no_command():
    result = run("--model", "mamba2")
    assert result.exit_code == 2
    assert "--peer" in result.stderr
