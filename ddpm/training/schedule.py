"""Lengths, intervals and the learning rate as functions of the optimizer step.

Also which settings may change between the parts of one run, and how many steps fit into --budget.
"""

import math
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import psutil
import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from ddpm import file_io, run_folder
from ddpm.config.base import as_flag, flatten, read_settings
from ddpm.config.train import OptimizationConfig, TrainConfig
from ddpm.errors import UsageError
from ddpm.run_record import read_checkpoint_state
from ddpm.training.signals import launcher_pid

COMMAND_FIELDS = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint"),
    *("dry_run", "trust_checkpoint", "cpu_wait_policy", "ddp_timeout"),
}
"""Settings of this command rather than of the run: they change without a note."""
LENGTH_FIELDS = {"num_epochs", "max_train_steps", "budget"}
CHANGEABLE_SECTIONS = ("preview", "evaluation", "checkpoint", "tracking", "hub")
CHANGEABLE_FIELDS = {
    *COMMAND_FIELDS,
    *LENGTH_FIELDS,
    *("dataset_revision", "cache_dir", "max_bad_images"),
    *("gradient_accumulation_steps", "gradient_checkpointing", "compile", "post_hoc_ema"),
    *(name for part in CHANGEABLE_SECTIONS for name in flatten(getattr(TrainConfig(), part))),
}
"""Settings that may change between the parts of one run. The checkpoint checks the product of
accumulation and processes, and the pixels."""
DATA_PLACES = {"dataset_name", "train_data_dir"}
"""Settings that may change in addition once there is a checkpoint, which knows the pixels."""
UNLIMITED_STEPS = 2**62
"""More steps than any run has: the length of a run that only its time budget ends."""


@dataclass(frozen=True)
class Schedule:
    """Lengths and intervals in optimizer steps. An interval of 0 means: only at the end."""

    num_images: int
    micro_batches: int
    total_steps: int
    steps_per_epoch: int
    images_per_step: int
    preview_every: int
    export_every: int

    @classmethod
    def make(cls, config: TrainConfig, num_images: int, num_processes: int) -> "Schedule":
        """Return the schedule of a run on `num_images` images."""
        optimization = config.optimization
        micro_batches = num_processes * optimization.gradient_accumulation_steps
        images_per_step = optimization.train_batch_size * micro_batches
        steps_per_epoch = math.ceil(num_images / images_per_step)
        total_steps = optimization.max_train_steps
        if total_steps is None:
            total_steps = optimization.num_epochs * steps_per_epoch
            total_steps = UNLIMITED_STEPS if optimization.budget else total_steps
        return cls(
            num_images=num_images,
            micro_batches=micro_batches,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            images_per_step=images_per_step,
            preview_every=config.preview.save_images_epochs * steps_per_epoch,
            export_every=config.checkpoint.save_model_epochs * steps_per_epoch,
        )

    def epoch(self, step: int) -> float:
        """Return how often the images have been seen after `step` steps, to four digits."""
        return round(step * self.images_per_step / self.num_images, 4)


def is_due(step: int, every: int) -> bool:
    """Return whether periodic work is due after `step`; an interval of 0 is never due."""
    return every > 0 and step % every == 0


