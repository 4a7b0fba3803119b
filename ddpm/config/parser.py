"""How flags and JSON become the same config.

A JSON file is read as if its entries had been typed as flags before the real ones, so both pass
the same checks (checks.py): default < `--config FILE` < flag.
"""

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from ddpm.config.checks import (
    check_data,
    check_ema_lengths,
    check_sample,
    check_samplers,
    check_train,
    is_ref_name,
)
from ddpm.config.commands import EvaluateConfig, PushConfig, SampleConfig
from ddpm.config.train import DataConfig, TrainConfig, flatten
from ddpm.errors import UsageError
from ddpm.run_folder import read_json

DEFAULT_RECIPE = Path(__file__).parents[2] / "recipes" / "digits.json"
IGNORED_FLAGS = {
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

DATASET_FIELDS = ("dataset_name", "train_data_dir")
DATASET_DEPENDENT_FIELDS = (
    "dataset_config_name",
    "dataset_revision",
    "split",
    "image_column",
    "value_range",
    "held_out",
)
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
        if name is not None and not is_ref_name(name):
            raise UsageError(
                f"{flag} {name!r} is no name for a branch or tag: use letters, digits "
                "and - _ . as in v1.0."
            )
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
        values = values if isinstance(values, dict) else {}
        seed = [f"--held_out_seed={values['seed']}"] if "seed" in values else []
        values = {k: v for k, v in values.items() if k in known}
        if flags & set(DATASET_FIELDS):  # other data: only how images are made squares is the run's
            values = {
                k: v
                for k, v in values.items()
                if k not in (*DATASET_FIELDS, *DATASET_DEPENDENT_FIELDS)
            }
        from_run = _as_flags(values, DataConfig, str(run)) + seed
    config = _cli(EvaluateConfig, [*from_run, *argv], "Measure how good a model is.")
    for name in ("num_images", "batch_size", "num_inference_steps"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; it must be at least 1.")
    if not 0 <= config.seed <= 2**63 - config.num_images:
        raise UsageError(f"--seed {config.seed}: give a number from 0 to 2**63.")
    if config.data.dataset_name and config.data.train_data_dir:
        raise UsageError("Give --dataset_name or --train_data_dir, not both.")
    check_samplers(config)
    check_ema_lengths(config)
    check_data(config.data)
    return config


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
    for name, (takes_value, why) in IGNORED_FLAGS.items():
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
