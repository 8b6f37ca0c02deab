"""`baton convert`: what it writes, what it says, what it leaves behind; and runs that start from what it wrote."""

import functools
import json
import os
import shutil
import signal
import sys
import weakref

import pytest
import torch
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers", reason="transformers, the peer, is not installed: pip install -e .[dev]")

from models.hf_peers import build, config_of, read, save, tokens  # noqa: E402

from baton.configs.errors import UserError  # noqa: E402
from baton.configs.loading import ConfigError, load_config  # noqa: E402
from baton.launcher.checkpoints import tensors as checkpoint_tensors  # noqa: E402
from baton.launcher.checkpoints.contents import read_contents  # noqa: E402
from baton.launcher.cli import app  # noqa: E402
from baton.launcher.conversion.from_hf import convert_from_hf  # noqa: E402
from baton.launcher.conversion.to_hf import convert_to_hf  # noqa: E402
from baton.launcher.training.tokenizer import byte_tokenizer  # noqa: E402
from baton.models.hf import HFCheckpoint, load_hf  # noqa: E402
from baton.models.hf.files import TensorFiles  # noqa: E402
from helpers import error_of_command, relative_error, run_command  # noqa: E402


@pytest.fixture(scope="module")
def jamba(tmp_path_factory):
    """A tiny Jamba with a tokenizer, as users have it."""
    folder = save(build("jamba", vocab_size=260, eos_token_id=0), tmp_path_factory.mktemp("hf") / "jamba")
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def imported(jamba, tmp_path_factory):
    folder = tmp_path_factory.mktemp("baton") / "jamba"
    convert_from_hf(jamba, folder)
    return folder


run, error_of = (functools.partial(command, "convert") for command in (run_command, error_of_command))


