"""JSON and texts as typed values: wrong types are refused with the place and the expected type."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from ddpm.errors import UserError
from ddpm.typed_json import parse_json, parse_text


@dataclass(frozen=True)
class Part:
    count: int

    def __post_init__(self):
        if self.count < 0:
            raise ValueError("count is negative")


@dataclass(frozen=True)
class Whole:
    name: str
    ratio: float = 0.5
    kind: Literal["a", "b"] = "a"
    part: Part | None = None
    parts: tuple[Part, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    anything: Any = None
    text_or_list: str | list[int] | None = None


def test_values_are_typed_and_other_keys_ignored():
    value = {
        "name": "x",
        "ratio": 2,
        "part": {"count": 1, "unknown": 0},
        "parts": [{"count": 2}],
        "counts": {"a": 1},
        "anything": [None],
        "text_or_list": [1],
        "unknown": 1,
    }
    expected = Whole("x", 2.0, "a", Part(1), (Part(2),), {"a": 1}, [None], [1])
    assert parse_json(Whole, value, "file.json") == expected
    assert type(expected.ratio) is float


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "f.json must be a JSON object."),
        ({}, "f.json has no entry name."),
        ({"name": 1}, "f.json: name is 1; it must be a text."),
        ({"name": None}, "f.json: name is None; it must be a text."),
        ({"ratio": True}, "f.json: ratio is True; it must be a number."),
        ({"ratio": float("inf")}, "f.json: ratio is inf; it must be a number."),
        ({"kind": "c"}, "f.json: kind is 'c'; it must be one of a, b."),
        ({"part": 1}, "f.json: part must be a JSON object."),
        ({"part": {"count": 1.0}}, "f.json: part: count is 1.0; it must be a whole number."),
        ({"part": {"count": -1}}, "f.json: part: count is negative"),
        ({"parts": {}}, "f.json: parts is {}; it must be a list."),
        ({"counts": {"a": "1"}}, "f.json: counts.a is '1'; it must be a whole number."),
        ({"text_or_list": 1}, "f.json: text_or_list is 1; it must be a text or a list or null."),
    ],
)
def test_wrong_types_are_refused(value, message):
    if isinstance(value, dict) and value:
        value = {"name": "x", **value}
    with pytest.raises(UserError) as error:
        parse_json(Whole, value, "f.json")
    assert str(error.value) == message


def test_texts_are_parsed_by_type():
    assert parse_text(int, "7", "x") == 7
    assert parse_text(float | None, "3.5", "x") == 3.5
    assert parse_text(str | None, "7", "x") == "7"
    with pytest.raises(UserError, match="x is 'many'; it must be a whole number"):
        parse_text(int | None, "many", "x")
    with pytest.raises(UserError, match="x is 'c'; it must be one of a, b"):
        parse_text(Literal["a", "b"] | None, "c", "x")
