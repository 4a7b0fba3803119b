"""Order of the rows and seeds of all random draws, as functions of the step.

With B images in a micro-batch and M micro-batches in an optimizer step (processes x accumulation),
step s reads positions [s*M*B, (s+1)*M*B) of an endless sequence: the permutation of epoch 0, then
that of epoch 1, and so on, each a function of (seed, epoch). Micro-batch m of a step runs on
process m mod processes, with generators seeded by (seed, s, m). A resumed run therefore replays
nothing, and the same M gives the same run on any number of processes.
"""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch

Purpose = Literal["order", "pixels", "noise", "dropout", "weights", "split", "labels"]
PURPOSES: dict[Purpose, int] = {
    "order": 0,
    "pixels": 1,
    "noise": 2,
    "dropout": 3,
    "weights": 4,
    "split": 5,
    "labels": 6,
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


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(num_rows, generator=generator)