def test_in_check_and_out(jamba, tmp_path):
    result = run("from-hf", jamba, tmp_path / "in")
    assert result.exit_code == 0
    assert f"jamba of 90,643 parameters (float32) -> {tmp_path / 'in'}" in result.stdout
    result = run("check", jamba, tmp_path / "in", "--json", tmp_path / "errors.json")
    assert result.exit_code == 0, result.stderr
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert [each["name"] for each in errors] == ["logits", "loss", "aux_loss", "92 gradients"]
    # Gradients by the command's own limit: two programs in fp32 round differently, on some CPUs by 1.1e-5.
    assert all(each["error"] <= (1e-4 if "gradients" in each["name"] else 1e-5) for each in errors)
    assert run("to-hf", tmp_path / "in", tmp_path / "out").exit_code == 0
    before, after = read(jamba), read(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert config_of(jamba) == config_of(tmp_path / "out")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (jamba / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    inspected = CliRunner().invoke(app, ["checkpoint", "inspect", str(tmp_path / "in")])
    assert "  step        0: 0 samples, 0 tokens" in inspected.stdout


def test_out_as_another_type_or_dtype(imported, tmp_path):
    assert "jamba: model.pattern" not in error_of("to-hf", imported, tmp_path / "no", "--type", "bamba")
    assert error_of("to-hf", imported, tmp_path / "no", "--type", "llama").startswith("error: --type is 'llama', allowed: jamba, ")
    assert error_of("to-hf", imported, tmp_path / "no", "--dtype", "int8") == "error: --dtype is 'int8', allowed: bf16, fp32"
    assert not (tmp_path / "no").exists()
    assert run("to-hf", imported, tmp_path / "bf16", "--dtype", "bf16").exit_code == 0
    dtypes = {name: tensor.dtype for name, tensor in read(tmp_path / "bf16").items()}
    exact = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert {name.rsplit(".", 1)[-1] for name in exact} == {"A_log", "D", "bias"}
    assert all("dt_proj" in name for name in exact if name.endswith("bias"))
    assert len(exact) < len(dtypes) / 4


def test_a_file_at_a_time_is_in_memory(jamba, tmp_path, monkeypatch):
    """What is read for one is gone when the next is begun; of 90643 numbers in all."""
    alive, most = weakref.WeakSet(), []
    reading = HFCheckpoint.read

    def watched(self, name):
        most.append(sum(storage.nbytes() for storage in alive))
        tensor = reading(self, name)
        alive.add(tensor.untyped_storage())
        return tensor

    monkeypatch.setattr(HFCheckpoint, "read", watched)
    monkeypatch.setattr(checkpoint_tensors, "FILE_BYTES", 40_000)
    source = convert_from_hf(jamba, tmp_path / "out")
    assert len(most) == len(source.ours)
    assert 33_000 < max(most) <= 40_000
    assert len([*tmp_path.glob("out/*.distcp")]) > 9
    assert load_config(tmp_path / "out" / "config.yaml").model == source.model
    reader = checkpoint_tensors.CheckpointTensors(read_contents(tmp_path / "out"))
    assert all(torch.equal(reader.read(name), reading(source, name)) for name in source.ours)


def test_check_against_a_file(jamba, imported, tmp_path, monkeypatch):
    """Written where transformers is, read where it is not; other tokens than those at random."""
    ids = tmp_path / "ids.txt"
    ids.write_text(" ".join(map(str, tokens(17, 1)[0][0].tolist())))
    reference = tmp_path / "reference.safetensors"
    assert run("check", jamba, imported, "--tokens", ids, "--write-reference", reference).exit_code == 0
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "transformers is not installed (pip install baton-train[hf])" in error_of("check", jamba, imported)
    result = run("check", jamba, imported, "--reference", reference)
    assert result.exit_code == 0, result.stderr
    assert "92 gradients" in result.stdout


def test_check_without_experts(tmp_path):
    """Whose loss has no part of a router."""
    dense = save(build("jamba", num_experts=1), tmp_path / "dense")
    assert run("from-hf", dense, tmp_path / "in").exit_code == 0
    result = run("check", dense, tmp_path / "in")
    assert result.exit_code == 0, result.stderr
    assert "aux_loss" not in result.stdout
    missing = tmp_path / "missing" / "reference.safetensors"
    assert error_of("check", dense, tmp_path / "in", "--write-reference", missing) == (
        f"error: {missing.parent} is no folder; allowed: a file in one that exists"
    )


def test_a_bad_end_is_known_before_tensors_are_read(jamba, tmp_path, monkeypatch):
    copy = shutil.copytree(jamba, tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps(config_of(jamba) | {"eos_token_id": 900}))
    monkeypatch.setattr(HFCheckpoint, "read", None)
    assert "eos_token_id is 900, allowed: a token of tokenizer.json" in error_of("from-hf", copy, tmp_path / "out")


def test_check_finds_what_differs(jamba, tmp_path):
    """One number of one tensor."""
    from safetensors.torch import save_file

    changed = save(build("jamba", vocab_size=260, eos_token_id=0), tmp_path / "changed")
    stored = read(changed)
    stored["model.layers.3.mamba.D"][5] += 0.1
    save_file(stored, changed / "model.safetensors", metadata={"format": "pt"})
    convert_from_hf(changed, tmp_path / "in")
    assert f"{tmp_path / 'in'} differs from {jamba}: logits " in error_of("check", jamba, tmp_path / "in")
    other = save(build("jamba", mamba_d_state=7), tmp_path / "other")
    convert_from_hf(other, tmp_path / "other-in")
    assert "is of another model than" in error_of("check", jamba, tmp_path / "other-in")


def test_bad_input_leaves_nothing(jamba, imported, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    assert error_of("from-hf", jamba, taken) == f"error: {taken} exists; allowed: a folder that does not"
    assert error_of("to-hf", imported, taken) == f"error: {taken} exists; allowed: a folder that does not"
    assert error_of("from-hf", taken, tmp_path / "out").startswith(f"error: {taken}/config.json: No such file")
    assert "no complete checkpoint" in error_of("to-hf", jamba, tmp_path / "out")
    (tmp_path / "ids.txt").write_text("1 2 900")
    both = ("--reference", tmp_path / "a", "--write-reference", tmp_path / "b")
    assert "--reference and --write-reference: allowed: one of them" in error_of("check", jamba, imported, *both)
    with pytest.raises(UserError, match="load_hf: dtype is torch.int8, allowed: torch.float64, "):
        load_hf(jamba, torch.int8)
    assert "allowed: two token ids and more, from 0 to 259" in error_of("check", jamba, imported, "--tokens", tmp_path / "ids.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.txt", "taken"]


def test_a_write_that_fails_leaves_nothing(jamba, tmp_path, monkeypatch):
    def broken(self, name):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HFCheckpoint, "read", broken)
    with pytest.raises(UserError, match="out: No space left on device"):
        convert_from_hf(jamba, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(jamba, imported, tmp_path, monkeypatch, number):
    """It waits for the tensor that is read; before and after, signals do what they did."""
    before = signal.getsignal(number)
    reading, read_so_far = TensorFiles.read, []

    def interrupted(self, name):
        os.kill(os.getpid(), number)
        read_so_far.append(name)
        return reading(self, name)

    monkeypatch.setattr(TensorFiles, "read", interrupted)
    with pytest.raises(SystemExit, match=str(128 + number)):
        convert_from_hf(jamba, tmp_path / "in")
    assert len(read_so_far) == 1
    monkeypatch.undo()
    own = checkpoint_tensors.CheckpointTensors.read
    monkeypatch.setattr(checkpoint_tensors.CheckpointTensors, "read", lambda *given: (os.kill(os.getpid(), number), own(*given))[1])
    with pytest.raises(SystemExit, match=str(128 + number)):
        convert_to_hf(imported, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) == before


def first_step(rank, file, overrides):
    """The losses of a run's first step, and the validation loss before it."""
    from baton.launcher.environment import Environment
    from baton.launcher.training.loop import Trainer

    config = load_config(file, overrides, torch.distributed.get_world_size())
    trainer = Trainer(config, Environment(rank, torch.distributed.get_world_size(), torch.device("cpu")))
    try:
        trainer.start()
    except UserError as error:
        return str(error)
    return trainer.validate(), trainer.step()["loss"]


def run_keys(tmp_path, text):
    keys = [f"run={tmp_path / 'run'}", f"data.folder={tmp_path / 'data'}", f"data.input=[{text}]", "data.context=32"]
    return [*keys, "data.documents=single", "evaluation.sequences=1", "data.validation_fraction=0.3", "logging.sample_tokens=0"]


def test_a_run_starts_from_it(pool, jamba, imported, tmp_path):
    """With its tokenizer: the first losses are those of the imported model, on one rank and on two."""
    from baton.launcher.training.data import Samples
    from baton.launcher.training.token_files import TokenStream, prepare

    text = tmp_path / "text.py"
    text.write_text("def add(a, b):\n    return a + b\n" * 10)
    keys = run_keys(tmp_path, text)
    config = load_config(imported / "config.yaml", keys, 1)
    prepare(config)
    ids = Samples(TokenStream(tmp_path / "data", "validation"), 32, None)[0][None]
    with torch.no_grad():
        expected = load_hf(jamba).loss(ids, ids)["cross_entropy"]
    alone = pool.run(1, first_step, imported / "config.yaml", keys)[0]
    assert relative_error(torch.tensor(alone[0]), expected) <= 1e-5
    for found in pool.run(2, first_step, imported / "config.yaml", [*keys, "parallel={cp: 2, layout: zigzag}"]):
        assert found == pytest.approx(alone, rel=1e-5)


def test_what_a_run_cannot_start_from(pool, imported, tmp_path):
    """Another model, another tokenizer; and a tokenizer's end that it does not have."""
    from baton.launcher.training.token_files import prepare

    text = tmp_path / "text.py"
    text.write_text("def add(a, b):\n    return a + b\n" * 10)
    keys = run_keys(tmp_path, text)
    with pytest.raises(UserError, match="data.tokenizer.end is '</s>', allowed: a token of "):
        prepare(load_config(imported / "config.yaml", [*keys, "data.tokenizer.end=</s>"], 1))
    prepare(load_config(imported / "config.yaml", keys, 1))
    (error,) = pool.run(1, first_step, imported / "config.yaml", [*keys, "model.mamba.state_dim=4"])
    assert error == f"{imported} is of another model: its model.mamba.state_dim is 6, the config's 4"
    early = [*keys, f"data.folder={tmp_path / 'never'}", "model.mamba.state_dim=4"]
    result = CliRunner().invoke(app, ["train", str(imported / "config.yaml"), *early, "--nproc", "1"])
    assert (result.exit_code, result.stderr) == (1, f"error: {error}\n")
    assert not (tmp_path / "never").exists()
    own = [f"data.folder={tmp_path / 'bpe'}", "data.tokenizer={kind: bpe}"]
    prepare(load_config(imported / "config.yaml", [*keys, *own], 1))
    (error,) = pool.run(1, first_step, imported / "config.yaml", [*keys, *own])
    assert error == f"{imported} was trained with another tokenizer than {tmp_path / 'bpe'}/tokenizer.json"
    with pytest.raises(ConfigError, match="run is .*, as start_from is; allowed: another folder"):
        load_config(imported / "config.yaml", [*keys, f"run={imported}"])
    assert load_config(imported / "config.yaml").run.resolve() != imported
    with pytest.raises(ConfigError, match="data.tokenizer.file is None, allowed with kind file: a file"):
        load_config("quickstart", ["data.tokenizer.kind=file"])


def two_runs(rank, file, overrides, run):
    """A run that starts from the import, saved; and one that starts from that, saved."""
    from baton.launcher.environment import Environment
    from baton.launcher.training.loop import Trainer

    for start, name in ((None, "a"), (run / "a", "b")):
        more = [f"run={run / name}", *([f"start_from={start}"] if start else [])]
        trainer = Trainer(load_config(file, [*overrides, *more], 1), Environment(rank, 1, torch.device("cpu")))
        trainer.start()
        trainer.step()
        trainer.save()
        trainer.checkpointer.finish()


def test_their_files_go_along(pool, jamba, imported, tmp_path):
    """From checkpoint to checkpoint, also of a run that started from a run; and no text is cut as the tokenizer's file says."""
    from baton.launcher.training.token_files import prepare
    from baton.launcher.training.tokenizer import load_tokenizer

    text = tmp_path / "text.py"
    text.write_text("def add(a, b):\n    return a + b\n" * 10)
    keys = run_keys(tmp_path, text)
    prepare(load_config(imported / "config.yaml", keys, 1))
    assert (tmp_path / "data" / "tokenizer.json").read_bytes() == (jamba / "tokenizer.json").read_bytes()
    pool.run(1, two_runs, imported / "config.yaml", keys, tmp_path)
    assert run("to-hf", tmp_path / "b", tmp_path / "out").exit_code == 0
    assert config_of(tmp_path / "out") == config_of(jamba)
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (jamba / "generation_config.json").read_bytes()
    cutting = byte_tokenizer()
    cutting.enable_truncation(3)
    cutting.enable_padding()
    cutting.save(str(tmp_path / "cutting.json"))
    encoded = load_tokenizer(tmp_path / "cutting.json").encode_batch(["a longer text", "b"])
    assert [len(each.ids) for each in encoded] == [13, 1]
