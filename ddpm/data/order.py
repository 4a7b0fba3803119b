"""What is seen when: rows and randomness as functions of the step, not as a state.

With B images in a micro-batch and M micro-batches in an optimizer step (processes x accumulation),
step s takes positions [s*M*B, (s+1)*M*B) of an endless stream: the permutation of epoch 0, then
that of epoch 1, and so on, each a function of (seed, epoch). Micro-batch m of a step runs on
process m mod processes, with generators seeded by (seed, s, m). So a resumed run replays nothing,
and the same M gives the same run on any number of processes.
"""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch

RANDOM_STREAMS = {"order": 0, "pixels": 1, "noise": 2, "dropout": 3, "weights": 4, "split": 5}
RandomStream = Literal["order", "pixels", "noise", "dropout", "weights", "split"]


def derive_seed(seed: int, stream: RandomStream, *counters: int) -> int:
    """A 63-bit seed for one use of randomness; distinct uses get unrelated seeds."""
    entropy = np.random.SeedSequence([seed, RANDOM_STREAMS[stream], *counters])
    return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))


def make_generator(
    seed: int, stream: RandomStream, step: int, micro_batch: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The generator of one micro-batch: the same draws whenever and wherever it runs."""
    made = torch.Generator(device=device)
    return made.manual_seed(derive_seed(seed, stream, step, micro_batch))


def row_indices(seed: int, num_rows: int, start: int, count: int) -> list[int]:
    """Row numbers at positions [start, start + count) of the endless stream of permutations."""
    found: list[int] = []
    position = start
    while len(found) < count:
        epoch, offset = divmod(position, num_rows)
        take = min(count - len(found), num_rows - offset)
        found += _permutation(seed, epoch, num_rows)[offset : offset + take].tolist()
        position += take
    return found


def held_out_rows(seed: int, num_rows: int, share: float) -> list[int]:
    """The rows that a run never trains on, in rising order: a share of all, at least one.

    A function of (seed, num_rows, share), whatever the number of processes.
    """
    chosen = torch.Generator().manual_seed(derive_seed(seed, "split"))
    count = max(1, round(share * num_rows))
    return sorted(torch.randperm(num_rows, generator=chosen)[:count].tolist())


def micro_batches(process: int, num_processes: int, accumulation: int) -> range:
    """Which micro-batches of a step run on this process."""
    return range(process, num_processes * accumulation, num_processes)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_rows: int) -> torch.Tensor:
    order = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(num_rows, generator=order)
