"""How flags and JSON become the same config, and which settings cannot work.

A JSON file is read as if its entries had been typed as flags before the real ones, so both pass
the same checks: default < `--config FILE` < flag.
"""

import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from ddpm.config import (
    DataConfig,
    EvaluateConfig,
    OptimizationConfig,
    PushConfig,
    SampleConfig,
    TrainConfig,
    flatten,
)
from ddpm.errors import UsageError
from ddpm.runfolder import read_json

DEFAULT_RECIPE = Path(__file__).parent.parent / "recipes" / "digits.json"
MAX_RESOLUTION = 2048
MOST_IMAGES = 10**9

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
RELICS = {
    "local_rank": (True, "the launcher tells each process its rank."),
    "enable_xformers_memory_efficient_attention": (
        False,
        "torch's own attention, which is used, needs no more memory.",
    ),
    "dataloader_num_workers": (
        True,
        "images are decoded once, on all cores, before the first step; after that none is loaded.",
    ),
    "preserve_input_precision": (
        False,
        "16-bit and float images are always scaled from their own range, never clipped.",
    ),
}
"""Flags of diffusers' unconditional example that are accepted and say so: (takes a value, why)."""

SOURCE = ("dataset_name", "train_data_dir")
OF_SOURCE = ("dataset_config_name", "dataset_revision", "split", "image_column", "value_range")
"""Settings that mean something only for the data that they were given with."""

Config = TypeVar("Config")


def parse_train(argv: Sequence[str]) -> TrainConfig:
    """Flags, and the JSON file that `--config` names, as a TrainConfig; no data: the digits."""
    argv, file = _take_config_option(_take_relics(list(argv)))
    flags = {arg.split("=")[0].lstrip("-").replace("-", "_") for arg in argv}
    named = flags & {"dataset_name", "train_data_dir"}
    asked_for_help = "-h" in argv or "--help" in argv
    if file is None and not named and not asked_for_help:
        file = DEFAULT_RECIPE
    values = read_json(file) if file else {}
    if file == DEFAULT_RECIPE and not Path(values["dataset_name"]).is_dir():
        raise UsageError(
            "Without a dataset the digits in data/ are trained, and they are not here: run the "
            "command in the repository's folder, or give --dataset_name or --train_data_dir."
        )
    if named and isinstance(values, dict):  # data named on the command line replaces the file's
        values = {k: v for k, v in values.items() if k not in ("dataset_name", "train_data_dir")}
    from_file = _as_flags(values, TrainConfig, str(file))
    config = _cli(
        TrainConfig,
        [*from_file, *argv],
        "Train a UNet2DModel with a DDPMScheduler and wrap the result in a DDPMPipeline.\n\n"
        "  accelerate launch train.py                                   the digits in data/\n"
        "  accelerate launch train.py --dataset_name owner/name         a dataset on the Hub\n"
        "  accelerate launch train.py --config recipes/digits.json      settings from a file\n\n"
        "--config FILE is JSON with the names below; flags go before it in rank.",
    )
    if config.data.dataset_name is None and config.data.train_data_dir is None:
        raise UsageError(f"{file} names no data: add --dataset_name or --train_data_dir.")
    check_train(config)
    return config


def parse_push(argv: Sequence[str]) -> PushConfig:
    """The words and flags of push.py. UsageError for names that git cannot hold, and for flags that
    contradict each other."""
    config = _cli(PushConfig, argv, "Publish a run folder to the Hub as one commit, and prove it.")
    for flag, name in (("--revision", config.revision), ("--tag", config.tag)):
        if name is not None and not _is_ref_name(name):
            raise UsageError(f"{flag} {name!r} is no name for a branch or tag: use letters, digits "
                             "and - _ . as in v1.0.")  # fmt: skip
    if config.create_pr and (config.revision or config.tag):
        other = "--revision" if config.revision else "--tag"
        raise UsageError(
            f"--create_pr proposes a commit to main, so {other} has no place beside it. Leave one "
            "of the two out."
        )
    if not config.commit_message.strip():
        raise UsageError("--commit_message is empty: give the commit a title, or leave it out.")
    return config


