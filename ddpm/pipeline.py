"""The artifact and what it draws: export, load, and image k from seed k.

One way of generating serves previews, the proof of a push and sample.py. The artifact is a plain
DDPMPipeline folder; loading reads JSON and safetensors only and never runs code of a repository.
"""

import inspect
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub.utils.sha import sha_fileobj
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError

from ddpm import hub
from ddpm.errors import UsageError, UserError
from ddpm.runfolder import (
    MODEL_INDEX,
    PIPELINE_FILES,
    SCHEDULER_CONFIG,
    UNET_CONFIG,
    UNET_WEIGHTS,
    read_json,
    sync_folder,
    sync_tree,
    why_not_written,
)

logging.disable_progress_bar()  # diffusers' bar over the two parts of a pipeline

SAMPLERS: dict[str, tuple[type[SchedulerMixin], bool]] = {
    # name: (class, whether x0 is kept in [-1, 1] by thresholding instead of clip_sample)
    "ddpm": (DDPMScheduler, False),
    "ddim": (DDIMScheduler, False),
    "dpmsolver++": (DPMSolverMultistepScheduler, True),
    "unipc": (UniPCMultistepScheduler, True),
}
PIPELINES = ("DDPMPipeline", "DDIMPipeline")
"""Those whose noise all samplers know; others with a UNet2DModel draw latents, or other noise."""
SAMPLER_STEPS = 50
"""Denoising steps when none are asked for; the whole chain for ddpm."""
GRID_LIMIT = 256
"""Most images that sample.py puts on one sheet."""


@dataclass(frozen=True)
class Artifact:
    """A loaded model: `version` is its commit on the Hub, or the sha256 of a folder's weights."""

    unet: UNet2DModel
    scheduler_config: dict[str, Any]
    name: str
    version: str


def export(unet: UNet2DModel, scheduler: DDPMScheduler, output_dir: Path) -> None:
    """Put a DDPMPipeline into `output_dir`, file by file, each whole: old or new, never half.

    What is being written lies in a hidden folder beside until it is complete and on disk. UserError
    for a disk that cannot take it.
    """
    partial = output_dir / ".pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    whole = DDPMPipeline(unet=unet, scheduler=scheduler)
    try:
        whole.save_pretrained(partial, safe_serialization=True)
        sync_tree(partial)
    except (OSError, SafetensorError) as error:
        reason = why_not_written(error, output_dir)
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"The pipeline could not be written to {output_dir} ({reason}). "
            "What was there before is untouched. Make room, then run the same command again."
        ) from error
    for name in (SCHEDULER_CONFIG, UNET_CONFIG, UNET_WEIGHTS, MODEL_INDEX):
        destination = output_dir / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, destination)
        sync_folder(destination.parent)
    shutil.rmtree(partial)


def load(model: str, revision: str | None = None, cache_dir: str | None = None) -> Artifact:
    """Load `model`, a folder or an id on the Hub, on the CPU in float32 and eval mode.

    Files of the Hub are checked against the Hub's hashes before they are read. UserError for what
    is not an unconditional pipeline, and for weights that are not safetensors.
    """
    folder = Path(model)
    if folder.is_dir():
        if revision is not None:
            raise UsageError(f"--revision belongs to models on the Hub; {model} is a folder here.")
        return _load_folder(folder, folder.resolve().name, None)
    if not hub.is_repo_id(model):
        raise UserError(f"{model} is neither a folder here nor the id of a model on the Hub.")
    wanted = ["*.json", "*.safetensors", "*/*.json", "*/*.safetensors"]
    snapshot = hub.fetch(model, revision=revision, allow_patterns=wanted, cache_dir=cache_dir)
    return _load_folder(snapshot.folder, model, snapshot.commit)


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return sha_fileobj(file).hex()


def build_sampler(
    name: str, scheduler_config: dict[str, Any], num_inference_steps: int | None
) -> tuple[SchedulerMixin, int]:
    """The scheduler called `name` for a model trained with `scheduler_config`, and its step count.

    Spacing is trailing, so that every step count starts at the last timestep, which is pure noise.
    The predicted image is kept in [-1, 1] at each step where the model's own scheduler says so.
    UsageError for a step count outside 1..T.
    """
    kind, thresholds = SAMPLERS[name]
    chain = int(scheduler_config.get("num_train_timesteps", 1000))
    steps = num_inference_steps
    if steps is None:
        steps = chain if name == "ddpm" else min(SAMPLER_STEPS, chain)
    if not 1 <= steps <= chain:
        raise UsageError(
            f"--num_inference_steps {num_inference_steps}: this model was trained with {chain} "
            f"steps, so give a number from 1 to {chain}."
        )
    extra: dict[str, Any] = {"timestep_spacing": "trailing"}
    if thresholds:
        extra |= {
            "thresholding": bool(scheduler_config.get("clip_sample", True)),
            "sample_max_value": float(scheduler_config.get("clip_sample_range", 1.0)),
        }
    return kind.from_config(scheduler_config, **extra), steps


