"""A given picture: how much noise, what is restored, what is kept under a mask."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm.data import transforms
from ddpm.diffusion import schedulers
from ddpm.errors import UsageError
from ddpm.sampling import inpaint

TRUTH = torch.linspace(-0.9, 0.9, 64).view(1, 8, 8)


class Knowing:
    """A model that knows the one picture there is: it predicts x0 = TRUTH from anything."""

    config = SimpleNamespace(in_channels=1, sample_size=8)
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        self.asked = []

    def __call__(self, images, timestep):
        self.asked.append(int(timestep))
        return SimpleNamespace(sample=TRUTH.expand_as(images).clone())


@pytest.fixture
def build():
    chain = DDPMScheduler(1000, prediction_type="sample")
    return lambda name="ddim", steps=50: schedulers.build_sampling_scheduler(
        name, chain.config, steps
    )


@pytest.mark.parametrize("name", ["ddpm", "ddim", "pndm", "unipc", "dpmsolver++", "euler", "heun"])
def test_noise_is_taken_away_from_the_level_it_was_added_to(build, name):
    scheduler = build(name)
    unet = Knowing()
    done = inpaint.restore_image(unet, scheduler, TRUTH, 0.5, seed=3)
    assert (done.level, done.timestep) == (0.5, 499)
    assert unet.asked[0] == 499 and max(unet.asked) == 499
    original = transforms.to_pixels(TRUTH[None])[0]
    assert torch.equal(done.prediction, original)
    assert inpaint.rms_difference(done.restored, original) < 3
    assert inpaint.rms_difference(done.noisy, original) > 50


def test_noisy_picture_is_that_of_the_equation(build):
    """x_t = sqrt(abar) x0 + sqrt(1 - abar) noise, with the noise of the seed."""
    scheduler = build()
    done = inpaint.restore_image(Knowing(), scheduler, TRUTH, 0.2, seed=3)
    abar = DDPMScheduler().alphas_cumprod[199]
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = transforms.to_pixels(abar.sqrt() * TRUTH + (1 - abar).sqrt() * noise)[0]
    assert done.timestep == 199
    assert (done.noisy.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("level", "timestep", "calls"), [(1.0, 999, 50), (0.1, 99, 5), (0.001, 19, 1)]
)
def test_level_is_a_part_of_the_steps_and_at_least_one(build, level, timestep, calls):
    scheduler = build()
    unet = Knowing()
    assert inpaint.restore_image(unet, scheduler, TRUTH, level, 0).timestep == timestep
    assert len(unet.asked) == calls


def test_difference_by_hand():
    a = torch.tensor([[[0, 10]]], dtype=torch.uint8)
    b = torch.tensor([[[3, 6]]], dtype=torch.uint8)
    assert inpaint.rms_difference(a, b) == pytest.approx((25 / 2) ** 0.5)


@pytest.mark.parametrize("name", inpaint.INPAINTING_SCHEDULERS)
def test_inpainting_keeps_what_is_black_and_paints_what_is_white(build, name, make_unet):
    scheduler = build(name, 10)
    hole = torch.zeros(1, 8, 8)
    hole[:, 2:5, 3:7] = 1
    original = -TRUTH  # the model wants TRUTH: only the hole may get it
    drawn = inpaint.inpaint(Knowing(), scheduler, original, hole, 3, [0, 1])
    kept, wanted = transforms.to_pixels(original[None])[0], transforms.to_pixels(TRUTH[None])[0]
    for image in drawn:
        assert torch.equal(image[hole == 0], kept[hole == 0])
        assert torch.equal(image[hole == 1], wanted[hole == 1])

    # With a model of no opinion each seed paints its own, alone or in a batch.
    unet = make_unet()
    two = inpaint.inpaint(unet, scheduler, original, hole, 2, [0, 1])
    alone = inpaint.inpaint(unet, scheduler, original, hole, 2, [1])
    assert (two[1].int() - alone[0].int()).abs().max() <= 1
    assert not torch.equal(two[0][hole == 1], two[1][hole == 1])
    assert torch.equal(two[0][hole == 0], kept[hole == 0])


def test_every_step_but_the_last_is_walked_again(build):
    scheduler = build("ddpm", 5)
    unet = Knowing()
    inpaint.inpaint(unet, scheduler, TRUTH, torch.ones(1, 8, 8), 4, [0])
    assert unet.asked == [999] * 4 + [799] * 4 + [599] * 4 + [399] * 4 + [199]


def test_going_back_puts_the_noise_of_the_step_back(build):
    """A model that sees x_t at its step each time: the variance there is that of the chain."""
    scheduler = build("ddpm", 5)
    seen = {}

    class Watching(Knowing):
        def __call__(self, images, timestep):
            seen.setdefault(int(timestep), []).append(images)
            return super().__call__(images, timestep)

    inpaint.inpaint(Watching(), scheduler, TRUTH, torch.ones(1, 8, 8), 3, range(64))
    for timestep, images in seen.items():
        abar = float(scheduler.alphas_cumprod[timestep])
        for each in images:
            left = each - abar**0.5 * TRUTH
            assert float(left.std()) == pytest.approx((1 - abar) ** 0.5, rel=0.08)


@pytest.mark.parametrize("name", ["unipc", "heun", "dpmsolver-sde"])
def test_solvers_with_a_memory_do_not_inpaint(name):
    with pytest.raises(UsageError, match=f"--mask with --scheduler {name}"):
        inpaint.require_inpainting_scheduler(name)
