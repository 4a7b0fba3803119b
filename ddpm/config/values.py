"""Values of settings that are texts on a command line: sizes, colors, numbers, names.

All raise UsageError for a text that is none.
"""

import difflib
import math
import re
from contextlib import suppress
from typing import Literal, get_args

from ddpm.errors import UsageError

Resolution = int | tuple[int, int]
"""Size of images in pixels: of squares one number, else height and width."""
Logger = Literal["none", "wandb", "tensorboard", "trackio"]
Loggers = Logger | tuple[Logger, ...]
"""One tracker, or several."""
WaitPolicy = Literal["auto", "active", "passive"]
Scheduler = Literal[
    "ddpm",
    "ddim",
    "pndm",
    "dpmsolver++",
    "dpmsolver-sde",
    "unipc",
    "euler",
    "euler-ancestral",
    "heun",
    "deis",
]

MAX_GUIDANCE_SCALE = 100


def parse_resolution(text: str) -> Resolution:
    """Return the size that a flag states. Raise UsageError for any other text."""
    if not re.fullmatch("[0-9]{1,9}(,[0-9]{1,9})?", text):
        raise UsageError(
            f"--resolution {text!r:.60} is no size. Give pixels: 64 for squares, or HEIGHT,WIDTH "
            "for rectangles, as in 48,80."
        )
    height, _, width = text.partition(",")
    return (int(height), int(width)) if width else int(height)


def size_of(resolution: Resolution) -> tuple[int, int]:
    """Return height and width of images."""
    return (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)


def parse_numbers(text: str) -> tuple[float, ...]:
    """Return numbers that are joined by commas; for any other text one NaN, which no range has."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        return (math.nan,)


def parse_color(text: str) -> tuple[int, int, int]:
    """Return a color name or #rrggbb as red, green and blue in 0..255."""
    from PIL import ImageColor

    with suppress(ValueError):
        return ImageColor.getrgb(text)[:3]
    raise UsageError(f"--background {text} is not a color. Give white, black or #rrggbb.")


def logger_names(logger: Loggers) -> tuple[str, ...]:
    """Return the names of trackers, each once."""
    return tuple(dict.fromkeys([logger] if isinstance(logger, str) else logger))


def parse_loggers(text: str) -> tuple[Logger, ...]:
    """Return the trackers that a flag names. Raise UsageError for an unknown one."""
    names = tuple(text.split(","))
    for name in names:
        if name not in get_args(Logger):
            choices = ", ".join(get_args(Logger))
            raise UsageError(f"--logger {name!r:.60} is no tracker: give one or more of {choices}.")
    return names


def parse_sampler_choice(word: str) -> tuple[str, int | None]:
    """Return NAME:STEPS, or NAME alone, as a pair. Raise UsageError for an unknown name, and for
    steps that are no number above 0."""
    known = get_args(Scheduler)
    name, colon, steps = word.partition(":")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Give one of {', '.join(known)}."
        raise UsageError(f"--samplers {word}: {name!r} is no sampler. {hint}")
    if colon and not re.fullmatch("0*[1-9][0-9]{0,8}", steps, flags=re.ASCII):
        raise UsageError(
            f"--samplers {word}: give a number of steps after the colon, as in {name}:10, or "
            f"{name} alone."
        )
    return name, int(steps) if colon else None