def parse_sample(argv: Sequence[str]) -> SampleConfig:
    """The words and flags of sample.py. UsageError for those that make no images."""
    config = _cli(SampleConfig, argv, "Draw images; image k comes from seed --seed + k.")
    check_sample(config)
    return config


def parse_evaluate(argv: Sequence[str], run: Path | None = None) -> EvaluateConfig:
    """The words and flags of evaluate.py; settings about data that they leave out are those of the
    train_config.json `run`. UsageError for what cannot be measured."""
    flags = {arg.split("=")[0].lstrip("-").replace("-", "_") for arg in argv}
    from_run: list[str] = []
    if run is not None:
        known = flatten(DataConfig())
        values = read_json(run)
        values = {k: v for k, v in values.items() if k in known} if isinstance(values, dict) else {}
        if flags & set(SOURCE):  # other data: only how images are made squares is the run's
            values = {k: v for k, v in values.items() if k not in (*SOURCE, *OF_SOURCE)}
        from_run = _as_flags(values, DataConfig, str(run))
    config = _cli(EvaluateConfig, [*from_run, *argv], "Measure how good a model is.")
    for name in ("num_images", "batch_size", "num_inference_steps"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; it must be at least 1.")
    if not 0 <= config.seed <= 2**63 - config.num_images:
        raise UsageError(f"--seed {config.seed}: give a number from 0 to 2**63.")
    if config.data.dataset_name and config.data.train_data_dir:
        raise UsageError("Give --dataset_name or --train_data_dir, not both.")
    _check_data(config.data)
    return config


def check_sample(config: SampleConfig) -> None:
    """UsageError for flags of sample.py that cannot work, or would have no effect."""
    for name in ("num_images", "batch_size", "num_inference_steps", "num_resamples", "height",
                 "width"):  # fmt: skip
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; it must be at least 1.")
    if config.num_images > MOST_IMAGES:
        raise UsageError(f"--num_images {config.num_images}: give at most {MOST_IMAGES:,}.")
    _require_folder("output_dir", config.output_dir)
    for seed in (config.seed, *(config.interpolate or ())):
        if not 0 <= seed <= 2**63 - config.num_images:
            raise UsageError(f"--seed {seed}: give a number from 0 to 2**63.")
    for name in ("noise_level", "strength"):
        value = getattr(config, name)
        if value is not None and not 0 < value <= 1:
            raise UsageError(f"--{name} is {value}; give a number above 0, up to 1.")
    if config.model is None and config.like is None:
        raise UsageError("Name a MODEL: an id on the Hub, a folder, or a checkpoint. Or give "
                         "--like picture.png.")  # fmt: skip
    # Flags that mean something only beside another one.
    for name, needed in (("noise_level", "image"), ("mask", "image"), ("strength", "image"),
                         ("strength", "prompt"), ("negative_prompt", "prompt"),
                         ("guidance_scale", "prompt"), ("height", "prompt"),
                         ("width", "prompt")):  # fmt: skip
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
    _check_data(data)
    not_negative = {
        "learning_rate": optimization.learning_rate,
        "lr_warmup_steps": optimization.lr_warmup_steps,
        "lr_power": optimization.lr_power,
        "save_images_epochs": config.preview.save_images_epochs,
        "save_model_epochs": config.checkpoint.save_model_epochs,
        "seed": optimization.seed,
        "adam_epsilon": optimization.adam_epsilon,
        "adam_weight_decay": optimization.adam_weight_decay,
        "ema_power": config.ema.ema_power,
    }
    for name, value in not_negative.items():
        if not value >= 0:
            raise UsageError(f"--{name} is {value}; it must be 0 or more.")
    for name, value in {"dropout": config.model.dropout, "max_bad_images": data.max_bad_images,
                        "ema_max_decay": config.ema.ema_max_decay}.items():  # fmt: skip
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
        seconds_of(optimization.budget)
    if config.preview.ddpm_num_inference_steps > config.diffusion.ddpm_num_steps:
        raise UsageError(
            f"--ddpm_num_inference_steps is {config.preview.ddpm_num_inference_steps}, more than "
            f"the {config.diffusion.ddpm_num_steps} steps of the chain (--ddpm_num_steps)."
        )


def _require_folder(name: str, path: str) -> None:
    if Path(path).exists() and not Path(path).is_dir():
        raise UsageError(f"--{name} {path} is a file: give a folder, which is made if need be.")


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


def seconds_of(text: str) -> float:
    """2h, 90m, 45s or 1h30m as seconds. UsageError for anything else, and for no time at all."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    total = sum(float(number) * UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not total > 0:
        raise UsageError(f"--budget {text}: give a time such as 45s, 90m, 2h or 1h30m.")
    return total


def take_hub_token(argv: Sequence[str]) -> list[str]:
    """The words without --hub_token, whose value goes to HF_TOKEN: no setting ever holds it."""
    token, rest = _take("hub_token", argv)
    if token:
        os.environ["HF_TOKEN"] = token
        _say(
            "--hub_token is passed on as HF_TOKEN. Others on this machine can read command lines: "
            "set HF_TOKEN, or log in once with `hf auth login`."
        )
    return rest


def _take_relics(argv: list[str]) -> list[str]:
    """The words without those switches of diffusers' example that have no effect here; said why."""
    for name, (takes_value, why) in RELICS.items():
        found, argv = _take(name, argv, takes_value)
        if found is not None:
            _say(f"--{name} has no effect: {why}")
    return argv


def _take(name: str, argv: Sequence[str], takes_value: bool = True) -> tuple[str | None, list[str]]:
    """The value of a flag (the last one given; None without it), and the words that are left."""
    value, rest, words = None, [], list(argv)
    while words:
        word = words.pop(0)
        flag, equals, after = word.partition("=")
        if not flag.startswith("--") or flag[2:].replace("-", "_") != name:
            rest.append(word)
        elif equals or not takes_value:
            value = after
        elif words:
            value = words.pop(0)
        else:
            raise UsageError(f"--{name} needs a value.")
    return value, rest


def _say(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"Note: {text}", file=sys.stderr)


def _check_data(data: DataConfig) -> None:
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
    if data.rows_per_epoch is not None and not data.streaming:
        raise UsageError("--rows_per_epoch is for --streaming: otherwise all rows are an epoch.")


def _is_ref_name(name: str) -> bool:
    """Whether git takes `name` for a branch or tag, and it cannot be mistaken for a commit."""
    plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*", name)
    wrong = ".." in name or name.endswith((".", ".lock")) or name.startswith("refs/")
    return bool(plain) and not wrong and not re.fullmatch(r"[0-9a-f]{40}", name)


def _take_config_option(argv: list[str]) -> tuple[list[str], Path | None]:
    rest, file = [], None
    while argv:
        word = argv.pop(0)
        if word == "--config":
            if not argv:
                raise UsageError("--config needs the path of a JSON file.")
            file = Path(argv.pop(0))
        elif word.startswith("--config="):
            file = Path(word.partition("=")[2])
        else:
            rest.append(word)
    if file is not None and not file.is_file():
        raise UsageError(f"--config {file}: there is no such file.")
    return rest, file


def _as_flags(values: Any, kind: type, source: str) -> list[str]:
    """The entries of a JSON object as the flags that mean the same."""
    if not isinstance(values, dict):
        raise UsageError(f"{source} must hold one JSON object of settings.")
    known = flatten(kind())
    flags: list[str] = []
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else " train.py --help lists them."
            raise UsageError(f"{source} has {name!r}, which is no setting.{hint}")
        if isinstance(known[name], bool) and not isinstance(value, bool):
            raise UsageError(f"{source}: {name} must be true or false.")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        elif value is None or isinstance(value, (str, int, float)):
            flags.append(f"--{name}={value}")
        else:
            raise UsageError(f"{source}: {name} must be a number, a text, true, false or null.")
    return flags


def _cli(kind: type[Config], argv: Sequence[str], description: str) -> Config:
    return tyro.cli(
        tyro.conf.OmitArgPrefixes[kind],
        args=argv,
        description=description,
        prog=Path(sys.argv[0]).name,
        config=(tyro.conf.HelptextFromCommentsOff,),
        use_underscores=True,
    )
