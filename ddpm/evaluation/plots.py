"""Plots of a run for its model card: losses, samplers, EMA lengths.

The functions return a figure, or None for fewer than two points, which make no line. matplotlib is
imported inside them: it takes longer to load than all else that push.py needs for the card.
"""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm import file_io
from ddpm.evaluation.results import TimestepLosses
from ddpm.sampling import sampler_results
from ddpm.sampling.guidance_results import LABEL_ACCURACY, GuidanceCurve
from ddpm.sampling.sampler_results import SamplerTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
DISTANCE_TITLES = {"fid": "FID", "frechet_distance": "Frechet distance"}


def save(figure: "Figure | None", path: Path, metadata: Mapping[str, str] | None = None) -> bool:
    """Write a figure as a PNG with `metadata` as its text; a reader sees the old file or the new.

    Return whether there was a figure to write.
    """
    if figure is None:
        return False
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None, **(metadata or {})})
    file_io.write_bytes(path, png.getvalue())
    return True


def plot_loss(losses: Points) -> "Figure | None":
    """Plot the training loss over (step, loss) pairs, pale, with its moving average."""
    if len(losses) < 2:
        return None
    axes = _new_axes("Training loss", "optimizer step", "loss")
    steps, values = zip(*losses, strict=True)
    half = max(1, len(values) // 40)
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    axes.plot(steps, values, color="C0", alpha=0.3, linewidth=1, label="each logged step")
    axes.plot(steps, [sum(w) / len(w) for w in windows], color="C0", label="moving average")
    set_log_scale(axes, "y")
    axes.legend()
    return axes.figure


def plot_held_out_loss(series: Sequence[dict[str, Any]], num_timesteps: int) -> "Figure | None":
    """Plot held-out losses of entries of metrics.jsonl: over all timesteps, and in each band."""
    names = [n for n in (series[-1] if series else ()) if re.fullmatch(r"eval_loss_band_\d+", n)]
    lines = {"all timesteps": _positive_points(series, "eval_loss")}
    for band, name in enumerate(names):
        first, end = (round(num_timesteps * edge / len(names)) for edge in (band, band + 1))
        lines[f"{first} to {end - 1}"] = _positive_points(series, name)
    if len({step for points in lines.values() for step, _ in points}) < 2:
        return None
    axes = _new_axes("Loss on held-out images, by timestep", "optimizer step", "mean squared error")
    from matplotlib import colormaps

    for number, (label, points) in enumerate(lines.items()):
        color = colormaps["viridis"](1 - number / len(lines)) if number else "black"
        steps, values = [step for step, _ in points], [value for _, value in points]
        axes.plot(steps, values, color=color, label=label, zorder=2 if number else 3)
    set_log_scale(axes, "y")
    _label_lines(axes)
    return axes.figure


def plot_timestep_loss(losses: TimestepLosses) -> "Figure | None":
    """Plot the losses of both splits over the middles of the bands; raw weights are dashed."""
    if len(losses.bands) < 2:
        return None
    axes = _new_axes(
        "Loss by timestep", "timestep: little noise left, much right", "mean squared error"
    )
    middles = [(first + last) / 2 for first, last in losses.bands]
    for split, color, values in (
        ("held out", "C1", losses.held_out),
        ("trained on", "C0", losses.trained),
    ):
        for name, line in values.items():
            raw = name == "raw"
            axes.plot(
                middles,
                line,
                "--" if raw else "o-",
                color=color,
                markersize=4,
                label=f"{split}, raw" if raw else split,
            )
    set_log_scale(axes, "y")
    _label_lines(axes)
    return axes.figure


def plot_sampler_table(table: SamplerTable) -> "Figure":
    """Plot distance over seconds per image, a line for each sampler, with its steps at the points.

    A bar is as long as chance alone moves the difference to the best distance, the level line: an
    entry whose bar reaches that line is as good.
    """
    axes = _new_axes(
        "Samplers: quality against time (steps at the points)",
        "seconds per image",
        f"{DISTANCE_TITLES[table.best.distance_name]} (lower is better)",
    )
    for sampler in dict.fromkeys(entry.scheduler for entry in table.entries):
        entries = [entry for entry in table.entries if entry.scheduler == sampler]
        entries.sort(key=lambda entry: entry.num_inference_steps)
        noise = [
            sampler_results.SIGNIFICANT_ERRORS
            * sampler_results.jackknife_standard_error(entry.leaving_out, table.best.leaving_out)
            for entry in entries
        ]
        seconds = [entry.seconds_per_image for entry in entries]
        distances = [entry.distance for entry in entries]
        line = axes.errorbar(seconds, distances, noise, fmt="o-", markersize=5, label=sampler)[0]
        for entry in entries:
            axes.annotate(
                str(entry.num_inference_steps),
                (entry.seconds_per_image, entry.distance),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
                color=line.get_color(),
            )
    axes.axhline(table.best.distance, color="0.5", linestyle=":", zorder=0)
    set_log_scale(axes, "x")
    if all(entry.distance > 0 for entry in table.entries):
        set_log_scale(axes, "y")
    _label_lines(axes)
    return axes.figure


def plot_ema_lengths(
    points: Sequence[tuple[float, float, float]], levels: dict[str, float], distance_title: str
) -> "Figure | None":
    """Plot (sigma_rel, distance, standard error) with error bars, and `levels` by name across."""
    if len(points) < 2:
        return None
    axes = _new_axes(
        "Length of the average of the weights", "EMA length (sigma_rel)", distance_title
    )
    lengths, distances, errors = zip(*points, strict=True)
    axes.errorbar(lengths, distances, errors, fmt="o-", capsize=3, label="averages by length")
    for number, (name, distance) in enumerate(levels.items(), 1):
        axes.axhline(distance, color=f"C{number}", linestyle="--", label=name)
    axes.set_xscale("log")
    axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
    axes.set_xticks([], minor=True)
    _label_lines(axes)
    return axes.figure


def plot_guidance(curve: GuidanceCurve) -> "Figure | None":
    """Plot distance over label accuracy, with the scales at the points; without a classifier over
    the scales. Bars are as long as chance alone moves the difference to the best."""
    if len(curve.entries) < 2:
        return None
    is_classified = all(LABEL_ACCURACY in entry.metrics for entry in curve.entries)
    axes = _new_axes(
        "Guidance to the classes" + (" (scale at the points)" if is_classified else ""),
        "label accuracy" if is_classified else "guidance scale",
        f"{DISTANCE_TITLES[curve.distance_name]} (lower is better)",
    )
    places = [
        entry.metrics[LABEL_ACCURACY] if is_classified else entry.guidance_scale
        for entry in curve.entries
    ]
    distances = [entry.distance for entry in curve.entries]
    noise = [
        sampler_results.SIGNIFICANT_ERRORS * curve.standard_error(entry) for entry in curve.entries
    ]
    axes.errorbar(places, distances, noise, fmt="o-", markersize=5, label="guidance")
    if is_classified:
        for entry, place in zip(curve.entries, places, strict=True):
            axes.annotate(
                f"{entry.guidance_scale:g}",
                (place, entry.distance),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
            )
    axes.axhline(curve.best.distance, color="0.5", linestyle=":", zorder=0)
    return axes.figure


def _new_axes(title: str, xlabel: str, ylabel: str) -> "Axes":
    """Return the axes of a new figure of 1080 x 600 pixels."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(7.2, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9")
    return axes


def set_log_scale(axes: "Axes", name: str) -> None:
    """Make axis "x" or "y" logarithmic, with plain numbers at 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # evenly spaced ticks within a narrow range
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:.4g}")


def _label_lines(axes: "Axes") -> None:
    """Put the legend to the right of the axes, where it covers no line."""
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _positive_points(series: Iterable[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return (step, value) of the entries whose value has a logarithm."""
    points = [(entry["step"], entry[name]) for entry in series if name in entry]
    return [(step, value) for step, value in points if math.isfinite(value) and value > 0]
