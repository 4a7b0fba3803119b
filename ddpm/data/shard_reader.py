"""Rows of a stream by position: shuffled in blocks, and found again from any block onwards.

In each epoch the shards come in an order of their own, up to `WIDTH` of them are read in turn, and
neighbouring rows are shuffled in whole blocks; all of it is a function of (seed, epoch, block). The
place where a block begins is a small JSON object. `datasets`' own buffer is not used: what is in it
is lost in a resume.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from ddpm import hub
from ddpm.data import order
from ddpm.data.source import Source, root_cause
from ddpm.errors import UserError

WIDTH = 8
"""Shards that are read in turn."""
MAX_SHARDS = 1024
Place = dict[str, Any]
"""Where reading stands: {"epoch", "next", "turn", "open": [[shard, state of datasets], ...]}."""
START: Place = {"epoch": 0, "next": 0, "turn": 0, "open": []}


@dataclass
class Shard:
    """One open shard: its number, the rest of its rows, and where that begins.

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
    """The rows of one epoch after the other, some shards at a time, from any place onwards."""

    def __init__(self, source: Source, seed: int):
        self.dataset, self.column, self.seed = source.dataset, source.column, seed
        self.thing = f"The dataset {source.facts['name']}"
        self.num_shards = max(1, min(source.dataset.num_shards, MAX_SHARDS))
        self.seek(START)

    def place(self) -> Place:
        """Where the next row is."""
        shards = [[shard.number, shard.state()] for shard in self._open]
        return {"epoch": self.epoch, "next": self._next, "turn": self._turn, "open": shards}

    def seek(self, place: Place) -> None:
        self.epoch, self._next, self._turn = place["epoch"], place["next"], place["turn"]
        shuffled = np.random.default_rng(order.derive_seed(self.seed, "order", self.epoch, 0))
        self._order = shuffled.permutation(self.num_shards).tolist()
        self._open = [self._opened(number, state) for number, state in place["open"]]

    def rows(self, count: int) -> list[Any]:
        """The next rows of this epoch, fewer at its end; none when it is over."""
        found: list[Any] = []
        with hub.hub_errors(self.thing):
            while len(found) < count:
                while len(self._open) < WIDTH and self._next < self.num_shards:
                    self._open.append(self._opened(self._order[self._next], None))
                    self._next += 1
                if not self._open:
                    break
                self._turn %= len(self._open)
                try:
                    found.append(self._open[self._turn].read()[self.column])
                    self._turn += 1
                except StopIteration:
                    del self._open[self._turn]
                except Exception as error:  # of any builder; every one means: not readable
                    if hub.describe_error(error, self.thing):
                        raise
                    raise UserError(
                        f"{self.thing} cannot be read further: {root_cause(error)}. The same "
                        "command goes on from the last checkpoint."
                    ) from error
        return found

    def _opened(self, number: int, state: dict[str, Any] | None) -> Shard:
        dataset = self.dataset.shard(num_shards=self.num_shards, index=number)
        if state is not None:
            dataset.load_state_dict(state)
        return Shard(number, dataset, iter(dataset), state)


@dataclass
class Block:
    """Neighbouring rows, shuffled: `first` is the first's position, `place` where reading began."""

    first: int
    number: int
    place: Place
    rows: list[Any]

    def mark(self) -> dict[str, Any]:
        return {"first": self.first, "block": self.number, "place": self.place}


class ShuffledBlocks:
    """Rows by position. Going forward costs reading; going back, reading from a remembered mark."""

    def __init__(self, reader: ShardReader, size: int):
        self.reader, self.size = reader, size
        self._blocks: deque[Block] = deque(maxlen=2)
        self._marks: deque[dict[str, Any]] = deque(maxlen=64)
        self._jump({"first": 0, "block": 0, "place": START})

    def row(self, position: int, offset: int = 0) -> Any:
        """The row at `position`, or `offset` further in the same block, round its end."""
        block = self._block(position)
        return block.rows[(position - block.first + offset) % len(block.rows)]

    def length(self, position: int) -> int:
        """Rows in the block of `position`."""
        return len(self._block(position).rows)

    def mark(self, position: int) -> dict[str, Any]:
        """What to remember to go on from `position`: the block that it is in."""
        return self._block(position).mark()

    def restore(self, mark: dict[str, Any]) -> None:
        self._jump(mark)

    def _jump(self, mark: dict[str, Any]) -> None:
        self.reader.seek(mark["place"])
        self._blocks.clear()
        self._marks.append(mark)
        self._end, self._number = mark["first"], mark["block"]

    def _block(self, position: int) -> Block:
        if position < (self._blocks[0].first if self._blocks else self._end):
            before = [mark for mark in self._marks if mark["first"] <= position]
            self._jump(max(before, key=lambda mark: mark["first"], default=self._start()))
        while position >= self._end:
            self._read()
        return next(b for b in self._blocks if b.first <= position < b.first + len(b.rows))

    def _start(self) -> dict[str, Any]:
        return {"first": 0, "block": 0, "place": START}

    def _read(self) -> None:
        place = self.reader.place()
        rows = self.reader.rows(self.size)
        if not rows:
            if self._number == 0:
                raise UserError(f"{self.reader.thing} has no rows. Choose another --split.")
            self.reader.seek({**START, "epoch": self.reader.epoch + 1})
            self._number = 0
            return
        seed = order.derive_seed(self.reader.seed, "order", self.reader.epoch, self._number + 1)
        shuffled = np.random.default_rng(seed).permutation(len(rows))
        block = Block(self._end, self._number, place, [rows[index] for index in shuffled])
        self._blocks.append(block)
        self._marks.append(block.mark())
        self._end, self._number = self._end + len(rows), self._number + 1
