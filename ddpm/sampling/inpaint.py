"""Starting from an image: restoring it after adding noise, and inpainting the white of a mask.

x_0 is the given image, [C, H, W] float32 in [-1, 1]. A level is the part of the noise schedule that
is added to it, from 0 (unchanged) to 1 (pure noise).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

from ddpm.config.sample import SampleConfig
from ddpm.data.transforms import to_model, to_pixels
from ddpm.diffusion.schedulers import SamplingScheduler
from ddpm.errors import UsageError
from ddpm.file_io import file_sha256
from ddpm.sampling import generate, image_io, outputs
from ddpm.sampling.guidance import ClassGuidance, ImageKey, predictor

DEFAULT_LEVEL = 0.5
STRIP_LEVELS = (0.1, 0.25, 0.5, 0.75, 0.95)
"""Levels in strip.png, next to the one asked for."""
INPAINTING_SCHEDULERS = ("ddpm", "ddim")
"""Schedulers without a memory of earlier steps, so that a step can be repeated."""


@dataclass(frozen=True)
class RestoredImage:
    """An image with noise of one level and restored from it; images are [C, H, W] uint8.

    `timestep` is the one that the noise belongs to, `prediction` the x_0 predicted in one step.
    """

    level: float
    timestep: int
    original: torch.Tensor
    noisy: torch.Tensor
    prediction: torch.Tensor
    restored: torch.Tensor


def read_model_image(config: SampleConfig, unet: UNet2DModel) -> torch.Tensor:
    """Read --image at the size and with the channels of the model: [C, H, W] uint8.

    UsageError for a background where the model has transparency.
    """
    channels = unet.config.in_channels
    if channels == 4 and config.background != "white":
        raise UsageError(
            f"--background {config.background} would fill what is transparent in --image, which "
            "this model keeps: leave it out."
        )
    image = image_io.read_image(Path(config.image), channels, config.background)
    return image_io.resize_and_crop(image, *generate.image_size(unet))


def read_mask(config: SampleConfig, unet: UNet2DModel) -> torch.Tensor:
    """Read --mask at the size of the model: [1, H, W] in {0, 1}, 1 where to inpaint.

    UsageError for another size than --image, and for a mask without white.
    """
    mask = image_io.read_image(Path(config.mask), 1, "black")
    size = image_io.read_image(Path(config.image), 1).shape
    if mask.shape != size:
        raise UsageError(
            f"--mask {config.mask} is {mask.shape[2]}x{mask.shape[1]}, --image {config.image} "
            f"{size[2]}x{size[1]}: they must be of one size."
        )
    white = (image_io.resize_and_crop(mask, *generate.image_size(unet)) >= 128).float()
    if not white.any():
        raise UsageError(f"--mask {config.mask} has no white: nothing would be painted.")
    return white


def restore_to_folder(
    unet: UNet2DModel,
    scheduler: SamplingScheduler,
    config: SampleConfig,
    metadata: dict[str, str],
    guidance: ClassGuidance | None = None,
) -> list[RestoredImage]:
    """Restore --image from --noise_level and from STRIP_LEVELS; --noise_level is the first result.

    Write it as noisy.png, prediction.png and restored.png, and all levels as strip.png, into
    --output_dir. UserError if a file there was not made by this command.
    """
    original, folder = read_model_image(config, unet), Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("noisy", "prediction", "restored", "strip"):
        outputs.require_own_png(folder / f"{name}.png")
    steps = scheduler.num_inference_steps
    wanted = (config.noise_level or DEFAULT_LEVEL, *STRIP_LEVELS)
    results = [
        restore_image(unet, scheduler, original, num_steps, config.seed, guidance)
        for num_steps in dict.fromkeys(max(1, round(level * steps)) for level in wanted)
    ]
    first, image_sha256 = results[0], file_sha256(Path(config.image))
    text = {**metadata, "seed": str(config.seed), "image_sha256": image_sha256}
    for name in ("noisy", "prediction", "restored"):
        level = {"noise_level": str(first.level)}
        image_io.save_png(getattr(first, name), folder / f"{name}.png", {**text, **level})
    rows = [
        (result.original, result.noisy, result.prediction, result.restored)
        for result in sorted(results, key=lambda result: result.level)
    ]
    cells = [image for row in rows for image in row]
    image_io.save_png(image_io.make_grid(cells, columns=4), folder / "strip.png", text)
    return results


def format_errors(results: Sequence[RestoredImage]) -> str:
    """Return a table of how far the images of each level are from the original."""
    lines = ["level  timestep    noisy  prediction  restored   (RMS difference, of 255)"]
    for result in sorted(results, key=lambda result: result.level):
        noisy, prediction, restored = (
            rms_difference(image, result.original)
            for image in (result.noisy, result.prediction, result.restored)
        )
        lines.append(
            f"{result.level:5.2f}  {result.timestep:8d} {noisy:8.1f} {prediction:11.1f} "
            f"{restored:9.1f}"
        )
    return "\n".join(lines)


def restore_image(
    unet: UNet2DModel,
    scheduler: SamplingScheduler,
    original: torch.Tensor,
    num_steps: int,
    seed: int,
    guidance: ClassGuidance | None = None,
) -> RestoredImage:
    """Add the noise of the last `num_steps` steps to an image and denoise it in these steps.

    original: [C, H, W] uint8. The level is the fraction of all steps.
    """
    begin = scheduler.num_inference_steps - num_steps
    timestep = int(scheduler.set_timesteps(begin)[0])
    generator = torch.Generator().manual_seed(seed)
    noise = generate.initial_noise(unet, [generator])
    noisy = scheduler.add_noise(to_model(original)[None].to(unet.device), noise, timestep)
    predictions: list[torch.Tensor] = []
    restored = generate.denoise(
        predictor(unet, scheduler, [seed], guidance),
        scheduler,
        noisy,
        [generator],
        begin,
        callback=lambda timestep, x_t, x_0: predictions.append(x_0),
    )
    images = to_pixels(torch.cat((noisy, predictions[0], restored)))
    return RestoredImage(num_steps / scheduler.num_inference_steps, timestep, original, *images)


def rms_difference(image: torch.Tensor, original: torch.Tensor) -> float:
    """Return the root mean square difference of two uint8 images, in levels of 255."""
    return float((image.double() - original.double()).square().mean().sqrt())


@torch.no_grad()
def inpaint(
    unet: UNet2DModel,
    scheduler: SamplingScheduler,
    original: torch.Tensor,
    mask: torch.Tensor,
    num_resamples: int,
    seeds: Sequence[ImageKey],
    guidance: ClassGuidance | None = None,
) -> torch.Tensor:
    """Generate where `mask` is 1 and keep `original` elsewhere: [B, C, H, W] uint8, one per seed.

    original: [C, H, W] uint8; mask: [1, H, W] in {0, 1}. RePaint (arXiv 2201.09865, algorithm 1,
    jumps of one step): what is kept is set to the original with the noise of the step, and every
    step but the last is done `num_resamples` times, with its noise added again between, so that
    both parts come to agree. `scheduler` is one of INPAINTING_SCHEDULERS.
    """
    generators = generate.make_generators(seeds)
    images = generate.initial_noise(unet, generators)
    x_0, mask = to_model(original)[None].to(images), mask.to(images)
    predict = predictor(unet, scheduler, seeds, guidance)

    def new_noise() -> torch.Tensor:
        return randn_tensor(images.shape, generator=generators, device=images.device)

    def denoise_step(images: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        prediction = predict(images, timestep)
        step_input = scheduler.convert_model_output(prediction, images, timestep)
        return scheduler.step(step_input, timestep, images, generators)

    timesteps, abar = scheduler.set_timesteps(), scheduler.alphas_cumprod
    for timestep, earlier in zip(timesteps[:-1], timesteps[1:], strict=True):
        ratio = float(abar[int(timestep)] / abar[int(earlier)])
        for resample in range(num_resamples):
            if resample > 0:  # q(x_t | x_s), from the earlier timestep s back to t
                images = ratio**0.5 * images + (1 - ratio) ** 0.5 * new_noise()
            generated = denoise_step(images, timestep)
            kept = scheduler.add_noise(x_0, new_noise(), int(earlier))
            images = mask * generated + (1 - mask) * kept
    return to_pixels(mask * denoise_step(images, timesteps[-1]) + (1 - mask) * x_0)


def require_inpainting_scheduler(name: str) -> None:
    """UsageError for a scheduler that cannot repeat a step."""
    if name not in INPAINTING_SCHEDULERS:
        raise UsageError(
            f"--mask with --scheduler {name}: inpainting repeats steps, which works with "
            f"{' or '.join(INPAINTING_SCHEDULERS)} only."
        )
