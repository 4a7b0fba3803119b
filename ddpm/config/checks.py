"""Which settings cannot work, each named with what to give instead."""

import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from ddpm.config.commands import EvaluateConfig, SampleConfig, Scheduler
from ddpm.config.train import DataConfig, EvaluationConfig, OptimizationConfig, TrainConfig
from ddpm.errors import UsageError

MAX_RESOLUTION = 2048
MAX_IMAGES = 10**9
MAX_SIGMA_REL = 0.28
"""Largest sigma_rel of an average: 0.289 is the plain mean over the run."""
MIN_IMAGES = 16
"""Drawn images below which no distance is measured."""

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def check_sample(config: SampleConfig) -> None:
    """UsageError for flags of sample.py that cannot work, or would have no effect."""
    for name in (
        "num_images",
        "batch_size",
        "num_inference_steps",
        "num_resamples",
        "height",
        "width",
    ):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; it must be at least 1.")
    if config.num_images > MAX_IMAGES:
        raise UsageError(f"--num_images {config.num_images}: give at most {MAX_IMAGES:,}.")
    _require_folder("output_dir", config.output_dir)
    for seed in (config.seed, *(config.interpolate or ())):
        if not 0 <= seed <= 2**63 - config.num_images:
            raise UsageError(f"--seed {seed}: give a number from 0 to 2**63.")
    for name in ("noise_level", "strength"):
        value = getattr(config, name)
        if value is not None and not 0 < value <= 1:
            raise UsageError(f"--{name} is {value}; give a number above 0, up to 1.")
    if config.model is None and config.like is None:
        raise UsageError(
            "Name a MODEL: an id on the Hub, a folder, or a checkpoint. Or give --like picture.png."
        )
    chosen = [
        name
        for name in ("scheduler", "num_inference_steps", "prompt", "like", "verify")
        if getattr(config, name) not in (None, False)
    ]
    if config.quality is not None and chosen:
        raise UsageError(
            f"--quality chooses the sampler and its steps, so --{chosen[0]} has no "
            "place beside it: leave one out."
        )
    # Flags that mean something only beside another one.
    for name, needed in (
        ("noise_level", "image"),
        ("mask", "image"),
        ("strength", "image"),
        ("strength", "prompt"),
        ("negative_prompt", "prompt"),
        ("guidance_scale", "prompt"),
        ("height", "prompt"),
        ("width", "prompt"),
    ):
        if getattr(config, name) is not None and getattr(config, needed) is None:
            raise UsageError(f"--{name} has no effect without --{needed}: add it, or leave both.")
    # Flags that ask for two different things.
    restores = config.image is not None and config.prompt is None and config.mask is None
    asked = {
        "prompt": config.prompt is not None,
        "mask": config.mask is not None,
        "noise_level": config.noise_level is not None,
        "interpolate": config.interpolate is not None,
        "trajectory": config.trajectory,
    }
    both = [f"--{name}" for name, given in asked.items() if given]
    if len(both) > 1:
        raise UsageError(f"{' and '.join(both)} do different things: give one of them.")
    if config.image is not None and (config.interpolate is not None or config.trajectory):
        raise UsageError(f"--image and {both[0]} do different things: give one of them.")
    if restores and (config.npz or config.parquet):
        raise UsageError("--npz and --parquet collect drawn images; restoring --image makes none.")


def check_samplers(config: EvaluateConfig) -> None:
    """UsageError for --samplers that cannot be measured, or a flag without effect beside it."""
    if config.samplers is None:
        return
    parse_sampler_choices(config.samplers)
    if config.ema_lengths is not None:
        raise UsageError("--samplers and --ema_lengths are two commands: give one of them.")
    for name in ("scheduler", "num_inference_steps"):
        if getattr(config, name) is not None:
            raise UsageError(
                f"--{name} has no effect beside --samplers, which names samplers and "
                "steps itself: leave one out."
            )


