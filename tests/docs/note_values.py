"""The functions that comments in the notes may call, besides `math` and `torch`.

`test_notes.py` evaluates the comments: `0.33<!-- = mean_weight("squaredcos_cap_v2") -->`.
"""

import functools
import math
import re

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.models.attention_processor import Attention

from ddpm.config.data import DataConfig
from ddpm.config.train import DiffusionConfig, EMAConfig, ModelConfig
from ddpm.data import dataset, transforms
from ddpm.diffusion import ema, objective, unet
from ddpm.diffusion.power_ema import gamma_to_sigma_rel  # noqa: F401 - for the comments
from tests.conftest import ROOT

DOCS = ROOT / "docs"


def abar(schedule: str, t: int) -> float:
    return float(scheduler_of(schedule).alphas_cumprod[t])


def beta(schedule: str, t: int) -> float:
    return float(scheduler_of(schedule).betas[t])


def posterior(schedule: str, t: int) -> tuple[float, float, float]:
    """Return the weights of x_t and x_0 in the posterior mean, and its variance: DDPM eq. 6, 7."""
    now, before, noise = abar(schedule, t), abar(schedule, t - 1), beta(schedule, t)
    return (
        math.sqrt(1 - noise) * (1 - before) / (1 - now),
        math.sqrt(before) * noise / (1 - now),
        (1 - before) / (1 - now) * noise,
    )


def drawn_below(schedule: str, deviations: float) -> int:
    """The timestep of the default logit-normal, so many standard deviations above its mean."""
    config, levels = DiffusionConfig(), -0.5 * scheduler_of(schedule).alphas_cumprod.logit()
    wanted = config.logit_mean + deviations * config.logit_std
    return int(torch.searchsorted(levels, torch.tensor(wanted)))


def below_one(schedule: str, ratio: float = 1.0) -> int:
    """Return the first step with an SNR below `ratio`."""
    snr = objective.compute_snr(scheduler_of(schedule).alphas_cumprod, torch.arange(1000))
    return int((snr >= ratio).sum())


def weight(prediction_type: str, alpha: float) -> float:
    alphas, timesteps = torch.tensor([alpha]), torch.tensor([0])
    return float(objective.min_snr_weights(prediction_type, alphas, timesteps, 5.0))


def decay(step: int) -> float:
    return ema.EMA(torch.nn.Linear(1, 1), EMAConfig()).decay(step)


def pixel(what: str) -> float:
    """Return a value of the worked example: alpha-bar 0.64, a pixel of 0.5, noise of -1."""
    alphas, t = torch.tensor([0.64]), torch.tensor([0])
    image, noise = torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), -1.0)
    if what == "noisy":
        return float(objective.add_noise(alphas, image, noise, t))
    return float(objective.prediction_target("v_prediction", alphas, image, noise, t))


@functools.cache
def digits() -> torch.Tensor:
    """Return the training digits, [N, 1, 8, 8] in [-1, 1]."""
    config = DataConfig(dataset_name=str(ROOT / "data" / "digits"), resolution=8)
    images = dataset.load_images(config, show_progress=False)
    return transforms.to_model(torch.stack([images.pixels(row) for row in range(len(images))]))


def digit_moments() -> tuple[float, float]:
    """Return mean and variance of all values of the training digits."""
    return float(digits().mean()), float(digits().var())


def bound_factor(schedule: str, t: int) -> float:
    """Return the factor of the noise error in the bound, with sigma^2 = beta: DDPM eq. 12."""
    return beta(schedule, t) / (2 * (1 - beta(schedule, t)) * (1 - abar(schedule, t)))


def rounds_to_one(schedule: str) -> int:
    """Return the number of timesteps whose alpha-bar is 1 in bfloat16."""
    return int((scheduler_of(schedule).alphas_cumprod.bfloat16() == 1).sum())


def mean_weight(schedule: str) -> float:
    """Return the mean Min-SNR weight of velocity over all timesteps, with gamma = 5."""
    alphas, timesteps = scheduler_of(schedule).alphas_cumprod, torch.arange(1000)
    return float(objective.min_snr_weights("v_prediction", alphas, timesteps, 5.0).mean())


def cell(row: str, column: int) -> float:
    """Return the number at the start of a cell of docs/evaluation.md, in the row that `row` begins.

    Columns count from 0, which has the name of the row.
    """
    text = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    [line] = re.findall(rf"^\| {re.escape(row)} \|.*$", text, re.M)
    return float(re.match(r"-?[\d.]+", line.split("|")[column + 1].strip())[0])


def training_loop() -> str:
    """Return the code of section 12."""
    return re.search(
        r"```python\n([^`]+for step in range\(steps\).+?)```",
        (DOCS / "diffusion.md").read_text(encoding="utf-8"),
        re.S,
    )[1]


def training_loop_lines() -> int:
    return len(training_loop().splitlines())


def ddim_step(now: float, following: float, noisy: float, noise: float) -> float:
    """Return x_{t-1} of a DDIM step with eta = 0 from alpha-bar `now` to `following`."""
    chain = _two_steps(now, following)
    return float(chain.step(torch.tensor(noise), 1, torch.tensor(noisy)).prev_sample)


def ddim_sigma(now: float, following: float) -> float:
    """Return sigma_t of that step with eta = 1."""
    return float(_two_steps(now, following)._get_variance(1, 0).sqrt())


