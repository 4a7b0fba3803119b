"""The evaluation of a model: metrics, memorization and loss by timestep, as JSON and as tables.

Notation: N images, D features.
"""

import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from ddpm import run_folder, run_record
from ddpm.data import order
from ddpm.data.dataset import ImageDataset
from ddpm.errors import UserError
from ddpm.evaluation import class_results, features, memorization, metrics, plots, timestep_loss
from ddpm.evaluation.class_results import label_accuracy
from ddpm.evaluation.evaluator import Evaluator
from ddpm.evaluation.memorization import Memorization
from ddpm.evaluation.results import (
    Evaluation,
    ModelVersion,
    SamplerSettings,
    TimestepLosses,
    read_evaluation,
)
from ddpm.sampling import generate, image_io
from ddpm.sampling.guidance_results import LABEL_ACCURACY

MAX_LOSS_IMAGES = 1000
"""Most images of a split whose loss is measured, each in all bands."""
NOTEWORTHY = 0.05
"""Relative difference of two losses above which the table ends with a warning."""


@dataclass(frozen=True)
class ExtractedFeatures:
    """Features [N, D] of all images of an evaluation; `held_out` is None without such images.

    `images_per_s`: generated images a second. With a classifier, `predicted` [N] int64 has the
    classes of the generated images, and `held_out_accuracy` is that of the held-out images.
    """

    generated: torch.Tensor
    trained: torch.Tensor
    held_out: torch.Tensor | None
    images_per_s: float
    predicted: torch.Tensor | None = None
    held_out_accuracy: float | None = None


def extract_features(evaluator: Evaluator) -> ExtractedFeatures:
    """Generate images; extract the features of generated and real ones. Call on every process."""
    start = time.perf_counter()
    generated, predicted = evaluator.generate_and_classify()
    images_per_s = len(generated) / (time.perf_counter() - start)
    held_out = None
    if evaluator.held_out is not None:
        held_out = evaluator.dataset_features(evaluator.held_out)
    trained = evaluator.dataset_features(evaluator.trained)
    accuracy = class_results.held_out_accuracy(evaluator)
    return ExtractedFeatures(generated, trained, held_out, images_per_s, predicted, accuracy)


def evaluate(evaluator: Evaluator, extracted: ExtractedFeatures, folder: Path) -> Evaluation:
    """Measure everything, and write the plots into `folder`. Call on every process."""
    evaluation = compute_metrics(evaluator, extracted)
    memorized, compared_with, is_copy = measure_memorization(evaluator, extracted, folder)
    losses = measure_timestep_loss(evaluator)
    if losses is not None and evaluator.accelerator.is_main_process:
        path = folder / run_folder.EVALUATION_DIR / run_folder.LOSS_BY_BAND
        plots.save(plots.plot_timestep_loss(losses), path, {"model": evaluator.model.version})
    entries = asdict(memorized)
    return replace(
        evaluation,
        metrics={**evaluation.metrics, "memorised": entries.pop("memorised")},
        memorisation={**entries, "compared_with": compared_with},
        loss_by_band=losses,
        classes=class_results.measure_classes(
            evaluator, extracted.generated, extracted.trained, extracted.predicted, is_copy
        ),
    )


def compute_metrics(evaluator: Evaluator, extracted: ExtractedFeatures) -> Evaluation:
    """Compute the distances of generated images, and of held-out images for comparison."""

    def distances(images: torch.Tensor, accuracy: float | None) -> dict[str, float]:
        values = metrics.distances(images, extracted.trained)
        entries = metrics.metrics_to_dict(values, evaluator.extractor.is_inception)
        return entries if accuracy is None else {**entries, LABEL_ACCURACY: accuracy}

    generated, held_out, predicted = extracted.generated, extracted.held_out, extracted.predicted
    evaluation = Evaluation(
        metrics=distances(generated, label_accuracy(evaluator, predicted)),
        **evaluation_context(evaluator),
        sampler=SamplerSettings(
            scheduler=evaluator.scheduler_name,
            num_inference_steps=evaluator.scheduler.num_inference_steps,
        ),
        kernel_subset_size=metrics.kernel_subset_size(generated, extracted.trained),
        num_features=generated.shape[1],
        drawing_images_per_s=round(extracted.images_per_s, 3),
    )
    if held_out is None:
        return evaluation
    as_many = generated[: len(held_out)]
    return replace(
        evaluation,
        held_out={
            "num_images": len(held_out),
            **distances(held_out, extracted.held_out_accuracy),
        },
        as_many_as_held_out={
            "num_images": len(as_many),
            **distances(as_many, label_accuracy(evaluator, predicted, len(as_many))),
        },
    )


