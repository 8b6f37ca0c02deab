"""A checkpoint of Hugging Face's becomes one that any mesh begins to train from."""

import shutil
from pathlib import Path
from typing import Any

import torch

from ...configs.errors import UserError
from ...configs.schema import Config
from ...models.hf import HFCheckpoint
from ...models.hf.files import CONFIG
from ..checkpoints.manifest import ORIGINAL
from ..training.tokenizer import load_tokenizer
from .beginning import TOKENIZER, write_beginning

BESIDE = (CONFIG, TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
"""Those that are carried from one to the other."""
CONTEXT = 4096
"""Tokens of a sequence that the config in a converted checkpoint asks for."""


def convert_from_hf(folder: Path, out: Path) -> HFCheckpoint:
    """Writes the checkpoint `out`, complete or not at all, with a config that trains from it. Raises UserError."""
    source = HFCheckpoint(folder)
    config = _config(source, out)

    def copy(partial: Path) -> None:
        copy_beside(folder, partial / ORIGINAL)
        if (folder / TOKENIZER).is_file():
            shutil.copyfile(folder / TOKENIZER, partial / TOKENIZER)

    write_beginning(source, config, out, copy)
    return source


def copy_beside(source: Path, target: Path) -> None:
    """Those of BESIDE that are in one folder, to another."""
    target.mkdir(exist_ok=True)
    for name in BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _config(source: HFCheckpoint, out: Path) -> Config:
    """A run that goes on from the checkpoint: what it cannot know is a beginning."""
    bf16 = torch.bfloat16 in source.dtypes.values()
    data: dict[str, Any] = {"folder": f"runs/data/{out.name}", "context": CONTEXT, "documents": "packed"}
    if (source.folder / TOKENIZER).is_file():
        data["tokenizer"] = {"kind": "file", "file": str((out / TOKENIZER).resolve()), "end": _end(source)}
    values = {
        "run": f"runs/{out.name}-trained",
        "start_from": str(out.resolve()),
        "precision": "bf16" if bf16 else "fp32",
        "model": source.model.model_dump(mode="json"),
        "data": data,
        "optimizer": {"lr": 1e-5},
        "schedule": {"steps": 1000, "warmup": 50},
    }
    return Config.model_validate(values)


def _end(source: HFCheckpoint) -> str:
    """The token at a document's end, by eos_token_id."""
    number = source.values.get("eos_token_id")
    number = next(iter(number), None) if isinstance(number, list) else number
    tokenizer = load_tokenizer(source.folder / TOKENIZER)
    token = None if number is None else tokenizer.id_to_token(number)
    if token is None:
        raise UserError(f"{source.folder / CONFIG}: eos_token_id is {number!r}, allowed: a token of {TOKENIZER}")
    return token
