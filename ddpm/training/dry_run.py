"""--dry_run: predict memory, speed and duration from a few steps, without starting a run.

Memory is predicted as a straight line in the batch size, from steps on small batches: besides
weights, optimizer and averages a step holds activations, which grow with the batch. On a GPU torch
counts what is allocated. On a CPU it does not, so the results of operators are counted while they
live, and the growth of the process where that is more.
"""

import os
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm.config.base import dump
from ddpm.config.data import DataConfig
from ddpm.config.train import TrainConfig
from ddpm.data import report
from ddpm.data.transforms import Batch
from ddpm.errors import UserError
from ddpm.training.pretrained import Pretrained
from ddpm.training.schedule import UNLIMITED_STEPS, learning_rate, require_same_config
from ddpm.training.step import (
    TrainState,
    build_train_state,
    describe_run,
    format_duration,
    is_sharded,
    train_step,
)
from ddpm.training.tracking import LossMeter, peak_memory_mib
from ddpm.training.validation import Validator

WARMUP_STEPS, TIMED_STEPS = 2, 8
SMALL_BATCH = 4
"""Images of the first steps whose memory is measured; later ones have no fewer."""
MIB = 2**20


def dry_run(
    accelerator: Accelerator, config: TrainConfig, pretrained: Pretrained | None = None
) -> None:
    """Print settings, data, size, speed, memory, and how long the run would take.

    Call on every process. Raises what training would raise: UserError for data or settings that
    cannot be used, and for a folder that holds a run with other settings.
    """
    say = accelerator.print
    say(dump(config))
    if not config.overwrite_output_dir:
        say(require_same_config(config), end="")
    state = build_train_state(accelerator, config, pretrained)
    Validator.open(state)  # raises for what could not be measured
    say("\n" + "\n".join([*report.format_report(state.data.facts), *describe_run(state)]))
    say(_check_memory(state))
    seconds = _seconds_per_step(state)
    checkpoint_mib = _num_copies(state) * _weights_mib(state.parameters)
    rate, total_steps = state.schedule.images_per_step / seconds, state.schedule.total_steps
    say(f"{rate:,.0f} images/s, {seconds:.3f} s a step, over {TIMED_STEPS} steps.")
    say(f"Their peak memory: {peak_memory_mib(accelerator.device):,.0f} MiB.")
    say(f"A checkpoint takes about {checkpoint_mib:,.0f} MiB on disk.")
    if total_steps != UNLIMITED_STEPS:
        say(
            f"All {total_steps:,} steps: about {format_duration(total_steps * seconds)}"
            " (h:mm:ss), without previews, evaluation and saving."
        )
    else:
        say(f"--budget {config.optimization.budget} ends the run.")
    say("A dry run: no run was started. Leave out --dry_run to train.")


def _check_memory(state: TrainState) -> str:
    """Return lines on the memory of a step on each process. Call on every process.

    Raises UserError, on every process, if it exceeds what is available on one of them.
    """
    accelerator, batch_size = state.accelerator, state.config.optimization.train_batch_size
    estimate = estimate_memory(state)
    needed, available = estimate.at(batch_size), _least_available(accelerator)
    largest = estimate.largest(available)
    if needed > available:
        advice = f"Give {largest} at most" if largest else "Give a smaller --resolution or model"
        raise UserError(
            f"--train_batch_size {batch_size} needs about {needed:,.0f} MiB, and {available:,.0f} "
            f"are there. {advice}, with --gradient_accumulation_steps for the same batch a step; "
            "or try --gradient_checkpointing."
        )
    processes = accelerator.num_processes
    which = "this process" if processes == 1 else f"each of the {processes} processes"
    lines = [
        f"Memory of {which} at its peak, predicted: about {needed:,.0f} MiB, of which "
        f"{estimate.per_image:,.1f} MiB an image.",
        f"The largest --train_batch_size for the {available:,.0f} MiB there: about {largest:,}.",
    ]
    if is_sharded(accelerator):
        copies = _num_copies(state) + 1  # gradients
        parts = [getattr(weight, "_local_tensor", weight) for weight in state.parameters]
        where = " in RAM" if parts[0].device.type == "cpu" else ""
        lines.append(
            f"Of {copies * _weights_mib(state.parameters):,.1f} MiB of weights, gradients, moments "
            f"and averages, FSDP keeps {copies * _weights_mib(parts):,.1f} MiB{where} in each."
        )
    return "\n".join(lines)


def _num_copies(state: TrainState) -> int:
    """Return how many tensors a checkpoint has of each weight."""
    averages = 0 if state.power_ema is None else len(state.power_ema.averages)
    return 3 + (state.ema is not None) + averages  # AdamW keeps two moments


def _weights_mib(weights: list[torch.Tensor]) -> float:
    return sum(weight.numel() * weight.element_size() for weight in weights) / MIB


def _least_available(accelerator: Accelerator) -> float:
    """Return the MiB that every process could hold. Call on every process."""
    return -_largest(accelerator, -available_mib(accelerator.device))[0]


