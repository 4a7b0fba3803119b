"""Other people's text-to-image models: whatever diffusers' AutoPipelineForText2Image loads.

Needs transformers (requirements-prompt.txt). Image k comes from seed k here too: each has a
generator of its own.
"""

import inspect
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ddpm.config.commands import SampleConfig
from ddpm.diffusion import schedulers
from ddpm.errors import UsageError, UserError
from ddpm.sampling import image_io
from ddpm.sampling.generate import run_in_batches
from ddpm.sampling.pipeline import (
    CUSTOM_LOOP_PIPELINES,
    SUPPORTED_PIPELINES,
    PipelineFolder,
    require_safetensors,
)


def load_text_to_image(found: PipelineFolder, config: SampleConfig, dtype: torch.dtype) -> Any:
    """The pipeline in `found`, for pictures from words, or from a picture and words (--image).

    UsageError for a pipeline that takes no words, UserError for one that cannot be loaded.
    """
    if found.kind in (*SUPPORTED_PIPELINES, *CUSTOM_LOOP_PIPELINES):
        raise UsageError(
            f"{found.name} is a {found.kind}: it draws without words. Leave out --prompt."
        )
    if find_spec("transformers") is None:
        raise UserError(
            "--prompt needs transformers, which is not installed here: "
            "pip install -r requirements-prompt.txt."
        )
    for part, kind in found.index.items():
        if isinstance(kind, list) and (found.folder / part / "config.json").is_file():
            require_safetensors(found.folder / part, found.name)

    from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image

    auto = AutoPipelineForImage2Image if config.image else AutoPipelineForText2Image
    try:
        pipe = auto.from_pretrained(
            found.folder, dtype=dtype, use_safetensors=True, local_files_only=True
        )
        if config.scheduler:
            pipe.scheduler = schedulers.build_latent_scheduler(
                config.scheduler, dict(pipe.scheduler.config)
            )
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{found.name}, a {found.kind}, cannot be loaded: {reason}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate_from_prompt(
    pipe: Any, config: SampleConfig, seeds: Sequence[int]
) -> Iterator[tuple[int, Any]]:
    """Draw one picture a seed: (seed, [3, H, W] uint8), in the order of `seeds`."""
    arguments = _arguments(pipe, config)

    def draw(chosen: list[int]) -> list[torch.Tensor]:
        generators = [torch.Generator().manual_seed(seed) for seed in chosen]
        words = {
            name: [arguments[name]] * len(chosen)
            for name in ("prompt", "negative_prompt")
            if name in arguments
        }
        given = {"image": [arguments["image"]] * len(chosen)} if "image" in arguments else {}
        drawn = pipe(**{**arguments, **words, **given}, generator=generators, output_type="pt")
        return list((drawn.images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())

    try:
        yield from run_in_batches(seeds, config.batch_size, draw)
    except (ValueError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{type(pipe).__name__} refuses these settings: {reason}") from error


def default_num_inference_steps(pipe: Any) -> int:
    """How many steps a pipeline of diffusers takes when it is not told."""
    return inspect.signature(pipe.__call__).parameters["num_inference_steps"].default


def image_metadata(pipe: Any, config: SampleConfig) -> dict[str, str]:
    """What the pictures are made from beside the model and the seed, for their text."""
    asked = {name: value for name, value in _arguments(pipe, config).items() if name != "image"}
    return {
        "scheduler": config.scheduler or type(pipe.scheduler).__name__,
        "num_inference_steps": str(config.num_inference_steps or default_num_inference_steps(pipe)),
        **{name: str(value) for name, value in asked.items()},
    }


def _arguments(pipe: Any, config: SampleConfig) -> dict[str, Any]:
    """What the pipeline is called with; what was not asked for keeps the pipeline's own default."""
    names = ("prompt", "negative_prompt", "guidance_scale", "num_inference_steps")
    names += ("strength",) if config.image else ("height", "width")
    asked = {name: getattr(config, name) for name in names}
    arguments = {name: value for name, value in asked.items() if value is not None}
    if config.image:
        arguments["image"] = initial_image(pipe, config)
    return arguments


def initial_image(pipe: Any, config: SampleConfig) -> Image.Image:
    """The picture to start from: upright RGB, at the size asked for, or at its own one cut to what
    the model's encoder can halve."""
    image = image_io.read_image(Path(config.image), 3, config.background)
    step = getattr(pipe, "vae_scale_factor", 8)
    height = config.height or max(step, image.shape[1] // step * step)
    width = config.width or max(step, image.shape[2] // step * step)
    return image_io.to_pil(image_io.resize_and_crop(image, height, width))
