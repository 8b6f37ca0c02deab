"""`baton generate`: what it prints and keeps, over processes too, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

from baton.configs.errors import UserError
from baton.configs.schema import Config
from baton.launcher.checkpoints.contents import read_contents
from baton.launcher.checkpoints.manifest import find_checkpoint
from baton.launcher.checkpoints.tensors import CheckpointTensors
from baton.launcher.cli import app
from baton.launcher.environment import Environment
from baton.launcher.generation import run
from baton.launcher.generation.prompts import Prompt, Text, read_prompts
from baton.launcher.generation.request import Request
from baton.launcher.generation.run import run_generation
from baton.launcher.generation.weights import generation_config, load_model
from baton.launcher.training.loop import Trainer, run_training
from baton.launcher.training.run_folder import checkpoints
from baton.launcher.training.tokenizer import byte_tokenizer
from baton.models.hybrid import HybridModel
from helpers import small_run

LEARNT = [
    "schedule={steps: 60, warmup: 2}",
    "optimizer.lr=0.01",
    "checkpoint.every=60",
    "evaluation.every=60",
    "logging.sample_tokens=0",
]
"""Enough for text to come out, which no bytes at random are."""
PATTERN = ["model.pattern=M-m*E", "model.mamba.state_dim=4", "precision=fp64", "model.initializer_range=0.2", *LEARNT]


def train(rank, config):
    run_training(config, Environment(rank, dist.get_world_size(), torch.device("cpu")), False, None, None)


@pytest.fixture(scope="module")
def runs(pool, tmp_path_factory):
    """A run, and a short one of another seed."""
    folder = tmp_path_factory.mktemp("generate")
    text = folder / "text.txt"
    text.write_text("".join(f"{i} squared is {i * i}; " for i in range(700)))
    for name, more in (("one", []), ("other", ["seed=1", "schedule={steps: 2, warmup: 1}"])):
        pool.run(1, train, small_run(folder, [*PATTERN, *more], text, 1, name))
    return folder


def generate(*arguments, code=0):
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    return result


def error_of(*arguments):
    """The last line of a command that fails, which prints nothing else but notes."""
    result = generate(*arguments, code=1)
    assert result.stdout == ""
    return result.stderr.splitlines()[-1]


def expected(run, text, count):
    """By the whole sequence again for each token; without the tokenizer's end."""
    contents = read_contents(find_checkpoint(run))
    model = HybridModel(Config.model_validate(contents.config).model).double().eval()
    reader = CheckpointTensors(contents)
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text).ids
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.read(name))
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return text + tokenizer.decode(ids[-count:])


def test_a_continuation(runs):
    """That of the full forward, whatever the chunks, on stdout; what it took on stderr."""
    wanted = expected(runs / "one", "7 squared is ", 20)
    assert len(set(wanted)) > 8
    result = generate(runs / "one", "--prompt", "7 squared is ", "--max-new", 20)
    assert result.stdout == wanted + "\n"
    notes = result.stderr.splitlines()
    assert notes[-2].startswith("read 13 tokens in ")
    assert notes[-1].startswith("wrote 20 tokens in ")
    assert generate(runs / "one", "--prompt", "7 squared is ", "--max-new", 20, "--chunk", 3).stdout == wanted + "\n"
    assert generate(runs / "other", "--prompt", "7 squared is ", "--max-new", 20).stdout != wanted + "\n"


def test_several_prompts(runs, tmp_path):
    """Of text, of a file and of ids, of different lengths: each as alone."""
    (tmp_path / "long.txt").write_bytes(b"12 squared is 144; " * 4 + b"12 squared is 144;\r\n")
    (tmp_path / "ids.txt").write_text(" ".join(map(str, byte_tokenizer().encode("3 sq").ids)))
    options = ["--file", tmp_path / "long.txt", "--ids", tmp_path / "ids.txt", "--prompt", "9 squ", "--max-new", 8]
    shown = generate(runs / "one", *options).stdout
    text, file, ids = (
        expected(runs / "one", prompt, 8) for prompt in ("9 squ", "12 squared is 144; " * 4 + "12 squared is 144;\r\n", "3 sq")
    )
    assert shown == f"[1] {text}\n[2] {file[96:]}\n[3] {ids[4:]}\n"


