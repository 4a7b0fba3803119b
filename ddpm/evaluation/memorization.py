"""Does a model draw new images, or those that it was trained on?

Each drawn image has a nearest training image in feature space. How near is near is told by images
that were never trained on: theirs are as near as two images of these data happen to be. Without
such images the training images themselves tell, each by the nearest other one.

Legend: N images, D features; sets are [N, D] float32 on the CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ddpm.sampling import image_io

NEAR_FRACTION = 0.01
"""Share of the unseen images that lie nearer than what counts as near."""
NUM_PAIRS = 12
"""Closest pairs on the sheet."""
CHUNK = 1024
"""Rows whose distances to all training images are in memory at once."""


@dataclass(frozen=True)
class Nearest:
    """For each of N images the distance to its nearest training image, and that one's row: [N]."""

    distances: torch.Tensor
    rows: torch.Tensor

    def closest(self, count: int) -> list[int]:
        """Numbers of the images that lie nearest, the nearest first."""
        return self.distances.argsort(stable=True)[:count].tolist()


def nearest_neighbors(
    images: torch.Tensor, trained: torch.Tensor, *, themselves: bool = False
) -> Nearest:
    """The nearest training image of each image; with `themselves` the nearest other one, where
    `images` are the training images."""
    found = []
    for start in range(0, len(images), CHUNK):
        distances = torch.cdist(images[start : start + CHUNK].double(), trained.double())
        if themselves:
            own = torch.arange(len(distances))
            distances[own, start + own] = torch.inf
        found.append(distances.min(dim=1))
    return Nearest(
        torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])
    )


def memorization_stats(drawn: Nearest, unseen: Nearest) -> dict[str, Any]:
    """The entries of evaluation.json.

    `memorised`: share of the drawn images that lie nearer to a training image than 99 of 100 unseen
    ones do; about 0.01 for a model that copies nothing. `nearer_than_unseen`: how often a drawn
    image is nearer than an unseen one, ties half (the U statistic of arXiv 2004.05675); above 0.5
    the drawn images keep closer to the training images than the data themselves.
    """
    limit = torch.quantile(unseen.distances, NEAR_FRACTION)
    ordered = unseen.distances.sort().values
    below = torch.searchsorted(ordered, drawn.distances, right=False)
    not_above = torch.searchsorted(ordered, drawn.distances, right=True)
    nearer = 1 - (below + not_above).double().mean() / 2 / len(ordered)
    return {
        "memorised": float((drawn.distances < limit).double().mean()),
        "nearer_than_unseen": float(nearer),
        "limit": float(limit),
        "median_drawn": float(drawn.distances.median()),
        "median_unseen": float(unseen.distances.median()),
    }


def closest_pairs_grid(
    drawn: Nearest,
    unseen: Nearest,
    draw: Callable[[int], torch.Tensor],
    show_unseen: Callable[[int], torch.Tensor],
    show_trained: Callable[[int], torch.Tensor],
) -> Image.Image:
    """The closest pairs as four lines: drawn, their nearest training images; then unseen ones and
    theirs. The functions give image k as [C, H, W] uint8."""
    count = min(NUM_PAIRS, len(drawn.rows), len(unseen.rows))
    lines: list[torch.Tensor] = []
    for found, show in ((drawn, draw), (unseen, show_unseen)):
        chosen = found.closest(count)
        lines += [show(number) for number in chosen]
        lines += [show_trained(int(found.rows[number])) for number in chosen]
    return image_io.make_grid(lines, columns=count)
