"""Rows of a lane of a stream by position: shuffled in blocks, and readable from any block onwards.

In each epoch the shards of a lane have an order of their own, some of them are read in turn, and
consecutive rows are shuffled in blocks; all of it is a function of (seed, lane, epoch, block). The
place where a block begins is a small JSON object. Threads read the next rows of all open shards
while those before are used.

Shards, their states, and the rows of lanes that share a shard are those of `datasets`. Its
`shuffle` is not used, since a resume loses the rows in the buffer. With a buffer of one row and a
permutation by `map` in batches none is lost; but the readers of several shards then wait for 5 s at
the end of an epoch, and runs of earlier versions could not go on in their order.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node

from ddpm import hub
from ddpm.data import order
from ddpm.data.open_errors import data_errors
from ddpm.data.source import Source
from ddpm.errors import UserError

OPEN_SHARDS, MIN_OPEN_SHARDS = 8, 2
"""Shards that all lanes together read in turn, and each of them at least."""
MIN_BLOCK_ROWS = 32
"""Fewest rows that a lane shuffles together, if the buffer has as many."""
MAX_SHARDS = 1024
READING_THREADS = 16
MAX_REOPENED = 20
"""How often a shard is opened again after another thread closed the client of all."""
Row = dict[str, Any]
Place = dict[str, Any]
"""Reading position: {"epoch", "next", "turn", "open": [[shard, state of datasets, used], ...]};
`used` rows after the state."""
START: Place = {"epoch": 0, "next": 0, "turn": 0, "open": []}


class Chunk(NamedTuple):
    """Consecutive rows of a shard: where they begin, and whether the shard ends with them."""

    state: dict[str, Any] | None
    rows: list[Row]
    is_last: bool


class Shard:
    """One open shard. A thread reads the next chunk while the rows of the one before are used."""

    def __init__(
        self,
        number: int,
        dataset: datasets.IterableDataset,
        chunk_rows: int,
        threads: ThreadPoolExecutor,
        state: dict[str, Any] | None = None,
        used: int = 0,
    ):
        """Open at `used` rows after `state`, which is None for the beginning."""
        self.number, self._dataset, self._state = number, dataset, state
        if state is not None:
            dataset.load_state_dict(state)
        self._rows, self._chunk_rows, self._threads = iter(dataset), chunk_rows, threads
        self._reopened = 0
        self._chunk, self._used = Chunk(state, [], False), used
        self._next = threads.submit(self._read_chunk)

    def place(self) -> list[Any]:
        """Return JSON: where the next row is."""
        return [self.number, self._chunk.state, self._used]

    def next_row(self) -> Row | None:
        """Return the next row, None at the end of the shard. Raise whatever `datasets` raises."""
        while self._used >= len(self._chunk.rows):
            if self._chunk.is_last:
                return None
            self._used -= len(self._chunk.rows)
            self._chunk = self._next.result()
            if not self._chunk.is_last:
                self._next = self._threads.submit(self._read_chunk)
        self._used += 1
        return self._chunk.rows[self._used - 1]

    def _read_chunk(self) -> Chunk:
        state = self._state
        try:
            rows = list(islice(self._rows, self._chunk_rows))
        except RuntimeError as error:  # the client was closed: `datasets` does not try that again
            if self._reopened == MAX_REOPENED or not hub.is_transient(error):
                raise
            self._reopened += 1
            self._dataset.load_state_dict(state)
            self._rows = iter(self._dataset)
            return self._read_chunk()
        self._state = self._dataset.state_dict()
        return Chunk(state, rows, len(rows) < self._chunk_rows)


class ShardReader:
    """Reads the rows of a lane in one epoch after the other, several shards in turn."""

    def __init__(
        self,
        source: Source,
        seed: int,
        threads: ThreadPoolExecutor,
        block_rows: int,
        lane: int = 0,
        num_lanes: int = 1,
    ):
        self.dataset, self._threads = source.dataset, threads
        self.description = f"The dataset {source.facts.name}"
        self.seed = order.derive_seed(seed, "lanes", lane) if lane else seed
        self.num_shards = count_shards(source, num_lanes)
        self.shards = range(lane % self.num_shards, self.num_shards, num_lanes)
        self.sharers = range(self.shards[0], num_lanes, self.num_shards)
        self._sharer = self.sharers.index(lane)
        self._max_open = max(MIN_OPEN_SHARDS, OPEN_SHARDS // num_lanes)
        self._chunk_rows = -(-block_rows // min(self._max_open, len(self.shards)))
        self.seek(START)

    def place(self) -> Place:
        """Return where the next row is."""
        if self._open is None:
            return self._start
        shards = [shard.place() for shard in self._open]
        return {"epoch": self.epoch, "next": self._next, "turn": self._turn, "open": shards}

    def seek(self, place: Place) -> None:
        """Continue from a place. Its shards are opened when the next rows are read."""
        self._start, self._open = place, None
        self.epoch, self._next, self._turn = place["epoch"], place["next"], place["turn"]
        generator = np.random.default_rng(order.derive_seed(self.seed, "order", self.epoch, 0))
        self._order = generator.permutation(self.shards).tolist()

    def rows(self, count: int) -> list[Row]:
        """Return the next rows of this epoch: fewer than `count` at its end, none after it.

        Raises UserError if the data cannot be read; the next call reads the same rows again.
        """
        place, rows = self.place(), []
        advice = " The same command continues from the last checkpoint."
        try:
            with data_errors(self.description, "cannot be read further", advice):
                if self._open is None:
                    self._open = [self._open_shard(*shard) for shard in place["open"]]
                while len(rows) < count and (row := self._next_row()) is not None:
                    rows.append(row)
        except Exception:
            self.seek(place)
            raise
        return rows

    def _next_row(self) -> Row | None:
        """Return the next row, from the shard whose turn it is; None at the end of the epoch."""
        while True:
            while len(self._open) < self._max_open and self._next < len(self._order):
                self._open.append(self._open_shard(self._order[self._next]))
                self._next += 1
            if not self._open:
                return None
            self._turn %= len(self._open)
            row = self._open[self._turn].next_row()
            if row is not None:
                self._turn += 1
                return row
            del self._open[self._turn]

    def _open_shard(self, number: int, state: dict[str, Any] | None = None, used: int = 0) -> Shard:
        dataset = self.dataset.shard(num_shards=self.num_shards, index=number)
        if len(self.sharers) > 1:
            dataset = split_dataset_by_node(dataset, self._sharer, len(self.sharers), "examples")
        return Shard(number, dataset, self._chunk_rows, self._threads, state, used)


def count_shards(source: Source, num_lanes: int) -> int:
    """Return how many shards the lanes of a stream read: its files, or groups of them."""
    return max(1, min(source.dataset.num_shards, max(MAX_SHARDS, num_lanes)))


def block_rows(buffer_rows: int, num_lanes: int) -> int:
    """Return how many rows each lane shuffles together, so that all of them fill the buffer."""
    return max(-(-buffer_rows // num_lanes), min(buffer_rows, MIN_BLOCK_ROWS))


def lane_notes(num_shards: int, num_lanes: int) -> list[str]:
    """Return lines on what lanes cost that share shards, or have more of them than others."""
    notes = []
    most = -(-max(num_lanes, num_shards) // min(num_lanes, num_shards))
    fewest = max(num_lanes, num_shards) // min(num_lanes, num_shards)
    if num_shards < num_lanes:
        notes.append(
            f"Note: the stream has fewer shards (files), {num_shards:,}, than a step has "
            f"micro-batches, {num_lanes:,}. Up to {most:,} of these share a shard: each reads all "
            f"of it and uses a part of its rows. Of {num_lanes:,} files, each is read once."
        )
    if most != fewest:
        notes.append(
            f"Note: the {num_shards:,} shards of the stream are not evenly divided over "
            f"{num_lanes:,} micro-batches a step: some images are seen {most / fewest:.3g} times "
            f"as often as others. A number of files that is a multiple of {num_lanes:,} is even."
        )
    return notes


class Block(NamedTuple):
    """Consecutive rows, shuffled: position `first` and later; reading them begins at `place`."""

    first: int
    number: int
    place: Place
    rows: list[Row]

    def mark(self) -> dict[str, Any]:
        """Return JSON to continue from this block."""
        return {"first": self.first, "block": self.number, "place": self.place}


class ShuffledBlocks:
    """Rows of a lane by position. One behind the kept blocks is read again from a kept mark."""

    def __init__(self, reader: ShardReader, size: int, kept: int = 2):
        self.reader, self.size = reader, size
        self._blocks: deque[Block] = deque(maxlen=kept)
        self._marks: deque[dict[str, Any]] = deque(maxlen=64)
        self.restore(self._start())

    def row(self, position: int, offset: int = 0) -> Row:
        """Return the row at `position`, or `offset` later in the same block, cyclically."""
        block = self._block(position)
        return block.rows[(position - block.first + offset) % len(block.rows)]

    def length(self, position: int) -> int:
        """Return the number of rows in the block of `position`."""
        return len(self._block(position).rows)

    def first_rows(self, count: int) -> list[Row]:
        """Return the first rows of the first epoch, at most `count`."""
        rows: list[Row] = []
        while len(rows) < count:
            block = self._block(len(rows))
            if block.place["epoch"] > 0:
                break
            rows += block.rows
        return rows[:count]

    def mark(self, position: int) -> dict[str, Any]:
        """Return JSON to continue from `position`: where its block begins. Reads no block ahead."""
        if position == self._end:
            return {"first": self._end, "block": self._number, "place": self.reader.place()}
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
            if self._number == 0 and len(self.reader.sharers) > 1:
                raise UserError(
                    f"{self.reader.description} has fewer rows than the micro-batches of a step "
                    "that share them. Use fewer processes or --gradient_accumulation_steps."
                )
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
