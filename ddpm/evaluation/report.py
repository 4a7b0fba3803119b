"""How good a model is: what it draws, compared with the images that it was trained on.

Legend: N images, D features.
"""

import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ddpm import run_folder
from ddpm.data import order
from ddpm.evaluation import evaluator, memorization, metrics, plots, timestep_loss
from ddpm.evaluation.evaluator import Evaluator
from ddpm.evaluation.results import TimestepLosses
from ddpm.sampling import generate, image_io

MAX_LOSS_IMAGES = 1000
"""Images of a split whose loss is measured, in each band."""
NOTEWORTHY = 0.05
"""Relative difference of two losses from which a sentence is said."""


@dataclass(frozen=True)
class ExtractedFeatures:
    """Features [N, D] of all images of an exam; `held_out` is None without such images."""

    drawn: torch.Tensor
    trained: torch.Tensor
    held_out: torch.Tensor | None
    images_per_s: float


def extract_features(exam: Evaluator) -> ExtractedFeatures:
    """Draw, and look at what was drawn and at the real images. Call on every process."""
    began = time.perf_counter()
    drawn = evaluator.generated_features(exam, exam.scheduler, exam.config.num_images)
    seconds = time.perf_counter() - began
    held_out = None if exam.held_out is None else evaluator.split_features(exam, exam.held_out)
    return ExtractedFeatures(
        drawn, evaluator.split_features(exam, exam.trained), held_out, len(drawn) / seconds
    )


def compute_metrics(exam: Evaluator, looked: ExtractedFeatures) -> dict[str, Any]:
    """The distances, and the floor that the held-out images set: entries of evaluation.json."""
    drawn, trained = looked.drawn, looked.trained
    named = {"is_inception": exam.features.is_inception}
    found = {
        "metrics": metrics.metrics_to_dict(metrics.distances(drawn, trained), **named),
        **evaluation_context(exam),
        "kernel_subset_size": metrics.subset_size(drawn, trained),
        "num_features": drawn.shape[1],
        "drawing_images_per_s": round(looked.images_per_s, 3),
    }
    if looked.held_out is not None:
        same = drawn[: len(looked.held_out)]
        for name, few in (("held_out", looked.held_out), ("as_many_as_held_out", same)):
            entries = metrics.metrics_to_dict(metrics.distances(few, trained), **named)
            found[name] = {"num_images": len(few), **entries}
    return found


def measure_memorization(
    exam: Evaluator, looked: ExtractedFeatures, folder: Path
) -> dict[str, Any]:
    """How near drawn images come to training images; writes the sheet of the closest pairs.

    The images of the sheet are drawn once more, from their seeds. Call on every process.
    """
    drawn = memorization.nearest_neighbors(looked.drawn, looked.trained)
    if looked.held_out is None:
        unseen = memorization.nearest_neighbors(looked.trained, looked.trained, themselves=True)
    else:
        unseen = memorization.nearest_neighbors(looked.held_out, looked.trained)
    others = exam.trained if exam.held_out is None else exam.held_out

    def draw(number: int) -> torch.Tensor:
        seed = exam.config.seed + number
        return next(generate.generate_images(exam.artifact.unet, exam.scheduler, [seed], 1))[1]

    if exam.accelerator.is_main_process:
        sheet = memorization.closest_pairs_grid(
            drawn,
            unseen,
            draw,
            lambda row: evaluator.real_image(others, row),
            lambda row: evaluator.real_image(exam.trained, row),
        )
        path = folder / run_folder.EVALUATION_DIR / run_folder.NEAREST
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "drawn; nearest trained; unseen; nearest trained"
        image_io.save_png(sheet, path, {"model": exam.artifact.version, "lines": lines})
    compared = "training images among themselves" if looked.held_out is None else "held-out images"
    return {**memorization.memorization_stats(drawn, unseen), "compared_with": compared}


def measure_timestep_loss(exam: Evaluator) -> dict[str, Any] | None:
    """Loss by band of timesteps of the exported weights and of the raw ones, on held-out images and
    on as many that were trained on; None without held-out images. Call on every process."""
    if exam.held_out is None:
        return None
    count = min(MAX_LOSS_IMAGES, len(exam.held_out), len(exam.trained))
    weights = {"model": exam.artifact.unet, "raw": evaluator.load_raw_unet(exam)}
    found: dict[str, Any] = {"num_images": count}
    found["bands"] = timestep_loss.timestep_bands(len(exam.scheduler.alphas_cumprod))
    for split, real in (("held_out", exam.held_out), ("trained", exam.trained)):
        rows = order.row_indices(0, len(real), 0, count)
        found[split] = {
            name: evaluator.split_losses(exam, unet, real, rows).mean(0).tolist()
            for name, unet in weights.items()
            if unet is not None
        }
    return found


