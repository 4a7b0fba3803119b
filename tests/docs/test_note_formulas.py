"""The formulas of the notes that no function of this repository computes, against diffusers, torch
and cases whose answer is known."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from ddpm.diffusion import objective
from tests.docs.note_values import (
    abar,
    beta,
    divergence,
    edm_skip_out_in,
    guess,
    langevin,
    ode_of_normal,
    posterior,
    scheduler_of,
    two_points_guess,
    two_points_noise,
    two_points_score,
)

# docs/diffusion.md


def ddpm_step(clip: bool, noise_error: float) -> tuple[float, float, float]:
    """Return x_t, the guess of x_0 and the mean of x_{t-1} of DDPMScheduler.step at t = 500.

    x_0 is 0.5 and the noise -1; the prediction is the noise plus `noise_error`.
    """
    chain, t = DDPMScheduler.from_config(scheduler_of("linear").config, clip_sample=clip), 500
    clean, noise = torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), -1.0)
    noisy = objective.add_noise(chain.alphas_cumprod, clean, noise, torch.tensor([t]))
    chain.set_timesteps(1000)
    generator = torch.Generator().manual_seed(0)
    step = chain.step(noise + noise_error, t, noisy, generator=generator)
    fresh = torch.randn(1, 1, 1, 1, generator=generator.manual_seed(0))
    mean = step.prev_sample - math.sqrt(posterior("linear", t)[2]) * fresh
    return float(noisy), float(step.pred_original_sample), float(mean)


@pytest.mark.parametrize(("clip", "noise_error"), [(False, -0.5), (True, -0.5), (True, 0.0)])
def test_ddpm_scheduler_step_has_the_mean_of_the_guess(clip, noise_error):
    """Its mean is eq. 7 with the clipped guess; where nothing is clipped it is eq. 11."""
    noisy, guess, mean = ddpm_step(clip, noise_error)
    of_noisy, of_clean, _ = posterior("linear", 500)
    now, noise = abar("linear", 500), -1 + noise_error
    unclipped = (noisy - math.sqrt(1 - now) * noise) / math.sqrt(now)
    was_clipped = clip and noise_error != 0
    assert (unclipped > 1) == (noise_error != 0)
    assert guess == pytest.approx(1.0 if was_clipped else unclipped, abs=1e-5)
    assert mean == pytest.approx(of_noisy * noisy + of_clean * guess, abs=1e-5)
    step = beta("linear", 500)
    of_noise = (noisy - step / math.sqrt(1 - now) * noise) / math.sqrt(1 - step)  # eq. 11
    assert (abs(mean - of_noise) < 1e-5) == (not was_clipped)


def test_divergence_of_two_normal_distributions():
    """Step 4: distance^2 / (2 sigma^2) with equal variances, and a number C more with others."""
    _, _, variance = posterior("linear", 500)
    step = beta("linear", 500)
    for mean in (0.3, 0.5, -1.0):
        distance = (mean - 0.3) ** 2
        assert divergence(mean, variance, 0.3, variance) == pytest.approx(distance / (2 * variance))
        constant = divergence(0.3, variance, 0.3, step)
        assert divergence(mean, variance, 0.3, step) - constant == pytest.approx(
            distance / (2 * step)
        )
    assert constant > 0


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_mixture(eta):
    """Section 7: with the true noise, x_{t-1} has the distribution q(x_{t-1} | x_0) for any eta."""
    chain = DDIMScheduler.from_config(scheduler_of("linear").config, clip_sample=False)
    chain.set_timesteps(50)
    now, following = int(chain.timesteps[20]), int(chain.timesteps[21])
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.full((1, 100_000), 0.5), torch.randn(1, 100_000, generator=generator)
    noisy = abar("linear", now) ** 0.5 * clean + (1 - abar("linear", now)) ** 0.5 * noise
    stepped = chain.step(noise, now, noisy, eta=eta, generator=generator).prev_sample
    mixture = abar("linear", following)
    assert float(stepped.mean()) == pytest.approx(0.5 * math.sqrt(mixture), abs=0.01)
    assert float(stepped.var()) == pytest.approx(1 - mixture, rel=0.01)


@pytest.mark.parametrize(("t", "is_random"), [(500, True), (1, True), (0, False)])
def test_no_noise_is_added_at_the_last_step(t, is_random):
    """Section 7: DDPMScheduler.step draws no z at t = 0."""
    chain = scheduler_of("linear")
    chain.set_timesteps(1000)
    noisy, noise = torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    first, second = (
        chain.step(noise, t, noisy, generator=torch.Generator().manual_seed(seed)).prev_sample
        for seed in (1, 2)
    )
    assert torch.equal(first, second) != is_random


def test_a_ddim_step_is_an_euler_step():
    """Section 7: with eta 0, x / sqrt(alpha-bar) changes by (sigma' - sigma) times the noise."""
    chain = DDIMScheduler.from_config(scheduler_of("linear").config, clip_sample=False)
    chain.set_timesteps(50)
    now, following = int(chain.timesteps[20]), int(chain.timesteps[21])
    noisy, noise = torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    stepped = chain.step(noise, now, noisy).prev_sample

    def level(t: int) -> tuple[float, float]:
        return abar("linear", t) ** 0.5, (1 / abar("linear", t) - 1) ** 0.5

    (signal, sigma), (next_signal, next_sigma) = level(now), level(following)
    expected = noisy / signal + (next_sigma - sigma) * noise
    torch.testing.assert_close(stepped / next_signal, expected, rtol=1e-4, atol=1e-5)


# docs/score-and-flow.md


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("noisy", [-1.5, 0.0, 0.3, 2.0])
def test_two_points_have_the_formulas_of_sections_1_and_2(alpha, noisy):
    """Bayes' rule gives the tanh, noise is the score in other units, Tweedie's formula."""
    clean = math.tanh(math.sqrt(alpha) * noisy / (1 - alpha))
    assert two_points_guess(noisy, alpha) == pytest.approx(clean, abs=1e-6)
    score = two_points_score(noisy, alpha)
    assert two_points_noise(noisy, alpha) == pytest.approx(-math.sqrt(1 - alpha) * score, abs=1e-5)
    assert (noisy + (1 - alpha) * score) / math.sqrt(alpha) == pytest.approx(clean, abs=1e-5)


def test_a_step_back_is_a_step_along_the_score():
    """Section 2: DDPMScheduler.step has the mean (x_t + beta_t score) / sqrt(alpha_t)."""
    scheduler, t, noisy = (
        DDPMScheduler.from_config(scheduler_of("linear").config, clip_sample=False),
        500,
        0.3,
    )
    scheduler.set_timesteps(1000)
    alpha, step = abar("linear", t), beta("linear", t)
    mean = (noisy + step * two_points_score(noisy, alpha)) / math.sqrt(1 - step)
    sample, noise = (torch.full((1, 1, 1, 1), x) for x in (noisy, two_points_noise(noisy, alpha)))
    stepped = scheduler.step(
        noise, t, sample, generator=torch.Generator().manual_seed(0)
    ).prev_sample
    fresh = torch.randn(1, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    assert float(stepped - math.sqrt(posterior("linear", t)[2]) * fresh) == pytest.approx(
        mean, abs=1e-5
    )


def test_langevin_dynamics_reaches_the_distribution():
    """Section 3: walks of many small steps have the moments of the two points at alpha-bar 0.5."""
    generator = torch.Generator().manual_seed(0)
    places = torch.full((5_000,), 3.0)
    for _ in range(150):
        places = langevin(places, 0.5, 0.1, torch.randn(5_000, generator=generator))
    assert float(places.mean()) == pytest.approx(0.0, abs=0.06)
    assert float(places.var()) == pytest.approx(1.0, abs=0.06)
    assert float((places**4).mean()) == pytest.approx(0.25 + 6 * 0.25 + 3 * 0.25, abs=0.2)


@pytest.mark.parametrize("is_sde", [True, False], ids=["SDE", "ODE"])
def test_reverse_sde_and_ode_lead_from_noise_to_the_two_points(is_sde):
    """Section 4: small steps of either, with beta from 0.1 to 20, have the moments at u = 0.02."""
    generator, start, end, steps = torch.Generator().manual_seed(0), 1.0, 0.02, 200
    places = torch.randn(2_000, generator=generator, dtype=torch.float64)
    for step in range(steps):
        u = start + (end - start) * step / steps
        rate, alpha = 0.1 + 19.9 * u, math.exp(-0.1 * u - 19.9 * u**2 / 2)
        score = two_points_score(places, alpha)
        du = (end - start) / steps
        drift = -rate * (places / 2 + score * (1 if is_sde else 0.5))
        noise = torch.randn(2_000, generator=generator, dtype=torch.float64)
        places = places + drift * du + is_sde * math.sqrt(rate * -du) * noise
    alpha = math.exp(-0.1 * end - 19.9 * end**2 / 2)
    assert float(places.mean()) == pytest.approx(0.0, abs=0.1)
    assert float(places.var()) == pytest.approx(1.0, abs=0.03)
    fourth = alpha**2 + 6 * alpha * (1 - alpha) + 3 * (1 - alpha) ** 2
    assert float((places**4).mean()) == pytest.approx(fourth, abs=0.05)


def test_the_ode_keeps_the_number_of_standard_deviations():
    """Section 4: small steps of DDIM on normal data of variance 4 end where the answer says."""
    for start in (3.0, -0.5):
        expected = start / 2 * math.sqrt(0.25 * 4 + 0.75)
        assert ode_of_normal(start, 4.0, 0.25) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("position", [0.2, 0.5, 0.9])
def test_flow_matching_is_a_change_of_coordinates(position):
    """Section 5: its step mixes both guesses anew, and x_s is x_t with a factor."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    index = int((scheduler.sigmas - position).abs().argmin())
    now, following = float(scheduler.sigmas[index]), float(scheduler.sigmas[index + 1])
    clean, noise = torch.tensor([0.5, -1.0]), torch.tensor([-1.0, 2.0])
    mixed = scheduler.scale_noise(clean, scheduler.timesteps[index : index + 1], noise)
    torch.testing.assert_close(mixed, (1 - now) * clean + now * noise)
    torch.testing.assert_close(noise - clean, (noise - mixed) / (1 - now))
    stepped = scheduler.step(noise - clean, scheduler.timesteps[index], mixed).prev_sample
    torch.testing.assert_close(stepped, (1 - following) * clean + following * noise)
    length = math.hypot(1 - now, now)
    alpha = torch.tensor([((1 - now) / length) ** 2]).expand(2)
    noisy = objective.add_noise(
        alpha, *(x.view(2, 1, 1, 1) for x in (clean, noise)), torch.tensor([0, 1])
    )
    torch.testing.assert_close(noisy.flatten(), mixed / length)
    shares = math.sqrt(alpha[0]) + math.sqrt(1 - alpha[0])
    torch.testing.assert_close(noisy.flatten() / shares, mixed)


@pytest.mark.parametrize("sigma", [0.01, 0.8, 50.0])
def test_edm_preconditioning_has_variance_1_and_the_smallest_factor(sigma):
    """Section 6: input and target have variance 1, and no other c_skip has a smaller c_out."""
    skip, out, scale = edm_skip_out_in(sigma, 0.5)
    assert scale**2 * (0.25 + sigma**2) == pytest.approx(1, rel=1e-5)
    for other in (skip, skip - 0.01, skip + 0.01):
        factor = math.sqrt((1 - other) ** 2 * 0.25 + other**2 * sigma**2)
        assert (factor == pytest.approx(out, rel=1e-4)) if other == skip else factor > out


@pytest.mark.parametrize("alpha", [0.1, 0.36, 0.9])
def test_velocity_is_edm_with_variance_1(alpha):
    """Section 6: F is -v, and the network sees x_t."""
    noisy, velocity, sigma = -0.2, 0.7, math.sqrt((1 - alpha) / alpha)
    skip, out, scale = edm_skip_out_in(sigma, 1.0)
    x = noisy / math.sqrt(alpha)
    assert scale * x == pytest.approx(noisy, abs=1e-6)
    assert skip * x - out * velocity == pytest.approx(
        guess("v_prediction", alpha, noisy, velocity), abs=1e-5
    )


def test_edm_levels_are_those_of_diffusers():
    """Section 6, the formula of the noise levels."""
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0)
    scheduler.set_timesteps(18)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    expected = [(high + i / 17 * (low - high)) ** 7 for i in range(18)]
    torch.testing.assert_close(scheduler.sigmas[:18], torch.tensor(expected), rtol=1e-4, atol=1e-6)
