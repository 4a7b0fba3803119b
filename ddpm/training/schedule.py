"""One clock: lengths, intervals and the learning rate as arithmetic on the optimizer step.

Also which settings may change between the parts of one run: most of those that may are lengths
and intervals.
"""

import math
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from ddpm import run_folder
from ddpm.config.base import flatten
from ddpm.config.train import OptimizationConfig, TrainConfig
from ddpm.errors import UsageError

CHANGEABLE_FIELDS = frozenset(
    (
        "output_dir",
        "overwrite_output_dir",
        "dataset_revision",
        "cache_dir",
        "max_bad_images",
        "num_epochs",
        "max_train_steps",
        "budget",
        "gradient_accumulation_steps",
        "save_images_epochs",
        "eval_batch_size",
        "ddpm_num_inference_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "eval_steps",
        "eval_images",
        "features",
        "keep_best",
        "resume_from_checkpoint",
        "save_model_epochs",
        "logger",
        "logging_dir",
        "logging_steps",
        "project_name",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "hub_checkpoints",
        "trust_checkpoint",
        "dry_run",
        "post_hoc_ema",
        "gradient_checkpointing",
        "compile",
    )
)
"""Settings that may differ between the parts of one run. Accumulation is checked as a product."""
LENGTH_FIELDS = ("num_epochs", "max_train_steps", "budget")
COMMAND_FIELDS = frozenset(
    ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", "trust_checkpoint")
)
"""Settings that tell this command what to do, rather than what the run is."""
UNLIMITED_STEPS = 2**62
"""More steps than any run has: the length of one that only time ends."""


@dataclass(frozen=True)
class Schedule:
    """Lengths and intervals in optimizer steps; an interval of 0 means: only at the end."""

    num_images: int
    micro_batches: int
    total_steps: int
    steps_per_epoch: int
    images_per_step: int
    preview_every: int
    export_every: int

    @classmethod
    def make(cls, config: TrainConfig, num_images: int, num_processes: int) -> "Schedule":
        micro_batches = num_processes * config.optimization.gradient_accumulation_steps
        images_per_step = config.optimization.train_batch_size * micro_batches
        steps_per_epoch = math.ceil(num_images / images_per_step)
        return cls(
            num_images=num_images,
            micro_batches=micro_batches,
            total_steps=_total_steps(config.optimization, steps_per_epoch),
            steps_per_epoch=steps_per_epoch,
            images_per_step=images_per_step,
            preview_every=config.preview.save_images_epochs * steps_per_epoch,
            export_every=config.checkpoint.save_model_epochs * steps_per_epoch,
        )


def is_due(step: int, every: int) -> bool:
    """Whether work that comes every so many steps comes after `step`; 0 is never."""
    return every > 0 and step % every == 0


def learning_rate(config: OptimizationConfig, step: int, total_steps: int) -> float:
    """The rate of the optimizer step that follows `step` others, in a run of `total_steps`.

    diffusers' own schedules, asked for their function: nothing is stepped, so neither accumulation
    nor the number of processes can stretch them.
    """
    return config.learning_rate * _schedule(config, total_steps).lr_lambdas[0](step)


