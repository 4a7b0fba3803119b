"""Compare guidance scales of one model with classes: the same seeds and classes for each.

More guidance draws images that are surely of their class, and fewer of its varieties: the label
accuracy rises, while the distance to the data falls and then rises (arXiv 2207.12598, section 4).
"""

from pathlib import Path

from ddpm import run_folder
from ddpm.evaluation import metrics, plots
from ddpm.evaluation.class_results import label_accuracy
from ddpm.evaluation.evaluator import Evaluator
from ddpm.evaluation.report import ExtractedFeatures
from ddpm.sampling.guidance_results import LABEL_ACCURACY, GuidanceCurve, GuidanceResult


def compare_guidance_scales(
    evaluator: Evaluator, extracted: ExtractedFeatures, folder: Path
) -> GuidanceCurve:
    """Measure --guidance_scales, and plot them into `folder`. Call on every process."""
    entries = []
    for scale in evaluator.config.scales:
        generated, predicted = extracted.generated, extracted.predicted
        if scale != evaluator.guidance.scale:
            evaluator.accelerator.print(f"Generating with guidance {scale:g} ...", flush=True)
            generated, predicted = evaluator.with_guidance_scale(scale).generate_and_classify()
        distances = metrics.distances(generated, extracted.trained)
        entries_of_scale = metrics.metrics_to_dict(distances, evaluator.extractor.is_inception)
        accuracy = label_accuracy(evaluator, predicted)
        if accuracy is not None:
            entries_of_scale[LABEL_ACCURACY] = accuracy
        leaving_out = tuple(metrics.jackknife_distances(generated, extracted.trained))
        entries.append(
            GuidanceResult(guidance_scale=scale, metrics=entries_of_scale, leaving_out=leaving_out)
        )
    first, count = evaluator.config.seed, evaluator.config.num_images
    curve = GuidanceCurve(
        num_images=count,
        seeds=[first, first + count - 1],
        scheduler=evaluator.scheduler_name,
        num_inference_steps=evaluator.scheduler.num_inference_steps,
        entries=tuple(entries),
    )
    if evaluator.accelerator.is_main_process:
        path = folder / run_folder.EVALUATION_DIR / run_folder.GUIDANCE
        plots.save(plots.plot_guidance(curve), path, {"model": evaluator.model.version})
    return curve


def format_guidance(curve: GuidanceCurve) -> str:
    """Return the scales as a table, with the standard error of each difference to the best."""
    is_inception = "fid" in curve.best.metrics
    frechet, kernel = metrics.distance_names(is_inception)
    lines = [
        f"{'guidance':10}{'FID' if is_inception else 'Frechet':>10}{'':17}"
        f"{'KID' if is_inception else 'kernel':>10}{'precision':>11}{'recall':>8}{'accuracy':>10}"
    ]
    for entry in curve.entries:
        values, accuracy = entry.metrics, entry.metrics.get(LABEL_ACCURACY)
        note = "" if entry is curve.best else f"(error {curve.standard_error(entry):.2g})"
        lines.append(
            f"{entry.guidance_scale:<10g}{values[frechet]:>10.4g} {note:16}"
            f"{values[kernel]:>10.3g}{values['precision']:>11.3f}{values['recall']:>8.3f}"
            f"{'' if accuracy is None else f'{accuracy:.3f}':>10}  {curve.verdict(entry)}".rstrip()
        )
    return "\n".join(lines)
