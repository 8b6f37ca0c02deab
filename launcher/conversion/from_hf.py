"""A checkpoint of Hugging Face's becomes one that any mesh begins to train from."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...configs.errors import UserError
from ...configs.schema import Config
from ...models.hf import HFCheckpoint
from ...models.hf.files import CONFIG, new_folder
from ..checkpoints.manifest import MANIFEST, ORIGINAL
from ..checkpoints.tensors import write_tensors
from ..training.token_files import tokenizer_digest
from ..training.tokenizer import load_tokenizer
from .report import counted

TOKENIZER = "tokenizer.json"
BESIDE = (CONFIG, TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
"""Those that are carried from one to the other."""
CONTEXT = 4096
"""Tokens of a sequence that the config in a converted checkpoint asks for."""


def convert_from_hf(folder: Path, out: Path) -> HFCheckpoint:
    """Writes the checkpoint `out`, complete or not at all, with a config that trains from it. Raises UserError."""
    source = HFCheckpoint(folder)
    config = _config(source, out)
    tensors = {name: like.to(source.dtypes[name]) for name, like in source.ours.items()}
    with new_folder(out) as partial, counted(source.read, len(tensors)) as read:
        write_tensors(partial, tensors, read)
        copy_beside(folder, partial / ORIGINAL)
        if (folder / TOKENIZER).is_file():
            shutil.copyfile(folder / TOKENIZER, partial / TOKENIZER)
        (partial / "config.yaml").write_text(config.to_yaml())
        (partial / MANIFEST).write_text(json.dumps(_facts(partial), indent=1))
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


def _facts(folder: Path) -> dict[str, Any]:
    """A manifest; the run has not begun."""
    return {
        "step": 0,
        "consumed": 0,
        "world": 1,
        "tokenizer": tokenizer_digest(folder) if (folder / TOKENIZER).exists() else None,
        "data": {},
        "baton": __version__,
        "torch": torch.__version__,
        "files": {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()},
    }
