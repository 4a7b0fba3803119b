"""Restoring and inpainting an image: how much noise is added, what is changed, what is kept."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm.data.transforms import to_model, to_pixels
from ddpm.diffusion import schedulers
from ddpm.errors import UsageError
from ddpm.sampling import inpaint

ORIGINAL = torch.arange(2, 256, 4, dtype=torch.uint8)[:64].view(1, 8, 8)
NEGATIVE = 255 - ORIGINAL


class PerfectModel:
    """A model that predicts x_0 = ORIGINAL from anything and records its inputs."""

    config = SimpleNamespace(num_class_embeds=None, in_channels=1, sample_size=8)
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        self.timesteps: list[int] = []
        self.inputs: list[torch.Tensor] = []

    def __call__(self, images, timestep):
        self.timesteps.append(int(timestep))
        self.inputs.append(images)
        return SimpleNamespace(sample=to_model(ORIGINAL).expand_as(images).clone())


def build(name="ddim", steps=50):
    config = DDPMScheduler(1000, prediction_type="sample").config
    return schedulers.build_sampling_scheduler(name, config, steps)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "pndm", "unipc", "dpmsolver++", "euler", "heun"])
def test_restoring_starts_at_the_timestep_of_the_noise(name):
    unet = PerfectModel()
    result = inpaint.restore_image(unet, build(name), ORIGINAL, num_steps=25, seed=3)
    assert (result.level, result.timestep) == (0.5, 499)
    assert unet.timesteps[0] == 499 and max(unet.timesteps) == 499
    assert torch.equal(result.original, ORIGINAL) and torch.equal(result.prediction, ORIGINAL)
    assert inpaint.rms_difference(result.restored, ORIGINAL) < 3
    assert inpaint.rms_difference(result.noisy, ORIGINAL) > 50


def test_noisy_image_is_that_of_the_equation():
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise, with the noise of the seed."""
    result = inpaint.restore_image(PerfectModel(), build(), ORIGINAL, num_steps=10, seed=3)
    abar = DDPMScheduler().alphas_cumprod[199]
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = to_pixels(abar.sqrt() * to_model(ORIGINAL) + (1 - abar).sqrt() * noise)[0]
    assert result.timestep == 199
    assert (result.noisy.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(("num_steps", "timestep"), [(50, 999), (5, 99), (1, 19)])
def test_level_is_the_fraction_of_the_steps(num_steps, timestep):
    unet = PerfectModel()
    result = inpaint.restore_image(unet, build(), ORIGINAL, num_steps, 0)
    assert (result.level, result.timestep) == (num_steps / 50, timestep)
    assert len(unet.timesteps) == num_steps


def test_rms_difference_by_hand():
    a = torch.tensor([[[0, 10]]], dtype=torch.uint8)
    b = torch.tensor([[[3, 6]]], dtype=torch.uint8)
    assert inpaint.rms_difference(a, b) == pytest.approx((25 / 2) ** 0.5)


@pytest.mark.parametrize("name", inpaint.INPAINTING_SCHEDULERS)
def test_inpainting_changes_only_what_is_white(name, make_unet):
    scheduler = build(name, 10)
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:5, 3:7] = 1
    # The model always predicts ORIGINAL: only the masked part of NEGATIVE may become it.
    for image in inpaint.inpaint(PerfectModel(), scheduler, NEGATIVE, mask, 3, [0, 1]):
        assert torch.equal(image[mask == 0], NEGATIVE[mask == 0])
        assert torch.equal(image[mask == 1], ORIGINAL[mask == 1])

    # With an untrained model the result depends on the seed, not on the batch.
    unet = make_unet()
    both = inpaint.inpaint(unet, scheduler, NEGATIVE, mask, 2, [0, 1])
    alone = inpaint.inpaint(unet, scheduler, NEGATIVE, mask, 2, [1])
    assert (both[1].int() - alone[0].int()).abs().max() <= 1
    assert not torch.equal(both[0][mask == 1], both[1][mask == 1])
    assert torch.equal(both[0][mask == 0], NEGATIVE[mask == 0])


def test_every_step_but_the_last_is_repeated():
    unet = PerfectModel()
    inpaint.inpaint(unet, build("ddpm", 5), ORIGINAL, torch.ones(1, 8, 8), 4, [0])
    assert unet.timesteps == [999] * 4 + [799] * 4 + [599] * 4 + [399] * 4 + [199]


def test_repeated_step_has_the_noise_of_its_timestep():
    """The variance of x_t is that of the noise schedule each time the model sees it."""
    scheduler, unet = build("ddpm", 5), PerfectModel()
    inpaint.inpaint(unet, scheduler, ORIGINAL, torch.ones(1, 8, 8), 3, range(64))
    for timestep, images in zip(unet.timesteps, unet.inputs, strict=True):
        abar = float(scheduler.alphas_cumprod[timestep])
        noise = images - abar**0.5 * to_model(ORIGINAL)
        assert float(noise.std()) == pytest.approx((1 - abar) ** 0.5, rel=0.08)


@pytest.mark.parametrize("name", ["unipc", "heun", "dpmsolver-sde"])
def test_multistep_schedulers_do_not_inpaint(name):
    with pytest.raises(UsageError, match=f"--mask with --scheduler {name}"):
        inpaint.require_inpainting_scheduler(name)
