"""Distances between two sets of images, computed from their features.

The numbers are torch-fidelity's, and all but the kernel distance are by its own functions. It is
used rather than torchmetrics because its Inception and its resize are those of the TensorFlow code
in which published FIDs were measured, it agrees with that code to the last digits, and it accepts
features that are already extracted.

Notation: N images, D features; `generated`, `real`: [N, D] float32 on the CPU.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ddpm.evaluation.features import require_torch_fidelity

KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020
"""Those of torch-fidelity."""
NEIGHBORS = 3
"""Precision and recall: the ball around an image reaches its 3rd neighbor, as in torch-fidelity."""
GROUPS = 10
"""Groups of images of the jackknife."""


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Distances between two sets of features; the first two are FID and KID for Inception.

    `frechet`: of two Gaussians (arXiv 1706.08500, eq. 6); biased upwards with few images.
    `kernel`, `kernel_spread`: squared MMD with a cubic kernel (arXiv 1801.01401, section 3), mean
    and standard deviation over subsets; unbiased, so it may be below 0.
    `precision`: fraction of the generated images within the real ones; `recall`: fraction of the
    real images within the generated ones (arXiv 1904.06991, eq. 1 and 2).
    """

    frechet: float
    kernel: float
    kernel_spread: float
    precision: float
    recall: float


def distances(generated: torch.Tensor, real: torch.Tensor) -> Distances:
    """Compute all distances. UserError if torch-fidelity is not installed."""
    precision, recall = precision_recall(generated, real)
    kernel, kernel_spread = kernel_distance(generated, real)
    return Distances(
        frechet=frechet_distance(generated, real),
        kernel=kernel,
        kernel_spread=kernel_spread,
        precision=precision,
        recall=recall,
    )


def frechet_distance(generated: torch.Tensor, real: torch.Tensor) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): means m, covariances C, in float64."""
    return _frechet_distances([generated], real)[0]


def jackknife_distances(generated: torch.Tensor, real: torch.Tensor) -> list[float]:
    """Return the Frechet distance without each of the groups of generated images: [GROUPS].

    Every GROUPS-th image is in the same group, so two sets from the same seeds have the same groups
    and `sampler_results.jackknife_standard_error` applies to their difference.
    """
    group = torch.arange(len(generated)) % GROUPS
    return _frechet_distances((generated[group != left_out] for left_out in range(GROUPS)), real)


def _frechet_distances(sets: Iterable[torch.Tensor], real: torch.Tensor) -> list[float]:
    """Return the Frechet distance of each set; the real statistics are computed once."""
    require_torch_fidelity()
    from torch_fidelity import metric_fid

    real_statistics = metric_fid.fid_features_to_statistics(real.double())
    return [
        metric_fid.fid_statistics_to_metric(
            metric_fid.fid_features_to_statistics(features.double()), real_statistics, verbose=False
        )[metric_fid.KEY_METRIC_FID]
        for features in sets
    ]


def kernel_distance(generated: torch.Tensor, real: torch.Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of the squared MMD over `KID_SUBSETS` pairs of subsets.

    The subsets are those of torch-fidelity, whose cubes by `pow` take several times as long.
    """
    size, draws = kernel_subset_size(generated, real), np.random.RandomState(KID_SEED)
    values = [
        _squared_mmd(*(s[draws.choice(len(s), size, replace=False)] for s in (generated, real)))
        for _ in range(KID_SUBSETS)
    ]
    return float(np.mean(values)), float(np.std(values))


def _squared_mmd(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the unbiased estimate from two sets [N, D], with the kernel (x.y / D + 1)^3."""

    def sum_of_kernels(x: torch.Tensor, y: torch.Tensor, diagonal: bool = True) -> float:
        products = x @ y.T / x.shape[1] + 1
        cubes = products * products * products
        total = cubes.sum(dtype=torch.float64)
        return float(total if diagonal else total - cubes.diagonal().sum(dtype=torch.float64))

    count = len(one)
    within = sum(sum_of_kernels(s, s, diagonal=False) for s in (one, other))
    return within / (count * (count - 1)) - 2 * sum_of_kernels(one, other) / count**2


def kernel_subset_size(generated: torch.Tensor, real: torch.Tensor) -> int:
    """Return 1000, or half of the smaller set: subsets of all images would all be the same."""
    return min(KID_SUBSET_SIZE, len(generated) // 2, len(real) // 2)


def precision_recall(generated: torch.Tensor, real: torch.Tensor) -> tuple[float, float]:
    """Return (precision, recall); a set is the union of balls that reach the 3rd neighbor."""
    require_torch_fidelity()
    from torch_fidelity import metric_prc

    values = metric_prc.prc_features_to_metric(
        generated.double(),
        real.double(),
        verbose=False,
        save_cpu_ram=True,
        prc_neighborhood=NEIGHBORS,
    )
    return values[metric_prc.KEY_METRIC_PRECISION], values[metric_prc.KEY_METRIC_RECALL]


def metrics_to_dict(distances: Distances, is_inception: bool) -> dict[str, float]:
    """Return the entries of evaluation.json; only Inception's distances are named FID and KID."""
    frechet, kernel = distance_names(is_inception)
    return {
        frechet: distances.frechet,
        kernel: distances.kernel,
        f"{kernel}_spread": distances.kernel_spread,
        "precision": distances.precision,
        "recall": distances.recall,
    }


def distance_names(is_inception: bool) -> tuple[str, str]:
    """Return the names of the Frechet and the kernel distance in evaluation.json."""
    return ("fid", "kid") if is_inception else ("frechet_distance", "kernel_distance")
