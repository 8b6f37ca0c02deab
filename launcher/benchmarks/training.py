"""Trains the weights of small models by Hugging Face's code and by ours, in one run on the CPU, and compares speed and memory."""

import multiprocessing
import platform
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from ...configs.errors import UserError
from ...models.hf import load_hf
from .machine import cpu_name, write_rows
from .report import console

LENGTHS = [2048, 8192]
SECONDS = 3.0
"""Of measured steps that each side has at least."""
STEPS = 3
"""Measured of each side at least, however long they take."""
AGREEMENT = 1e-4
"""Of the two losses, relative, at most: it is one model."""
WARM_UP = 64
"""Tokens of the step before the one whose memory is measured."""
VOCABULARY = 512

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "use_cache": False}
FEED_FORWARD = {"intermediate_size": 224, "num_hidden_layers": 8}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "jamba": SIZES
    | FEED_FORWARD
    | ATTENTION
    | {"attn_layer_period": 8, "attn_layer_offset": 4}
    | {"expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2}
    | {"output_router_logits": True, "use_mambapy": True},
    "mamba2": SIZES | {"num_hidden_layers": 4, "num_heads": 2, "head_dim": 64, "state_size": 128, "n_groups": 1, "chunk_size": 64},
    "bamba": SIZES
    | FEED_FORWARD
    | ATTENTION
    | {"attn_layer_indices": [4], "mamba_n_heads": 2, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_chunk_size": 64},
}
"""By model_type the sizes, by the keys of config.json: narrow and shallow, with the published models' heads and states of Mamba,
feed-forwards and share of attention. Theirs keeps no cache, and runs mambapy's scan where it has a choice."""

Loss = Callable[[Tensor], Tensor]


@dataclass
class Comparison:
    """One model at one length."""

    model: str
    tokens: int
    theirs_tokens_per_second: float
    ours_tokens_per_second: float
    ratio: float
    """Ours over theirs."""
    theirs_mib: float | None
    """Of a step's memory at most, beyond what was there before; None where the kernel does not tell."""
    ours_mib: float | None
    loss_difference: float
    """Relative, before the first step."""
    steps: int
    """Measured of each."""

    def __str__(self) -> str:
        return f"{self.model}, {self.tokens} tokens: losses agree to {self.loss_difference:.1e}, {self.steps} steps of each"


def bench_training(names: list[str], lengths: list[int], threads: int, file: Path | None) -> None:
    """Prints what was compared and a table, and writes it as JSON. Raises UserError."""
    machine = _machine(names, threads)
    torch.set_num_threads(threads)
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), soft_wrap=True)
    comparisons: list[Comparison] = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            save_model(name, Path(folder))
            for tokens in lengths:
                comparisons.append(compare(name, Path(folder), tokens))
                console.print(str(comparisons[-1]), soft_wrap=True)
    console.print(table(comparisons))
    if file is not None:
        write_rows(file, [asdict(comparison) | machine for comparison in comparisons])


def save_model(name: str, folder: Path) -> None:
    """Writes the model, random as theirs begins, in fp32."""
    transformers = _transformers()
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **MODELS[name])
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def compare(name: str, folder: Path, tokens: int) -> Comparison:
    """Trains the folder's model on both sides. Raises UserError where their first losses differ."""
    ids = _ids(tokens)
    trainings = {side: Training(side, folder) for side in SIDES}
    losses = {side: training.step(ids) for side, training in trainings.items()}
    difference = _difference(f"{name}, {tokens} tokens", **losses)
    seconds = alternate({side: partial(training.step, ids) for side, training in trainings.items()})
    speeds = {side: tokens / median(times) for side, times in seconds.items()}
    memory = {side: step_mib(side, folder, tokens) for side in SIDES}
    return Comparison(
        name,
        tokens,
        theirs_tokens_per_second=speeds["theirs"],
        ours_tokens_per_second=speeds["ours"],
        ratio=speeds["ours"] / speeds["theirs"],
        theirs_mib=memory["theirs"],
        ours_mib=memory["ours"],
        loss_difference=difference,
        steps=len(seconds["ours"]),
    )