def _largest(accelerator: Accelerator, *numbers: float) -> list[float]:
    """Return the largest of each number on any process, so that all of them decide alike."""
    values = torch.tensor([numbers], dtype=torch.float32, device=accelerator.device)
    return accelerator.gather(values).amax(dim=0).tolist()


def _seconds_per_step(state: TrainState) -> float:
    device, meter, start = state.accelerator.device, LossMeter(state.accelerator), 0.0
    state.unet.train()
    for step in range(WARMUP_STEPS + TIMED_STEPS):
        if step == WARMUP_STEPS:
            start = _synchronized_time(device)
        lr = learning_rate(state.config.optimization, step, state.schedule.total_steps)
        train_step(state, step, lr, meter)
    return (_synchronized_time(device) - start) / TIMED_STEPS


def _synchronized_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of a process in MiB: `fixed` + `per_image` x images in a micro-batch."""

    fixed: float
    per_image: float

    def at(self, batch_size: int) -> float:
        """Return the MiB for micro-batches of this size."""
        return self.fixed + self.per_image * batch_size

    def largest(self, available: float) -> int:
        """Return the largest micro-batch that fits into `available` MiB; 0 if none does."""
        return max(0, int((available - self.fixed) / max(self.per_image, 1e-3)))


def estimate_memory(state: TrainState) -> MemoryEstimate:
    """Measure steps on small batches of blank images. Call on every process.

    Returns the largest of all processes. Weights and moments change. The steps are not compiled: a
    compiled step needs less.
    """
    device, batch_size = state.accelerator.device, state.config.optimization.train_batch_size
    with torch.compiler.set_stance("force_eager"):
        _step(state, 1)  # allocates the optimizer's moments
        held = _held(device)
        estimate = _estimate_from(state, held, SMALL_BATCH)
        # In a small batch gradients and moments outweigh activations: measure closer to the batch
        # size. Never with fewer images than before: the process does not shrink in between.
        available = _least_available(state.accelerator)
        if batch_size >= 8 * SMALL_BATCH and estimate.at(batch_size // 2) < available:
            estimate = _estimate_from(state, held, batch_size // 4)
    return estimate


def available_mib(device: torch.device) -> float:
    """Return the MiB that this process could hold: what it holds, and its fraction of the rest."""
    if device.type == "cuda":
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / MIB
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return (_held(device) + psutil.virtual_memory().available / processes) / MIB


class LiveBytes(TorchDispatchMode):
    """Count the bytes of tensors that operators create inside it: `now`, and at most (`peak`)."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            # Views and changes in place allocate nothing.
            if storage._cdata not in inputs and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    tensors = [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    return [getattr(tensor, "_local_tensor", tensor).untyped_storage() for tensor in tensors]


class _BlankImages:
    """Stands for the dataset: any number of gray images, of the first class if it has classes."""

    def __init__(self, channels: int, size: tuple[int, int], class_names: list[str] | None):
        self.channels, self.size, self.class_names = channels, size, class_names

    def rows(self, first: int, count: int) -> range:
        return range(count)

    def batch(self, rows: range, generator: torch.Generator, augmentation: DataConfig) -> Batch:
        shape = (len(rows), self.channels, *self.size)
        labels = None if self.class_names is None else torch.zeros(len(rows), dtype=torch.int64)
        return Batch(torch.full(shape, 127, dtype=torch.uint8), labels)


def _step(state: TrainState, batch_size: int) -> None:
    """Take a step on one micro-batch of this size."""
    optimization = replace(
        state.config.optimization, train_batch_size=batch_size, gradient_accumulation_steps=1
    )
    small = replace(
        state,
        config=replace(state.config, optimization=optimization),
        data=_BlankImages(state.data.channels, state.data.size, state.data.class_names),
    )
    train_step(small, 0, 0.0, LossMeter(state.accelerator))


def _estimate_from(state: TrainState, held: int, batch_size: int) -> MemoryEstimate:
    """Return the line through the peaks of a step with this many images and with twice as many."""
    device = state.accelerator.device
    one, two = (
        _peak(device, held, lambda n=n: _step(state, n)) for n in (batch_size, 2 * batch_size)
    )
    fixed, per_image = (held + 2 * one - two) / MIB, (two - one) / batch_size / MIB
    return MemoryEstimate(*_largest(state.accelerator, fixed, per_image))


def _held(device: torch.device) -> int:
    """Return the bytes that this process holds now: on the GPU if it has one, else in RAM."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def _peak(device: torch.device, held: int, work: Callable[[], None]) -> int:
    """Return the peak bytes of `work`, beyond those `held` before it.

    On a CPU operators use scratch space and the heap has gaps. Both show in the size of a process
    that keeps what it frees, unless earlier work has already brought it to that size: then the
    tensors count.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - held
    with LiveBytes() as live:
        work()
        work()  # the second time next to what the first one left behind
    return max(live.peak, _held(device) - held)
