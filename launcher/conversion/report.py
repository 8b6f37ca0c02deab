"""What a conversion says of itself."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ...configs.pattern import CUT
from ...models.foreign import ForeignCheckpoint
from ...models.hf import HFCheckpoint
from ...models.megatron_config import MegatronConfig
from ..training.description import count_parameters

console = Console(highlight=False, soft_wrap=True)


@contextmanager
def counted(read: Callable[[str], Tensor], total: int) -> Iterator[Callable[[str], Tensor]]:
    """`read`, which is called so often, with a bar on a terminal; between two calls a signal ends the process."""
    bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with _held_signals() as end_if_asked, bar:
        task = bar.add_task("converting", total=total)

        def counting(name: str) -> Tensor:
            end_if_asked()
            bar.advance(task)
            return read(name)

        yield counting


@contextmanager
def _held_signals() -> Iterator[Callable[[], None]]:
    """Ctrl-C and SIGTERM wait for a call of what it gives: within one of theirs, libraries turn them into errors of their own."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}

    def end_if_asked() -> None:
        if came:
            sys.exit(128 + came[0])

    try:
        yield end_if_asked
        end_if_asked()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_imported(source: HFCheckpoint, out: Path) -> None:
    """What was imported of Hugging Face's, and how to check and train it."""
    print_beginning(source.model_type, source, out, f"  check it: baton convert check {source.folder} {out}")


def print_beginning(kind: str, source: ForeignCheckpoint, out: Path, *hints: str) -> None:
    """What was imported, further lines, and how to train it."""
    model = source.model
    dtypes = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in source.dtypes.values()}))
    count = count_parameters(model)
    size = f"{count / 1e9:.3f} B" if count >= 1e8 else f"{count:,}"
    console.print(f"{kind} of {size} parameters ({dtypes}) -> {out}", markup=False)
    pattern = (model.pattern * model.repeat).replace(CUT, "")
    console.print(f"  {len(source.theirs)} tensors there, {len(source.ours)} here; pattern {pattern}", markup=False)
    for hint in hints:
        console.print(hint, markup=False)
    console.print(f"  train it: baton train {out}/config.yaml --input FOLDER data.context=N parallel.cp=N", markup=False)


def print_for_megatron(config: MegatronConfig, out: Path) -> None:
    """What was exported, and what Megatron-LM has to be told of it."""
    console.print(f"a checkpoint for Megatron-LM -> {out}", markup=False)
    console.print("  options of its training script, beside those of data, mesh and optimizer:", markup=False)
    load = [f"--load {out}", "--finetune --no-load-optim --no-load-rng --ckpt-format torch_dist"]
    for option in config.options + load:
        console.print(f"    {option}", markup=False)
    console.print("  without Transformer Engine --no-rope-fusion, without apex --no-gradient-accumulation-fusion", markup=False)


def print_exported(model_type: str, out: Path) -> None:
    """What was written."""
    console.print(f"{model_type} -> {out}", markup=False)