class Training:
    """A model in training on one side: theirs or ours."""

    def __init__(self, side: str, folder: Path) -> None:
        model, self.loss = SIDES[side](folder)
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(self, ids: Tensor) -> float:
        """One step on ids [1, l] -> the loss before it."""
        loss = self.loss(ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def _theirs(folder: Path) -> tuple[nn.Module, Loss]:
    model = _transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    return model, lambda ids: model(input_ids=ids, labels=ids).loss


def _ours(folder: Path) -> tuple[nn.Module, Loss]:
    model = load_hf(folder)
    return model, lambda ids: model.loss(ids, ids)["loss"]


SIDES = {"theirs": _theirs, "ours": _ours}


def alternate(steps: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each one's steps. They take turns, so that whatever else the machine does falls on all."""
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    while any(len(times) < STEPS or sum(times) < SECONDS for times in seconds.values()):
        for side, step in steps.items():
            start = perf_counter()
            step()
            seconds[side].append(perf_counter() - start)
    return seconds


def step_mib(side: str, folder: Path, tokens: int) -> float | None:
    """A step's memory by a process of its own. Raises UserError where that dies."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peak = pool.submit(step_memory, side, folder, tokens, torch.get_num_threads()).result()
    except BrokenProcessPool:
        raise UserError(f"{side}, {tokens} tokens: the process that measured memory was killed; is there enough?") from None
    return None if peak is None else peak / 2**20


def step_memory(side: str, folder: Path, tokens: int, threads: int) -> int | None:
    """Bytes of the second step, which no longer makes the optimizer's state. For a process of its own."""
    torch.set_num_threads(threads)
    training, ids = Training(side, folder), _ids(tokens)
    training.step(_ids(WARM_UP))
    return peak_memory(partial(training.step, ids))


def peak_memory(work: Callable[[], object]) -> int | None:
    """Bytes that the process held during the work, at most, beyond those before it; None where the kernel does not tell."""
    try:
        # Sets the kernel's peak (VmHWM) to what there is now.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def _difference(where: str, theirs: float, ours: float) -> float:
    """Of the losses, relative to theirs. Raises UserError."""
    difference = abs(ours - theirs) / abs(theirs)
    # Also where it is nan.
    if not difference <= AGREEMENT:
        raise UserError(f"{where}: the loss is {theirs:.8g} there and {ours:.8g} here, allowed: {AGREEMENT:g} of it apart")
    return difference


def _ids(tokens: int) -> Tensor:
    """At random, but always the same: [1, tokens]."""
    return torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(0))


def _transformers() -> Any:
    """The library, silent. Raises UserError where it is there, but cannot be imported."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"transformers cannot be imported: {error}") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _machine(names: list[str], threads: int) -> dict[str, str | int]:
    """What ran, and on what. Raises UserError where a package is missing that one of the models needs."""
    packages = ["torch", "transformers", *["mambapy"] * any("use_mambapy" in MODELS[name] for name in names)]
    try:
        versions = {name: version(name) for name in packages}
    except PackageNotFoundError as missing:
        raise UserError(f"{missing.name} is not installed; pip install baton-train[hf]") from None
    return {"cpu": cpu_name(), "threads": threads, "python": platform.python_version(), **versions}


def table(comparisons: list[Comparison]) -> Table:
    """A row for each model and length."""
    columns = ["theirs tok/s", "ours tok/s", "ratio", "theirs MiB", "ours MiB"]
    shown = Table("model", "tokens", *columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for each in comparisons:
        speeds = [f"{speed:.0f}" for speed in (each.theirs_tokens_per_second, each.ours_tokens_per_second)]
        memory = ["-" if mib is None else f"{mib:.1f}" for mib in (each.theirs_mib, each.ours_mib)]
        shown.add_row(each.model, str(each.tokens), *speeds, f"{each.ratio:.2f}", *memory)
    return shown
