"""Distances between sets of features, compared with values computed by hand."""

import math

import pytest
import torch

from ddpm.evaluation import metrics

pytest.importorskip("torch_fidelity")


def gaussian(count: int, mean: list[float], deviations: list[float], seed: int) -> torch.Tensor:
    """Features whose sample mean is `mean`, and whose sample covariance is exactly diagonal."""
    normal = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed)).double()
    centered = normal - normal.mean(0)
    factor = torch.linalg.cholesky(torch.cov(centered.T))
    white = torch.linalg.solve_triangular(factor, centered.T, upper=False).T
    return (white * torch.tensor(deviations) + torch.tensor(mean)).float()


def test_frechet_distance_is_that_of_two_gaussians():
    """|m1 - m2|^2 + sum (s1 - s2)^2 for covariances that commute: 9 + 16 + 1 + 0.25 = 26.25."""
    one = gaussian(200, [1.0, 2.0, 0.0], [2.0, 1.0, 0.5], 0)
    other = gaussian(90, [4.0, -2.0, 0.0], [1.0, 1.0, 1.0], 1)
    assert metrics.frechet_distance(one, other) == pytest.approx(26.25, rel=1e-4)
    assert metrics.frechet_distance(other, one) == pytest.approx(26.25, rel=1e-4)
    assert metrics.frechet_distance(one, one) == pytest.approx(0, abs=1e-4)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """tr (C1 C2)^(1/2) by hand, for C1 = diag(4, 1) and C2 the same turned by 45 degrees."""
    one = gaussian(300, [0.0, 0.0], [2.0, 1.0], 2)
    rotation = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / math.sqrt(2)
    other = one @ rotation.T
    # The product has determinant 16 and trace 12.5 ((4 + 1) * 2.5): roots sum to sqrt(12.5 + 8).
    assert metrics.frechet_distance(one, other) == pytest.approx(10 - 2 * math.sqrt(20.5), rel=1e-3)


def test_frechet_distance_works_with_fewer_images_than_features():
    features = torch.randn(20, 50, generator=torch.Generator().manual_seed(3))
    assert metrics.frechet_distance(features, features) == pytest.approx(0, abs=1e-3)


def test_jackknife_leaves_out_every_tenth_image():
    generator = torch.Generator().manual_seed(5)
    generated, real = (torch.randn(40, 3, generator=generator) for _ in range(2))
    values = metrics.jackknife_distances(generated, real)
    kept = [row for row in range(40) if row % 10 != 3]
    assert len(values) == metrics.GROUPS
    assert values[3] == pytest.approx(metrics.frechet_distance(generated[kept], real))


def test_kernel_distance_of_two_points_is_that_of_the_kernel():
    """All generated images alike, all real ones alike: k(a, a) + k(b, b) - 2 k(a, b), no spread."""
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])

    def k(x, y):
        return float(x @ y / 2 + 1) ** 3

    mean, spread = metrics.kernel_distance(a.repeat(20, 1), b.repeat(30, 1))
    assert mean == pytest.approx(k(a, a) + k(b, b) - 2 * k(a, b), rel=1e-6)
    assert spread == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_that_of_torch_fidelity():
    from torch_fidelity import metric_kid

    generator = torch.Generator().manual_seed(5)
    one, other = (torch.rand(n, 8, generator=generator) * 4 for n in (60, 50))
    expected = metric_kid.kid_features_to_metric(
        one.double(), other.double() + 1, verbose=False, kid_subset_size=25
    )
    values = metrics.kernel_distance(one, other + 1)
    assert values == pytest.approx(tuple(expected.values()), rel=1e-5)


def test_kernel_distance_has_no_bias_and_a_spread():
    generator = torch.Generator().manual_seed(4)
    one, other = (torch.randn(400, 4, generator=generator) for _ in range(2))
    mean, spread = metrics.kernel_distance(one, other)
    assert spread > 0
    assert abs(mean) < spread
    far, _ = metrics.kernel_distance(one, other + 1)
    assert far > 10 * spread


def test_kernel_subsets_are_never_the_whole_set():
    small, large = torch.zeros(40, 2), torch.zeros(5000, 2)
    assert metrics.kernel_subset_size(small, large) == 20
    assert metrics.kernel_subset_size(large, large) == 1000


def test_precision_and_recall_by_hand():
    """Real: 0, 1, ..., 19 on a line, so each ball reaches to the 3rd neighbor. Half of the
    generated images are among them, half far away; their balls contain the real ones from 0 to 9
    and some more."""
    real = torch.arange(20.0)[:, None]
    generated = torch.cat((torch.arange(10.0), torch.arange(1000.0, 1010.0)))[:, None]
    precision, recall = metrics.precision_recall(generated, real)
    assert precision == 0.5
    # The ball of generated 9 (neighbors 8, 7, 6) has radius 3, so it reaches to 12: 13 of 20.
    assert recall == pytest.approx(13 / 20)


def test_only_distances_of_inception_are_named_fid_and_kid():
    distances = metrics.Distances(frechet=1, kernel=2, kernel_spread=3, precision=4, recall=5)
    inception, other = (metrics.metrics_to_dict(distances, flag) for flag in (True, False))
    assert list(inception) == ["fid", "kid", "kid_spread", "precision", "recall"]
    assert "fid" not in other and other["frechet_distance"] == 1
    assert list(inception.values()) == list(other.values()) == [1, 2, 3, 4, 5]
