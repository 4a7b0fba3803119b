"""How much memory a step takes, as a straight line in the batch size, from steps on small batches.

What a step holds beside weights, optimizer and average grows with the batch: activations that the
forward pass keeps for the backward one, and whatever else lives at the fullest moment. Two small
batches give the line. On a GPU torch counts what is allocated; on a CPU it does not, so every
operator's result is counted here while it lives, and the process's own growth where that is more.
"""

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm.stepping import Parts, take_step
from ddpm.tracking import Meter

SMALL = 4
"""Images of the first steps that are measured; also of the ones that follow, at least."""
MIB = 2**20


@dataclass(frozen=True)
class Footprint:
    """Peak memory of a process in MiB: `fixed` + `per_image` x images in a micro-batch."""

    fixed: float
    per_image: float

    def at(self, batch_size: int) -> float:
        """MiB with micro-batches of this many images."""
        return self.fixed + self.per_image * batch_size

    def largest(self, room: float) -> int:
        """The largest micro-batch that takes no more than `room` MiB; 0 when none does."""
        return max(0, int((room - self.fixed) / max(self.per_image, 1e-3)))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators make inside it; `peak` is the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            # A view, or a change in place, holds nothing new.
            if storage._cdata not in given and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def measure(parts: Parts) -> Footprint:
    """The line of a run's own steps. Call on every process; weights and moments do change.

    Steps are not compiled here, and see blank images. (A compiled step needs less, not more.)
    """
    device = parts.accelerator.device
    asked = parts.config.optimization.train_batch_size
    with torch.compiler.set_stance("force_eager"):
        _step(parts, 1)  # makes the optimizer's moments
        held = _held(device)
        line = _line(parts, held, SMALL)
        # In a small batch gradients and moments weigh more than activations: look nearer by. Never
        # at fewer images than before: what the process then grew to would be taken for theirs.
        if asked >= 8 * SMALL and line.at(asked // 2) < room(device):
            line = _line(parts, held, asked // 4)
    return line


def room(device: torch.device) -> float:
    """MiB that this process could hold in all: what it has, and its share of what is free."""
    if device.type == "cuda":
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / MIB
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return (_held(device) + psutil.virtual_memory().available / processes) / MIB


class _Blank:
    """Stands for the data: gray squares, as many as are asked for."""

    def __init__(self, channels: int, resolution: int):
        self.channels, self.resolution = channels, resolution

    def rows(self, first: int, count: int) -> range:
        return range(count)

    def batch(self, rows: range, generator: torch.Generator, random_flip: bool) -> torch.Tensor:
        shape = (len(rows), self.channels, self.resolution, self.resolution)
        return torch.full(shape, 127, dtype=torch.uint8)


def _step(parts: Parts, batch_size: int) -> None:
    optimization = replace(
        parts.config.optimization, train_batch_size=batch_size, gradient_accumulation_steps=1
    )
    small = replace(
        parts,
        config=replace(parts.config, optimization=optimization),
        data=_Blank(parts.data.channels, parts.data.resolution),
    )
    take_step(small, 0, 0.0, Meter(parts.accelerator))


def _line(parts: Parts, held: int, batch_size: int) -> Footprint:
    """Through the peaks of a step with this many images, and of one with twice as many."""
    device = parts.accelerator.device
    one, two = (
        _peak(device, held, lambda n=n: _step(parts, n)) for n in (batch_size, 2 * batch_size)
    )
    return Footprint((held + 2 * one - two) / MIB, (two - one) / batch_size / MIB)


def _held(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def _peak(device: torch.device, held: int, work: Callable[[], None]) -> int:
    """Bytes that `work` takes at its fullest, beyond what was `held` before.

    On a CPU operators have scratch space of their own and the heap has gaps: a process that keeps
    what it frees shows them in its size. A size that work of before had brought about shows
    nothing; then what the tensors need is told.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - held
    with LiveBytes() as live:
        work()
        work()  # what the first one left behind lies in the way of the second
    return max(live.peak, _held(device) - held)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [v.untyped_storage() for v in tree_leaves(values) if isinstance(v, torch.Tensor)]