@torch.no_grad()
def generate(
    unet: UNet2DModel,
    sampler: SchedulerMixin,
    num_inference_steps: int,
    seeds: Sequence[int],
    batch_size: int,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Draw one image a seed: (seed, [C, H, W] uint8 on the CPU), in the order of `seeds`.

    All the noise of an image comes from a CPU generator of its own seed, so it does not depend on
    the device's generator, on the batch, or on the other images. The loop is DDPMPipeline's, with
    its result for the same generators; `unet` is used as it is, on the device it is on.
    """
    size = unet.config.sample_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    device, dtype = unet.device, unet.dtype
    takes_generator = "generator" in inspect.signature(sampler.step).parameters
    for start in range(0, len(seeds), batch_size):
        chosen = list(seeds[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seed) for seed in chosen]
        shape = (len(chosen), unet.config.in_channels, *sides)
        images = randn_tensor(shape, generator=generators, device=device, dtype=dtype)
        _set_timesteps(sampler, num_inference_steps)
        images = images * sampler.init_noise_sigma
        extra = {"generator": generators} if takes_generator else {}
        for timestep in sampler.timesteps:
            prediction = unet(sampler.scale_model_input(images, timestep), timestep).sample
            images = sampler.step(prediction, timestep, images, **extra).prev_sample
        yield from zip(chosen, to_pixels(images), strict=True)


def _set_timesteps(sampler: SchedulerMixin, num_inference_steps: int) -> None:
    """`sampler.set_timesteps`, less the timestep -1 that some counts get (61 of 1000 is one).

    diffusers spaces "trailing" with an arange of a float step, which may end one value late; -1 is
    then read as the noisiest entry of alphas_cumprod and spoils the finished image.
    """
    sampler.set_timesteps(num_inference_steps)
    if len(sampler.timesteps) > num_inference_steps:
        sampler.timesteps = sampler.timesteps[:num_inference_steps]
        if hasattr(sampler, "sigmas"):  # one a timestep, and the 0 after the last
            sampler.sigmas = torch.cat((sampler.sigmas[:num_inference_steps], sampler.sigmas[-1:]))


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] in [-1, 1] -> uint8 on the CPU, rounded as diffusers' pipelines do."""
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def to_pillow(image: torch.Tensor) -> Image.Image:
    """[C, H, W] uint8, C of 1 or 3 -> mode L or RGB."""
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def save_png(image: torch.Tensor | Image.Image, path: Path, text: dict[str, str]) -> None:
    """Write a PNG whole or not at all, with `text` as its text chunks."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    pillow = to_pillow(image) if isinstance(image, torch.Tensor) else image
    partial = path.with_name(f".{path.name}.partial")
    pillow.save(partial, "PNG", pnginfo=info)
    os.replace(partial, path)


def read_png_text(path: Path) -> dict[str, str]:
    """The text chunks of a PNG; empty for a file that is no PNG or is cut short."""
    try:
        with Image.open(path) as image:
            image.load()
            return {key: str(value) for key, value in getattr(image, "text", {}).items()}
    except (OSError, SyntaxError):
        return {}


def read_png(path: Path) -> torch.Tensor:
    """A PNG of mode L or RGB -> [C, H, W] uint8."""
    array = np.array(Image.open(path))
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def choose_device(name: str) -> torch.device:
    """`auto` is the accelerator of this machine if it has one. UsageError for one it has not."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"--device {name} cannot be used here: {reason}") from None
    return device


def grid(images: Sequence[torch.Tensor]) -> Image.Image:
    """Images ([C, H, W] uint8, all alike) side by side, as square as can be, small ones enlarged.

    Pixels are repeated a whole number of times until an image is 64 wide or more; nothing is
    smoothed.
    """
    channels, height, width = images[0].shape
    factor = max(1, math.ceil(64 / max(height, width)))
    columns = math.ceil(math.sqrt(len(images)))
    gap, tall, wide = 2, height * factor, width * factor
    rows = math.ceil(len(images) / columns)
    sheet = np.full((rows * (tall + gap) + gap, columns * (wide + gap) + gap, channels), 255,
                    dtype=np.uint8)  # fmt: skip
    for index, image in enumerate(images):
        top, left = (gap + n * (s + gap) for n, s in zip(divmod(index, columns), (tall, wide),
                                                        strict=True))  # fmt: skip
        large = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        sheet[top : top + tall, left : left + wide] = large.permute(1, 2, 0).numpy()
    return Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet)


def _load_folder(folder: Path, name: str, commit: str | None) -> Artifact:
    if not (folder / MODEL_INDEX).is_file():
        raise UserError(
            f"{name} is no diffusers pipeline: it has no {MODEL_INDEX}. For a training run that "
            "was cut short, run train.py again with the same command to finish it."
        )
    index = read_json(folder / MODEL_INDEX)
    kind, unet = (
        (index.get("_class_name"), index.get("unet")) if isinstance(index, dict) else (None, None)
    )
    if kind not in PIPELINES or unet != ["diffusers", "UNet2DModel"]:
        raise UserError(
            f"{name} is a {kind or 'file'} that this command cannot sample: it draws from "
            f"unconditional pipelines with a UNet2DModel ({' or '.join(PIPELINES)})."
        )
    if not (folder / UNET_WEIGHTS).is_file():
        raise UserError(
            f"{name} has no {UNET_WEIGHTS}. Only safetensors are loaded: pickled weights can run "
            "code. Ask its author to convert them."
        )
    missing = [file for file in PIPELINE_FILES if not (folder / file).is_file()]
    if missing:
        raise UserError(f"{name} is not whole: {', '.join(missing)} missing.")
    try:
        unet = UNet2DModel.from_pretrained(
            folder, subfolder="unet", use_safetensors=True, local_files_only=True
        )
        config = read_json(folder / SCHEDULER_CONFIG)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{name} cannot be loaded: {reason}") from error
    return Artifact(unet.eval(), config, name, commit or sha256_of(folder / UNET_WEIGHTS))
