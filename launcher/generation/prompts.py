"""Prompts as tokens, and what follows them as text."""

from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from ...configs.errors import UserError
from ...configs.schema import Config
from ..training.tokenizer import END_OF_DOCUMENT, load_tokenizer
from .request import Request

TOKENIZER = "tokenizer.json"
SEEN = 16
"""Tokens of the prompt that what follows is decoded with: how a token is written may depend on those before it."""
PART = "\ufffd"
"""What a part of a character is decoded as."""
LONGEST_CHARACTER = 4
"""Tokens that may be one."""


class Prompt(NamedTuple):
    """What a sequence is to go on with."""

    ids: list[int]
    shown: str = ""
    """What is printed before the continuation."""


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """A checkpoint's own, if it has one. Raises UserError."""
    return load_tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else None


def find_end(config: Config, tokenizer: Tokenizer | None) -> int | None:
    """The token that ends documents, if there is one."""
    asked = config.data.tokenizer
    name = END_OF_DOCUMENT if asked.file is None else asked.end
    return None if tokenizer is None or name is None else tokenizer.token_to_id(name)


def read_prompts(request: Request, tokenizer: Tokenizer | None, vocab_size: int) -> list[Prompt]:
    """Texts, files of text, and files of token ids separated by blanks, in this order. Raises UserError for what is no prompt."""
    if (request.texts or request.files) and tokenizer is None:
        raise UserError(f"the checkpoint has no {TOKENIZER}; allowed: --ids, files of token ids")

    def encode(text: str) -> list[int]:
        assert tokenizer is not None
        # What a tokenizer puts before a text belongs at a sequence's beginning alone.
        return tokenizer.encode(text, add_special_tokens=request.state is None).ids

    prompts: list[Prompt] = []
    for number, text in enumerate(request.texts, 1):
        name = "--prompt" if len(request.texts) == 1 else f"--prompt {number}"
        prompts.append(Prompt(_checked(encode(_encodable(text, name)), name, vocab_size), text))
    prompts += [Prompt(_checked(encode(_text(file)), f"--file {file}", vocab_size)) for file in request.files]
    prompts += [Prompt(_checked(_numbers(file), f"--ids {file}", vocab_size)) for file in request.ids]
    return prompts


def _checked(ids: list[int], name: str, vocab_size: int) -> list[int]:
    if not ids:
        raise UserError(f"{name} is empty; allowed: a token and more")
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocab_size:
            raise UserError(f"{name}: token {token} is beyond the vocabulary; allowed: 0 to {vocab_size - 1}")
    return ids


def _encodable(text: str, name: str) -> str:
    """As it is. Raises UserError for what came as bytes that are no text."""
    try:
        text.encode()
    except UnicodeError as error:
        raise UserError(f"{name} is no text: {error}") from None
    return text


def _text(file: Path) -> str:
    try:
        # Not as text, for which Python changes ends of lines.
        return file.read_bytes().decode()
    except (OSError, ValueError) as error:
        raise UserError(f"--file {file}: cannot be read as text: {error}") from None


def _numbers(file: Path) -> list[int]:
    try:
        return [int(word) for word in file.read_bytes().decode().split()]
    except (OSError, ValueError) as error:
        raise UserError(f"--ids {file}: no token ids: {error}") from None


class Text:
    """A continuation as it grows, without special tokens; ids where there is no tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: Prompt) -> None:
        self.tokenizer, self.so_far = tokenizer, prompt.shown
        self.ids, self.begin = prompt.ids[-SEEN:], 0
        self.prompt = self.told = len(self.ids)
        """Tokens that the text so far is of; from `begin` on they are what the next ones are decoded with."""

    def add(self, token: int) -> str:
        """What one more token adds; "" until a character is complete."""
        self.ids.append(token)
        return self._grown(len(self.ids) - self.told >= LONGEST_CHARACTER)

    def finish(self) -> str:
        """What there is of a character that was not completed."""
        return self._grown(True)

    def _grown(self, whatever: bool) -> str:
        if self.tokenizer is None:
            more = "".join(f"{token} " for token in self.ids[self.told :])
        else:
            before, after = (self.tokenizer.decode(self.ids[self.begin : end]) for end in (self.told, len(self.ids)))
            if after.endswith(PART) and not whatever:
                return ""
            # The prompt's last character may be complete only now.
            before = before.rstrip(PART) if self.begin == 0 and self.told == self.prompt else before
            more, self.begin = after[len(before) :], self.told
        self.told, self.so_far = len(self.ids), self.so_far + more
        return more
