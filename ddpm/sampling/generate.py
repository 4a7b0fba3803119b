"""Image k from seed k: the one generation path of previews, proofs, evaluation and sample.py.

All the noise of an image comes from a generator with its own seed on the CPU, so an image depends
neither on the device's generator, nor on the batch, the other images or the number of processes.
Noise and schedule are float32; only the UNet computes in its own dtype.

Images are [B, C, H, W] float32 with pixels in [-1, 1].
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers import UNet2DModel

from ddpm.data.transforms import to_pixels
from ddpm.diffusion.schedulers import SamplingScheduler
from ddpm.diffusion.unet import image_size
from ddpm.errors import UserError
from ddpm.sampling.guidance import ClassGuidance, ImageKey, Predict, predictor, seed_of

BATCH, SMALL_IMAGE_BATCH = 16, 64

StepCallback = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called with (timestep, x_t, predicted x_0) after each model call; both [B, C, H, W]."""


def generate_images(
    unet: UNet2DModel,
    scheduler: SamplingScheduler,
    seeds: Sequence[ImageKey],
    batch_size: int,
    callback: StepCallback | None = None,
    guidance: ClassGuidance | None = None,
) -> Iterator[tuple[ImageKey, torch.Tensor]]:
    """Yield (seed, image) in the order of `seeds`; an image is [C, H, W] uint8 on the CPU.

    Gives the images of DDPMPipeline for the same generators. `unet` is used as it is, on its own
    device. A batch that does not fit into memory is halved.
    """

    def generate_batch(batch: list[ImageKey]) -> torch.Tensor:
        generators = make_generators(batch)
        noise = initial_noise(unet, generators)
        predict = predictor(unet, scheduler, batch, guidance)
        return to_pixels(denoise(predict, scheduler, noise, generators, callback=callback))

    return run_in_batches(seeds, batch_size, generate_batch)


def interpolate_seeds(
    unet: UNet2DModel,
    scheduler: SamplingScheduler,
    seeds: tuple[int, int],
    num_images: int,
    indices: Sequence[ImageKey],
    batch_size: int,
    guidance: ClassGuidance | None = None,
) -> Iterator[tuple[ImageKey, torch.Tensor]]:
    """Yield (index, [C, H, W] uint8) for `indices` in 0..num_images - 1, from one seed to another.

    The initial noise is interpolated between that of the two seeds; index 0 is the image of the
    first seed. A stochastic scheduler draws the noise of its steps from the first seed for all
    images, so the last one is the image of the second seed only for deterministic schedulers. All
    images are of the class of the first seed.
    """

    def generate_batch(batch: list[ImageKey]) -> torch.Tensor:
        first_seeds = [seeds[0]] * len(batch)
        generators = make_generators(first_seeds)
        start = initial_noise(unet, generators)
        end = initial_noise(unet, make_generators([seeds[1]] * len(batch)))
        positions = torch.tensor([seed_of(index) for index in batch], dtype=torch.float64)
        fractions = positions / max(1, num_images - 1)
        predict = predictor(unet, scheduler, first_seeds, guidance)
        return to_pixels(denoise(predict, scheduler, slerp(start, end, fractions), generators))

    return run_in_batches(indices, batch_size, generate_batch)


def default_batch_size(unet: UNet2DModel) -> int:
    """Return how many images to denoise at once: more of up to 32 x 32 pixels.

    At 8 x 8 pixels, batches of 64 are 1.5 times as fast as those of 16; at 32 x 32 as fast.
    """
    return SMALL_IMAGE_BATCH if math.prod(image_size(unet)) <= 32 * 32 else BATCH


def slerp(start: torch.Tensor, end: torch.Tensor, fractions: torch.Tensor) -> torch.Tensor:
    """Interpolate spherically between B pairs of noise tensors, each taken as one vector.

    `fractions` [B] in [0, 1] is the position between `start` and `end` [B, ...]. Linear
    interpolation would give noise with too small a variance.
    """
    a, b = start.cpu().double().flatten(1), end.cpu().double().flatten(1)  # MPS has no float64
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    angle = cosine.clamp(-1, 1).arccos().clamp_min(1e-9)
    weight_a, weight_b = ((f * angle).sin() / angle.sin() for f in (1 - fractions, fractions))
    return (weight_a[:, None] * a + weight_b[:, None] * b).view(start.shape).to(start)


def make_generators(seeds: Sequence[ImageKey]) -> list[torch.Generator]:
    """Return a generator on the CPU for each image."""
    return [torch.Generator().manual_seed(seed_of(seed)) for seed in seeds]


def initial_noise(unet: UNet2DModel, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Return standard normal noise [B, C, H, W] float32 on the model's device, one per generator.

    The numbers are those of diffusers' randn_tensor.
    """
    shape = (1, unet.config.in_channels, *image_size(unet))
    noise = [torch.randn(shape, generator=generator) for generator in generators]
    return torch.cat(noise).to(unet.device)


@torch.no_grad()
def denoise(
    predict: Predict,
    scheduler: SamplingScheduler,
    images: torch.Tensor,
    generators: Sequence[torch.Generator],
    begin: int = 0,
    callback: StepCallback | None = None,
) -> torch.Tensor:
    """Denoise x_T = `images` (pure noise) to x_0, or x_t that is `begin` steps later.

    `generators`, one for each image, give the noise of stochastic schedulers.
    """
    timesteps = scheduler.set_timesteps(begin)
    scale_model_input = scheduler.scheduler.scale_model_input
    # Schedulers in the notation of k-diffusion keep x_t / sqrt(abar_t); their scale of the model's
    # input at the first timestep converts to it.
    images = images / scale_model_input(torch.ones((), device="cpu"), timesteps[0])
    for timestep in timesteps:
        noisy = scale_model_input(images, timestep)
        prediction = predict(noisy, timestep)
        if callback is not None:
            original = scheduler.predict_original_sample(prediction, noisy, timestep)
            callback(int(timestep), noisy, original)
        step_input = scheduler.convert_model_output(prediction, noisy, timestep)
        images = scheduler.step(step_input, timestep, images, generators)
    return images


def run_in_batches(
    seeds: Sequence[ImageKey],
    batch_size: int,
    generate_batch: Callable[[list[ImageKey]], Sequence[torch.Tensor]],
) -> Iterator[tuple[ImageKey, torch.Tensor]]:
    """Yield (seed, image) in the order of `seeds`; `generate_batch` makes the images of a few.

    When memory runs out, the batch size is halved for the rest, with a line on stderr. Raise
    UserError if a single image does not fit.
    """
    start = 0
    while start < len(seeds):
        batch = list(seeds[start : start + batch_size])
        try:
            images = generate_batch(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            images = None  # retry outside of `except`, where the error still refers to the tensors
        if images is not None:
            yield from zip(batch, images, strict=True)
            start += len(batch)
        elif len(batch) > 1:
            batch_size = len(batch) // 2
            print(
                f"Out of memory with {len(batch)} images at once: going on with {batch_size}.",
                file=sys.stderr,
                flush=True,
            )
        else:
            raise UserError(
                "One image alone does not fit into memory. Try --dtype bf16 or fp16, "
                "or --device cpu."
            )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether memory ran out: CUDA raises its own type, MPS and the CPU only a message."""
    message = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(
        phrase in message
        for phrase in ("out of memory", "can't allocate memory", "not enough memory")
    )
