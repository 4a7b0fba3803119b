"""Rows of a stream by position: shuffled in blocks, and readable from any block onwards.

In each epoch the shards have an order of their own, up to `OPEN_SHARDS` of them are read in turn,
and consecutive rows are shuffled in blocks; all of it is a function of (seed, epoch, block). The
place where a block begins is a small JSON object. The shuffle buffer of `datasets` is not used: a
resume loses its content.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from ddpm.data import order
from ddpm.data.open_errors import data_errors
from ddpm.data.source import Source
from ddpm.errors import UserError

OPEN_SHARDS = 8
"""Shards that are read in turn."""
MAX_SHARDS = 1024
Place = dict[str, Any]
"""Reading position: {"epoch", "next", "turn", "open": [[shard, state of datasets], ...]}."""
START: Place = {"epoch": 0, "next": 0, "turn": 0, "open": []}


@dataclass
class Shard:
    """One open shard: its number and its remaining rows.

    `opened_at` is the state of `datasets` that it was opened with, None for its beginning.
    """

    number: int
    dataset: datasets.IterableDataset
    rows: Iterator[dict[str, Any]]
    opened_at: dict[str, Any] | None
    was_read: bool = False

    def read(self) -> dict[str, Any]:
        row = next(self.rows)
        self.was_read = True
        return row

    def state(self) -> dict[str, Any] | None:
        return self.dataset.state_dict() if self.was_read else self.opened_at


class ShardReader:
    """Reads the rows of one epoch after the other, several shards in turn, from any place."""

    def __init__(self, source: Source, seed: int):
        self.dataset, self.seed = source.dataset, seed
        self.description = f"The dataset {source.facts.name}"
        self.num_shards = max(1, min(source.dataset.num_shards, MAX_SHARDS))
        self.seek(START)

    def place(self) -> Place:
        """Return where the next row is."""
        shards = [[shard.number, shard.state()] for shard in self._open]
        return {"epoch": self.epoch, "next": self._next, "turn": self._turn, "open": shards}

    def seek(self, place: Place) -> None:
        """Continue from a place."""
        self.epoch, self._next, self._turn = place["epoch"], place["next"], place["turn"]
        generator = np.random.default_rng(order.derive_seed(self.seed, "order", self.epoch, 0))
        self._order = generator.permutation(self.num_shards).tolist()
        self._open = [self._open_shard(number, state) for number, state in place["open"]]

    def rows(self, count: int) -> list[dict[str, Any]]:
        """Return the next rows of this epoch: fewer than `count` at its end, none after it."""
        rows: list[dict[str, Any]] = []
        advice = " The same command continues from the last checkpoint."
        with data_errors(self.description, "cannot be read further", advice):
            while len(rows) < count:
                while len(self._open) < OPEN_SHARDS and self._next < self.num_shards:
                    self._open.append(self._open_shard(self._order[self._next], None))
                    self._next += 1
                if not self._open:
                    break
                self._turn %= len(self._open)
                try:
                    rows.append(self._open[self._turn].read())
                    self._turn += 1
                except StopIteration:
                    del self._open[self._turn]
        return rows

    def _open_shard(self, number: int, state: dict[str, Any] | None) -> Shard:
        dataset = self.dataset.shard(num_shards=self.num_shards, index=number)
        if state is not None:
            dataset.load_state_dict(state)
        return Shard(number, dataset, iter(dataset), state)


@dataclass
class Block:
    """Consecutive rows, shuffled: position `first` and later; reading them begins at `place`."""

    first: int
    number: int
    place: Place
    rows: list[dict[str, Any]]

    def mark(self) -> dict[str, Any]:
        """Return JSON to continue from this block."""
        return {"first": self.first, "block": self.number, "place": self.place}


class ShuffledBlocks:
    """Rows by position. A position behind the last two blocks is read again from a kept mark."""

    def __init__(self, reader: ShardReader, size: int):
        self.reader, self.size = reader, size
        self._blocks: deque[Block] = deque(maxlen=2)
        self._marks: deque[dict[str, Any]] = deque(maxlen=64)
        self.restore(self._start())

    def row(self, position: int, offset: int = 0) -> dict[str, Any]:
        """Return the row at `position`, or `offset` later in the same block, cyclically."""
        block = self._block(position)
        return block.rows[(position - block.first + offset) % len(block.rows)]

    def length(self, position: int) -> int:
        """Return the number of rows in the block of `position`."""
        return len(self._block(position).rows)

    def mark(self, position: int) -> dict[str, Any]:
        """Return JSON to continue from `position`: where its block begins."""
        return self._block(position).mark()

    def restore(self, mark: dict[str, Any]) -> None:
        """Continue from a mark."""
        self.reader.seek(mark["place"])
        self._blocks.clear()
        self._marks.append(mark)
        self._end, self._number = mark["first"], mark["block"]

    def _block(self, position: int) -> Block:
        if position < (self._blocks[0].first if self._blocks else self._end):
            earlier = [mark for mark in self._marks if mark["first"] <= position]
            self.restore(max(earlier, key=lambda mark: mark["first"], default=self._start()))
        while position >= self._end:
            self._read_block()
        return next(b for b in self._blocks if b.first <= position < b.first + len(b.rows))

    def _start(self) -> dict[str, Any]:
        return {"first": 0, "block": 0, "place": START}

    def _read_block(self) -> None:
        """Read the next block, or go to the next epoch if this one is over."""
        place = self.reader.place()
        rows = self.reader.rows(self.size)
        if not rows:
            if self._number == 0:
                raise UserError(f"{self.reader.description} has no rows. Choose another --split.")
            self.reader.seek({**START, "epoch": self.reader.epoch + 1})
            self._number = 0
            return
        seed = order.derive_seed(self.reader.seed, "order", self.reader.epoch, self._number + 1)
        permutation = np.random.default_rng(seed).permutation(len(rows))
        block = Block(self._end, self._number, place, [rows[index] for index in permutation])
        self._blocks.append(block)
        self._marks.append(block.mark())
        self._end, self._number = self._end + len(rows), self._number + 1
