"""Of which model a checkpoint is, and whether that is the one that a config describes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ...configs.errors import UserError
from ...configs.pattern import CUT
from ...configs.schema import TRAINING_KEYS, Config, ModelConfig
from ..training.run_folder import checkpoints
from .manifest import find_checkpoint, read_manifest


def read_model(folder: Path) -> ModelConfig:
    """As it was saved; what has become a key since has its default. Raises UserError."""
    try:
        return ModelConfig.model_validate(yaml.safe_load((folder / "config.yaml").read_text())["model"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        raise UserError(f"{folder}/config.yaml: is damaged, or of another version of baton") from None


def check_model(folder: Path, model: ModelConfig) -> None:
    """Raises UserError with the first key by which the checkpoint's parameters, or what they compute, are not the model's."""
    saved, now = describe_model(read_model(folder)), describe_model(model)
    for key in {**now, **saved}:
        if (before := saved.get(key)) != (value := now.get(key)):
            raise UserError(f"{folder} is of another model: its model.{key} is {before!r}, the config's {value!r}")


def check_start(config: Config, resume: bool) -> None:
    """Raises UserError where a run cannot begin with the weights that it is to start from, unless it goes on with its own."""
    if config.start_from is not None and not (resume and checkpoints(config.run)):
        folder = find_checkpoint(config.start_from)
        read_manifest(folder)
        check_model(folder, config.model)


def describe_model(model: ModelConfig) -> dict[str, Any]:
    """By key, what has to be as in the checkpoint: neither where a pipeline is cut nor TRAINING_KEYS."""
    leaves = dict(_leaves(model.model_dump(mode="json", exclude={"repeat"})))
    leaves["pattern"] = (model.pattern * model.repeat).replace(CUT, "")
    return {key: value for key, value in leaves.items() if key not in TRAINING_KEYS}


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