def learning_rate(config: OptimizationConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of the optimizer step that follows `step` others.

    The function inside diffusers' LR scheduler of that name is called with the step; no scheduler
    object is stepped, so neither accumulation nor the number of processes can stretch it.
    """
    return config.learning_rate * _lr_scheduler(config, total_steps).lr_lambdas[0](step)


@lru_cache(maxsize=2)
def _lr_scheduler(config: OptimizationConfig, total_steps: int) -> LambdaLR:
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


def require_same_config(config: TrainConfig) -> str:
    """Raise UsageError if the run in output_dir has other settings, naming each, was and now.

    Returns a note on the settings that may change and did, "" if there are none. A folder with a
    model or checkpoints but without settings is refused too.
    """
    output_dir = Path(config.output_dir)
    path = output_dir / run_folder.TRAIN_CONFIG
    if not path.exists():
        if (output_dir / run_folder.MODEL_INDEX).exists() or run_folder.checkpoints(output_dir):
            raise UsageError(
                f"{output_dir} holds a model or checkpoints but no {run_folder.TRAIN_CONFIG}, so "
                "it is not a run that can be resumed. Give another --output_dir."
            )
        return ""
    # A setting that an earlier version did not have counts as its default.
    before = {**flatten(TrainConfig()), **read_settings(TrainConfig, path, unknown="ignore")}
    changes = {
        name: f"{name} was {as_flag(before[name])}, now {as_flag(value)}"
        for name, value in flatten(config).items()
        if before[name] != value and name not in COMMAND_FIELDS
    }
    changeable = CHANGEABLE_FIELDS | (DATA_PLACES if run_folder.checkpoints(output_dir) else set())
    refused = [change for name, change in changes.items() if name not in changeable]
    if refused:
        raise UsageError(
            f"{output_dir} holds a run with other settings: {'; '.join(refused)}. Give another "
            "--output_dir, or --overwrite_output_dir to delete that run and start again."
        )
    if not changes:
        return ""
    note = "The learning rate follows the new length from here on."
    return (
        "Note: this run began with other settings, which may change: "
        f"{'; '.join(changes.values())}.{f' {note}' if LENGTH_FIELDS & changes.keys() else ''}\n"
    )


def keep_micro_batches(config: TrainConfig, checkpoint: Path, num_processes: int) -> TrainConfig:
    """Return the config with the accumulation that keeps the micro-batches of the newest checkpoint
    of its output_dir, where the number of processes changed and the accumulation did not.

    If the processes cannot share them equally, or the setting was changed, return the config.
    """
    settings = file_io.read_json(Path(config.output_dir) / run_folder.TRAIN_CONFIG)
    accumulation = config.optimization.gradient_accumulation_steps
    micro_batches = read_checkpoint_state(checkpoint).micro_batches
    kept, rest = divmod(micro_batches, num_processes)
    is_set = settings.get("gradient_accumulation_steps", 1) != accumulation
    if is_set or rest or kept == accumulation:
        return config
    print(
        f"Note: {checkpoint} has {micro_batches} micro-batches a step, so "
        f"--gradient_accumulation_steps is {kept} instead of {accumulation} with {num_processes} "
        f"{'process' if num_processes == 1 else 'processes'}."
    )
    optimization = replace(config.optimization, gradient_accumulation_steps=kept)
    return replace(config, optimization=optimization)


SPEED_WINDOW = 50
"""Steps over which the speed is measured: many enough to be steady, few enough to be current."""
WARMUP_STEPS = 3
"""First steps of a process, which are not measured: memory is allocated and kernels are chosen."""
EXIT_SECONDS = 3.0
"""Seconds kept for closing trackers, writing the record, and leaving the interpreter."""


def seconds_since_launch() -> float:
    """Return how long ago this command started: its launcher if it has one, else this process.

    On Linux both readings come from the clock that counts from boot; elsewhere from the wall clock.
    """
    pid = launcher_pid() or os.getpid()
    if hasattr(time, "CLOCK_BOOTTIME"):
        stat = Path(f"/proc/{pid}/stat").read_text()
        # proc(5): field 22 is the start time in ticks; field 2, the name, may hold spaces.
        start = int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - start
    else:
        seconds = time.time() - psutil.Process(pid).create_time()
    return max(0.0, seconds)


class TimeBudget:
    """The number of steps that a run will have, as a function of the time that is left.

    It is estimated again after each step from the speed of the last ones, so the learning rate, a
    function of step and horizon, reaches its end when the time does. Time is kept for the work at
    the end (checkpoint, preview, export): as much as the slowest of its kind has taken so far. Only
    the main process's estimate counts, so that all processes stop after the same step.
    """

    def __init__(
        self,
        seconds: float | None,
        limit: int,
        spent: float = 0.0,
        seconds_per_step: float | None = None,
    ):
        """Start counting.

        `seconds` is the budget, None for a run of `limit` steps. `spent` is the time before this
        call, with that of earlier parts of the run, whose speed, `seconds_per_step`, counts until
        this part's is measured.
        """
        self.seconds, self.limit = seconds, limit
        self._start = time.monotonic() - spent
        self._earlier_seconds_per_step = seconds_per_step
        self._step_seconds: deque[float] = deque(maxlen=SPEED_WINDOW)
        self._unmeasured = WARMUP_STEPS
        self._last_step_end: float | None = None
        self._work_seconds: dict[str, float] = {}

    @property
    def overrun(self) -> float:
        """Seconds by which the budget is exceeded; 0 if it is not, or there is none."""
        return max(0.0, self.spent - self.seconds) if self.seconds is not None else 0.0

    @property
    def spent(self) -> float:
        """Seconds since the launch, with those of the run's earlier parts."""
        return time.monotonic() - self._start

    def end_step(self) -> None:
        """Measure the step that has just ended, without the periodic work before it."""
        now = time.monotonic()
        if self._last_step_end is not None:
            if self._unmeasured:
                self._unmeasured -= 1
            else:
                self._step_seconds.append(now - self._last_step_end)
        self._last_step_end = now

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure periodic work that is due once more at the end."""
        start = time.monotonic()
        yield
        elapsed = time.monotonic() - start
        self._work_seconds[name] = max(self._work_seconds.get(name, 0.0), elapsed)
        if self._last_step_end is not None:
            self._last_step_end += elapsed

    def horizon(self, step: int, final_work: dict[str, float]) -> int:
        """Return how many steps the run will have: from `step`, those done so far, to `limit`.

        `final_work` names the work at the end, with the time to keep for it, in steps, while none
        of its kind has been measured.
        """
        if self.seconds is None:
            return self.limit
        step_seconds = self._earlier_seconds_per_step
        if self._step_seconds:
            step_seconds = sum(self._step_seconds) / len(self._step_seconds)
        if step_seconds is None:  # no speed is known yet
            return step if self.spent + EXIT_SECONDS >= self.seconds else self.limit
        reserve = EXIT_SECONDS + sum(
            1.2 * self._work_seconds[name] if name in self._work_seconds else steps * step_seconds
            for name, steps in final_work.items()
        )
        # Half a step more than the mean: a step that has begun is finished.
        left = self.seconds - self.spent - reserve - 0.5 * step_seconds
        return min(self.limit, step + max(0, int(left / step_seconds)))
