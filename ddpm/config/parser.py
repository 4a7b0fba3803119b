"""Command lines as configs.

Precedence: default < `--config FILE` < flag. The file's settings are the defaults of the parser.
"""

import atexit
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar, get_args

import tyro

from ddpm.config.base import (
    TOKEN_ADVICE,
    TOKEN_FLAGS,
    as_flag,
    flatten,
    nest,
    read_settings,
    require_flags,
    without_checks,
)
from ddpm.config.data import DATASET_FIELDS
from ddpm.config.evaluate import EvaluateConfig
from ddpm.config.push import PushConfig
from ddpm.config.sample import SampleConfig
from ddpm.config.train import TrainConfig
from ddpm.config.values import Logger, Loggers, Resolution, parse_loggers, parse_resolution
from ddpm.errors import TOKEN, UsageError

DEFAULT_RECIPE = Path(__file__).parents[2] / "recipes" / "digits.json"
IGNORED_FLAGS = {
    "local_rank": (True, "the launcher sets the rank of each process."),
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
"""Flags of diffusers' unconditional example without effect here: (takes a value, reason)."""

TEXT_FIELDS = {"class_label", "prompt", "negative_prompt", "commit_message"}
"""Settings in which ~ is a character like any other."""

Config = TypeVar("Config")
REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.primitive_rule
def _values_rule(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Parse a Resolution from one word, where tyro alone would take two, and Loggers from one word
    or several."""
    if info.type == Resolution:
        nargs, metavar, parse = 1, "INT|INT,INT", parse_resolution
    elif info.type == Loggers:
        nargs, metavar, parse = "*", f"{{{','.join(get_args(Logger))}}} ...", parse_loggers
    else:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=nargs,
        metavar=metavar,
        instance_from_str=lambda words: parse(",".join(words)),
        is_instance=lambda value: isinstance(value, int | str | tuple),
        str_from_instance=lambda value: [as_flag(value)],
    )


def parse_train(argv: Sequence[str]) -> TrainConfig:
    """Return the flags, and the JSON file of `--config`, as a TrainConfig.

    With neither a dataset nor a file, that is the recipe of the digits. Raise UsageError for
    settings that cannot work, SystemExit for a command line that cannot be parsed.
    """
    _require_no_token(argv)
    argv, file = _pop_config_file(_pop_ignored_flags(argv))
    given = given_flags(argv)
    names_data = given & DATASET_FIELDS
    settings = read_settings(TrainConfig, file) if file else {}
    if file == DEFAULT_RECIPE and not (names_data or Path(settings["dataset_name"]).is_dir()):
        raise UsageError(
            "Without a dataset, train.py trains on the digits in data/, which are not here: run "
            "the command in the repository's folder, or give --dataset_name or --train_data_dir."
        )
    if names_data:  # the dataset of the command line replaces that of the file
        given |= DATASET_FIELDS
    settings = {name: value for name, value in settings.items() if name not in given}
    if file is not None:
        require_flags(TrainConfig, settings, file)
    config = _cli(
        TrainConfig,
        argv,
        "Train a UNet2DModel with a DDPMScheduler and save the result as a DDPMPipeline.\n\n"
        "  accelerate launch train.py                                   the digits in data/\n"
        "  accelerate launch train.py --dataset_name owner/name         a dataset on the Hub\n"
        "  accelerate launch train.py --config recipes/digits.json      settings from a file\n\n"
        "--config FILE is JSON with the names below; flags win.",
        without_checks(TrainConfig, settings),
    )
    if config.data.dataset_name is None and config.data.train_data_dir is None:
        raise UsageError(f"{file} names no data: add --dataset_name or --train_data_dir.")
    return config


def explicit_settings(argv: Sequence[str]) -> set[str]:
    """Return the names of the settings that a command line of train.py, or its file, gives."""
    argv, file = _pop_config_file(argv)
    return given_flags(argv) | (read_settings(TrainConfig, file).keys() if file else set())


def parse_push(argv: Sequence[str]) -> PushConfig:
    """Return the command line of push.py. Raise as `parse_train`."""
    return _cli(PushConfig, argv, "Publish a run folder to the Hub as one commit, and verify it.")


def parse_sample(argv: Sequence[str]) -> SampleConfig:
    """Return the command line of sample.py. Raise as `parse_train`."""
    return _cli(SampleConfig, argv, "Draw images; image k comes from seed --seed + k.")


def parse_evaluate(argv: Sequence[str]) -> EvaluateConfig:
    """Return the command line of evaluate.py. Raise as `parse_train`."""
    return _cli(EvaluateConfig, argv, "Measure how good a model is.")


def given_flags(argv: Sequence[str]) -> set[str]:
    """Return the names of the fields whose flags are on a command line, for values of lower rank.

    They are spelled with underscores; --no_name gives name.
    """
    flags = (arg.partition("=")[0][2:] for arg in argv if arg.startswith("--"))
    return {flag.replace("-", "_").removeprefix("no_") for flag in flags}


def _require_no_token(argv: Sequence[str]) -> None:
    """Raise UsageError, which does not repeat it, for a token on the command line."""
    given = [arg for arg in argv if TOKEN.search(arg) or given_flags([arg]) & TOKEN_FLAGS]
    if not given:
        return
    # `accelerate launch` prints its whole command line when a script fails: end it before that.
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        import psutil  # late: sample.py needs neither accelerate nor what it requires

        with suppress(psutil.Error):
            launcher = psutil.Process(os.getppid())
            if given[0] in launcher.cmdline():
                atexit.register(launcher.terminate)
    raise UsageError(f"The command line holds what looks like a token. {TOKEN_ADVICE}")


def _pop_ignored_flags(argv: Sequence[str]) -> list[str]:
    """Return the command line without IGNORED_FLAGS; print why each has no effect."""
    for name, (takes_value, reason) in IGNORED_FLAGS.items():
        value, argv = _pop_flag(name, argv, takes_value)
        if value is not None:
            _print_note(f"--{name} has no effect: {reason}")
    return list(argv)


def _pop_config_file(argv: Sequence[str]) -> tuple[list[str], Path | None]:
    """Return the command line without --config, and the file that it names.

    With neither a file nor a dataset that is the recipe of the digits.
    """
    name, rest = _pop_flag("config", argv, needs="the path of a JSON file")
    path = None if name is None else Path(os.path.expanduser(name))
    if path is not None and not path.is_file():
        raise UsageError(f"--config {name}: there is no such file.")
    if path is None and not given_flags(rest) & DATASET_FIELDS and not {"-h", "--help"} & set(rest):
        path = DEFAULT_RECIPE
    return rest, path


def _pop_flag(
    name: str, argv: Sequence[str], takes_value: bool = True, needs: str = "a value"
) -> tuple[str | None, list[str]]:
    """Return the last value of a flag, None without the flag, and the rest of the command line."""
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
            raise UsageError(f"--{name} needs {needs}.")
    return value, rest


def _print_note(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"Note: {text}", file=sys.stderr)


def _cli(
    kind: type[Config], argv: Sequence[str], description: str, default: Config | None = None
) -> Config:
    _require_no_token(argv)
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[kind],
        args=argv,
        description=description,
        default=tyro.MISSING_NONPROP if default is None else default,
        prog=Path(sys.argv[0]).name,
        config=(tyro.conf.HelptextFromCommentsOff,),
        use_underscores=True,
        registry=REGISTRY,
    )
    return _expand_home(config)


def _expand_home(config: Config) -> Config:
    """Return a config with ~ expanded in its paths, as shells do except in --output_dir=~/run.

    UsageError for an empty one, which is what an unset variable of a shell gives: pathlib would
    take it for the working directory.
    """
    settings = flatten(config)
    for name, value in settings.items():
        if isinstance(value, str) and name not in TEXT_FIELDS:
            if not value:
                raise UsageError(f"--{name} is empty: give a value, or leave it out.")
            settings[name] = os.path.expanduser(value)
    return nest(type(config), settings)
