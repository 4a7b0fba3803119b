"""Order of the rows and seeds of all random draws, as functions of the step.

With B images in a micro-batch and M micro-batches in an optimizer step (processes x accumulation),
step s reads positions [s*M*B, (s+1)*M*B) of an endless sequence: the permutation of epoch 0, then
that of epoch 1, and so on, each a function of (seed, epoch). Micro-batch m of a step runs on
process m mod processes, with generators seeded by (seed, s, m). A resumed run therefore replays
nothing, and the same M gives the same run on any number of processes. Micro-batch m of a stream
reads a lane of its own (`Lanes`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

Purpose = Literal["order", "pixels", "noise", "dropout", "weights", "split", "labels", "lanes"]
PURPOSES: dict[Purpose, int] = {
    "order": 0,
    "pixels": 1,
    "noise": 2,
    "dropout": 3,
    "weights": 4,
    "split": 5,
    "labels": 6,
    "lanes": 7,
}
"""What random numbers are drawn for. The numbers are part of every seed: never change them."""


def derive_seed(seed: int, purpose: Purpose, *counters: int) -> int:
    """Return a 63-bit seed; different purposes and counters give unrelated seeds."""
    entropy = np.random.SeedSequence([seed, PURPOSES[purpose], *counters])
    return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))


def make_generator(
    seed: int, purpose: Purpose, step: int, micro_batch: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return the generator of one micro-batch; it draws the same numbers on every process."""
    generator = torch.Generator(device=device)
    return generator.manual_seed(derive_seed(seed, purpose, step, micro_batch))


def row_indices(seed: int, num_rows: int, start: int, count: int) -> list[int]:
    """Return the rows at positions [start, start + count) of the endless sequence."""
    rows: list[int] = []
    while len(rows) < count:
        epoch, offset = divmod(start + len(rows), num_rows)
        rows += _permutation(seed, epoch, num_rows)[offset : offset + count - len(rows)].tolist()
    return rows


def held_out_rows(seed: int, num_rows: int, fraction: float) -> list[int]:
    """Return the rows that a run never trains on, sorted: `fraction` of all, at least one."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "split"))
    count = max(1, round(fraction * num_rows))
    return sorted(torch.randperm(num_rows, generator=generator)[:count].tolist())


def micro_batches(process: int, num_processes: int, accumulation: int) -> range:
    """Return the micro-batches of a step that run on this process."""
    return range(process, num_processes * accumulation, num_processes)


@dataclass(frozen=True)
class Lanes:
    """The lanes of a stream: micro-batch m of every step reads lane m.

    `count` is M, `own` are the lanes of this process, `batch_size` the images of a micro-batch.
    """

    count: int = 1
    own: Sequence[int] = (0,)
    batch_size: int = 1

    @classmethod
    def of(cls, process: int, num_processes: int, accumulation: int, batch_size: int) -> "Lanes":
        """Return the lanes of a run, as one of its processes reads them."""
        own = micro_batches(process, num_processes, accumulation)
        return cls(num_processes * accumulation, own, batch_size)

    def locate(self, position: int) -> tuple[int, int]:
        """Return the lane of a position of the endless sequence, and the position in that lane."""
        micro_batch, index = divmod(position, self.batch_size)
        step, lane = divmod(micro_batch, self.count)
        return lane, step * self.batch_size + index


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(num_rows, generator=generator)
