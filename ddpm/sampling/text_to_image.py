"""Text-to-image models of others: whatever diffusers' AutoPipelineForText2Image loads.

Needs transformers (requirements-prompt.txt). Image k comes from seed k here too: each has its own
generator.
"""

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ddpm.config.sample import SampleConfig
from ddpm.diffusion import schedulers
from ddpm.errors import UsageError, UserError, foreign_errors
from ddpm.sampling import image_io
from ddpm.sampling.generate import BATCH, run_in_batches
from ddpm.sampling.pipeline_folder import (
    CUSTOM_LOOP_PIPELINES,
    SUPPORTED_PIPELINES,
    PipelineFolder,
)
from ddpm.sampling.unet_files import require_safetensors


@dataclass(frozen=True)
class PromptArguments:
    """Arguments of a call of the pipeline. None leaves out an argument, so its default applies."""

    prompt: str
    negative_prompt: str | None
    guidance_scale: float | None
    num_inference_steps: int | None
    strength: float | None
    height: int | None
    width: int | None
    image: Image.Image | None

    @classmethod
    def from_config(cls, pipe: DiffusionPipeline, config: SampleConfig) -> "PromptArguments":
        """An initial image (--image) has the size asked for, so the call gets no size."""
        has_image = config.image is not None
        return cls(
            prompt=config.prompt,
            negative_prompt=config.negative_prompt,
            guidance_scale=config.guidance_scale,
            num_inference_steps=config.num_inference_steps,
            strength=config.strength if has_image else None,
            height=None if has_image else config.height,
            width=None if has_image else config.width,
            image=_initial_image(pipe, config) if has_image else None,
        )

    def given(self) -> dict[str, Any]:
        """Return the arguments that are not None."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def for_batch(self, batch_size: int) -> dict[str, Any]:
        """Return the arguments of a call for a batch, in which texts and images are lists."""
        lists = ("prompt", "negative_prompt", "image")
        return {
            name: [value] * batch_size if name in lists else value
            for name, value in self.given().items()
        }


def load_text_to_image(
    pipeline: PipelineFolder, config: SampleConfig, dtype: torch.dtype
) -> DiffusionPipeline:
    """Load a pipeline that makes images from a prompt, or from an image and a prompt (--image).

    Raise UsageError for a pipeline that takes no prompt, UserError if it cannot be loaded.
    """
    if pipeline.kind in (*SUPPORTED_PIPELINES, *CUSTOM_LOOP_PIPELINES):
        raise UsageError(
            f"{pipeline.name} is a {pipeline.kind}: it draws without words. Leave out --prompt."
        )
    if find_spec("transformers") is None:
        raise UserError(
            "--prompt needs transformers, which is not installed here: "
            "pip install -r requirements-prompt.txt."
        )
    for component in pipeline.index.components:
        if (pipeline.folder / component / "config.json").is_file():
            require_safetensors(pipeline.folder / component, pipeline.name)

    from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image

    auto_class = AutoPipelineForImage2Image if config.image else AutoPipelineForText2Image
    with foreign_errors(f"{pipeline.name}, a {pipeline.kind}, cannot be loaded"):
        pipe = auto_class.from_pretrained(
            pipeline.folder, dtype=dtype, use_safetensors=True, local_files_only=True
        )
        if config.scheduler:
            pipe.scheduler = schedulers.build_latent_scheduler(
                config.scheduler, dict(pipe.scheduler.config)
            )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate_from_prompt(
    pipe: DiffusionPipeline, config: SampleConfig, seeds: Sequence[int]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (seed, [3, H, W] uint8 on the CPU) in the order of `seeds`.

    Raise UserError for settings that the pipeline refuses.
    """
    arguments = PromptArguments.from_config(pipe, config)

    def generate_batch(batch: list[int]) -> list[torch.Tensor]:
        generators = [torch.Generator().manual_seed(seed) for seed in batch]
        output = pipe(**arguments.for_batch(len(batch)), generator=generators, output_type="pt")
        return list((output.images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())

    with foreign_errors(f"{type(pipe).__name__} refuses these settings"):
        yield from run_in_batches(seeds, config.batch_size or BATCH, generate_batch)


def default_num_inference_steps(pipe: DiffusionPipeline) -> int:
    """Return the default number of steps of a pipeline of diffusers."""
    return inspect.signature(pipe.__call__).parameters["num_inference_steps"].default


def image_metadata(pipe: DiffusionPipeline, config: SampleConfig) -> dict[str, str]:
    """Return the texts of a PNG: the scheduler and the arguments of the call, without the image."""
    arguments = PromptArguments.from_config(pipe, config).given()
    arguments.pop("image", None)
    return {
        "scheduler": config.scheduler or type(pipe.scheduler).__name__,
        "num_inference_steps": str(config.num_inference_steps or default_num_inference_steps(pipe)),
        **{name: str(value) for name, value in arguments.items()},
    }


def _initial_image(pipe: DiffusionPipeline, config: SampleConfig) -> Image.Image:
    """Return the image of --image, upright RGB, at --height and --width.

    By default it keeps its size, cropped to a multiple of the factor of the model's encoder.
    """
    image = image_io.read_image(Path(config.image), 3, config.background)
    factor = getattr(pipe, "vae_scale_factor", 8)
    height = config.height or max(factor, image.shape[1] // factor * factor)
    width = config.width or max(factor, image.shape[2] // factor * factor)
    return image_io.to_pil(image_io.resize_and_crop(image, height, width))
