"""Distance over EMA length as a picture, drawn with nothing but Pillow."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ddpm.evaluation.plots import BOTTOM, GRID, HEIGHT, INK, LEFT, RAW, RIGHT, SMOOTH, TOP, WIDTH
from ddpm.sampling import image_io

LINES = ("#c05020", "#3a8a4a", "#806090")
"""Colours of the lines for weights without a length."""


def plot_ema_lengths(
    points: Sequence[tuple[float, float, float]], lines: dict[str, float], name: str, path: Path
) -> bool:
    """Write (length, distance, standard error) as dots with bars, and `lines` across, as a PNG.

    The lengths lie on a logarithmic axis. False, and no file, for fewer than two of them.
    """
    if len(points) < 2:
        return False
    ends = [math.log(points[0][0]), math.log(points[-1][0])]
    values = [*lines.values(), *(d + side * e for _, d, e in points for side in (-1, 1))]
    low, high = min(values), max(values)
    margin = 0.08 * max(high - low, 1e-6 * abs(high), 1e-12)
    low, high = low - margin, high + margin
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    inset = 30  # the first and the last bar stand away from the edge

    def x(length: float) -> float:
        share = (math.log(length) - ends[0]) / (ends[1] - ends[0])
        return LEFT + inset + share * (WIDTH - LEFT - RIGHT - 2 * inset)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    for tick in range(5):
        value = low + (high - low) * tick / 4
        pen.line((LEFT, y(value), WIDTH - RIGHT, y(value)), fill=GRID)
        pen.text((LEFT - 8, y(value)), f"{value:.3g}", INK, font, anchor="rm")
    pen.text((LEFT, 8), f"{name} over EMA length (sigma_rel), with standard errors", INK, font)
    for number, (label, value) in enumerate(lines.items()):
        colour = LINES[number % len(LINES)]
        pen.line((LEFT, y(value), WIDTH - RIGHT, y(value)), fill=colour, width=2)
        pen.text((WIDTH - RIGHT, y(value) - 2), label, colour, font, anchor="rd")
    spots = [(x(length), y(value)) for length, value, _ in points]
    pen.line(spots, fill=RAW, width=2)
    for (length, value, error), (across, down) in zip(points, spots, strict=True):
        pen.line((across, y(value - error), across, y(value + error)), fill=SMOOTH, width=2)
        pen.ellipse((across - 4, down - 4, across + 4, down + 4), fill=SMOOTH)
        pen.text((across, HEIGHT - BOTTOM + 8), f"{length:g}", INK, font, anchor="mt")
    path.parent.mkdir(parents=True, exist_ok=True)
    image_io.save_png(image, path, {})
    return True
