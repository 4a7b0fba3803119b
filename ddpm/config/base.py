"""What the configs share: checks of their fields, and the flat form that JSON files have."""

import dataclasses
import difflib
import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from ddpm.errors import TOKEN, UsageError, UserError
from ddpm.file_io import read_json
from ddpm.typed_json import parse_value

Config = TypeVar("Config")

TOKEN_FLAGS = {"hub_token", "hf_token", "token"}
TOKEN_ADVICE = (
    "Command lines and settings are printed and kept, so it was not used: take it out, log in once "
    "with `hf auth login` or set HF_TOKEN, and revoke the token if others could read it."
)

TEXT = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{,4096}")
"""A text in a file of settings: no control characters, and no longer than a path."""
REVISION = re.compile(r"(?!.*\.\.)\w[\w.+-]*(/\w[\w.+-]*)*")
"""A branch, a tag or a commit, as git names them: it names a folder of the cache too."""
MIN_IMAGES = 16
"""Smallest number of images that measures anything: a loss or a distance of fewer is noise."""


def require(config: Any, valid: Callable[[Any], bool], message: str, *names: str) -> None:
    """Raise UsageError for the first of these fields that is neither None nor `valid`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not valid(value):
            raise UsageError(f"--{name} is {as_flag(value)}; {message}.")


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


def require_revision(config: Any, name: str) -> None:
    """Raise UsageError unless this field is a REVISION."""
    require(config, REVISION.fullmatch, "it must be a branch, a tag or a commit", name)


def require_seed(seed: int, num_images: int) -> None:
    """Raise UsageError for a first seed whose range of seeds does not fit into 63 bits."""
    if not 0 <= seed <= 2**63 - num_images:
        raise UsageError(f"--seed {seed}: give a number from 0 to 2**63.")


def require_no_file(name: str, path: str) -> None:
    """Raise UsageError when the folder of a setting exists as a file."""
    if os.path.exists(path) and not os.path.isdir(path):  # which raise nothing, unlike Path
        raise UsageError(f"--{name} {path} is a file: give a folder; it is created when missing.")


def flatten(config: Any) -> dict[str, Any]:
    """Return a config as one flat dict in the order of its fields: the content of the JSON file."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {item.name: value})
    return flat


def as_flag(value: Any) -> str:
    """Return the value of a setting as its flag has it: 48,80 for a pair."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def dump(config: Any) -> str:
    """Return a config as the JSON text that `from_json` reads back to the same config."""
    return json.dumps(flatten(config), indent=2)


def read_settings(
    kind: type, path: Path, unknown: Literal["refuse", "ignore"] = "refuse"
) -> dict[str, Any]:
    """Return the settings in a flat JSON file, each of the type of its field in the config `kind`.

    Raise UserError for a file that cannot be read, UsageError for a wrong type, a token, a text
    with control characters or too long, and unless these are ignored for an unknown name.
    """
    values, fields = read_json(path), setting_fields(kind)
    if TOKEN_FLAGS & values.keys() or TOKEN.search(json.dumps(values)):
        raise UsageError(f"{path} holds what looks like a token. {TOKEN_ADVICE}")
    settings = {}
    for name, value in values.items():
        if name in fields:
            try:
                settings[name] = parse_value(fields[name].type, value, f"{path}: {name}")
            except UserError as error:
                raise UsageError(str(error)) from None
            if isinstance(value, str) and not TEXT.fullmatch(value):
                raise UsageError(f"{path}: {name} is {value!r:.60}; give a text of one line.")
        elif unknown == "refuse":
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f" Did you mean {close[0]}?" if close else " train.py --help lists them."
            raise UsageError(f"{path} has {name!r:.60}, which is no setting.{hint}")
    return settings


# Settings that only the user may set


def from_flags(needs_flag: Callable[[Any], bool] = bool) -> dict[str, Any]:
    """Return the metadata of a field whose value must come from a flag where `needs_flag` says so.

    Such a value publishes, deletes, trusts, runs code, or names a place outside the working
    directory, and a config file or a model may be somebody else's. It is never published.
    """
    return {"needs_flag": needs_flag}


def leads_outside(place: str | None) -> bool:
    """Return whether a path is absolute, begins with ~, goes up with .., or is an address."""
    parts = re.split(r"[/\\]", place or "")
    return place is not None and (":" in place or ".." in parts or place[:1] in ("/", "\\", "~"))


FLAG_ONLY = from_flags()
"""Metadata of settings that publish, delete, trust, or run code."""
PLACE = from_flags(leads_outside)
"""Metadata of settings that name a file, a folder or an address."""


def setting_fields(kind: type) -> dict[str, dataclasses.Field]:
    """Return the fields of a config and of its sections by name, in the order of `flatten`."""
    fields: dict[str, dataclasses.Field] = {}
    for item in dataclasses.fields(kind):
        is_section = dataclasses.is_dataclass(item.type)
        fields.update(setting_fields(item.type) if is_section else {item.name: item})
    return fields


def needs_flag(kind: type, name: str, value: Any) -> bool:
    """Return whether this value of a setting of the config `kind` must come from a flag."""
    check = setting_fields(kind)[name].metadata.get("needs_flag")
    return check is not None and check(value)


def require_flags(kind: type, settings: dict[str, Any], path: Path) -> None:
    """Raise UsageError, with the flags to type, for settings of a file that must be flags."""
    flags = [
        f"--{name}" if value is True else f"--{name}={shlex.quote(as_flag(value))}"
        for name, value in settings.items()
        if needs_flag(kind, name, value)
    ]
    if flags:
        raise UsageError(
            f"{path} sets what only flags may set, because a config may come from somebody else: "
            "to publish, delete, trust, run code, or use a place outside the working directory. "
            f"Remove it there, or type what you want of it: {' '.join(flags)}"
        )


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