def test_a_kept_state(runs, tmp_path):
    """Goes on as if all had been read at once, alone, with more text, and with several texts."""
    state = tmp_path / "state"
    first = generate(runs / "one", "--prompt", "5 squared is 25; ", "--max-new", 6, "--save-state", state).stdout
    assert first == expected(runs / "one", "5 squared is 25; ", 6) + "\n"
    again = generate(runs / "one", "--state", state, "--max-new", 6)
    assert "5 squared is 25; " + again.stdout == first
    assert not any(line.startswith("read") for line in again.stderr.splitlines())
    both = generate(runs / "one", "--state", state, "--prompt", "6 sq", "--prompt", "7 squared", "--max-new", 6).stdout
    texts = [expected(runs / "one", f"5 squared is 25; {more}", 6)[17:] for more in ("6 sq", "7 squared")]
    assert both == f"[1] {texts[0]}\n[2] {texts[1]}\n"
    generate(
        runs / "one",
        "--state",
        state,
        "--prompt",
        "6 sq",
        "--prompt",
        "7 squared",
        "--max-new",
        1,
        "--save-state",
        tmp_path / "two",
    )
    continued = generate(runs / "one", "--state", tmp_path / "two", "--max-new", 6).stdout
    assert continued == f"[1] {texts[0][4:]}\n[2] {texts[1][9:]}\n"
    wrong = error_of(runs / "one", "--state", tmp_path / "two", *["--prompt", "a"] * 3)
    assert wrong == f"error: --state {tmp_path / 'two'}: 2 sequences in it, 3 prompts; allowed: as many, or no prompt"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state", "two"]


@pytest.mark.slow
def test_over_processes(runs, tmp_path):
    """A prompt read over cp, a model shared out over tp: the text of one process, and nothing after it."""
    (tmp_path / "long.txt").write_text("12 squared is 144; " * 9)
    command = [
        sys.executable,
        "-P",
        "-m",
        "baton.launcher.cli",
        "generate",
        str(runs / "one"),
        "--file",
        str(tmp_path / "long.txt"),
    ]
    wanted = expected(runs / "one", "12 squared is 144; " * 9, 6)[171:] + "\n"
    for options in (["--cp=2", "--tp=2", "--max-new=6"], ["--cp=2", "--max-new=6", f"--save-state={tmp_path / 'state'}"]):
        settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *options], capture_output=True, text=True, timeout=120, env=os.environ | settings, check=False
        )
        assert (done.returncode, done.stdout) == (0, wanted), done.stderr
    assert generate(runs / "one", "--state", tmp_path / "state", "--max-new", 6).stdout == wanted


def test_the_end_of_a_document_ends_it(runs, monkeypatch):
    """Of each sequence by itself; what ends is not printed."""
    text = expected(runs / "one", "7 squared is ", 20)[13:]
    stop = byte_tokenizer().token_to_id("Ġ" if text[4] == " " else text[4])
    monkeypatch.setattr("baton.launcher.generation.run.find_end", lambda config, tokenizer: stop)
    shown = generate(runs / "one", "--prompt", "7 squared is ", "--max-new", 20)
    short = text[: text.index(text[4])]
    assert shown.stdout == f"7 squared is {short}\n"
    assert f"wrote {len(short)} tokens" in shown.stderr
    other = expected(runs / "one", "1", 20)[1:]
    other = other[: other.index(text[4])] if text[4] in other else other
    both = generate(runs / "one", "--prompt", "7 squared is ", "--prompt", "1", "--max-new", 20).stdout
    assert both == f"[1] 7 squared is {short}\n[2] 1{other}\n"


