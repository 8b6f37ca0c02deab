"""What `baton generate` prints: continuations on stdout, what they took on stderr."""

import io
import os
import sys

from rich.console import Console
from tokenizers import Tokenizer

from ...configs.errors import UserError
from ...models.generation import GenerationState
from ..benchmarks.report import size
from .prompts import Prompt, Text


class Printer:
    """Continuations on stdout, a single one as it grows; what it took on stderr."""

    def __init__(self, tokenizer: Tokenizer | None, prompts: list[Prompt]) -> None:
        self.texts = [Text(tokenizer, prompt) for prompt in prompts]
        if sys.stdout is None:
            raise UserError("stdout: is closed")
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal that does not know a character shows another one.
            sys.stdout.reconfigure(errors="replace")
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    def add(self, tokens: list[int], going: list[bool]) -> None:
        """The next token of each sequence that still goes on."""
        grown = [text.add(token) for text, token, still in zip(self.texts, tokens, going, strict=True) if still]
        if len(self.texts) == 1:
            self._write("".join(grown))

    def begin(self, tokens: int, seconds: float) -> None:
        """How long the prompts took; then what was given of a single one."""
        if tokens:
            self.console.print(f"read {tokens} tokens in {seconds:.2f} s ({tokens / seconds:.0f} tokens/s)")
        if len(self.texts) == 1:
            self._write(self.texts[0].so_far)

    def end(self, tokens: int, seconds: float, state: GenerationState) -> None:
        """The continuations of several sequences; how long they took, and what the state holds."""
        ends = [text.finish() for text in self.texts]
        if len(self.texts) == 1:
            self._write(f"{ends[0]}\n")
        else:
            for number, text in enumerate(self.texts, 1):
                self._write(f"[{number}] {text.so_far}\n")
        sizes = f"{size(state.recurrent_bytes)} of states, {size(state.cache_bytes)} of keys and values"
        self.console.print(f"wrote {tokens} tokens in {seconds:.2f} s ({tokens / seconds:.0f} tokens/s); {sizes}")

    def _write(self, text: str) -> None:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError as error:
            # Nor at the process's end, when Python would flush it once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise UserError(f"stdout: {error.strerror or error}") from None
