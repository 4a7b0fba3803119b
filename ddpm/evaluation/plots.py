"""Losses over steps or noise levels as pictures, drawn with nothing but Pillow.

A picture of a few lines and numbers needs no plotting library: one that draws fonts and axes
for everything is larger than all else that push.py imports for the card.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 720, 320
LEFT, TOP, RIGHT, BOTTOM = 70, 30, 20, 40
"""Margins in pixels, for the numbers at the axes."""
RAW, SMOOTH, INK, GRID = "#b8cbe4", "#1f5fa8", "#222222", "#dddddd"
BESIDE = 170
"""Pixels for the names of lines."""
COLOURS = (
    "#222222",
    "#1f5fa8",
    "#c1452b",
    "#2f8f4e",
    "#8a5fb5",
    "#b8860b",
    "#3ba3a3",
    "#d1699e",
    "#7a7a2e",
    "#5b7fd4",
    "#a0522d",
)
BAND = r"eval_loss_band_\d+"


def read_losses(metrics: Path) -> list[tuple[int, float]]:
    """(step, loss) of each line of metrics.jsonl that has both, in rising order of steps.

    Losses that are not finite or not positive are left out, and so is a line cut short.
    """
    losses: dict[int, float] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        try:
            entry = json.loads(line)
            step, loss = int(entry["step"]), float(entry["loss"])
        except (ValueError, KeyError, TypeError):
            continue
        if math.isfinite(loss) and loss > 0:
            losses[step] = loss
    return sorted(losses.items())


def moving_average(values: list[float], half: int) -> list[float]:
    """Mean of each value and its neighbours, `half` on each side as far as there are any."""
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def plot_loss(losses: list[tuple[int, float]], path: Path) -> bool:
    """Write the curve as a PNG: the losses pale, their running mean dark, on a logarithmic axis.

    False, and no file, for fewer than two points: no line can be drawn.
    """
    if len(losses) < 2:
        return False
    steps, values = [step for step, _ in losses], [loss for _, loss in losses]
    paper = Paper("loss, and its running mean, over optimizer steps", steps, values)
    paper.line(losses, RAW, 1)
    half = max(1, len(values) // 40)
    paper.line(list(zip(steps, moving_average(values, half), strict=True)), SMOOTH, 2)
    paper.image.save(path, "PNG")
    return True


def plot_lines(title: str, lines: dict[str, list[tuple[float, float]]]) -> Image.Image | None:
    """Several lines (x, y) with their names beside them, y on a logarithmic axis.

    Points that are not finite or not positive are left out; None where no two points are left.
    """
    good = {
        name: [(x, y) for x, y in points if math.isfinite(y) and y > 0]
        for name, points in lines.items()
    }
    every = [point for points in good.values() for point in points]
    if len({x for x, _ in every}) < 2:
        return None
    paper = Paper(title, [x for x, _ in every], [y for _, y in every], room=BESIDE)
    for number, (name, points) in enumerate(good.items()):
        colour = COLOURS[number % len(COLOURS)]
        paper.line(points, colour, 2)
        paper.name(number, name, colour)
    return paper.image


def band_lines(
    bands: list[tuple[int, int]], columns: dict[str, list[float]]
) -> dict[str, list[tuple[float, float]]]:
    """Losses by band as lines over the timesteps: each loss at the middle of its band."""
    middles = [(first + last) / 2 for first, last in bands]
    return {name: list(zip(middles, values, strict=True)) for name, values in columns.items()}


def held_out_loss_lines(
    series: list[dict[str, Any]], num_timesteps: int
) -> dict[str, list[tuple[float, float]]]:
    """The held-out losses of lines of metrics.jsonl as lines over the steps: all, and by band."""
    names = [name for name in (series[-1] if series else {}) if re.fullmatch(BAND, name)]
    told = {"all": "eval_loss"}
    for number, name in enumerate(names):
        first, after = (round(num_timesteps * n / len(names)) for n in (number, number + 1))
        told[f"{first} to {after - 1}"] = name
    return {
        words: [(line["step"], line[name]) for line in series if name in line]
        for words, name in told.items()
    }


class Paper:
    """An empty picture with its axes: linear from left to right, logarithmic from below."""

    def __init__(self, title: str, xs: list[float], ys: list[float], room: int = 0):
        """`xs` and `ys` are all values that will be drawn, `room` pixels kept free on the right."""
        self.left, self.right = min(xs), max(xs)
        self.low, self.high = math.log10(min(ys)), math.log10(max(ys))
        self.high = max(self.high, self.low + 0.05)
        self.end = WIDTH - RIGHT - room
        self.image = Image.new("RGB", (WIDTH, HEIGHT), "white")
        self.pen, self.font = ImageDraw.Draw(self.image), ImageFont.load_default(14)
        for tick in range(5):
            logarithm = self.low + (self.high - self.low) * tick / 4
            x = self.left + (self.right - self.left) * tick / 4
            height, label = self._y(logarithm), f"{10**logarithm:.3g}"
            self.pen.line((LEFT, height, self.end, height), fill=GRID)
            self.pen.text((LEFT - 8, height), label, INK, self.font, anchor="rm")
            anchor = "lt" if tick == 0 else "rt" if tick == 4 else "mt"
            below = (self._x(x), HEIGHT - BOTTOM + 8)
            self.pen.text(below, f"{round(x):,}", INK, self.font, anchor=anchor)
        self.pen.text((LEFT, 8), title, INK, self.font)

    def line(self, points: list[tuple[float, float]], colour: str, width: int) -> None:
        places = [(self._x(x), self._y(math.log10(y))) for x, y in points]
        self.pen.line(places, fill=colour, width=width, joint="curve")

    def name(self, number: int, name: str, colour: str) -> None:
        """Write a line's name beside the axes, in its colour."""
        self.pen.text((self.end + 12, TOP + 22 * number), name, colour, self.font)

    def _x(self, value: float) -> float:
        return LEFT + (value - self.left) / (self.right - self.left) * (self.end - LEFT)

    def _y(self, logarithm: float) -> float:
        share = (self.high - logarithm) / (self.high - self.low)
        return TOP + share * (HEIGHT - TOP - BOTTOM)
