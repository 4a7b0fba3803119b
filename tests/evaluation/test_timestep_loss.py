"""Loss by noise level, against models whose loss is known."""

import pytest
import torch

from ddpm.diffusion import objective, schedulers
from ddpm.evaluation import timestep_loss


class Constant(torch.nn.Module):
    """Predicts one value everywhere; notes which timesteps it was asked for."""

    def __init__(self, value: float = 0.0):
        super().__init__()
        self.value, self.asked, self.device = value, [], torch.device("cpu")

    def forward(self, noisy, timesteps):
        self.asked.append((noisy, timesteps))
        self.sample = torch.full_like(noisy, self.value)
        return self


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def sampler_for(chain, prediction_type: str) -> schedulers.SamplingScheduler:
    config = {**chain.config, "prediction_type": prediction_type}
    return schedulers.build_sampling_scheduler("ddim", config, 2)


def test_bands_cover_the_chain_once():
    assert timestep_loss.timestep_bands(1000)[0] == (0, 99) and timestep_loss.timestep_bands(1000)[
        -1
    ] == (900, 999)
    for length in (3, 10, 77, 1000):
        covered = [
            t
            for first, last in timestep_loss.timestep_bands(length)
            for t in range(first, last + 1)
        ]
        assert covered == list(range(length))


def test_each_band_asks_for_its_own_timesteps(chain, images):
    unet, sampler = Constant(), sampler_for(chain, "epsilon")
    found = timestep_loss.loss_by_timestep(unet, sampler, images, range(64))
    limits = timestep_loss.timestep_bands(len(sampler.alphas_cumprod))
    assert found.shape == (64, len(limits))
    for (_, timesteps), (first, last) in zip(unet.asked, limits, strict=True):
        assert first <= int(timesteps.min()) and int(timesteps.max()) <= last
        assert len(set(timesteps.tolist())) > 1


def test_loss_of_a_model_that_says_nothing(chain, images):
    """Of noise it is the noise's variance, of the image that of the image, exactly its square."""
    noise = timestep_loss.loss_by_timestep(
        Constant(), sampler_for(chain, "epsilon"), images, range(64)
    )
    assert noise.mean(0).tolist() == pytest.approx([1.0] * noise.shape[1], abs=0.1)
    picture = timestep_loss.loss_by_timestep(
        Constant(), sampler_for(chain, "sample"), images, range(64)
    )
    expected = images.square().flatten(1).mean(1)
    torch.testing.assert_close(picture, expected[:, None].expand_as(picture))


def test_noisy_images_are_those_of_the_chain(chain, images):
    """A model that gives back its input has the loss of the formula, worked out here once more."""

    class Echo(Constant):
        def forward(self, noisy, timesteps):
            super().forward(noisy, timesteps)
            self.sample = noisy
            return self

    unet, sampler = Echo(), sampler_for(chain, "sample")
    found = timestep_loss.loss_by_timestep(unet, sampler, images, range(64))
    for band, (noisy, timesteps) in enumerate(unet.asked):
        alpha = sampler.alphas_cumprod[timesteps]
        signal = noisy - alpha.sqrt()[:, None, None, None] * images
        deviations = signal.flatten(1).std(1) / (1 - alpha).sqrt()
        assert float(deviations.mean()) == pytest.approx(1, abs=0.05)
        expected = (noisy - images).square().flatten(1).mean(1)
        torch.testing.assert_close(found[:, band], expected)
    assert objective.compute_snr(sampler.alphas_cumprod, unet.asked[0][1]).mean() > 1


def test_loss_of_an_image_depends_on_its_number_alone(chain, images):
    sampler = sampler_for(chain, "epsilon")
    whole = timestep_loss.loss_by_timestep(Constant(0.5), sampler, images, range(64))
    few = timestep_loss.loss_by_timestep(Constant(0.5), sampler, images[40:43], [40, 41, 42])
    torch.testing.assert_close(few, whole[40:43])
    other = timestep_loss.loss_by_timestep(Constant(0.5), sampler, images[40:43], [1, 2, 3])
    assert not torch.equal(few, other)
