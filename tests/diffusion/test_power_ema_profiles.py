"""Profiles of averages against integrals by brute force, and against averages kept directly."""

import numpy as np
import pytest

from ddpm.config.commands import MAX_SIGMA_REL
from ddpm.diffusion import power_ema
from ddpm.diffusion.power_ema import Profile

MIDS = (np.arange(200_000) + 0.5) / 100_000
"""Midpoints of a fine grid over two units of time: integrals are sums over it."""


def weighting(profile: Profile, taus: np.ndarray) -> np.ndarray:
    """How much the average weighs the weights of each moment."""
    gamma = power_ema.sigma_rel_to_gamma(profile.sigma_rel)
    inside = taus <= profile.step
    return np.where(inside, (gamma + 1) * (taus / profile.step) ** gamma / profile.step, 0.0)


def kept_directly(profile: Profile, path: np.ndarray) -> np.ndarray:
    """The average of weights [T, D] as training keeps it, by its updates alone."""
    average, gamma = np.zeros(path.shape[1]), power_ema.sigma_rel_to_gamma(profile.sigma_rel)
    for step in range(1, profile.step + 1):
        beta = power_ema.power_ema_decay(step, gamma)
        average = beta * average + (1 - beta) * path[step - 1]
    return average


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.10, 0.2, MAX_SIGMA_REL])
def test_sigma_rel_is_the_standard_deviation_of_the_weighting(sigma_rel):
    gamma = power_ema.sigma_rel_to_gamma(sigma_rel)
    assert power_ema.gamma_to_sigma_rel(gamma) == pytest.approx(sigma_rel, rel=1e-9)
    taus = MIDS[:100_000]
    weights = weighting(Profile(1, sigma_rel), taus) / 100_000
    mean = (weights * taus).sum()
    assert weights.sum() == pytest.approx(1, rel=1e-5)
    assert np.sqrt((weights * (taus - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=1e-4)


def test_exponents_of_the_two_averages():
    """6.94 and 16.97, as in the paper's section 3.1."""
    assert power_ema.sigma_rel_to_gamma(0.10) == pytest.approx(6.94, abs=0.005)
    assert power_ema.sigma_rel_to_gamma(0.05) == pytest.approx(16.97, abs=0.005)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Profile(2, 0.05), Profile(2, 0.05)),
        (Profile(2, 0.05), Profile(2, 0.2)),
        (Profile(1, 0.05), Profile(2, 0.1)),
        (Profile(2, 0.1), Profile(1, 0.05)),
        (Profile(1, 0.15), Profile(2, 0.25)),
    ],
)
def test_inner_products_are_the_integrals(one, other):
    by_sum = (weighting(one, MIDS) * weighting(other, MIDS)).sum() / 100_000
    assert power_ema.inner_products([one], [other])[0, 0] == pytest.approx(by_sum, rel=1e-4)


def test_updates_weigh_each_step_by_the_integral_over_it():
    """So the averages that training keeps are those of the closed form, binned by steps."""
    gamma, total = power_ema.sigma_rel_to_gamma(0.1), 40
    weights = kept_directly(Profile(total, 0.1), np.eye(total))
    edges = (np.arange(total + 1) / total) ** (gamma + 1)
    np.testing.assert_allclose(weights, np.diff(edges), rtol=1e-12)


GIVEN = [Profile(step, sigma) for step in range(20, 1001, 20) for sigma in (0.05, 0.10)]


@pytest.mark.parametrize(
    ("sigma_rel", "most"),
    [
        (0.02, 0.02),
        (0.03, 5e-3),
        (0.07, 1e-3),
        (0.15, 2e-3),
        (0.2, 5e-3),
    ],
)
def test_any_length_is_rebuilt_from_two(sigma_rel, most):
    """A wandering path of weights: what is rebuilt is the average that was kept directly."""
    noise = np.random.default_rng(0).normal(size=(1000, 50))
    path = noise.cumsum(0) / 10 + noise
    wanted = Profile(1000, sigma_rel)
    found = power_ema.solve_posthoc_weights(GIVEN, wanted)
    rebuilt = sum(w * kept_directly(p, path) for w, p in zip(found.weights, GIVEN, strict=True))
    direct = kept_directly(wanted, path)
    assert sum(found.weights) == pytest.approx(1)
    assert found.error < most
    size = np.sqrt((weighting(wanted, np.arange(1, 1001)) ** 2).sum())  # of white noise, averaged
    assert np.abs(rebuilt - direct).max() < 8 * most * size + 1e-3
    nearest = kept_directly(Profile(1000, 0.05 if sigma_rel < 0.07 else 0.10), path)
    assert np.abs(rebuilt - direct).max() < 0.2 * np.abs(nearest - direct).max()


def test_the_error_is_the_distance_of_the_weightings():
    given = [Profile(step, sigma) for step in (1, 2) for sigma in (0.05, 0.10)]
    wanted = Profile(2, 0.2)
    found = power_ema.solve_posthoc_weights(given, wanted)
    target = weighting(wanted, MIDS)
    rebuilt = sum(w * weighting(p, MIDS) for w, p in zip(found.weights, given, strict=True))
    by_sum = np.sqrt(((rebuilt - target) ** 2).sum() / (target**2).sum())
    assert found.error == pytest.approx(by_sum, rel=1e-3)
    assert found.error > 0.1
    for index in range(4):  # no other weights of sum 1 come as near as the solver's direction
        for nudge in (-0.01, 0.01):
            moved = np.array(found.weights)
            moved[index] += nudge
            moved /= moved.sum()
            other = sum(w * weighting(p, MIDS) for w, p in zip(moved, given, strict=True))
            assert ((other - target) ** 2).sum() > 0.97 * ((rebuilt - target) ** 2).sum()


def test_a_profile_that_was_kept_is_itself():
    found = power_ema.solve_posthoc_weights(GIVEN, Profile(1000, 0.05))
    assert found.error == 0 and found.weights[GIVEN.index(Profile(1000, 0.05))] == 1
    assert sorted(found.weights)[:-1] == [0.0] * (len(GIVEN) - 1)
    # The solver agrees, without being told.
    near = power_ema.solve_posthoc_weights(GIVEN, Profile(1000, 0.05 + 1e-9))
    assert near.error < 1e-4 and near.weights[GIVEN.index(Profile(1000, 0.05))] == pytest.approx(
        1, abs=1e-3
    )


def test_what_cannot_be_rebuilt_has_a_large_error():
    alone = [Profile(1000, 0.05), Profile(1000, 0.10)]
    assert power_ema.solve_posthoc_weights(alone, Profile(1000, 0.07)).error < 0.1
    assert power_ema.solve_posthoc_weights(alone, Profile(1000, 0.02)).error > 0.3
    assert power_ema.solve_posthoc_weights(alone, Profile(1000, 0.25)).error > 0.3
