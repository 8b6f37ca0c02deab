"""What a conversion says of itself."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from ...models.hf import HFCheckpoint
from ..training.description import count_parameters

console = Console(highlight=False, soft_wrap=True)


@contextmanager
def counted(read: Callable[[str], Tensor], total: int) -> Iterator[Callable[[str], Tensor]]:
    """`read`, which is called so often, with a bar on a terminal."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("converting", total=total)

        def counting(name: str) -> Tensor:
            progress.advance(task)
            return read(name)

        yield counting


def print_imported(source: HFCheckpoint, out: Path) -> None:
    """What was imported, and how to train it."""
    model = source.model
    dtypes = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in source.dtypes.values()}))
    count = count_parameters(model)
    size = f"{count / 1e9:.3f} B" if count >= 1e8 else f"{count:,}"
    console.print(f"{source.model_type} of {size} parameters ({dtypes}) -> {out}", markup=False)
    console.print(f"  {len(source.theirs)} tensors there, {len(source.ours)} here; pattern {model.pattern}", markup=False)
    console.print(f"  check it: baton convert check {source.folder} {out}", markup=False)
    console.print(f"  train it: baton train {out}/config.yaml --input FOLDER data.context=N parallel.cp=N", markup=False)


def print_exported(model_type: str, out: Path) -> None:
    """What was written."""
    console.print(f"{model_type} -> {out}", markup=False)
