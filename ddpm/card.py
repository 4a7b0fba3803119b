"""The metadata of a README.md on the Hub: YAML that anyone may have written, read within bounds."""

from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ddpm.errors import foreign_errors
from ddpm.file_io import read_bytes

CARD_LIMIT = 2**22
"""Largest README.md in bytes."""
METADATA_LIMIT = 2**18
"""Longest metadata in characters, also with each alias replaced by what it stands for."""
ADVICE = "Correct it there, or use another one."


class _Loader(yaml.SafeLoader):
    """The loader of the Hub's clients, with a limit to what aliases stand for."""

    def construct_document(self, node: yaml.Node) -> Any:
        if _num_characters(node, {}) > METADATA_LIMIT:
            raise yaml.YAMLError("its aliases stand for too much")
        return super().construct_document(node)


def _num_characters(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the size of a node, all aliases replaced. A node within itself is a RecursionError."""
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value)
    if id(node) not in known:
        values = chain(*node.value) if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_num_characters(value, known) for value in values)
    return known[id(node)]


def read_card(path: Path, source: str, errors: str = "strict") -> str:
    """Return the text of a README.md. UserError, which names `source`, if it is none."""
    with foreign_errors(f"{source} cannot be read", ADVICE):
        return read_bytes(path, CARD_LIMIT).decode(errors=errors)


def split_card(text: str, source: str) -> tuple[dict[str, Any], str]:
    """Return the metadata of a README.md, in their order, and the text after them.

    UserError, which names `source`, for metadata that are too long or no mapping.
    """
    match = REGEX_YAML_BLOCK.search(text)
    return (parse_yaml(match[2], source), text[match.end() :]) if match else ({}, text)


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """Return the mapping in a YAML text, an empty one for no value. UserError as `split_card`."""
    with foreign_errors(f"{source} cannot be read", ADVICE):
        if len(text) > METADATA_LIMIT:
            raise ValueError(f"its metadata are longer than {METADATA_LIMIT:,} characters")
        value = yaml.load(text, _Loader)
        if not isinstance(value, dict | None):
            raise ValueError("its metadata are no mapping")
    return value or {}
