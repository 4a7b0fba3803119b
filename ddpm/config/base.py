"""What the configs share: checks of their fields, and the flat form that JSON files have."""

import dataclasses
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ddpm.errors import UsageError, UserError
from ddpm.file_io import read_json
from ddpm.typed_json import parse_value

Config = TypeVar("Config")

MIN_IMAGES = 16
"""Smallest number of images that measures anything: a loss or a distance of fewer is noise."""


def require(config: Any, valid: Callable[[Any], bool], message: str, *names: str) -> None:
    """Raise UsageError for the first of these fields that is neither None nor `valid`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not valid(value):
            raise UsageError(f"--{name} is {value}; {message}.")


def require_at_least_one(config: Any, *names: str) -> None:
    """Raise UsageError for the first of these fields that is below 1."""
    require(config, lambda value: value >= 1, "it must be at least 1", *names)


def require_not_negative(config: Any, *names: str) -> None:
    """Raise UsageError for the first of these fields that is below 0."""
    require(config, lambda value: value >= 0, "it must be 0 or more", *names)


def require_positive(config: Any, *names: str) -> None:
    """Raise UsageError for the first of these fields that is not above 0."""
    require(config, lambda value: value > 0, "it must be above 0", *names)


def require_fraction(config: Any, *names: str) -> None:
    """Raise UsageError for the first of these fields that is not in [0, 1]."""
    require(config, lambda value: 0 <= value <= 1, "it must lie between 0 and 1", *names)


def require_no_file(name: str, path: str) -> None:
    """Raise UsageError when the folder of a setting exists as a file."""
    if Path(path).exists() and not Path(path).is_dir():
        raise UsageError(f"--{name} {path} is a file: give a folder; it is created when missing.")


def flatten(config: Any) -> dict[str, Any]:
    """Return a config as one flat dict in the order of its fields: the content of the JSON file."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {item.name: value})
    return flat


def dump(config: Any) -> str:
    """Return a config as the JSON text that `from_json` reads back to the same config."""
    return json.dumps(flatten(config), indent=2)


def read_settings(kind: type, path: Path) -> dict[str, Any]:
    """Return the settings in a flat JSON file, each of the type of its field in the config `kind`.

    Raise UserError for a file that cannot be read, UsageError for an unknown name or a wrong type.
    """
    values, types = read_json(path), _flat_types(kind)
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold one JSON object of settings.")
    for name in values:
        if name not in types:
            close = difflib.get_close_matches(name, types, n=1)
            hint = f" Did you mean {close[0]}?" if close else " train.py --help lists them."
            raise UsageError(f"{path} has {name!r}, which is no setting.{hint}")
    try:
        return {name: parse_value(types[name], v, f"{path}: {name}") for name, v in values.items()}
    except UserError as error:
        raise UsageError(str(error)) from None


def without_checks(kind: type[Config], flat: dict[str, Any]) -> Config:
    """Return a config that was not checked, because flags will still change it."""

    def make(section: type, values: dict[str, Any]) -> Any:
        config = object.__new__(section)
        for name, value in values.items():  # other fields are read from the class: its defaults
            object.__setattr__(config, name, value)
        return config

    return nest(kind, flat, make)


def nest(
    kind: type[Config],
    flat: dict[str, Any],
    make: Callable[[type, dict[str, Any]], Any] = lambda section, values: section(**values),
) -> Config:
    """Return a config from flat settings: the inverse of `flatten`. Other fields have defaults.

    `make` creates a section, and the config, from its fields.
    """
    values: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(item.type):
            values[item.name] = nest(item.type, flat, make)
        elif item.name in flat:
            values[item.name] = flat[item.name]
    return make(kind, values)


def _flat_types(kind: type) -> dict[str, Any]:
    types: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        is_section = dataclasses.is_dataclass(item.type)
        types.update(_flat_types(item.type) if is_section else {item.name: item.type})
    return types
