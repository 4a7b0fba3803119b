"""Splits as --split and --eval_split name them: train, train[:80%], train+test, all."""

from collections.abc import Mapping
from dataclasses import dataclass

import datasets

from ddpm.errors import UserError

HELD_OUT_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")
"""Names of splits that are usually not trained on, in order of preference."""


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of a split."""

    split: str
    start: int
    stop: int


def resolve(expression: str, sizes: Mapping[str, int]) -> list[Part]:
    """Return the rows that an expression names, given the number of rows of each split.

    Parts without rows are left out.
    ValueError for an unknown split and a slice that ends before it begins, UserError for what is no
    expression of splits.
    """
    if expression in sizes:
        parts = [Part(expression, 0, sizes[expression])]
    elif expression == "all":
        parts = [Part(split, 0, size) for split, size in sizes.items()]
    else:
        absolute = _parse(expression).to_absolute(dict(sizes))
        parts = [Part(part.splitname, part.from_, part.to) for part in absolute]
    if any(part.start > part.stop for part in parts):
        raise ValueError(f"a slice of {expression} ends before it begins")
    return [part for part in parts if part.start < part.stop]


def overlap(one: str, other: str, sizes: Mapping[str, int]) -> bool:
    """Return whether two expressions have rows in common.

    Without the sizes of their splits, any two slices of the same split have, and so have two
    expressions of the same split of which one does not name rows of the dataset.
    """
    if "all" in (one, other):
        return True
    common = _names(one) & _names(other)
    if not common <= sizes.keys():
        return True
    try:
        return any(
            a.split == b.split and max(a.start, b.start) < min(a.stop, b.stop)
            for a in (resolve(one, sizes) if common else ())
            for b in resolve(other, sizes)
        )
    except ValueError:  # of a split that the dataset does not have
        return True


def is_sliced(expression: str) -> bool:
    """Return whether an expression names a part of a split, as in train[:80%]."""
    return "[" in expression


def _names(expression: str) -> set[str]:
    """Return the names of the splits in an expression."""
    try:
        return {part.partition("[")[0] for part in _parse(expression).to_spec().split("+")}
    except UserError:  # a saved dataset may have splits of any name
        return {expression}


def _parse(expression: str) -> datasets.ReadInstruction:
    try:
        return datasets.ReadInstruction.from_spec(expression)
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{expression!r:.80} is not a split: give a name, a slice in rows or whole percents, "
            "or a sum, as in train, train[:80%] or train+test."
        ) from error