def _two_steps(now: float, following: float) -> DDIMScheduler:
    betas = [1 - following, 1 - now / following]
    chain = DDIMScheduler(2, trained_betas=betas, clip_sample=False)
    chain.set_timesteps(2)
    return chain


def divergence(mean: float, variance: float, other_mean: float, other_variance: float) -> float:
    """Return the Kullback-Leibler divergence of two normal distributions of one number."""
    first = torch.distributions.Normal(mean, math.sqrt(variance))
    other = torch.distributions.Normal(other_mean, math.sqrt(other_variance))
    return float(torch.distributions.kl_divergence(first, other))


def attention_weights() -> list[float]:
    """Return how much the query (1, 0) attends to the keys (1, 0) and (0, 1)."""
    attention = Attention(query_dim=2, heads=1, dim_head=2)
    return attention.get_attention_scores(torch.eye(2)[None, :1], torch.eye(2)[None])[0, 0].tolist()


@functools.cache
def preset_unet(resolution: int) -> UNet2DModel:
    """Return the UNet of a preset for color images, without memory for its weights."""
    return unet.empty_unet(unet.preset_config(resolution, 3), "preset")


def unet_parameters(resolution: int) -> int:
    return preset_unet(resolution).num_parameters()


def time_embedding_size() -> int:
    return preset_unet(32).time_embedding.linear_2.out_features


def first_up_channels() -> int:
    return preset_unet(32).up_blocks[0].resnets[0].in_channels


def digit_parameters() -> int:
    return unet.build_unet(ModelConfig(), resolution=8, channels=1).num_parameters()


def scheduler_of(schedule: str) -> DDPMScheduler:
    return unet.build_scheduler(DiffusionConfig(ddpm_beta_schedule=schedule))


def guess(
    prediction_type: objective.PredictionType, alpha: float, noisy: float, said: float
) -> float:
    """Return the x_0 that a network means by `said` at alpha-bar `alpha`."""
    prediction, sample = torch.tensor(said), torch.tensor(noisy)
    signal, sigma = math.sqrt(alpha), math.sqrt(1 - alpha)
    return float(objective.predict_original(prediction_type, prediction, sample, signal, sigma))


# docs/score-and-flow.md: pictures of one pixel, -1 or 1


def two_points_density(noisy: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the joint densities of x_t and of each of the two pictures, 1 and -1."""
    above, below = (
        torch.distributions.Normal(sign * math.sqrt(alpha), math.sqrt(1 - alpha))
        .log_prob(noisy)
        .exp()
        for sign in (1, -1)
    )
    return above / 2, below / 2


def two_points_guess(noisy: float, alpha: float) -> float:
    """Return E[x_0 | x_t] by Bayes' rule."""
    above, below = two_points_density(torch.tensor(noisy, dtype=torch.float64), alpha)
    return float((above - below) / (above + below))


def two_points_noise(noisy: float, alpha: float) -> float:
    return (noisy - math.sqrt(alpha) * two_points_guess(noisy, alpha)) / math.sqrt(1 - alpha)


def two_points_score(noisy: float | torch.Tensor, alpha: float) -> float | torch.Tensor:
    """Return the gradient of log q(x_t), in the form of `noisy`."""
    places = torch.as_tensor(noisy, dtype=torch.float64).detach().requires_grad_()
    density = sum(two_points_density(places, alpha)).log().sum()
    [score] = torch.autograd.grad(density, places)
    return score if isinstance(noisy, torch.Tensor) else float(score)


def two_points_valley(alpha: float) -> float:
    """Return the density half-way between the points, as a fraction of that at a point."""
    places = torch.tensor([0.0, math.sqrt(alpha)], dtype=torch.float64)
    middle, point = sum(two_points_density(places, alpha))
    return float(middle / point)


def langevin(
    x: float | torch.Tensor, alpha: float, delta: float, z: float | torch.Tensor
) -> float | torch.Tensor:
    """Return one step of Langevin dynamics on the two points: Song and Ermon 2019, eq. 4."""
    return x + delta / 2 * two_points_score(x, alpha) + math.sqrt(delta) * z


def ode_of_normal(start: float, variance: float, alpha: float, steps: int = 5000) -> float:
    """Walk from x_0 to x_t by Euler steps d(x / sqrt(abar)) = noise d(sigma), for normal data."""
    place, end = start, math.sqrt((1 - alpha) / alpha)
    for step in range(steps):
        sigma = end * (step + 0.5) / steps
        place += end / steps * sigma * place / (variance + sigma**2)
    return place * math.sqrt(alpha)


def flow_point(clean: float, noise: float, position: float) -> float:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[position])
    mixed = scheduler.scale_noise(
        torch.tensor([clean]), scheduler.timesteps[:1], torch.tensor([noise])
    )
    return float(mixed)


def edm_skip_out_in(sigma: float, sigma_data: float) -> tuple[float, float, float]:
    scheduler = EDMEulerScheduler(sigma_data=sigma_data)
    one, zero, level = torch.ones(()), torch.zeros(()), torch.tensor(sigma)
    skip, out = (
        scheduler.precondition_outputs(*pair, level) for pair in ((one, zero), (zero, one))
    )
    return float(skip), float(out), float(scheduler.precondition_inputs(one, level))


def edm_level(index: int, steps: int) -> float:
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0)
    scheduler.set_timesteps(steps)
    return float(scheduler.sigmas[index])