def test_a_text_begins_once(runs):
    """What a tokenizer puts before a text is not put before what follows a state."""
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    request = Request(runs, ["ab"], [], [], 1, 0.0, 1.0, 0, 8, None, None, 1, 1)
    ids = byte_tokenizer().encode("ab").ids
    assert read_prompts(request, tokenizer, 288) == [Prompt([0, *ids], "ab")]
    assert read_prompts(replace(request, state=runs), tokenizer, 288) == [Prompt(ids, "ab")]


def test_chance(runs):
    """A seed says what a temperature draws."""
    drawn = [
        generate(runs / "one", "--prompt", "7", "--max-new", 30, "--temperature", 1.5, "--top-p", 0.9, "--seed", seed).stdout
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_bad_input(runs, tmp_path):
    one, state, ids = runs / "one", tmp_path / "state", tmp_path / "ids"
    assert error_of(one) == "error: there is no prompt; allowed: --prompt, --file, --ids, or --state alone"
    assert error_of(one, "--prompt", "") == "error: --prompt is empty; allowed: a token and more"
    ids.write_text("1 2 288")
    assert error_of(one, "--ids", ids) == f"error: --ids {ids}: token 288 is beyond the vocabulary; allowed: 0 to 287"
    ids.write_text("1 two")
    assert error_of(one, "--ids", ids).startswith(f"error: --ids {ids}: no token ids: ")
    generate(one, "--prompt", "7", "--max-new", 1, "--save-state", state)
    whole = state.read_bytes()
    assert error_of(runs / "other", "--state", state) == f"error: --state {state}: is of another model, or of other weights of it"
    with safe_open(state, "pt") as opened:
        tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    for lengths, without in (("5", None), ("[]", None), ("[9]", None), ("[1]", "0/logits"), ("[1, 1]", None)):
        save_file({k: t for k, t in tensors.items() if k != without}, state, metadata | {"lengths": lengths})
        assert error_of(one, "--state", state).startswith(f"error: --state {state}: is damaged")
    state.write_bytes(whole[:-100])
    assert error_of(one, "--state", state).startswith(f"error: --state {state}: is damaged, or cannot be read: ")
    save_file({"a": torch.zeros(1)}, state)
    assert error_of(one, "--state", state) == f"error: --state {state}: is no state; --save-state writes one"
    assert error_of(one, "--state", tmp_path / "none").startswith(
        f"error: --state {tmp_path / 'none'}: is damaged, or cannot be read: "
    )
    assert error_of(tmp_path, "--prompt", "7").startswith(f"error: {tmp_path}: no complete checkpoint")
    assert error_of(tmp_path / "none", "--prompt", "7").startswith(
        f"error: {tmp_path / 'none'} is no folder; allowed: a checkpoint"
    )
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert error_of(tmp_path / "hf", "--prompt", "7").endswith("baton convert from-hf makes a checkpoint of it")
    shutil.rmtree(tmp_path / "hf")
    assert error_of(one, "--prompt", "7", "--seed", 3).startswith("error: --seed is 3, allowed with --temperature alone")
    assert error_of(one, "--prompt", "7", "--top-p", 0) == "error: --top-p is 0, allowed: more than 0, up to 1"
    assert error_of(one, "--prompt", "7", "--top-p", 0.5).startswith("error: --top-p is 0.5, allowed with --temperature alone")
    assert error_of(one, "--state", state, "--cp", 2).startswith("error: --cp is 2, allowed with --state: 1")
    assert error_of(one, "--prompt", "7", "--save-state", state, "--tp", 2).startswith("error: --tp is 2, allowed with --state")
    request = Request(one, ["7"], [], [], 1, 0.0, 1.0, 0, 8, None, None, 2, 1)
    with pytest.raises(UserError, match="--tp 2 x --cp 1 on 1 ranks; allowed: as many as their product"):
        run_generation(request, Environment(0, 1, torch.device("cpu")))
    nowhere = tmp_path / "no" / "state"
    assert error_of(one, "--prompt", "7", "--save-state", nowhere).endswith(
        f"{nowhere}: cannot be written; allowed: a file in a folder that exists and can be written"
    )
    assert "--save-state .: cannot be written" in error_of(one, "--prompt", "7", "--save-state", ".")
    assert "--prompt is no text: " in error_of(one, "--prompt", "\udcff")
    many = error_of(one, "--prompt", "7", "--max-new", 2**31)
    assert many.startswith(f"error: not enough memory for the prompts and --max-new {2**31}: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids", "state"]
    assert load_file(state).keys() == {"a"}


def test_a_prompt_of_fewer_tokens_than_experts(runs):
    """Is not what a batch of training has to be."""
    contents = read_contents(find_checkpoint(runs / "one"))
    model = contents.config["model"] | {"moe": contents.config["model"]["moe"] | {"experts": 64}}
    config = generation_config(replace(contents, config=contents.config | {"model": model}), 1, 2, 3)
    assert 64 <= config.data.context < 100
    assert (config.parallel.cp, config.parallel.layout, config.data.documents) == (2, "zigzag", "single")


def saved_twice(rank, config):
    """Checkpoints of a run in bf16, one small step apart."""
    trainer = Trainer(config, Environment(rank, 1, torch.device("cpu")))
    for _ in range(2):
        trainer.step()
        trainer.save()
        trainer.checkpointer.finish()


def test_a_state_of_the_step_before(pool, runs, tmp_path):
    """Is another model's, also in bf16, where a small step changes hardly a norm; and so is one in another precision."""
    steps = ["precision=bf16", "optimizer.lr=1e-6", "schedule={steps: 2, warmup: 1}", "checkpoint.every=1", "batch.micro_steps=1"]
    config = small_run(runs, [*PATTERN, *steps], runs / "text.txt", 1, "small")
    pool.run(1, saved_twice, config)
    first, second = checkpoints(config.run)
    state = tmp_path / "state"
    shown = generate(first, "--prompt", "7", "--max-new", 4, "--save-state", state).stdout
    assert "7" + generate(first, "--state", state, "--max-new", 4).stdout == shown
    assert error_of(second, "--state", state).endswith("is of another model, or of other weights of it")
    text = (first / "config.yaml").read_text()
    (first / "config.yaml").write_text(text.replace("precision: bf16", "precision: fp32"))
    manifest = json.loads((first / "manifest.json").read_text())
    manifest["files"]["config.yaml"] = (first / "config.yaml").stat().st_size
    (first / "manifest.json").write_text(json.dumps(manifest))
    assert error_of(first, "--state", state).endswith("is of another model, or of other weights of it")


def test_weights_that_are_not_finite(runs, monkeypatch):
    def broken(*given):
        model = load_model(*given)
        with torch.no_grad():
            model.head.norm.weight[3] = float("nan")
        return model

    monkeypatch.setattr(run, "load_model", broken)
    for options in ([], ["--temperature", 1]):
        wrong = generate(runs / "one", "--prompt", "7", *options, code=1).stderr.splitlines()[-1]
        assert wrong.endswith("step-00000060: logits that are not finite; are its weights?")


def test_text_grows_by_characters():
    """A character of several tokens comes whole, and as the prompt before it says."""
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("aé€ z").ids
    text = Text(tokenizer, Prompt(ids[:2], "a"))
    assert [text.add(token) for token in ids[2:]] == ["é", "", "", "€", " ", "z"]
    assert text.so_far == "aé€ z"
    marks = tokenizer.encode("a\ufffd\ufffdb").ids
    grown = Text(tokenizer, Prompt(marks[:1], "a"))
    assert "".join(grown.add(token) for token in marks[1:]) == "\ufffd\ufffdb"
    cut = Text(tokenizer, Prompt(ids[:1], "a"))
    assert [cut.add(token) for token in ids[1:5]] == ["", "é", "", ""]
    assert cut.finish() == "\ufffd"
    numbers = Text(None, Prompt([7]))
    assert numbers.add(5) + numbers.add(12) == "5 12 "
