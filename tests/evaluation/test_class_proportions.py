"""Which class each generated image has."""

from dataclasses import replace

import pytest

from ddpm.evaluation.class_proportions import label_sequence
from ddpm.run_record import DatasetRecord


def record(*counts: int, unlabeled: int = 0) -> DatasetRecord:
    classes = {name: count for name, count in zip("abc", counts, strict=True)}
    return DatasetRecord(name="data", classes=classes, unlabeled=unlabeled)


@pytest.mark.parametrize("start", [0, 1000, 2**62])
@pytest.mark.parametrize("count", [10, 100, 3000])
def test_any_range_of_seeds_has_the_proportions_of_the_data(start, count):
    """Images without a label are of the null class, whose id is the number of classes."""
    label_of = label_sequence("abc", record(70, 0, 25, unlabeled=5))
    labels = [label_of(seed) for seed in range(start, start + count)]
    for label, fraction in enumerate((0.70, 0, 0.25, 0.05)):
        assert abs(labels.count(label) - fraction * count) < 2.5, label
    assert labels.count(1) == 0
    assert [label_of(seed) for seed in range(start, start + count)] == labels


@pytest.mark.parametrize(
    "unusable",
    [
        None,
        DatasetRecord(name="x"),
        record(0, 0, 0),
        record(5, -1, 2),
        record(1, 1, 1, unlabeled=-9),
        replace(record(256, 0, 0), probed=256),
    ],
)
def test_a_record_without_these_classes_is_left_out(unusable):
    equal = [label_sequence("abc", unusable)(seed) for seed in range(300)]
    assert [equal.count(label) for label in range(4)] == pytest.approx([100, 100, 100, 0], abs=2)
    label_of = label_sequence("abc", unusable, record(0, 1, 0))
    assert {label_of(seed) for seed in range(99)} == {1}
