"""The corpus as token files in megatron-core's IndexedDataset format: made once, read memory-mapped."""

import hashlib
import json
import os
import shutil
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ...configs.errors import UserError
from ...configs.schema import Config, TokenizerConfig
from .corpus import documents
from .tokenizer import END_OF_DOCUMENT, byte_tokenizer, load_tokenizer, train_bpe

BYTES = 257
"""Tokens that any tokenizer here has."""
SPLITS = ("train", "validation")
MAGIC = b"MMIDIDX"
"""How an index begins."""


def prepare(config: Config) -> None:
    """Makes the token files and the tokenizer in data.folder unless they are there; written apart and renamed when complete.

    Raises UserError for bad input, and for a folder that was made from other settings.
    """
    folder, settings = config.data.folder, _settings(config)
    if folder.is_dir() and any(folder.iterdir()):
        _check_settings(folder, settings)
        return
    if config.model.vocab_size < BYTES and config.data.tokenizer.file is None:
        raise UserError(f"model.vocab_size is {config.model.vocab_size}, allowed: at least {BYTES}, for every byte and the end")
    console = Console(stderr=True, highlight=False)
    source = ", ".join(config.data.input) or "the Python standard library"
    console.print(f"Preparing the corpus in {folder} from {source} ...", soft_wrap=True)
    texts = list(documents(config.data.input, config.data.max_bytes))
    if not texts:
        raise UserError("data.input: no text in it")
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        counts = _write(partial, texts, config)
        (partial / "corpus.json").write_text(
            json.dumps({"settings": settings, "documents": len(texts), "tokens": counts}, indent=1)
        )
        os.rename(partial, folder)
    except OSError as error:
        raise UserError(f"data.folder {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(len(text.encode()) for text in texts) / 1e6
    console.print(
        f"  {len(texts)} documents, {size:.1f} MB of text: {counts['train']:,} tokens, {counts['validation']:,} to validate"
    )


def _settings(config: Config) -> dict[str, Any]:
    """What the files depend on."""
    return {
        "input": config.data.input,
        "max_bytes": config.data.max_bytes,
        "validation_fraction": config.data.validation_fraction,
        "tokenizer": _named(config.data.tokenizer),
        "vocab_size": config.model.vocab_size if config.data.tokenizer.kind == "bpe" else None,
    }


def _named(asked: TokenizerConfig) -> str:
    """A tokenizer by its kind, or that of a file by what it holds and the token that ends documents."""
    return asked.kind if asked.file is None else f"{_digest(asked.file)} {asked.end}"


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """A folder of somebody else's token files, which has no corpus.json, is taken as it is."""
    if not (folder / "corpus.json").exists():
        return
    try:
        made = dict(json.loads((folder / "corpus.json").read_text())["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}/corpus.json is damaged: remove {folder} to prepare it again") from None
    for key, value in settings.items():
        if made.get(key) != value:
            raise UserError(
                f"data.folder {folder} was made with {key} = {made.get(key)!r}, now {value!r}: name another data.folder"
            )


def _write(folder: Path, texts: list[str], config: Config) -> dict[str, int]:
    """Tokenizer and both splits -> tokens in each. The end of the text is the validation split: files come in a mixed order."""
    data = config.data
    tokenizer, end = _tokenizer_and_end(texts, config)
    if data.tokenizer.file is None:
        tokenizer.save(str(folder / "tokenizer.json"))
    else:
        shutil.copyfile(data.tokenizer.file, folder / "tokenizer.json")
    encoded = [np.array([*encoding.ids, end]) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    total = sum(len(ids) for ids in encoded)
    counts = {"train": total - round(total * data.validation_fraction)}
    counts["validation"] = total - counts["train"]
    for split, count in counts.items():
        if count <= data.context:
            raise UserError(
                f"the {split} split has {count} tokens, fewer than one sample ({data.context} + 1): "
                "give more text, a smaller data.context or another data.validation_fraction"
            )
    border = np.cumsum([0, *map(len, encoded)]) - counts["train"]
    train = [ids[: max(0, -start)] for ids, start in zip(encoded, border, strict=False) if start < 0]
    validation = [ids[max(0, -start) :] for ids, start in zip(encoded, border, strict=False) if start + len(ids) > 0]
    for split, parts in zip(SPLITS, (train, validation), strict=True):
        _write_split(folder / split, parts, tokenizer.get_vocab_size())
    return counts


def _tokenizer_and_end(texts: list[str], config: Config) -> tuple[Any, int]:
    """The config's, made or read, and its token at a document's end."""
    asked = config.data.tokenizer
    if asked.file is None:
        made = train_bpe(texts, config.model.vocab_size) if asked.kind == "bpe" else byte_tokenizer()
        own_end = made.token_to_id(END_OF_DOCUMENT)
        assert own_end is not None
        return made, own_end
    tokenizer = load_tokenizer(asked.file)
    end, size, most = tokenizer.token_to_id(asked.end), tokenizer.get_vocab_size(), config.model.vocab_size
    if end is None:
        raise UserError(f"data.tokenizer.end is {asked.end!r}, allowed: a token of {asked.file}")
    if size > most:
        raise UserError(f"{asked.file}: {size} tokens, more than model.vocab_size, {most}")
    return tokenizer, end


def _write_split(prefix: Path, encoded: list[Any], vocab_size: int) -> None:
    indexed = _indexed_dataset()
    builder = indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=indexed.DType.optimal_dtype(vocab_size))
    for ids in encoded:
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")


def _indexed_dataset() -> Any:
    """megatron-core's module: imported here alone, since that takes seconds and warns of what it does without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


class TokenStream:
    """The tokens of one split, one document after another, memory-mapped."""

    def __init__(self, folder: Path, split: str) -> None:
        """Raises UserError when a file is missing, truncated or no IndexedDataset."""
        self.name = prefix = folder / split
        for suffix in (".idx", ".bin"):
            if not Path(f"{prefix}{suffix}").is_file():
                raise UserError(f"{prefix}{suffix}: no such file; `baton data prepare` makes it")
        with open(f"{prefix}.idx", "rb") as index_file:
            genuine = index_file.read(len(MAGIC)) == MAGIC
        if not genuine:
            raise UserError(f"{prefix}.idx: no index of megatron-core's IndexedDataset")
        try:
            self.data = _indexed_dataset().IndexedDataset(str(prefix))
        except (AssertionError, ValueError, KeyError, struct.error) as error:
            raise UserError(f"{prefix}.idx: damaged: {error}") from None
        index = self.data.index
        self.dtype = index.dtype
        self.length = int(np.sum(index.sequence_lengths))
        # Of several empty documents at one place only the border is left.
        self.boundaries = np.unique(np.concatenate([[0], np.cumsum(index.sequence_lengths)])[index.document_indices])
        """Where documents begin, and the end, in tokens; ascending."""
        expected, found = self.length * np.dtype(self.dtype).itemsize, Path(f"{prefix}.bin").stat().st_size
        if found != expected:
            raise UserError(f"{prefix}.bin: {found} bytes, its index says {expected}: the file is truncated or another's")

    def cu_seqlens(self, start: int, count: int) -> list[int]:
        """Where the documents among tokens [start, start + count) begin, counted from `start`: 0 first and `count` last."""
        first, last = np.searchsorted(self.boundaries, start, "right"), np.searchsorted(self.boundaries, start + count)
        return [0, *(self.boundaries[first:last] - start).tolist(), count]

    def read(self, start: int, count: int) -> Any:
        """Tokens [start, start + count) as a numpy array of int64."""
        offset = start * np.dtype(self.dtype).itemsize
        return self.data.bin_reader.read(dtype=self.dtype, count=count, offset=offset).astype(np.int64)


def read_tokenizer(config: Config) -> Any:
    """data.folder's tokenizer. Raises UserError when it has more tokens than the model."""
    path = config.data.folder / "tokenizer.json"
    tokenizer = load_tokenizer(path)
    if tokenizer.get_vocab_size() > config.model.vocab_size:
        raise UserError(f"{path}: {tokenizer.get_vocab_size()} tokens, more than model.vocab_size, {config.model.vocab_size}")
    return tokenizer


def tokenizer_digest(folder: Path) -> str:
    """Tells one tokenizer from another."""
    return _digest(folder / "tokenizer.json")


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{file}: no tokenizer: {error.strerror or error}") from None
