"""Image k from seed k: one way of drawing, for previews, the proof of a push and sample.py.

All the noise of an image comes from a generator of its own seed on the CPU, so an image does not
depend on the device's generator, on the batch, on the other images or on the number of processes.
The noise and the schedule are float32; only the UNet computes in its own dtype.

Legend: B images of a batch, [B, C, H, W] float32, pixels in [-1, 1].
"""

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers import UNet2DModel

from ddpm.diffusion import schedulers
from ddpm.diffusion.schedulers import SamplingScheduler
from ddpm.errors import UserError
from ddpm.sampling.image_io import to_pixels

StepCallback = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called with (timestep, x_t, predicted x0) each time the model is asked; both [B, C, H, W]."""


def generate_images(
    unet: UNet2DModel,
    sampler: SamplingScheduler,
    num_inference_steps: int,
    seeds: Sequence[int],
    batch_size: int,
    watch: StepCallback | None = None,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Draw one image a seed: (seed, [C, H, W] uint8 on the CPU), in the order of `seeds`.

    The loop is DDPMPipeline's, with its result for the same generators; `unet` is used as it is, on
    the device it is on. A batch that does not fit into memory is halved.
    """

    def draw(chosen: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in chosen]
        images = initial_noise(unet, generators)
        return denoise(unet, sampler, num_inference_steps, images, generators, watch=watch)

    return run_in_batches(seeds, batch_size, lambda chosen: to_pixels(draw(chosen)))


def interpolate_seeds(
    unet: UNet2DModel,
    sampler: SamplingScheduler,
    num_inference_steps: int,
    seeds: tuple[int, int],
    num_images: int,
    chosen: Sequence[int],
    batch_size: int,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Draw from noises on the way between those of two seeds: (k, [C, H, W] uint8) for the chosen k
    of num_images, 0 being the first seed's.

    The first is the image of the first seed; a sampler that adds noise at its steps takes that of
    the first seed for all, so the last is the second seed's only where steps are deterministic.
    """

    def draw(few: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seeds[0]) for _ in few]
        start = initial_noise(unet, generators)
        end = initial_noise(unet, [torch.Generator().manual_seed(seeds[1]) for _ in few])
        parts = torch.tensor(few, dtype=torch.float64) / max(1, num_images - 1)
        images = slerp(start, end, parts)
        return to_pixels(denoise(unet, sampler, num_inference_steps, images, generators))

    return run_in_batches(chosen, batch_size, draw)


def slerp(start: torch.Tensor, end: torch.Tensor, parts: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation of B pairs of noises, `parts` [B] of the way, each as one vector.

    A straight line would pass through noise of too small a variance.
    """
    a, b = start.cpu().double().flatten(1), end.cpu().double().flatten(1)  # MPS has no float64
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    angle = cosine.clamp(-1, 1).arccos().clamp_min(1e-9)
    left, right = ((share * angle).sin() / angle.sin() for share in (1 - parts, parts))
    between = left[:, None] * a + right[:, None] * b
    return between.view(start.shape).to(start)


def initial_noise(unet: UNet2DModel, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Standard noise of the model's shape, one image a generator: on the model's device, float32.

    The numbers are those of diffusers' randn_tensor.
    """
    shape = (1, unet.config.in_channels, *image_size(unet))
    drawn = [torch.randn(shape, generator=generator) for generator in generators]
    return torch.cat(drawn).to(unet.device)


@torch.no_grad()
def denoise(
    unet: UNet2DModel,
    sampler: SamplingScheduler,
    num_inference_steps: int,
    images: torch.Tensor,
    generators: Sequence[torch.Generator],
    begin: int = 0,
    watch: StepCallback | None = None,
) -> torch.Tensor:
    """Walk x_T = `images` (pure noise) down to x_0; with `begin` from x_t that many steps later.

    `generators`, one an image, give the noise of samplers that add some at each step.
    """
    scheduler = sampler.scheduler
    timesteps = schedulers.set_timesteps(sampler, num_inference_steps, begin)
    # Schedulers in the notation of k-diffusion hold x_t / sqrt(abar_t); the first scaling tells.
    images = images / scheduler.scale_model_input(torch.ones((), device="cpu"), timesteps[0])
    extra = {"generator": list(generators)} if sampler.takes_generator else {}
    for timestep in timesteps:
        scaled = scheduler.scale_model_input(images, timestep)
        output = predict(unet, scaled, timestep)
        if watch is not None:
            watch(
                int(timestep),
                scaled,
                schedulers.predict_original_sample(sampler, output, scaled, timestep),
            )
        output = schedulers.convert_model_output(sampler, output, scaled, timestep)
        images = scheduler.step(output, timestep, images, **extra).prev_sample
    return images


def predict(unet: UNet2DModel, images: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """What the model predicts of x_t, in float32 whatever it computes in."""
    return unet(images.to(unet.dtype), timestep).sample.float()


def run_in_batches(
    seeds: Sequence[int], batch_size: int, draw: Callable[[list[int]], Sequence[torch.Tensor]]
) -> Iterator[tuple[int, torch.Tensor]]:
    """(seed, image) for each of `seeds`, in their order; `draw` makes the images of a few.

    When memory runs out the batch is halved, once and for all, and that is said on stderr.
    UserError when one image alone is too much.
    """
    start = 0
    while start < len(seeds):
        chosen = list(seeds[start : start + batch_size])
        try:
            images = draw(chosen)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            images = None  # try again outside: here the error still holds the tensors
        if images is not None:
            yield from zip(chosen, images, strict=True)
            start += len(chosen)
        elif len(chosen) > 1:
            batch_size = len(chosen) // 2
            print(
                f"Out of memory with {len(chosen)} images at once: going on with {batch_size}.",
                file=sys.stderr,
                flush=True,
            )
        else:
            raise UserError(
                "One image alone does not fit into memory. Try --dtype bf16 or fp16, "
                "or --device cpu."
            )


def is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a type for it; MPS and the CPU have only words."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(
        phrase in words
        for phrase in ("out of memory", "can't allocate memory", "not enough memory")
    )


def image_size(unet: UNet2DModel) -> tuple[int, int]:
    """Height and width of what the model draws."""
    size = unet.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)
