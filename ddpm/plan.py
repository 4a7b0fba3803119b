"""One clock: lengths, intervals and the learning rate as arithmetic on the optimizer step.

Also which settings may change between the parts of one run: most of those that may are lengths
and intervals.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from ddpm import runfolder
from ddpm.config import OptimizationConfig, TrainConfig, flatten
from ddpm.errors import UsageError

MAY_CHANGE = frozenset((
    "output_dir", "overwrite_output_dir", "dataset_revision", "cache_dir", "max_bad_images",
    "num_epochs", "max_train_steps", "budget", "gradient_accumulation_steps", "save_images_epochs",
    "eval_batch_size", "ddpm_num_inference_steps", "checkpointing_steps", "checkpoints_total_limit",
    "eval_steps", "eval_images", "features", "keep_best",
    "resume_from_checkpoint", "save_model_epochs", "logger", "logging_dir", "logging_steps",
    "project_name", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_checkpoints",
    "trust_checkpoint", "dry_run", "post_hoc_ema", "gradient_checkpointing", "compile",
))  # fmt: skip
"""Settings that may differ between the parts of one run. Accumulation is checked as a product."""
LENGTHS = ("num_epochs", "max_train_steps", "budget")
UNSAID = frozenset(
    ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", "trust_checkpoint")
)
"""Settings that tell this command what to do, rather than what the run is."""
NO_LIMIT = 2**62
"""More steps than any run has: the length of one that only time ends."""


@dataclass(frozen=True)
class Plan:
    """Lengths and intervals in optimizer steps; an interval of 0 means: only at the end."""

    num_images: int
    micro_batches: int
    total_steps: int
    steps_per_epoch: int
    images_per_step: int
    preview_every: int
    export_every: int

    @classmethod
    def make(cls, config: TrainConfig, num_images: int, num_processes: int) -> "Plan":
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


def due(step: int, every: int) -> bool:
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
    return NO_LIMIT if config.budget else config.num_epochs * steps_per_epoch


def require_same_settings(output_dir: Path, now: dict[str, Any]) -> str:
    """Refuse to go on in a folder whose run had other settings; name each, was and now.

    Lengths, intervals and logging may change: the note that is returned names them, a line or
    nothing. A folder that holds something else is refused too.
    """
    path = output_dir / runfolder.TRAIN_CONFIG
    if not path.exists():
        if (output_dir / runfolder.MODEL_INDEX).exists() or runfolder.checkpoints(output_dir):
            raise UsageError(
                f"{output_dir} holds a model or checkpoints but no {runfolder.TRAIN_CONFIG}, so it "
                "is not a run that can go on. Give another --output_dir."
            )
        return ""
    # What an earlier version did not have was as it is by default.
    was = {**flatten(TrainConfig()), **runfolder.read_json(path)}
    changed = [
        f"{name} was {was[name]}, now {value}"
        for name, value in now.items()
        if name not in MAY_CHANGE and was[name] != value
    ]
    if changed:
        raise UsageError(
            f"{output_dir} holds a run with other settings: {'; '.join(changed)}. Give another "
            "--output_dir, or --overwrite_output_dir to delete that run and start anew."
        )
    legal = [
        f"{name} was {was[name]}, now {value}"
        for name, value in now.items()
        if name in MAY_CHANGE - UNSAID and was[name] != value
    ]
    if not legal:
        return ""
    longer = any(was[name] != now[name] for name in LENGTHS)
    note = " The learning rate follows the new length from here on." if longer else ""
    return (
        f"Note: this run began with other settings, which may change: {'; '.join(legal)}.{note}\n"
    )
