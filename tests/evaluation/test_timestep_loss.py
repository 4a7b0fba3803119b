"""Loss by band of timesteps, of models whose loss is known."""

import pytest
import torch

from ddpm.diffusion import objective, schedulers
from ddpm.evaluation.timestep_loss import loss_by_timestep, timestep_bands


class Constant(torch.nn.Module):
    """Predicts one value everywhere; keeps its inputs."""

    def __init__(self, value: float = 0.0):
        super().__init__()
        self.value, self.inputs, self.device = value, [], torch.device("cpu")

    def forward(self, noisy, timesteps):
        self.inputs.append((noisy, timesteps))
        self.sample = torch.full_like(noisy, self.value)
        return self


class Identity(Constant):
    """Predicts its input."""

    def forward(self, noisy, timesteps):
        super().forward(noisy, timesteps)
        self.sample = noisy
        return self


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def ddim(chain, prediction_type: str) -> schedulers.SamplingScheduler:
    config = {**chain.config, "prediction_type": prediction_type}
    return schedulers.build_sampling_scheduler("ddim", config, 2)


def test_bands_cover_all_timesteps_once():
    assert timestep_bands(1000)[0] == (0, 99) and timestep_bands(1000)[-1] == (900, 999)
    for length in (3, 10, 77, 1000):
        covered = [t for first, last in timestep_bands(length) for t in range(first, last + 1)]
        assert covered == list(range(length))


def test_each_band_has_timesteps_of_its_own(chain, images):
    unet, scheduler = Constant(), ddim(chain, "epsilon")
    losses = loss_by_timestep(unet, scheduler, images, range(64))
    bands = timestep_bands(len(scheduler.alphas_cumprod))
    assert losses.shape == (64, len(bands))
    for (_, timesteps), (first, last) in zip(unet.inputs, bands, strict=True):
        assert first <= int(timesteps.min()) and int(timesteps.max()) <= last
        assert len(set(timesteps.tolist())) > 1


def test_the_loss_of_predicting_zero_is_the_square_of_the_target(chain, images):
    """For noise its variance, for images exactly their mean square."""
    noise = loss_by_timestep(Constant(), ddim(chain, "epsilon"), images, range(64))
    assert noise.mean(0).tolist() == pytest.approx([1.0] * noise.shape[1], abs=0.1)
    original = loss_by_timestep(Constant(), ddim(chain, "sample"), images, range(64))
    expected = images.square().flatten(1).mean(1)
    torch.testing.assert_close(original, expected[:, None].expand_as(original))


def test_noisy_images_follow_the_noise_schedule(chain, images):
    """A model that predicts its input has the loss of the formula, computed here again."""
    unet, scheduler = Identity(), ddim(chain, "sample")
    losses = loss_by_timestep(unet, scheduler, images, range(64))
    for band, (noisy, timesteps) in enumerate(unet.inputs):
        alpha = scheduler.alphas_cumprod[timesteps]
        noise = noisy - alpha.sqrt()[:, None, None, None] * images
        deviations = noise.flatten(1).std(1) / (1 - alpha).sqrt()
        assert float(deviations.mean()) == pytest.approx(1, abs=0.05)
        expected = (noisy - images).square().flatten(1).mean(1)
        torch.testing.assert_close(losses[:, band], expected)
    assert objective.compute_snr(scheduler.alphas_cumprod, unet.inputs[0][1]).mean() > 1


def test_the_loss_of_an_image_depends_on_its_row_alone(chain, images):
    scheduler = ddim(chain, "epsilon")
    all_losses = loss_by_timestep(Constant(0.5), scheduler, images, range(64))
    few = loss_by_timestep(Constant(0.5), scheduler, images[40:43], [40, 41, 42])
    torch.testing.assert_close(few, all_losses[40:43])
    other = loss_by_timestep(Constant(0.5), scheduler, images[40:43], [1, 2, 3])
    assert not torch.equal(few, other)
