"""Memorization: does a model generate new images, or those that it was trained on?

Each generated image has a nearest training image in feature space. Images that were never trained
on show how near is usual for these data. Without such images the training images take their place,
each with the nearest other one.

Notation: N images, D features; sets of features are [N, D] float32 on the CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image

from ddpm.sampling import image_io

NEAR_FRACTION = 0.01
"""Fraction of the unseen images that are nearer than the limit for a copy."""
NUM_PAIRS = 12
"""Closest pairs in the grid."""
CHUNK = 1024
"""Images whose distances to all training images are in memory at once."""


@dataclass(frozen=True)
class Nearest:
    """For each of N images the distance to its nearest training image and the row of that: [N]."""

    distances: torch.Tensor
    rows: torch.Tensor

    def closest(self, count: int) -> list[int]:
        """Return the indices of the images with the smallest distances, the smallest first."""
        return self.distances.argsort(stable=True)[:count].tolist()


@dataclass(frozen=True, kw_only=True)
class Memorization:
    """How near generated images are to training images, with the names of evaluation.json.

    `memorised`: fraction of the generated images that are nearer to a training image than 99% of
    the unseen images; about 0.01 for a model that copies nothing.
    `nearer_than_unseen`: how often a generated image is nearer than an unseen one, ties counted
    half (the U statistic of arXiv 2004.05675); above 0.5 the generated images are nearer to the
    training images than the data themselves.
    `limit`, `median_drawn`, `median_unseen`: distances to the nearest training image.
    """

    memorised: float
    nearer_than_unseen: float
    limit: float
    median_drawn: float
    median_unseen: float


def nearest_neighbors(
    features: torch.Tensor, trained: torch.Tensor, *, exclude_self: bool = False
) -> Nearest:
    """Return the nearest training image of each image.

    With `exclude_self`, for `features` that are the training images: the nearest other one.
    """
    distances, rows = [], []
    for start in range(0, len(features), CHUNK):
        chunk = torch.cdist(features[start : start + CHUNK].double(), trained.double())
        if exclude_self:
            index = torch.arange(len(chunk))
            chunk[index, start + index] = torch.inf
        smallest = chunk.min(dim=1)
        distances.append(smallest.values)
        rows.append(smallest.indices)
    return Nearest(torch.cat(distances), torch.cat(rows))


def memorization_stats(generated: Nearest, unseen: Nearest) -> Memorization:
    """Compare the distances of generated images with those of unseen images."""
    limit = torch.quantile(unseen.distances, NEAR_FRACTION)
    ordered = unseen.distances.sort().values
    below = torch.searchsorted(ordered, generated.distances, right=False)
    not_above = torch.searchsorted(ordered, generated.distances, right=True)
    nearer = 1 - (below + not_above).double().mean() / 2 / len(ordered)
    return Memorization(
        memorised=float((generated.distances < limit).double().mean()),
        nearer_than_unseen=float(nearer),
        limit=float(limit),
        median_drawn=float(generated.distances.median()),
        median_unseen=float(unseen.distances.median()),
    )


def closest_pairs_grid(
    generated: Nearest,
    unseen: Nearest,
    generated_image: Callable[[int], torch.Tensor],
    unseen_image: Callable[[int], torch.Tensor],
    trained_image: Callable[[int], torch.Tensor],
) -> Image.Image:
    """Return the closest pairs in four lines: generated images, the training images nearest to
    them, unseen images, the training images nearest to those.

    The functions return image k of a set: [C, H, W] uint8.
    """
    count = min(NUM_PAIRS, len(generated.rows), len(unseen.rows))
    images: list[torch.Tensor] = []
    for nearest, image in ((generated, generated_image), (unseen, unseen_image)):
        closest = nearest.closest(count)
        images += [image(index) for index in closest]
        images += [trained_image(int(nearest.rows[index])) for index in closest]
    return image_io.make_grid(images, columns=count)
