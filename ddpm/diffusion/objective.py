"""Noise, prediction targets, loss weights and loss: pure functions on float32 tensors.

Shapes: B batch, C channels, R resolution, T training timesteps.
`images`, `noise`, `noisy`, `prediction`: [B, C, R, R] float32; images in [-1, 1].
`timesteps`: [B] int64 in [0, T). `alphas_cumprod`: [T] float32, abar of the DDPM paper.

References: DDPM (Ho et al. 2020, arXiv 2006.11239), progressive distillation (Salimans and Ho 2022,
arXiv 2202.00512), Min-SNR (Hang et al. 2023, arXiv 2303.09556).
"""

from typing import Literal

import torch
import torch.nn.functional as F

PredictionType = Literal["epsilon", "v_prediction", "sample"]


def sample_noise_and_timesteps(
    shape: torch.Size,
    alphas_cumprod: torch.Tensor,
    generator: torch.Generator,
    logit_normal: tuple[float, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return standard normal noise of `shape` and a timestep for each image, uniform by default.

    With `logit_normal`, a mean and a standard deviation, the logarithm of the noise level
    sqrt((1 - abar) / abar) is normal instead (arXiv 2206.00364, table 1, there of the sigma of
    images that are not scaled): the timestep is the first of at least that level, or the last.
    """
    device, num_timesteps = alphas_cumprod.device, len(alphas_cumprod)
    noise = torch.randn(shape, generator=generator, device=device)
    if logit_normal is None:
        return noise, torch.randint(num_timesteps, shape[:1], generator=generator, device=device)
    mean, std = logit_normal
    wanted = mean + std * torch.randn(shape[:1], generator=generator, device=device)
    log_levels = -0.5 * alphas_cumprod.logit()
    return noise, torch.searchsorted(log_levels, wanted).clamp_(max=num_timesteps - 1)


def add_noise(
    alphas_cumprod: torch.Tensor, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Return x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (DDPM eq. 4).

    The factors are computed in the dtype of `alphas_cumprod`, the sum in that of `images`.
    """
    signal, sigma = _signal_and_sigma(alphas_cumprod, timesteps, images)
    return signal * images + sigma * noise


def prediction_target(
    prediction_type: PredictionType,
    alphas_cumprod: torch.Tensor,
    images: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """Return what the UNet should predict: noise (DDPM eq. 14), x_0, or velocity.

    Velocity is v = sqrt(abar) noise - sqrt(1 - abar) x_0 (arXiv 2202.00512, section 4).
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return images
    signal, sigma = _signal_and_sigma(alphas_cumprod, timesteps, images)
    return signal * noise - sigma * images


def predict_original(
    prediction_type: PredictionType,
    prediction: torch.Tensor,
    noisy: torch.Tensor,
    signal: float,
    sigma: float,
) -> torch.Tensor:
    """Return the x_0 that a prediction for x_t = `noisy` stands for: the inverse of the target.

    `signal` is sqrt(abar_t), `sigma` is sqrt(1 - abar_t).
    """
    if prediction_type == "epsilon":
        return (noisy - sigma * prediction) / signal  # DDPM eq. 4, solved for x_0
    if prediction_type == "v_prediction":
        return signal * noisy - sigma * prediction  # arXiv 2202.00512, section 4
    return prediction


def compute_snr(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Return the signal-to-noise ratio abar_t / (1 - abar_t): [B] float32, from large down to 0."""
    alpha = alphas_cumprod[timesteps]
    return alpha / (1.0 - alpha)


def min_snr_weights(
    prediction_type: PredictionType,
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    snr_gamma: float | None,
) -> torch.Tensor | None:
    """Return Min-SNR-gamma weights, [B] float32 (arXiv 2303.09556, section 3.4).

    None if `snr_gamma` is None.

    The loss on x_0 is weighted by min(SNR, gamma). For the squared error of the prediction this is
    min(SNR, gamma) / SNR with epsilon and min(SNR, gamma) / (SNR + 1) with velocity.
    """
    if snr_gamma is None:
        return None
    snr = compute_snr(alphas_cumprod, timesteps)
    clipped = snr.clamp(max=snr_gamma)
    if prediction_type == "sample":
        return clipped
    if prediction_type == "epsilon":
        # A schedule with zero terminal SNR ends at SNR 0, where the limit of the weight is 1.
        return torch.where(snr > 0, clipped / snr.clamp(min=1e-20), 1.0)
    return clipped / (snr + 1.0)


def diffusion_loss(
    prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Return the batch mean of each image's weighted mean squared error: a float32 scalar.

    Without weights this is L_simple (DDPM eq. 14).
    """
    errors = F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)
    return errors.mean() if weights is None else (weights * errors).mean()


def _signal_and_sigma(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sqrt(abar_t) and sqrt(1 - abar_t), each [B, 1, 1, 1] for products with `images`."""
    alpha = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt().to(images), (1.0 - alpha).sqrt().to(images)
