"""Sharded checkpoints: written to a folder of another name, renamed when complete, listed file by file in a manifest."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ... import __version__
from ...configs.errors import UserError
from ...configs.schema import Config
from .run_folder import checkpoint_folder, checkpoints
from .token_files import tokenizer_digest

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Checkpointer:
    """Saves and loads a model, its optimizer, the CPU's random state, and how far the run is."""

    def __init__(self, config: Config, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.config, self.model, self.optimizer = config, model, optimizer
        self.leads = dist.get_rank() == 0

    def save(self, step: int, consumed: int) -> Path:
        """Writes the state after `step` steps and `consumed` samples; older checkpoints beyond checkpoint.keep go."""
        target = checkpoint_folder(self.config.run, step)
        partial = target.with_name(f"{target.name}.partial")
        try:
            if self.leads:
                for unfinished in target.parent.glob("*.partial"):
                    shutil.rmtree(unfinished)
                partial.mkdir(parents=True)
            dist.barrier()
            dcp.save(self._state(), checkpoint_id=partial)
            if self.leads:
                self._complete(partial, target, step, consumed)
        except (OSError, CheckpointException) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{target}: cannot be written: {_last_line(error)}") from None
        dist.barrier()
        return target

    def _complete(self, partial: Path, target: Path, step: int, consumed: int) -> None:
        self._describe(partial, step, consumed)
        os.rename(partial, target)
        for old in checkpoints(self.config.run)[: -self.config.checkpoint.keep]:
            shutil.rmtree(old)

    def load(self, folder: Path) -> tuple[int, int]:
        """Reads a checkpoint in place -> steps and samples done. Raises UserError: truncated, or another model's."""
        facts = self._check(folder)
        state = self._state()
        random_states = state.pop("random")
        if facts["world"] == dist.get_world_size():
            state["random"] = random_states
        try:
            dcp.load(state, checkpoint_id=folder)
        except (Exception, CheckpointException) as error:  # the library's own is no Exception
            raise UserError(f"{folder}: cannot be read: {_last_line(error)}") from None
        set_model_state_dict(self.model, state["model"])
        # A checkpoint also holds the settings it was made with; those of the config count.
        settings = [{key: group[key] for key in ("betas", "eps", "weight_decay")} for group in self.optimizer.param_groups]
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=FLAT)
        for group, kept in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(kept)
        if "random" in state:
            torch.set_rng_state(random_states[str(dist.get_rank())])
        return facts["step"], facts["consumed"]

    def _state(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=FLAT),
            "random": {str(dist.get_rank()): torch.get_rng_state()},
        }

    def _describe(self, folder: Path, step: int, consumed: int) -> None:
        """What is needed to use the checkpoint, and last the manifest, which makes it complete."""
        (folder / "config.yaml").write_text(self.config.to_yaml())
        shutil.copyfile(self.config.data.folder / "tokenizer.json", folder / "tokenizer.json")
        facts = {
            "step": step,
            "consumed": consumed,
            "world": dist.get_world_size(),
            "tokenizer": tokenizer_digest(folder),
            "data": self._data_facts(),
            "baton": __version__,
            "torch": torch.__version__,
            "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        }
        (folder / "manifest.json").write_text(json.dumps(facts, indent=1))

    def _data_facts(self) -> dict[str, int]:
        """What the position in the data depends on."""
        sizes = {f"size of train{end}": (self.config.data.folder / f"train{end}").stat().st_size for end in (".bin", ".idx")}
        return {"seed": self.config.seed, "data.context": self.config.data.context, **sizes}

    def _check(self, folder: Path) -> dict[str, Any]:
        facts = read_manifest(folder)
        saved = yaml.safe_load((folder / "config.yaml").read_text())["model"]
        for key, value in _leaves(self.config.model.model_dump(mode="json")):
            if (old := dict(_leaves(saved)).get(key)) != value:
                raise UserError(f"{folder} is of another model: its model.{key} is {old!r}, the config's {value!r}")
        if facts["tokenizer"] != tokenizer_digest(self.config.data.folder):
            raise UserError(f"{folder} was trained with another tokenizer than {self.config.data.folder}/tokenizer.json")
        for key, value in self._data_facts().items():
            if facts["data"][key] != value:
                raise UserError(f"{folder} was trained on other data: its {key} is {facts['data'][key]}, now {value}")
        return facts


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest, its files checked for size. Raises UserError, which names the file."""
    try:
        facts = json.loads((folder / "manifest.json").read_text())
        files = dict(facts["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: no complete checkpoint: manifest.json is missing or damaged") from None
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes where {size} were written"
            before = [p for p in folder.parent.glob("step-????????") if p.name < folder.name]
            hint = f"; remove {folder} to resume from {max(before).name}" if before else ""
            raise UserError(f"{folder} is truncated: {name} {what}{hint}")
    return facts


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
