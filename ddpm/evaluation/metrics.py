"""How far apart two sets of images are, from their features alone.

The numbers are torch-fidelity's, by its own functions. It, rather than torchmetrics, because its
Inception and its resize are those of the TensorFlow code in which published FIDs were measured, it
agrees with that code to the last digits, it computes on features that are given to it, and it needs
nothing else but torch.

Legend: N images, D features; `drawn`, `real`: [N, D] float32 on the CPU.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ddpm.evaluation.features import require_torch_fidelity

SUBSETS, SUBSET_SIZE, NEIGHBOURS = 100, 1000, 3
"""torch-fidelity's own: KID over 100 subsets of 1000 images; balls that reach the 3rd neighbour."""

GROUPS = 10
"""Groups of images, each left out once to see how far a Frechet distance is moved by chance."""


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Between two sets of features; the first two are FID and KID where Inception's are.

    `frechet`: distance of two Gaussians (arXiv 1706.08500, eq. 6), too high with few images.
    `kernel`, `kernel_spread`: squared MMD with a cubic kernel (arXiv 1801.01401, section 3), mean
    and standard deviation over subsets; without that bias, and so sometimes below 0.
    `precision`: share of the drawn that lie among the real ones; `recall`: share of the real that
    lie among the drawn (arXiv 1904.06991, eq. 1 and 2).
    """

    frechet: float
    kernel: float
    kernel_spread: float
    precision: float
    recall: float


def distances(drawn: torch.Tensor, real: torch.Tensor) -> Distances:
    """All of them. UserError where torch-fidelity is not installed."""
    precision, recall = precision_recall(drawn, real)
    kernel, spread = kernel_distance(drawn, real)
    return Distances(
        frechet=frechet_distance(drawn, real),
        kernel=kernel,
        kernel_spread=spread,
        precision=precision,
        recall=recall,
    )


def frechet_distance(drawn: torch.Tensor, real: torch.Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of means m and covariances C, in float64."""
    return frechet_distances([drawn], real)[0]


def frechet_distances(sets: Iterable[torch.Tensor], real: torch.Tensor) -> list[float]:
    """`frechet_distance` of each of several sets to the same real one."""
    require_torch_fidelity()
    from torch_fidelity import metric_fid

    other = metric_fid.fid_features_to_statistics(real.double())
    return [
        metric_fid.fid_statistics_to_metric(
            metric_fid.fid_features_to_statistics(drawn.double()), other, verbose=False
        )[metric_fid.KEY_METRIC_FID]
        for drawn in sets
    ]


def jackknife_distances(drawn: torch.Tensor, real: torch.Tensor) -> list[float]:
    """`frechet_distance` without each of `GROUPS` groups of the drawn images: [GROUPS].

    Every GROUPS-th image is of one group, so that sets of the same seeds have the same groups. From
    them follows how far the draw of the seeds moves the distance (menu.standard_error).
    """
    group = torch.arange(len(drawn)) % GROUPS
    return frechet_distances((drawn[group != number] for number in range(GROUPS)), real)


def kernel_distance(drawn: torch.Tensor, real: torch.Tensor) -> tuple[float, float]:
    """(mean, standard deviation) of the squared MMD over `SUBSETS` pairs of subsets."""
    require_torch_fidelity()
    from torch_fidelity import metric_kid

    found = metric_kid.kid_features_to_metric(
        drawn.double(),
        real.double(),
        verbose=False,
        kid_subsets=SUBSETS,
        kid_subset_size=subset_size(drawn, real),
    )
    return found[metric_kid.KEY_METRIC_KID_MEAN], found[metric_kid.KEY_METRIC_KID_STD]


def subset_size(drawn: torch.Tensor, real: torch.Tensor) -> int:
    """1000, or half of the smaller set: subsets that are the whole set would all be the same."""
    return min(SUBSET_SIZE, len(drawn) // 2, len(real) // 2)


def precision_recall(drawn: torch.Tensor, real: torch.Tensor) -> tuple[float, float]:
    """(precision, recall), whose sets are balls around each image up to its 3rd neighbour."""
    require_torch_fidelity()
    from torch_fidelity import metric_prc

    found = metric_prc.prc_features_to_metric(
        drawn.double(), real.double(), verbose=False, save_cpu_ram=True, prc_neighborhood=NEIGHBOURS
    )
    return found[metric_prc.KEY_METRIC_PRECISION], found[metric_prc.KEY_METRIC_RECALL]


def metrics_to_dict(found: Distances, is_inception: bool) -> dict[str, Any]:
    """Names under which evaluation.json holds them: FID and KID belong to Inception alone."""
    frechet, kernel = ("fid", "kid") if is_inception else ("frechet_distance", "kernel_distance")
    return {
        frechet: found.frechet,
        kernel: found.kernel,
        f"{kernel}_spread": found.kernel_spread,
        "precision": found.precision,
        "recall": found.recall,
    }