def parse_sampler_choices(words: Sequence[str]) -> list[tuple[str, int | None]]:
    """NAME:STEPS, or NAME alone, as pairs. UsageError for a sampler that is not known, for steps
    that are no number above 0, and for what stands there twice."""
    known = get_args(Scheduler)
    choices: list[tuple[str, int | None]] = []
    for word in words:
        name, colon, steps = word.partition(":")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Give one of {', '.join(known)}."
            raise UsageError(f"--samplers {word}: {name!r} is no sampler. {hint}")
        if colon and not re.fullmatch("0*[1-9][0-9]{0,8}", steps, flags=re.ASCII):
            raise UsageError(
                f"--samplers {word}: give a number of steps after the colon, as in "
                f"{name}:10, or {name} alone."
            )
        choices.append((name, int(steps) if colon else None))
    twice = [word for word, choice in zip(words, choices, strict=True) if choices.count(choice) > 1]
    if twice:
        raise UsageError(f"--samplers names {twice[0]} twice: leave one out.")
    return choices


def parse_sigma_rels(text: str) -> tuple[float, ...]:
    """0.02,0.05 as numbers in rising order, each once. UsageError for what is no EMA length."""
    found = set()
    for word in text.split(","):
        try:
            found.add(float(word))
        except ValueError:
            found.add(math.nan)
    if not all(0 < each <= MAX_SIGMA_REL for each in found):
        raise UsageError(
            f"--ema_lengths {text}: give numbers above 0, to {MAX_SIGMA_REL}, such as "
            "0.02,0.05,0.10,0.15."
        )
    return tuple(sorted(found))


def check_ema_lengths(config: EvaluateConfig) -> None:
    """UsageError for --ema_lengths that are none, and for --export_best without them."""
    if config.ema_lengths is not None:
        parse_sigma_rels(config.ema_lengths)
    elif config.export_best:
        raise UsageError(
            "--export_best has no effect without --ema_lengths: add it, or leave both."
        )


def check_train(config: TrainConfig) -> None:
    """UsageError for a setting that cannot work, named with what to give instead."""
    optimization, data = config.optimization, config.data
    if data.dataset_name and data.train_data_dir:
        raise UsageError("Give --dataset_name or --train_data_dir, not both.")
    _require_folder("output_dir", config.output_dir)
    at_least_one = {
        "resolution": data.resolution,
        "shuffle_buffer_size": data.shuffle_buffer_size,
        "rows_per_epoch": data.rows_per_epoch,
        "train_batch_size": optimization.train_batch_size,
        "gradient_accumulation_steps": optimization.gradient_accumulation_steps,
        "num_epochs": optimization.num_epochs,
        "max_train_steps": optimization.max_train_steps,
        "lr_num_cycles": optimization.lr_num_cycles,
        "ddpm_num_steps": config.diffusion.ddpm_num_steps,
        "ddpm_num_inference_steps": config.preview.ddpm_num_inference_steps,
        "eval_batch_size": config.preview.eval_batch_size,
        "checkpointing_steps": config.checkpoint.checkpointing_steps,
        "checkpoints_total_limit": config.checkpoint.checkpoints_total_limit,
        "logging_steps": config.tracking.logging_steps,
    }
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; it must be at least 1.")
    check_data(data)
    not_negative = {
        "learning_rate": optimization.learning_rate,
        "lr_warmup_steps": optimization.lr_warmup_steps,
        "lr_power": optimization.lr_power,
        "save_images_epochs": config.preview.save_images_epochs,
        "save_model_epochs": config.checkpoint.save_model_epochs,
        "eval_steps": config.evaluation.eval_steps,
        "eval_images": config.evaluation.eval_images,
        "seed": optimization.seed,
        "adam_epsilon": optimization.adam_epsilon,
        "adam_weight_decay": optimization.adam_weight_decay,
        "ema_power": config.ema.ema_power,
    }
    for name, value in not_negative.items():
        if not value >= 0:
            raise UsageError(f"--{name} is {value}; it must be 0 or more.")
    _check_evaluation(config.evaluation)
    for name, value in {
        "dropout": config.model.dropout,
        "max_bad_images": data.max_bad_images,
        "ema_max_decay": config.ema.ema_max_decay,
    }.items():
        if not 0 <= value <= 1:
            raise UsageError(f"--{name} is {value}; it must lie between 0 and 1.")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(optimization, name) < 1:
            raise UsageError(f"--{name} is {getattr(optimization, name)}; give 0 to below 1.")
    if not config.ema.ema_inv_gamma > 0:
        raise UsageError(f"--ema_inv_gamma is {config.ema.ema_inv_gamma}; it must be above 0.")
    if not optimization.max_grad_norm > 0:
        raise UsageError(f"--max_grad_norm is {optimization.max_grad_norm}; it must be above 0.")
    gamma = config.diffusion.snr_gamma
    if gamma is not None and not gamma > 0:
        raise UsageError(f"--snr_gamma is {gamma}; give a number above 0, or leave it out.")
    if config.diffusion.rescale_betas_zero_snr and config.diffusion.prediction_type == "epsilon":
        raise UsageError(
            "--rescale_betas_zero_snr ends the chain in pure noise, where predicting the noise "
            "says nothing of the image: use --prediction_type v_prediction or sample."
        )
    if optimization.lr_scheduler == "polynomial" and optimization.learning_rate <= 1e-7:
        raise UsageError("--lr_scheduler polynomial ends at 1e-7: give a higher --learning_rate.")
    _check_step_rules(optimization)
    if optimization.budget is not None:
        parse_duration(optimization.budget)
    if config.preview.ddpm_num_inference_steps > config.diffusion.ddpm_num_steps:
        raise UsageError(
            f"--ddpm_num_inference_steps is {config.preview.ddpm_num_inference_steps}, more than "
            f"the {config.diffusion.ddpm_num_steps} steps of the chain (--ddpm_num_steps)."
        )


