"""Reads a YAML file and dotted overrides into a `Config`; every error is one line: file, line, key, and what is allowed."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .errors import KeyedError, UserError
from .schema import Config

PRESETS = Path(__file__).parent
Keys = tuple[str | int, ...]


class ConfigError(UserError):
    """A file or an override that is no configuration."""


def load_config(file: str | Path, overrides: list[str] | None = None, world: int | None = None) -> Config:
    """A file (or the name of a preset beside this one) and overrides such as `model.d_model=64` -> `Config`.

    With `world`, the number of ranks, `auto` becomes numbers and the degrees are checked against it.

    Raises ConfigError with one line: FILE:LINE: KEY value, what is allowed.
    """
    path = find_file(file)
    node, values = _parse(path)
    places = {keys: f"{path}:{line}" for keys, line in _lines(node, path).items()}
    for override in overrides or []:
        keys, value = parse_override(override)
        _assign(values, keys, value, override)
        for known in [k for k in places if k[: len(keys)] == keys]:
            del places[known]
        places[keys] = f"override {override}"
    config = validate(values, str(path), places)
    if world is None:
        return config
    try:
        return config.resolved(world)
    except KeyedError as error:
        raise _located(error, (), str(path), places) from None


def find_file(file: str | Path) -> Path:
    """The file itself, or the preset of that name."""
    for path in (Path(file), PRESETS / file, PRESETS / f"{file}.yaml"):
        if path.is_file():
            return path
    names = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
    raise ConfigError(f"{file}: no such file; allowed: a YAML file, or a preset: {names}")


def parse_override(override: str) -> tuple[Keys, Any]:
    """`a.b=1` -> (("a", "b"), 1); the value is YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(f"override {override!r}: allowed: dotted.key=value")
    try:
        return tuple(key.split(".")), yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"override {override!r}: {text!r} is no YAML value") from None


def validate(values: Any, source: str, places: dict[Keys, str] | None = None) -> Config:
    """Plain values -> `Config`; `places` says where each key was written. Raises ConfigError."""
    try:
        return Config.model_validate(values)
    except ValidationError as errors:
        error = errors.errors()[0]
    cause = error.get("ctx", {}).get("error")
    # pydantic adds the names of a union's members, such as `constrained-int`, to the keys.
    unions = {"constrained-int", "literal['auto']", "int", "literal"}
    keys: Keys = tuple(key for key in error["loc"] if key not in unions)
    if isinstance(cause, KeyedError):
        raise _located(cause, keys, source, places or {})
    raise ConfigError(f"{_place(keys, source, places or {})}: {_dotted(keys)} {_explain(error)}")


def check_section(section: type[BaseModel], name: str, values: dict[str, Any]) -> None:
    """Raises ConfigError for overrides that are no values of a section by itself."""
    try:
        section.model_validate(values)
    except ValidationError as errors:
        error = errors.errors()[0]
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, KeyedError):
            raise ConfigError(f"override {name}.{cause.key} {cause}") from None
        keys: Keys = (name, *error["loc"][:1])
        raise ConfigError(f"override {_dotted(keys)} {_explain({**error, 'loc': keys})}") from None


def _located(error: KeyedError, section: Keys, source: str, places: dict[Keys, str]) -> ConfigError:
    keys = section + tuple(error.key.split("."))
    return ConfigError(f"{_place(keys, source, places)}: {_dotted(keys)} {error}")


def _explain(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        parent = _fields(error["loc"][:-1])
        return f"is no key of this section; allowed: {', '.join(parent)}" if parent else "is not a known key"
    if error["type"] == "missing":
        return "is missing"
    if error["type"] == "path_type":
        return f"is {error['input']!r}, allowed: a path"
    if error["loc"][:2] in (("parallel", "cp"), ("parallel", "dp")):
        return f"is {error['input']!r}, allowed: auto, or 1 and more"
    message = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"is {error['input']!r}, allowed: {message}"


def _fields(keys: Keys) -> list[str]:
    section: Any = Config
    for key in keys:
        field = getattr(section, "model_fields", {}).get(key)
        if field is None:
            return []
        section = field.annotation
    return list(getattr(section, "model_fields", {}))


def _dotted(keys: Keys) -> str:
    return ".".join(str(key) for key in keys)


def _place(keys: Keys, source: str, places: dict[Keys, str]) -> str:
    for end in range(len(keys), 0, -1):
        if keys[:end] in places:
            return places[keys[:end]]
    return source


def _parse(path: Path) -> tuple[yaml.MappingNode, Any]:
    """The file as nodes, which know their lines, and as values."""
    try:
        text = path.read_text()
        node, values = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: no YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:1: holds no keys; allowed: a mapping such as `model:`")
    return node, values


def _lines(node: yaml.Node, file: Path, keys: Keys = ()) -> dict[Keys, int]:
    """The line on which each key stands. A key written twice is an error: YAML would keep the last in silence."""
    lines: dict[Keys, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path, line = keys + (key.value,), key.start_mark.line + 1
            if path in lines:
                raise ConfigError(f"{file}:{line}: {_dotted(path)} is written twice (line {lines[path]} before)")
            lines[path] = line
            lines |= _lines(value, file, path)
    return lines


def _assign(values: Any, keys: Keys, value: Any, override: str) -> None:
    for key in keys[:-1]:
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {key} holds a value, no keys")
    values[keys[-1]] = value
