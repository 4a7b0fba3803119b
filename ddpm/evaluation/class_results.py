"""What is measured of each class: distances, label accuracy, copies and held-out loss.

K: classes, with ids 0 to K - 1; K is the id of no class. N: images, D: features.
"""

import torch

from ddpm.config.base import MIN_IMAGES
from ddpm.evaluation import metrics
from ddpm.evaluation.evaluator import Evaluator
from ddpm.evaluation.results import ClassResult, Evaluation
from ddpm.sampling.guidance_results import LABEL_ACCURACY

MAX_CLASSES = 20
"""Classes whose distances are computed, and lines of a printed table: of the most images."""


def label_accuracy(
    evaluator: Evaluator, predicted: torch.Tensor | None, count: int | None = None
) -> float | None:
    """Return the fraction of the first `count` generated images that are found in their class.

    `predicted` [N] int64 are the classes that a classifier finds. Images of no class are left out;
    None without a classifier, and without images of a class.
    """
    if predicted is None:
        return None
    labels = evaluator.labels[:count]
    is_correct = (predicted[:count] == labels)[labels < len(evaluator.model.class_names)]
    return float(is_correct.double().mean()) if len(is_correct) else None


def held_out_accuracy(evaluator: Evaluator) -> float | None:
    """Return the accuracy of the classifier on held-out images; None without it or without them.

    Call on every process.
    """
    images = evaluator.held_out
    if not evaluator.has_classifier or images is None or images.labels is None:
        return None
    rows = (images.labels < len(evaluator.model.class_names)).nonzero()[:, 0].tolist()
    if not rows:
        return None
    return float((evaluator.classify(images, rows) == images.labels[rows]).double().mean())


def measure_classes(
    evaluator: Evaluator,
    generated: torch.Tensor,
    trained: torch.Tensor,
    predicted: torch.Tensor | None,
    is_copy: torch.Tensor,
) -> list[ClassResult] | None:
    """Measure the classes that have generated images; None for a model without classes.

    Features [N, D]; `predicted` [N] int64 or None, `is_copy` [N] bool. Distances need MIN_IMAGES
    generated and as many training images.
    """
    if evaluator.guidance is None:
        return None
    labels, real_labels = evaluator.labels, evaluator.trained.labels
    largest = torch.bincount(labels).argsort(descending=True, stable=True)[:MAX_CLASSES].tolist()
    results = []
    for label, name in enumerate(evaluator.model.class_names):
        chosen = labels == label
        if not chosen.any():
            continue
        entries = {}
        if label in largest and real_labels is not None:
            real = trained[real_labels == label]
            entries = _distances(evaluator, generated[chosen], real)
        if predicted is not None:
            entries[LABEL_ACCURACY] = float((predicted[chosen] == label).double().mean())
        copies = int(is_copy[chosen].sum())
        results.append(
            ClassResult(name=name, num_images=int(chosen.sum()), metrics=entries, copies=copies)
        )
    return results


def _distances(
    evaluator: Evaluator, generated: torch.Tensor, real: torch.Tensor
) -> dict[str, float]:
    """Return both distances of images of one class, none for fewer than MIN_IMAGES."""
    if min(len(generated), len(real)) < MIN_IMAGES:
        return {}
    frechet, kernel = metrics.distance_names(evaluator.extractor.is_inception)
    return {
        frechet: metrics.frechet_distance(generated, real),
        kernel: metrics.kernel_distance(generated, real)[0],
    }


def loss_by_class(
    evaluator: Evaluator, rows: list[int], losses: torch.Tensor
) -> dict[str, float] | None:
    """Return the mean loss of each class with MIN_IMAGES of the held-out `rows` [N].

    losses: [N, bands]. None for a model without classes, and without labels of the rows.
    """
    names, labels = evaluator.model.class_names, evaluator.held_out.labels
    if names is None or labels is None:
        return None
    labels, means = labels[rows], losses.double().mean(1)
    chosen = {name: means[labels == label] for label, name in enumerate(names)}
    return {name: float(m.mean()) for name, m in chosen.items() if len(m) >= MIN_IMAGES}


def format_classes(evaluation: Evaluation) -> str:
    """Return the classes as a table, those with the most images."""
    losses = evaluation.loss_by_band and evaluation.loss_by_band.held_out_by_class
    largest = sorted(evaluation.classes, key=lambda result: -result.num_images)[:MAX_CLASSES]
    lines = [
        f"{'class':22}{'generated':>10}{'distance':>10}{'kernel':>10}{'accuracy':>10}"
        f"{'copies':>8}{'held-out loss':>15}"
    ]
    for result in evaluation.classes:
        if result not in largest:
            continue
        values = result.metrics
        names = metrics.distance_names("fid" in values)
        numbers = [values.get(names[0]), values.get(names[1]), values.get(LABEL_ACCURACY)]
        shown = ["" if number is None else f"{number:.3g}" for number in numbers]
        loss = (losses or {}).get(result.name)
        lines.append(
            f"{result.name:22.21}{result.num_images:>10,}{shown[0]:>10}{shown[1]:>10}{shown[2]:>10}"
            f"{result.copies:>8}{'' if loss is None else f'{loss:.4f}':>15}".rstrip()
        )
    if len(evaluation.classes) > len(largest):
        lines.append(f"... and {len(evaluation.classes) - len(largest):,} classes of fewer images.")
    return "\n".join(lines)
