"""Parsed JSON as dataclasses: the strict reader of every file that the commands hand over.

It is used for files made here and for downloaded ones alike. Bounds that types cannot express
belong in `__post_init__` of the dataclass, as a ValueError.
"""

import dataclasses
import sys
from contextlib import suppress
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ddpm.errors import UserError

T = TypeVar("T")
_type_hints = cache(get_type_hints)

TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    NoneType: "null",
    dict: "an object",
    list: "a list",
    tuple: "a list",
}


def parse_json(kind: type[T], value: Any, source: str) -> T:
    """Return a parsed JSON object as the dataclass `kind`; other keys than its fields are ignored.

    Raise UserError, which names `source` and the field, for a missing field, a type other than the
    annotation of the field, or a ValueError of `__post_init__`.
    """
    if not isinstance(value, dict):
        raise UserError(f"{source} must be a JSON object.")
    hints, values = _type_hints(kind), {}
    for field in dataclasses.fields(kind):
        if field.name in value:
            values[field.name] = parse_value(
                hints[field.name], value[field.name], f"{source}: {field.name}"
            )
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{source} has no entry {field.name}.")
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def parse_value(hint: Any, value: Any, source: str) -> Any:
    """Return `value` as a field annotated with `hint` holds it. Raise UserError for a wrong type.

    Numbers must be finite, whole numbers fit into 64 bits; a whole number is accepted as a float,
    true and false are no numbers.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        options = [option for option in arguments if option is not NoneType]
        if len(options) == 1:
            return parse_value(options[0], value, source)
        for option in options:
            with suppress(UserError):
                return parse_value(option, value, source)
    elif dataclasses.is_dataclass(hint):
        return parse_json(hint, value, source)
    elif origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
    elif origin in (list, tuple) and isinstance(value, list):
        if origin is list or arguments[-1] is Ellipsis or len(arguments) == len(value):
            return origin(parse_value(arguments[0], item, source) for item in value)
    elif origin is dict and isinstance(value, dict):
        return {k: parse_value(arguments[1], v, f"{source}.{k}") for k, v in value.items()}
    elif hint is float:
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
    elif hint is int:
        if type(value) is int and -(2**63) <= value < 2**63:
            return value
    elif hint is Any or type(value) is hint:
        return value
    raise UserError(f"{source} is {value!r:.60}; it must be {_describe(hint)}.")


def parse_text(hint: Any, text: str, source: str) -> Any:
    """Return the text of a number, or any text, as a field annotated with `hint` holds it.

    Raise UserError for a text that is no such value.
    """
    kinds = get_args(hint) or (hint,)
    value: Any = text
    with suppress(ValueError):
        value = int(text) if int in kinds else float(text) if float in kinds else text
    return parse_value(hint, value, source)


def require_settings(
    hints: dict[str, Any],
    limits: dict[str, tuple[float, float]],
    values: dict[str, Any],
    source: str,
) -> dict[str, Any]:
    """Return those of `values` that `hints` names, unchanged.

    Raise UserError unless each has the type of its hint, and each number lies within its limits, or
    within `limits[""]` for a setting that has none.
    """
    settings = {name: value for name, value in values.items() if name in hints}
    for name, value in settings.items():
        parse_value(hints[name], value, f"{source}: {name}")
        low, high = limits.get(name, limits[""])
        for number in value if isinstance(value, list) else [value]:
            if type(number) in (int, float) and not low <= number <= high:
                raise UserError(
                    f"{source}: {name} is {number!r:.60}; it must be from {low:g} to {high:g}."
                )
    return settings


def _describe(hint: Any) -> str:
    """Return the words for a type in an error message."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(filter(None, map(_describe, arguments)))
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)}"
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    return TYPE_NAMES.get(origin or hint, "")  # "": a type that JSON has no value of