@lru_cache(maxsize=2)
def _schedule(config: OptimizationConfig, total_steps: int) -> LambdaLR:
    unused = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=config.learning_rate)
    return get_scheduler(
        config.lr_scheduler,
        unused,
        step_rules=config.lr_step_rules,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=total_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


def _total_steps(config: OptimizationConfig, steps_per_epoch: int) -> int:
    if config.max_train_steps is not None:
        return config.max_train_steps
    return UNLIMITED_STEPS if config.budget else config.num_epochs * steps_per_epoch


def require_same_config(output_dir: Path, now: dict[str, Any]) -> str:
    """Refuse to go on in a folder whose run had other settings; name each, was and now.

    Lengths, intervals and logging may change: the note that is returned names them, a line or
    nothing. A folder that holds something else is refused too.
    """
    path = output_dir / run_folder.TRAIN_CONFIG
    if not path.exists():
        if (output_dir / run_folder.MODEL_INDEX).exists() or run_folder.checkpoints(output_dir):
            raise UsageError(
                f"{output_dir} holds a model or checkpoints but no {run_folder.TRAIN_CONFIG}, so it "
                "is not a run that can go on. Give another --output_dir."
            )
        return ""
    # What an earlier version did not have was as it is by default.
    was = {**flatten(TrainConfig()), **run_folder.read_json(path)}
    changed = [
        f"{name} was {was[name]}, now {value}"
        for name, value in now.items()
        if name not in CHANGEABLE_FIELDS and was[name] != value
    ]
    if changed:
        raise UsageError(
            f"{output_dir} holds a run with other settings: {'; '.join(changed)}. Give another "
            "--output_dir, or --overwrite_output_dir to delete that run and start anew."
        )
    legal = [
        f"{name} was {was[name]}, now {value}"
        for name, value in now.items()
        if name in CHANGEABLE_FIELDS - COMMAND_FIELDS and was[name] != value
    ]
    if not legal:
        return ""
    longer = any(was[name] != now[name] for name in LENGTH_FIELDS)
    note = " The learning rate follows the new length from here on." if longer else ""
    return (
        f"Note: this run began with other settings, which may change: {'; '.join(legal)}.{note}\n"
    )


# A run by the clock: how many steps fit into a budget of time, with all that must still be done.
#
# The horizon is estimated anew after each step from the speed of the last ones, so the learning rate,
# a function of step and horizon, comes to its end when the time does. The chores at the end (the last
# checkpoint, preview and export) are given the time that the slowest of their kind took so far.

WINDOW = 50
"""Steps over which the speed is measured: old enough to be steady, new enough to be true."""
SETTLE = 3
"""First steps of a process that are not measured: memory and kernels are being got ready."""
LEAVING = 3.0
"""Seconds kept for closing trackers, the record, and the interpreter's way out."""


def seconds_since_launch() -> float:
    """How long ago this command was started: its launcher, when there is one, else this process."""
    process = psutil.Process()
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        process = process.parent() or process
    return time.time() - process.create_time()


class TimeBudget:
    """Where the end is. Without `seconds` it is `limit`, a number of steps known from the start.

    `spent` is what earlier parts of the run took. Only the main process's estimate counts: the
    others are told, so all stop after the same step.
    """

    def __init__(
        self,
        seconds: float | None,
        limit: int,
        spent: float = 0.0,
        seconds_per_step: float | None = None,
    ):
        """`seconds_per_step` is that of the run's earlier parts: it counts until there is news."""
        self.seconds, self.limit = seconds, limit
        self._began = time.monotonic() - spent
        self._earlier = seconds_per_step
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self._settling = SETTLE
        self._last: float | None = None
        self._chores: dict[str, float] = {}

    @property
    def lateness(self) -> float:
        """Seconds by which the budget is exceeded; 0 when it is not, or there is none."""
        return max(0.0, self.spent - self.seconds) if self.seconds is not None else 0.0

    @property
    def spent(self) -> float:
        """Seconds since the launch, with those of the run's earlier parts."""
        return time.monotonic() - self._began

    def step_done(self) -> None:
        """Measure the step that has just ended; chores between steps are not part of it."""
        now = time.monotonic()
        if self._last is not None:
            if self._settling:
                self._settling -= 1
            else:
                self._steps.append(now - self._last)
        self._last = now

    @contextmanager
    def chore(self, name: str) -> Iterator[None]:
        """Measure work that comes once in a while, and once more at the end."""
        began = time.monotonic()
        yield
        now = time.monotonic()
        self._chores[name] = max(self._chores.get(name, 0.0), now - began)
        if self._last is not None:
            self._last += now - began

    def horizon(self, step: int, due_at_end: dict[str, float]) -> int:
        """How many steps the run will have, after `step` of them; `limit` at most, `step` at least.

        `due_at_end` names the chores of the end, each with how many steps' time to keep for it as
        long as none of its kind has been measured.
        """
        each = sum(self._steps) / len(self._steps) if self._steps else self._earlier
        if self.seconds is None:
            return self.limit
        if each is None:  # nothing is known yet, but that the time is up
            return step if self.spent + LEAVING >= self.seconds else self.limit
        reserve = LEAVING + sum(
            1.2 * self._chores[name] if name in self._chores else steps * each
            for name, steps in due_at_end.items()
        )
        # Half a step more than the mean: a step that has begun is finished.
        left = self.seconds - self.spent - reserve - 0.5 * each
        return min(self.limit, step + max(0, int(left / each)))
