"""The metadata of a README.md, as anyone may write them."""

import os

import pytest
import yaml
from huggingface_hub import DatasetCard
from hypothesis import given
from hypothesis import strategies as st

from ddpm import card
from ddpm.errors import UserError
from tests.hostile import CHARACTERS, FAST, watched

BOMB = "a: &a {k: v}\n" + "".join(
    f"{name}: &{name} {{<<: *{old}, {name}: [*{old}, *{old}, *{old}]}}\n"
    for old, name in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED = [
    "- a list",
    "5",
    "a: [",
    "a: *b",
    BOMB,
    "a: &a [*a]",
    "a: &a {b: *a}",
    f"a: &a {'b' * 1000}\nc: [" + "*a, " * 1000 + "]",
    "a: " + "[" * 1000,
    "a: " + "{b: " * 5000,
    "? [a]\n: b",
    "a: !!bool x",
    "a: !!timestamp x",
    "a: !!int ''",
    "a: 2024-13-45",
    "a: !!python/object/apply:os.system [echo]",
    "a: " + "9" * 5000,
    "\0",
    "a: " + "b" * card.METADATA_LIMIT,
]


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text[:20]))
def test_other_metadata_are_refused_in_one_sentence(tmp_path, text):
    with watched(tmp_path), pytest.raises(UserError, match="^It cannot be read"):
        card.split_card(f"---\n{text}\n---\n# Title", "It")
    with watched(tmp_path), pytest.raises(UserError, match="^It cannot be read"):
        card.parse_yaml(text, "It")


def test_text_after_the_metadata_is_returned():
    assert card.split_card("---\nb: 1\na: [x]\n---\n# T\n", "It") == ({"b": 1, "a": ["x"]}, "# T\n")
    assert card.split_card("# T\n---\na: 1\n---\n", "It") == ({}, "# T\n---\na: 1\n---\n")
    assert card.split_card("---\n\n---\nT", "It") == ({}, "T")
    aliases = "---\na: &x [b]\nc: *x\nd: {<<: {e: *x}}\n---\n"
    assert card.split_card(aliases, "It")[0] == {"a": ["b"], "c": ["b"], "d": {"e": ["b"]}}


def test_files_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="^It cannot be read"):
        card.read_card(tmp_path / "README.md", "It")
    os.truncate(tmp_path / "README.md", card.CARD_LIMIT + 1)
    with pytest.raises(UserError, match="more than the limit"):
        card.read_card(tmp_path / "README.md", "It")


@FAST
@given(st.text("-:[]{}&*!#'\"\n\r ab0", max_size=30) | st.text(CHARACTERS, max_size=20))
def test_metadata_are_those_that_datasets_reads(text):
    """Else a card could show one thing here and another one there."""
    try:
        metadata = card.split_card(f"---\n{text}\n---\n", "It")[0]
    except UserError:
        return
    try:
        expected = DatasetCard(f"---\n{text}\n---\n", ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError):
        return
    assert {name: value for name, value in metadata.items() if value is not None} == expected