def _require_folder(name: str, path: str) -> None:
    if Path(path).exists() and not Path(path).is_dir():
        raise UsageError(f"--{name} {path} is a file: give a folder, which is made if need be.")


def _check_evaluation(evaluation: EvaluationConfig) -> None:
    if 0 < evaluation.eval_images < MIN_IMAGES:
        raise UsageError(
            f"--eval_images is {evaluation.eval_images}: no distance means anything with fewer "
            f"than {MIN_IMAGES} images; give more, or 0."
        )
    for name in ("eval_images", "keep_best"):
        if getattr(evaluation, name) and not evaluation.eval_steps:
            raise UsageError(f"--{name} has no effect without --eval_steps: say how often.")
    if evaluation.features is not None and not evaluation.eval_images:
        raise UsageError("--features has no effect without --eval_images: say how many to draw.")


def _check_step_rules(optimization: OptimizationConfig) -> None:
    rules = optimization.lr_step_rules
    if (optimization.lr_scheduler == "piecewise_constant") != (rules is not None):
        raise UsageError("--lr_scheduler piecewise_constant and --lr_step_rules go together.")
    number = r"\d+(\.\d+)?([eE]-?\d+)?"
    if rules is not None and not re.fullmatch(rf"({number}:\d+,)*{number}", rules):
        raise UsageError(
            f"--lr_step_rules {rules}: give factor:step pairs and a last factor, such as "
            "1:1000,0.1:2000,0.01 (the peak rate to step 1000, a tenth to 2000, then a hundredth)."
        )


def parse_duration(text: str) -> float:
    """2h, 90m, 45s or 1h30m as seconds. UsageError for anything else, and for no time at all."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    total = sum(float(number) * UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not total > 0:
        raise UsageError(f"--budget {text}: give a time such as 45s, 90m, 2h or 1h30m.")
    return total


def check_data(data: DataConfig) -> None:
    """UsageError for a resolution that no UNet takes, or a setting without effect."""
    if data.resolution > MAX_RESOLUTION:
        raise UsageError(
            f"--resolution is {data.resolution}; a UNet on pixels goes up to {MAX_RESOLUTION}, and "
            "is slow from 256. Give a smaller one."
        )
    if data.center_crop and data.resize_mode != "crop":
        raise UsageError(
            f"--center_crop cuts nothing with --resize_mode {data.resize_mode}: leave one out."
        )
    if not 0 <= data.held_out < 1:
        raise UsageError(f"--held_out is {data.held_out}; give a share from 0 to below 1.")
    if data.held_out and data.streaming:
        raise UsageError(
            "--held_out chooses among all rows, which --streaming does not know: leave it out. A "
            "test or validation split is found, and can be streamed too."
        )
    if data.rows_per_epoch is not None and not data.streaming:
        raise UsageError("--rows_per_epoch is for --streaming: otherwise all rows are an epoch.")


def is_ref_name(name: str) -> bool:
    """Whether git takes `name` for a branch or tag, and it cannot be mistaken for a commit."""
    plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*", name)
    wrong = ".." in name or name.endswith((".", ".lock")) or name.startswith("refs/")
    return bool(plain) and not wrong and not re.fullmatch(r"[0-9a-f]{40}", name)