def evaluation_context(evaluator: Evaluator) -> dict[str, Any]:
    """Return what was measured, how and where: fields of `Evaluation` and of `SamplerTable`."""
    config, accelerator = evaluator.config, evaluator.accelerator
    is_cuda = accelerator.device.type == "cuda"
    environment = run_record.Environment.current(
        torch.cuda.get_device_name() if is_cuda else None, accelerator.num_processes, "no"
    )
    environment.versions["torch-fidelity"] = metadata.version("torch-fidelity")
    extractor = evaluator.extractor
    described = {"name": extractor.name, "version": extractor.version}
    if evaluator.trained.channels == 4:
        described["background"] = extractor.background
    reference = ("name", "config_name", "revision", "split", "images", "pixels_sha256")
    return {
        "num_images": config.num_images,
        "model": ModelVersion(name=evaluator.model.name, version=evaluator.model.version),
        "seeds": [config.seed, config.seed + config.num_images - 1],
        "features": described,
        "reference": {name: getattr(evaluator.trained.facts, name) for name in reference},
        "environment": asdict(environment),
        "guidance_scale": evaluator.guidance and evaluator.guidance.scale,
        "evaluated_at": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def measure_memorization(
    evaluator: Evaluator, extracted: ExtractedFeatures, folder: Path
) -> tuple[Memorization, str, torch.Tensor]:
    """Compare the distances of generated and of unseen images to their nearest training images.

    Return the statistics, the name of the unseen images, and which generated images are as near as
    copies, [N] bool. Write the closest pairs as a grid, for which images are generated again from
    their seeds. Call on every process.
    """
    generated = memorization.nearest_neighbors(extracted.generated, extracted.trained)
    if extracted.held_out is None:
        compared_with, unseen_images = "training images among themselves", evaluator.trained
        unseen = memorization.nearest_neighbors(
            extracted.trained, extracted.trained, exclude_self=True
        )
    else:
        compared_with, unseen_images = "held-out images", evaluator.held_out
        unseen = memorization.nearest_neighbors(extracted.held_out, extracted.trained)

    def generate_image(index: int) -> torch.Tensor:
        seeds = [evaluator.config.seed + index]
        images = generate.generate_images(
            evaluator.model.unet, evaluator.scheduler, seeds, 1, guidance=evaluator.guidance
        )
        return next(images)[1]

    if evaluator.accelerator.is_main_process:
        grid = memorization.closest_pairs_grid(
            generated,
            unseen,
            generate_image,
            lambda row: features.dataset_image(unseen_images, row),
            lambda row: features.dataset_image(evaluator.trained, row),
        )
        path = folder / run_folder.EVALUATION_DIR / run_folder.NEAREST
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "drawn; nearest trained; unseen; nearest trained"
        image_io.save_png(grid, path, {"model": evaluator.model.version, "lines": lines})
    stats = memorization.memorization_stats(generated, unseen)
    return stats, compared_with, generated.distances < stats.limit


def measure_timestep_loss(evaluator: Evaluator) -> TimestepLosses | None:
    """Measure the loss of the exported and of the raw weights in bands of timesteps.

    On held-out images and on as many training images; None without held-out images. Call on every
    process.
    """
    if evaluator.held_out is None:
        return None
    unets = {"model": evaluator.model.unet, "raw": evaluator.load_raw_unet()}
    unets = {name: unet for name, unet in unets.items() if unet is not None}
    bands = timestep_loss.timestep_bands(len(evaluator.scheduler.alphas_cumprod))
    rows = _loss_rows(evaluator, evaluator.held_out)
    held_out = {
        name: evaluator.timestep_losses(unet, evaluator.held_out, rows)
        for name, unet in unets.items()
    }
    return TimestepLosses(
        num_images=len(rows),
        bands=[list(band) for band in bands],
        held_out={name: losses.mean(0).tolist() for name, losses in held_out.items()},
        trained={name: split_losses(evaluator, unet, "trained") for name, unet in unets.items()},
        held_out_by_class=class_results.loss_by_class(evaluator, rows, held_out["model"]),
    )


def split_losses(evaluator: Evaluator, unet: UNet2DModel, split: str) -> list[float]:
    """Return the mean loss in each band, of the first images of "held_out" or "trained" in the
    order of epoch 0. Call on every process."""
    images = evaluator.held_out if split == "held_out" else evaluator.trained
    rows = _loss_rows(evaluator, images)
    return evaluator.timestep_losses(unet, images, rows).mean(0).tolist()


def _loss_rows(evaluator: Evaluator, images: ImageDataset) -> list[int]:
    count = min(MAX_LOSS_IMAGES, len(evaluator.held_out), len(evaluator.trained))
    return order.row_indices(0, len(images), 0, count)


def write_evaluation(evaluator: Evaluator, evaluation: Evaluation, folder: Path) -> Path:
    """Write evaluation.json on the main process and return its path. Call on every process.

    The dataset is named only if it is not that of the run's record, which tells the card more.
    Guidance scales are kept that were measured of the same model, by the same network on the same
    data.
    """
    path, facts = folder / run_folder.EVALUATION, evaluator.trained.facts
    if evaluator.accelerator.is_main_process:
        recorded = run_record.read_record(folder).dataset
        if recorded is None or (recorded.name, recorded.split) != (facts.name, facts.split):
            evaluation = replace(evaluation, dataset=facts.name)
        if evaluation.guidance is None:
            with suppress(UserError):  # the file before may be of anyone
                before = read_evaluation(folder)
                if before is not None and _is_same_measurement(before, evaluation):
                    evaluation = replace(evaluation, guidance=before.guidance)
        evaluation.write(path)
    evaluator.accelerator.wait_for_everyone()
    return path


def _is_same_measurement(one: Evaluation, other: Evaluation) -> bool:
    """Return whether weights, feature network and real images are the same."""
    places = [(e.model and e.model.version, e.features, e.reference) for e in (one, other)]
    return places[0] == places[1]


def format_evaluation(evaluation: Evaluation) -> str:
    """Return the whole evaluation as text for the terminal."""
    parts = [format_metrics(evaluation), format_memorization(evaluation)]
    if evaluation.loss_by_band is not None:
        parts.append(format_timestep_loss(evaluation.loss_by_band))
    if evaluation.classes is not None:
        parts.append(class_results.format_classes(evaluation))
    return "\n".join(parts)


def format_metrics(evaluation: Evaluation) -> str:
    """Return the metrics as a table, with those of held-out images below."""
    rows = [("generated", evaluation.num_images, evaluation.metrics)]
    for title, entry in (
        ("generated, same number", evaluation.as_many_as_held_out),
        ("held out (reference)", evaluation.held_out),
    ):
        if entry is not None:
            rows.append((title, entry["num_images"], entry))
    is_inception, has_accuracy = "fid" in evaluation.metrics, LABEL_ACCURACY in evaluation.metrics
    frechet, kernel = metrics.distance_names(is_inception)
    titles = ("FID", "KID") if is_inception else ("Frechet", "kernel")
    lines = [
        f"{'':28}{'images':>8}{titles[0]:>10}{titles[1]:>10}  (spread)"
        f"{'precision':>11}{'recall':>8}{'accuracy' if has_accuracy else '':>10}".rstrip()
    ]
    for title, count, values in rows:
        accuracy = values.get(LABEL_ACCURACY)
        lines.append(
            f"{title:28}{count:>8,}{values[frechet]:>10.4g}{values[kernel]:>10.4g}"
            f"{values[f'{kernel}_spread']:>10.2g}{values['precision']:>11.3f}"
            f"{values['recall']:>8.3f}{'' if accuracy is None else f'{accuracy:.3f}':>10}".rstrip()
        )
    background = (evaluation.features or {}).get("background")
    if background is not None:
        lines.append(f"All images are compared over {background} (--background), as RGB.")
    return "\n".join(lines)


def format_memorization(evaluation: Evaluation) -> str:
    """Return a sentence on the fraction of copies."""
    return (
        f"{evaluation.metrics['memorised']:.1%} of the generated images are nearer to a training "
        f"image than 99 of 100 {evaluation.memorisation['compared_with']} are (about 1% or less: "
        "no sign of copying)."
    )


def format_timestep_loss(losses: TimestepLosses) -> str:
    """Return the losses by band as a table, with warnings about large differences."""
    columns = {"held out": losses.held_out["model"], "trained on": losses.trained["model"]}
    if "raw" in losses.held_out:
        columns["held out, raw weights"] = losses.held_out["raw"]
    lines = ["loss at timesteps".ljust(18) + "".join(f"{title:>22}" for title in columns)]
    for band, (first, last) in enumerate(losses.bands):
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
            f"Held-out images have a loss {held_out / trained - 1:.0%} above those trained on: the "
            "model begins to memorize its images."
        )
    return "\n".join(lines)
