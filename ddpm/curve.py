"""The loss over the steps, drawn from metrics.jsonl with nothing but Pillow.

A picture of two lines and four numbers needs no plotting library: one that draws fonts and axes
for everything is larger than all else that push.py imports for the card.
"""

import json
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 720, 320
LEFT, TOP, RIGHT, BOTTOM = 70, 30, 20, 40
"""Margins in pixels, for the numbers at the axes."""
RAW, SMOOTH, INK, GRID = "#b8cbe4", "#1f5fa8", "#222222", "#dddddd"


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


def smooth(values: list[float], half: int) -> list[float]:
    """Mean of each value and its neighbours, `half` on each side as far as there are any."""
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw(losses: list[tuple[int, float]], path: Path) -> bool:
    """Write the curve as a PNG: the losses pale, their running mean dark, on a logarithmic axis.

    False, and no file, for fewer than two points: no line can be drawn.
    """
    if len(losses) < 2:
        return False
    steps, values = [step for step, _ in losses], [loss for _, loss in losses]
    low, high = math.log10(min(values)), math.log10(max(values))
    high = max(high, low + 0.05)
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)

    def x(step: float) -> float:
        share = (step - steps[0]) / (steps[-1] - steps[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(logarithm: float) -> float:
        return TOP + (high - logarithm) / (high - low) * (HEIGHT - TOP - BOTTOM)

    for tick in range(5):
        logarithm, step = (
            low + (high - low) * tick / 4,
            steps[0] + (steps[-1] - steps[0]) * tick / 4,
        )
        pen.line((LEFT, y(logarithm), WIDTH - RIGHT, y(logarithm)), fill=GRID)
        pen.text((LEFT - 8, y(logarithm)), f"{10**logarithm:.3g}", INK, font, anchor="rm")
        anchor = "lt" if tick == 0 else "rt" if tick == 4 else "mt"
        pen.text((x(step), HEIGHT - BOTTOM + 8), f"{round(step):,}", INK, font, anchor=anchor)
    pen.text((LEFT, 8), "loss, and its running mean, over optimizer steps", INK, font)
    half = max(1, len(values) // 40)
    for line, colour, width in ((values, RAW, 1), (smooth(values, half), SMOOTH, 2)):
        points = [(x(s), y(math.log10(v))) for s, v in zip(steps, line, strict=True)]
        pen.line(points, fill=colour, width=width, joint="curve")
    image.save(path, "PNG")
    return True
