"""The menu of samplers as a picture: distance over seconds an image, with nothing but Pillow.

Both axes are logarithmic. Each sampler's entries are one line, the steps stand at its points. A bar
is as far as chance alone carries the difference to the best, whose distance is the level line: an
entry whose bar reaches the line is as good.
"""

import io
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ddpm import run_folder
from ddpm.sampling import sampler_table
from ddpm.sampling.sampler_table import SamplerResult, SamplerTable

WIDTH, HEIGHT = 720, 420
LEFT, TOP, RIGHT, BOTTOM = 70, 50, 30, 50
"""Margins in pixels, for the numbers at the axes."""
INK, GRID, BEST = "#222222", "#dddddd", "#777777"
COLOURS = ("#1f5fa8", "#c2521b", "#2c8a4b", "#8a3f9e", "#9a7b12", "#17828f", "#b0305c", "#555555")
TICKS, FEWEST_TICKS = (1, 2, 5), 3
NAMED_BY = {"fid": "FID", "frechet_distance": "Frechet distance"}


class Axis:
    """A logarithmic axis over some values, from pixel `start` to pixel `end`."""

    def __init__(self, values: list[float], start: float, end: float):
        low, high = math.log10(min(values)), math.log10(max(values))
        room = max(0.08 * (high - low), 0.05)
        self.low, self.high, self.start, self.end = low - room, high + room, start, end

    def at(self, value: float) -> float:
        """The pixel of a value; that of the nearer end for one beyond the axis."""
        part = (math.log10(value) - self.low) / (self.high - self.low) if value > 0 else 0.0
        return self.start + min(max(0.0, part), 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times the powers of ten; evenly spaced values on an axis with few of them."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        found = [
            factor * 10.0**power
            for power in powers
            for factor in TICKS
            if self.low <= math.log10(factor) + power <= self.high
        ]
        if len(found) >= FEWEST_TICKS:
            return found
        return [10 ** (self.low + (self.high - self.low) * part / 4) for part in range(5)]


def save_sampler_plot(made: SamplerTable, path: Path) -> None:
    """Write the picture as a PNG: the old one or the new one, never half."""
    whole = io.BytesIO()
    plot_sampler_table(made).save(whole, "PNG")
    run_folder.write_bytes(path, whole.getvalue())


def plot_sampler_table(made: SamplerTable) -> Image.Image:
    """The picture. Distances that are not above 0 lie at the bottom."""
    shown = [entry.distance for entry in made.entries if entry.distance > 0]
    across = Axis([entry.seconds for entry in made.entries], LEFT, WIDTH - RIGHT)
    up = Axis(shown or [1.0], HEIGHT - BOTTOM, TOP)
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for value in up.ticks():
        pen.line((LEFT, up.at(value), WIDTH - RIGHT, up.at(value)), GRID)
        pen.text((LEFT - 8, up.at(value)), f"{value:.3g}", INK, font, anchor="rm")
    for value in across.ticks():
        pen.line((across.at(value), TOP, across.at(value), HEIGHT - BOTTOM), GRID)
        pen.text((across.at(value), HEIGHT - BOTTOM + 8), f"{value:.3g}", INK, font, anchor="mt")
    level = up.at(made.best.distance)
    pen.line((LEFT, level, WIDTH - RIGHT, level), BEST)
    _lines(made, across, up, pen, font)
    named = next(
        name for name in sampler_table.DISTANCES if name in made.facts["entries"][0]["metrics"]
    )
    pen.text((LEFT, 8), f"{NAMED_BY[named]}, lower is better, with steps at the points", INK, font)
    pen.text((WIDTH - RIGHT, HEIGHT - 8), "seconds an image", INK, font, anchor="rb")
    return image


def _lines(made: SamplerTable, across: Axis, up: Axis, pen: ImageDraw.ImageDraw, font) -> None:
    """A line for each sampler, with its name above the picture."""
    lines: dict[str, list[SamplerResult]] = {}
    for entry in sorted(made.entries, key=lambda each: each.num_inference_steps):
        lines.setdefault(entry.scheduler, []).append(entry)
    left = LEFT
    for number, (name, entries) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = [(across.at(entry.seconds), up.at(entry.distance)) for entry in entries]
        if len(points) > 1:
            pen.line(points, colour, 2)
        for entry, (x, y) in zip(entries, points, strict=True):
            noise = sampler_table.SIGNIFICANT_ERRORS * sampler_table.jackknife_standard_error(
                entry, made.best
            )
            ends = [up.at(entry.distance + sign * noise) for sign in (-1, 1)]
            pen.line((x, ends[0], x, ends[1]), colour)
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
            pen.text((x + 7, y - 5), str(entry.num_inference_steps), colour, font, anchor="ls")
        pen.text((left, 28), name, colour, font)
        left += pen.textlength(name, font) + 18
