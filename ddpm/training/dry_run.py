"""--dry_run: what a run would be, measured on a few of its own steps. It writes no run."""

import os
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm.config.base import dump, flatten
from ddpm.config.train import TrainConfig
from ddpm.data import report
from ddpm.errors import UserError
from ddpm.training.schedule import UNLIMITED_STEPS, learning_rate, require_same_config
from ddpm.training.step import (
    TrainState,
    build_train_state,
    describe_run,
    format_duration,
    train_step,
)
from ddpm.training.tracking import LossMeter, peak_memory_mib
from ddpm.training.validation import Validator

UNMEASURED, MEASURED = 2, 8
"""Steps that are taken: first to get memory and kernels ready, then against the clock."""


def dry_run(accelerator: Accelerator, config: TrainConfig) -> None:
    """Print settings, data, size, speed, memory, and how long the run would take.

    Call on every process. Raises what training would raise: UserError for data or settings that
    cannot be used, and for a folder that holds a run with other settings.
    """
    say = accelerator.print
    say(dump(config))
    if not config.overwrite_output_dir:
        say(require_same_config(Path(config.output_dir), flatten(config)), end="")
    parts = build_train_state(accelerator, config)
    Validator.open(parts)  # refuses what could not be measured
    say("\n" + "\n".join([*report.format_report(parts.data.facts), *describe_run(parts)]))
    for line in _memory(parts):
        say(line)
    each = _seconds_a_step(parts)
    rate = parts.plan.images_per_step / each
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parts.parameters)
    copies = 4 if parts.ema is not None else 3
    copies += 0 if parts.tracks is None else len(parts.tracks.averages)
    say(f"{rate:,.0f} images/s, {each:.3f} s a step, over {MEASURED} steps.")
    say(f"Their peak memory: {peak_memory_mib(accelerator.device):,.0f} MiB.")
    say(f"A checkpoint takes about {weights * copies / 2**20:,.0f} MiB on disk.")
    if parts.plan.total_steps != UNLIMITED_STEPS:
        say(
            f"All {parts.plan.total_steps:,} steps: about {format_duration(parts.plan.total_steps * each)}"
            " (h:mm:ss), without previews, evaluation and saving."
        )
    else:
        say(f"--budget {config.optimization.budget} ends the run.")
    say("A dry run: no run was begun. Leave out --dry_run to train.")


def _memory(parts: TrainState) -> list[str]:
    """What a step will take, from small ones. UserError when that is more than there is."""
    asked = parts.config.optimization.train_batch_size
    if parts.is_sharded:
        return ["With FSDP's sharded weights no peak of memory is predicted."]
    line = estimate_memory(parts)
    room = available_mib(parts.accelerator.device)
    largest = line.largest(room)
    if line.at(asked) > room:
        advice = f"Give {largest} at most" if largest else "Give a smaller --resolution or model"
        raise UserError(
            f"--train_batch_size {asked} needs about {line.at(asked):,.0f} MiB, and {room:,.0f} "
            f"are there. {advice}, with --gradient_accumulation_steps for the same batch a step; "
            "or try --gradient_checkpointing."
        )
    return [
        f"Memory of this process at its peak, predicted: about {line.at(asked):,.0f} MiB, of which "
        f"{line.per_image:,.1f} MiB an image.",
        f"The largest --train_batch_size for the {room:,.0f} MiB there are: about {largest:,}.",
    ]


def _seconds_a_step(parts: TrainState) -> float:
    device = parts.accelerator.device
    meter, began = LossMeter(parts.accelerator), 0.0
    parts.unet.train()
    for step in range(UNMEASURED + MEASURED):
        if step == UNMEASURED:
            began = _now(device)
        lr = learning_rate(parts.config.optimization, step, parts.plan.total_steps)
        train_step(parts, step, lr, meter)
    return (_now(device) - began) / MEASURED


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# How much memory a step takes, as a straight line in the batch size, from steps on small batches.
#
# What a step holds beside weights, optimizer and average grows with the batch: activations that the
# forward pass keeps for the backward one, and whatever else lives at the fullest moment. Two small
# batches give the line. On a GPU torch counts what is allocated; on a CPU it does not, so every
# operator's result is counted here while it lives, and the process's own growth where that is more.

SMALL = 4
"""Images of the first steps that are measured; also of the ones that follow, at least."""
MIB = 2**20


@dataclass(frozen=True)
class MemoryEstimate:
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


def estimate_memory(parts: TrainState) -> MemoryEstimate:
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
        if asked >= 8 * SMALL and line.at(asked // 2) < available_mib(device):
            line = _line(parts, held, asked // 4)
    return line


def available_mib(device: torch.device) -> float:
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


def _step(parts: TrainState, batch_size: int) -> None:
    optimization = replace(
        parts.config.optimization, train_batch_size=batch_size, gradient_accumulation_steps=1
    )
    small = replace(
        parts,
        config=replace(parts.config, optimization=optimization),
        data=_Blank(parts.data.channels, parts.data.resolution),
    )
    train_step(small, 0, 0.0, LossMeter(parts.accelerator))


def _line(parts: TrainState, held: int, batch_size: int) -> MemoryEstimate:
    """Through the peaks of a step with this many images, and of one with twice as many."""
    device = parts.accelerator.device
    one, two = (
        _peak(device, held, lambda n=n: _step(parts, n)) for n in (batch_size, 2 * batch_size)
    )
    return MemoryEstimate((held + 2 * one - two) / MIB, (two - one) / batch_size / MIB)


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
