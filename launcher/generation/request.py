"""What `baton generate` was asked for."""

from dataclasses import dataclass
from pathlib import Path

from ...configs.errors import UserError
from ..files import check_writable


@dataclass(frozen=True)
class Request:
    """Its options."""

    checkpoint: Path
    texts: list[str]
    files: list[Path]
    ids: list[Path]
    max_new: int
    """Tokens of each continuation, at most."""
    temperature: float
    """0: the most likely token, always."""
    top_p: float
    seed: int
    chunk: int
    state: Path | None
    """A file whose sequences go on."""
    save_state: Path | None
    tp: int
    cp: int

    def check(self) -> None:
        """Raises UserError where options do not fit each other."""
        if not self.checkpoint.is_dir():
            raise UserError(f"{self.checkpoint} is no folder; allowed: a checkpoint, or a run's folder")
        if (self.checkpoint / "config.json").is_file():
            raise UserError(f"{self.checkpoint} is a folder of Hugging Face's; baton convert from-hf makes a checkpoint of it")
        if not (self.texts or self.files or self.ids or self.state):
            raise UserError("there is no prompt; allowed: --prompt, --file, --ids, or --state alone")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p:g}, allowed: more than 0, up to 1")
        if self.top_p < 1 and self.temperature == 0:
            raise UserError(f"--top-p is {self.top_p:g}, allowed with --temperature alone: without it there is no chance in it")
        if self.seed and self.temperature == 0:
            raise UserError(f"--seed is {self.seed}, allowed with --temperature alone: without it there is no chance in it")
        if self.state is not None and self.cp > 1:
            raise UserError(f"--cp is {self.cp}, allowed with --state: 1, since what follows is read by one rank")
        if (self.state or self.save_state) and self.tp > 1:
            raise UserError(f"--tp is {self.tp}, allowed with --state and --save-state: 1")
        if self.save_state is not None:
            check_writable(self.save_state, "--save-state")

    def arguments(self) -> list[str]:
        """Of the command, for workers."""
        options = [f"--prompt={text}" for text in self.texts]
        options += [f"--file={file}" for file in self.files] + [f"--ids={file}" for file in self.ids]
        options += [
            f"--max-new={self.max_new}",
            f"--temperature={self.temperature}",
            f"--top-p={self.top_p}",
            f"--seed={self.seed}",
        ]
        options += [f"--chunk={self.chunk}", f"--tp={self.tp}", f"--cp={self.cp}"]
        options += [f"--save-state={self.save_state}"] if self.save_state else []
        return ["generate", str(self.checkpoint), *options]
