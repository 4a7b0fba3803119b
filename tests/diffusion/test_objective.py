"""Noise, targets, weights and loss against diffusers and against numbers by hand."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from ddpm.diffusion import objective

SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]


@pytest.fixture(params=SCHEDULES)
def scheduler(request) -> DDPMScheduler:
    return DDPMScheduler(num_train_timesteps=100, beta_schedule=request.param)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, noise and timesteps, the first and the last among them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, 3, 4, 4, generator=generator) * 2 - 1
    noise = torch.randn(images.shape, generator=generator)
    return images, noise, torch.tensor([0, 1, 42, 98, 99])


def test_noisy_images_are_those_of_diffusers(scheduler, batch):
    images, noise, timesteps = batch
    ours = objective.add_noise(scheduler.alphas_cumprod, images, noise, timesteps)
    torch.testing.assert_close(ours, scheduler.add_noise(images, noise, timesteps))


def test_velocity_is_that_of_diffusers(scheduler, batch):
    images, noise, timesteps = batch
    ours = objective.prediction_target(
        "v_prediction", scheduler.alphas_cumprod, images, noise, timesteps
    )
    torch.testing.assert_close(ours, scheduler.get_velocity(images, noise, timesteps))


def test_target_is_the_noise_or_the_image(scheduler, batch):
    images, noise, timesteps = batch
    alphas = scheduler.alphas_cumprod
    assert torch.equal(
        objective.prediction_target("epsilon", alphas, images, noise, timesteps), noise
    )
    assert torch.equal(
        objective.prediction_target("sample", alphas, images, noise, timesteps), images
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_target_converts_back_to_the_image(prediction_type, scheduler, batch):
    """By predict_original, and by the scheduler of diffusers."""
    images, noise, timesteps = batch
    alphas = scheduler.alphas_cumprod
    noisy = objective.add_noise(alphas, images, noise, timesteps)
    target = objective.prediction_target(prediction_type, alphas, images, noise, timesteps)
    stock = DDPMScheduler.from_config(scheduler.config, prediction_type=prediction_type)
    for row in range(3):  # at 98 and 99 float32 has little of the image left
        abar = float(alphas[timesteps[row]])
        original = objective.predict_original(
            prediction_type, target[row], noisy[row], abar**0.5, (1 - abar) ** 0.5
        )
        torch.testing.assert_close(original, images[row], atol=1e-4, rtol=1e-4)
        expected = stock.step(target[row], timesteps[row], noisy[row]).pred_original_sample
        torch.testing.assert_close(original.clamp(-1, 1), expected)


def test_snr_is_that_of_diffusers(scheduler):
    timesteps = torch.arange(100)
    ours = objective.compute_snr(scheduler.alphas_cumprod, timesteps)
    torch.testing.assert_close(ours, compute_snr(scheduler, timesteps), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [
        # SNR = alpha / (1 - alpha) = 9, 1, 1/9; gamma = 5
        ("epsilon", [5 / 9, 1.0, 1.0]),
        ("v_prediction", [5 / 10, 1 / 2, (1 / 9) / (10 / 9)]),
        ("sample", [5.0, 1.0, 1 / 9]),
    ],
)
def test_min_snr_weights_by_hand(prediction_type, expected):
    alphas, timesteps = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0, 1, 2])
    weights = objective.min_snr_weights(prediction_type, alphas, timesteps, snr_gamma=5.0)
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_min_snr_weighs_an_error_of_the_image_alike_for_all_prediction_types(scheduler, batch):
    """The same error in x_0, as an error of noise or velocity, gives the same loss."""
    images, noise, timesteps = batch
    images, noise, timesteps = images[:4], noise[:4], torch.tensor([1, 10, 42, 80])
    alphas = scheduler.alphas_cumprod
    noisy = objective.add_noise(alphas, images, noise, timesteps)
    wrong_image = images + 0.1
    alpha = alphas[timesteps].view(-1, 1, 1, 1)
    wrong_noise = (noisy - alpha.sqrt() * wrong_image) / (1 - alpha).sqrt()
    losses = []
    for kind in ("sample", "epsilon", "v_prediction"):
        target = objective.prediction_target(kind, alphas, images, noise, timesteps)
        prediction = objective.prediction_target(kind, alphas, wrong_image, wrong_noise, timesteps)
        weights = objective.min_snr_weights(kind, alphas, timesteps, snr_gamma=5.0)
        losses.append(objective.diffusion_loss(prediction, target, weights))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_weights_are_finite_where_no_signal_is_left(prediction_type):
    weights = objective.min_snr_weights(
        prediction_type, torch.tensor([0.5, 0.0]), torch.tensor([1]), 5.0
    )
    assert weights.isfinite().all()
    assert weights.item() == (1.0 if prediction_type == "epsilon" else 0.0)


def test_no_gamma_means_no_weights():
    assert (
        objective.min_snr_weights("epsilon", torch.tensor([0.5]), torch.tensor([0]), None) is None
    )


def test_loss_by_hand():
    prediction = torch.tensor([1.0, 3.0, 0.0, 0.0]).view(2, 1, 1, 2)
    target = torch.zeros(2, 1, 1, 2)
    assert objective.diffusion_loss(prediction, target, None).item() == 2.5  # mean of 5 and 0
    assert objective.diffusion_loss(prediction, target, torch.tensor([0.5, 9.0])).item() == 1.25


def test_loss_is_float32_whatever_the_model_computes_in():
    prediction = torch.full((1, 1, 2, 2), 300.0, dtype=torch.float16)
    loss = objective.diffusion_loss(prediction, torch.zeros(1, 1, 2, 2), None)
    assert loss.dtype == torch.float32
    assert loss.item() == 90_000.0  # more than float16 can hold


def test_early_timesteps_get_noise():
    """In bfloat16, sqrt(alpha-bar) of the first timesteps rounds to 1 and leaves no noise."""
    alphas = DDPMScheduler().alphas_cumprod
    images, timesteps = torch.zeros(10, 1, 2, 2), torch.arange(10)
    noisy = objective.add_noise(alphas, images, torch.ones(10, 1, 2, 2), timesteps)
    assert noisy.dtype == torch.float32
    assert (noisy[:, 0, 0, 0].diff() > 0).all()
    assert noisy[0, 0, 0, 0].item() == pytest.approx(0.01, rel=1e-3)  # sqrt(beta_0 = 1e-4)


def test_noise_and_timesteps_depend_on_the_generator_alone():
    def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return objective.sample_noise_and_timesteps(
            torch.Size((500, 1, 2, 2)), torch.linspace(0.99, 0.01, 10), generator
        )

    noise, timesteps = draw(0)
    assert noise.shape == (500, 1, 2, 2)
    assert noise.dtype == torch.float32
    assert (timesteps.dtype, timesteps.shape) == (torch.int64, (500,))
    assert set(timesteps.tolist()) == set(range(10))
    assert abs(noise.mean().item()) < 0.1
    assert abs(noise.std().item() - 1) < 0.1
    torch.manual_seed(123)
    again = draw(0)
    assert torch.equal(again[0], noise)
    assert torch.equal(again[1], timesteps)
    assert not torch.equal(draw(1)[0], noise)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_logarithm_of_the_noise_level_is_normal(schedule, zero_snr):
    """Of the same noise as uniform timesteps, and inside the schedule where it ends too early."""
    scheduler = DDPMScheduler(beta_schedule=schedule, rescale_betas_zero_snr=zero_snr)
    alphas, shape = scheduler.alphas_cumprod, torch.Size((20_000, 1, 1, 1))

    def draw(*arguments):
        generator = torch.Generator().manual_seed(0)
        return objective.sample_noise_and_timesteps(shape, alphas, generator, *arguments)

    noise, timesteps = draw((-0.6, 1.2))
    assert torch.equal(noise, draw()[0])
    logs = ((1 - alphas[timesteps]) / alphas[timesteps]).sqrt().log()
    assert logs.mean().item() == pytest.approx(-0.6, abs=0.05)
    assert logs.std().item() == pytest.approx(1.2, abs=0.05)
    quantiles = torch.quantile(logs, torch.tensor([0.16, 0.84]))
    assert quantiles.tolist() == pytest.approx([-1.8, 0.6], abs=0.06)
    assert draw((100.0, 1.0))[1].unique().tolist() == [999]
    assert draw((-100.0, 1.0))[1].unique().tolist() == [0]