def plot_timestep_loss(exam: Evaluator, levels: dict[str, Any], folder: Path) -> None:
    """Write the losses by band as a picture, on the first process; call on every one."""
    if exam.accelerator.is_main_process:
        path = folder / run_folder.EVALUATION_DIR / run_folder.LOSS_BY_BAND
        figure = plots.plot_timestep_loss(TimestepLosses(**levels))
        plots.save(figure, path, {"model": exam.artifact.version})


def format_timestep_loss(levels: dict[str, Any]) -> str:
    """The losses by band for people, and a sentence where something is off."""
    columns = {
        "held out": levels["held_out"]["model"],
        "trained on": levels["trained"]["model"],
        "held out, raw weights": levels["held_out"].get("raw"),
    }
    columns = {name: values for name, values in columns.items() if values}
    lines = ["loss at timesteps".ljust(18) + "".join(f"{name:>22}" for name in columns)]
    for band, (first, last) in enumerate(levels["bands"]):
        values = "".join(f"{column[band]:>22.4f}" for column in columns.values())
        lines.append(f"{first:>6} to {last:<8}{values}")
    held_out, trained, *raw = (sum(values) / len(values) for values in columns.values())
    if raw and raw[0] < (1 - NOTEWORTHY) * held_out:
        lines.append(
            f"The average lags: the raw weights have a loss of {raw[0]:.4f}, it has "
            f"{held_out:.4f}. Train longer, or lower --ema_max_decay."
        )
    if held_out > (1 + NOTEWORTHY) * trained:
        lines.append(
            f"Held-out images cost {held_out / trained - 1:.0%} more than those trained "
            "on: the model begins to know its images by heart."
        )
    return "\n".join(lines)


def write_evaluation(exam: Evaluator, found: dict[str, Any], folder: Path) -> Path:
    """Write evaluation.json, on the first process; call on every one.

    The data is named only where it is not that of the run's record, which tells the card more.
    """
    path = folder / run_folder.EVALUATION
    if exam.accelerator.is_main_process:
        recorded = run_folder.read_record(folder).dataset
        facts = exam.trained.facts
        own = recorded and (recorded.name, recorded.split) == (facts.name, facts.split)
        named = {} if own else {"dataset": facts.name}
        run_folder.write_json(path, {**named, **found})
    exam.accelerator.wait_for_everyone()
    return path


def format_metrics(found: dict[str, Any]) -> str:
    """The numbers for people: a line for the drawn images, the floor below it."""
    rows = [("drawn", found["num_images"], found["metrics"])]
    for name, entry in (
        ("drawn, as many as held out", "as_many_as_held_out"),
        ("held out: the floor", "held_out"),
    ):
        if entry in found:
            rows.append((name, found[entry]["num_images"], found[entry]))
    frechet, kernel = ("FID", "KID") if "fid" in found["metrics"] else ("Frechet", "kernel")
    lines = [
        f"{'':28}{'images':>8}{frechet:>10}{kernel:>10}  (spread){'precision':>11}{'recall':>8}"
    ]
    for name, count, entry in rows:
        values = [value for key, value in entry.items() if key != "num_images"]
        lines.append(
            f"{name:28}{count:>8,}{values[0]:>10.4g}{values[1]:>10.4g}{values[2]:>10.2g}"
            f"{values[3]:>11.3f}{values[4]:>8.3f}"
        )
    return "\n".join(lines)


def format_memorization(copies: dict[str, Any]) -> str:
    """What was found about copies, in a sentence."""
    return (
        f"{copies['memorised']:.1%} of the drawn images lie nearer to a training image than 99 of "
        f"100 {copies['compared_with']} do (about 1%, or less: no sign of copying)."
    )


def evaluation_context(exam: Evaluator) -> dict[str, Any]:
    """What was measured, how and where: entries of evaluation.json."""
    config, facts = exam.config, exam.trained.facts
    machine = run_folder.Environment.current(
        torch.cuda.get_device_name() if exam.accelerator.device.type == "cuda" else None,
        exam.accelerator.num_processes,
        "no",
    )
    machine.versions["torch-fidelity"] = metadata.version("torch-fidelity")
    return {
        "num_images": config.num_images,
        "model": {"name": exam.artifact.name, "version": exam.artifact.version},
        "seeds": [config.seed, config.seed + config.num_images - 1],
        "sampler": {
            "scheduler": exam.scheduler_name,
            "num_inference_steps": exam.scheduler.num_inference_steps,
        },
        "features": {"name": exam.features.name, "version": exam.features.version},
        "reference": {
            key: getattr(facts, key)
            for key in ("name", "config_name", "revision", "split", "images", "pixels_sha256")
        },
        "environment": asdict(machine),
        "evaluated_at": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
