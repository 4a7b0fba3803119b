"""The class of each generated image: in the proportions of the training data."""

import bisect
import itertools
from collections.abc import Callable, Sequence

from ddpm.run_record import DatasetRecord

GOLDEN_RATIO = 0x9E3779B97F4A7C15
"""2**64 / 1.618..., whose multiples fill 0 to 2**64 evenly (Knuth, TAOCP volume 3, section 6.4)."""


def label_sequence(
    class_names: Sequence[str], *records: DatasetRecord | None
) -> Callable[[int], int]:
    """Return the label of the image of a seed, from 0 to K; K, the number of classes, is none.

    Each label is as frequent as in the first of the records with these classes, in which images
    without a label count as K; without such a record all classes are equally frequent. A record of
    a stream counts its first images alone, so it is left out. The label depends on the seed alone,
    and any range of seeds has nearly these proportions.
    """
    counts = [1] * len(class_names)
    for record in records:
        if record is None or record.probed or tuple(record.classes) != tuple(class_names):
            continue
        if any(record.classes.values()) and min(*record.classes.values(), record.unlabeled) >= 0:
            counts = [*record.classes.values(), record.unlabeled]
            break
    cumulative = list(itertools.accumulate(counts))

    def label_of(seed: int) -> int:
        position = seed * GOLDEN_RATIO % 2**64 * cumulative[-1] >> 64
        return bisect.bisect_right(cumulative, position)

    return label_of
