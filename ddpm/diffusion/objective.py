"""What is predicted and how its error is weighted: pure functions on float32 tensors.

Legend: B batch, C channels, R resolution, T length of the chain.
`images`, `noise`, `noisy`, `prediction`: [B, C, R, R] float32; images in [-1, 1].
`timesteps`: [B] int64 in [0, T). `alphas_cumprod`: [T] float32, alpha-bar of the DDPM paper.

References: DDPM (Ho et al. 2020, arXiv 2006.11239), progressive distillation (Salimans and Ho 2022,
arXiv 2202.00512), Min-SNR (Hang et al. 2023, arXiv 2303.09556).
"""

from typing import Literal

import torch
import torch.nn.functional as F

PredictionType = Literal["epsilon", "v_prediction", "sample"]


def sample_noise_and_timesteps(
    shape: torch.Size, num_timesteps: int, generator: torch.Generator, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal noise of `shape`, a uniform timestep for each image: (noise, timesteps)."""
    noise = torch.randn(shape, generator=generator, device=device)
    timesteps = torch.randint(num_timesteps, shape[:1], generator=generator, device=device)
    return noise, timesteps


def add_noise(
    alphas_cumprod: torch.Tensor, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """x_t = sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) noise: the closed form, DDPM eq. 4."""
    signal, sigma = _signal_and_sigma(alphas_cumprod, timesteps)
    return signal * images + sigma * noise


def prediction_target(
    prediction_type: PredictionType,
    alphas_cumprod: torch.Tensor,
    images: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
) -> torch.Tensor:
    """What the UNet should have said: noise (DDPM eq. 14), x_0, or velocity.

    Velocity is v = sqrt(alpha-bar) noise - sqrt(1 - alpha-bar) x_0 (arXiv 2202.00512, section 4).
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return images
    signal, sigma = _signal_and_sigma(alphas_cumprod, timesteps)
    return signal * noise - sigma * images


def compute_snr(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Signal-to-noise ratio alpha-bar_t / (1 - alpha-bar_t): [B] float32, from large down to 0."""
    alpha = alphas_cumprod[timesteps]
    return alpha / (1.0 - alpha)


def min_snr_weights(
    prediction_type: PredictionType,
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    snr_gamma: float | None,
) -> torch.Tensor | None:
    """Min-SNR-gamma weights, [B] float32 (arXiv 2303.09556, section 3.4); None without a gamma.

    The loss on x_0 is weighted by min(SNR, gamma). In terms of the squared error of what is
    predicted that is min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for velocity.
    """
    if snr_gamma is None:
        return None
    ratio = compute_snr(alphas_cumprod, timesteps)
    clipped = ratio.clamp(max=snr_gamma)
    if prediction_type == "sample":
        return clipped
    if prediction_type == "epsilon":
        # SNR is 0 at the end of a chain of zero terminal SNR; the limit of the weight is 1.
        return torch.where(ratio > 0, clipped / ratio.clamp(min=1e-20), 1.0)
    return clipped / (ratio + 1.0)


def diffusion_loss(
    prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Mean over the batch of the weighted mean squared error of each image: a float32 scalar.

    Without weights this is L_simple, DDPM eq. 14.
    """
    errors = F.mse_loss(prediction.float(), target, reduction="none").flatten(1).mean(1)
    return errors.mean() if weights is None else (weights * errors).mean()


def _signal_and_sigma(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(alpha-bar_t) and sqrt(1 - alpha-bar_t), each [B, 1, 1, 1]."""
    alpha = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt(), (1.0 - alpha).sqrt()
