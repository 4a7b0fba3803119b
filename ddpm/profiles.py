"""Power-function averages of weights: what each weighs, and one as a sum of others.

After Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models
(arXiv 2312.02696, section 3 and appendix C). The average of exponent gamma after step t is

    (gamma + 1) / t^(gamma + 1) * integral from 0 to t of tau^gamma theta(tau) dtau      (eq. 121)

so it scales with the run: early weights are forgotten as the run grows. People give its length as
sigma_rel, the standard deviation of that weighting over tau in units of t: 0.10 is "about the last
tenth". Pure functions in float64; t is in optimizer steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Profile:
    """The power-function average of length `sigma_rel` after optimizer step `step`, 1 or later."""

    step: int
    sigma_rel: float


@dataclass(frozen=True)
class Fit:
    """A wanted profile as a sum of given ones: a weight for each, which together are 1.

    `error`: what is left over, relative to the wanted one, both as root mean squares over the
    steps: 0 is exact, 1 is nothing of it.
    """

    weights: tuple[float, ...]
    error: float


def gamma_of(sigma_rel: float) -> float:
    """The exponent of an average of length `sigma_rel`, above 0 to 0.28 (0.289 is the plain mean).

    The largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1) / sigma_rel^2 (eq. 126).
    """
    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def sigma_rel_of(gamma: float) -> float:
    """The length of an average of exponent `gamma` (eq. 123)."""
    return float(np.sqrt(gamma + 1) / ((gamma + 2) * np.sqrt(gamma + 3)))


def decay(step: int, gamma: float) -> float:
    """Weight of the old average in the update after optimizer step `step` = 1, 2, ... (eq. 127).

    (1 - 1/t)^(gamma + 1): so step k ends with exactly the integral of the profile from k - 1 to k.
    """
    return (1.0 - 1.0 / step) ** (gamma + 1.0)


def inner_products(one: Sequence[Profile], other: Sequence[Profile]) -> np.ndarray:
    """Integrals over tau of the products of two lists of profiles: [len(one), len(other)].

    Eq. 151: with s the shorter and t the longer of two steps, of exponents a and b:
    (a + 1)(b + 1) / (a + b + 1) * (s / t)^b / t.
    """
    steps, gammas = _columns(one)
    others, exponents = _columns(other)
    steps, gammas = steps[:, None], gammas[:, None]
    later = np.where(steps < others, exponents, gammas)
    longest = np.maximum(steps, others)
    overlap = (np.minimum(steps, others) / longest) ** later
    return (gammas + 1) * (exponents + 1) / (gammas + exponents + 1) * overlap / longest


def fit(given: Sequence[Profile], wanted: Profile) -> Fit:
    """The sum of `given` profiles that comes nearest to `wanted` (algorithm 3), scaled to 1.

    A profile that is among the given is that one alone, to the bit.
    """
    if wanted in given:
        return Fit(tuple(float(each == wanted) for each in given), 0.0)
    products, targets = inner_products(given, given), inner_products(given, [wanted])[:, 0]
    # Each profile as a unit vector: they differ by the length of the run
    unit = 1 / np.sqrt(np.diag(products))
    solved = np.linalg.lstsq(products * unit[:, None] * unit, targets * unit, rcond=1e-13)[0]
    weights = solved * unit
    weights = weights / weights.sum()
    size = inner_products([wanted], [wanted])[0, 0]
    left = size - 2 * weights @ targets + weights @ products @ weights
    return Fit(tuple(weights.tolist()), float(np.sqrt(max(left, 0.0) / size)))


def _columns(profiles: Sequence[Profile]) -> tuple[np.ndarray, np.ndarray]:
    steps = np.array([each.step for each in profiles], dtype=np.float64)
    return steps, np.array([gamma_of(each.sigma_rel) for each in profiles])
