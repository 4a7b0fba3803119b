"""Feature networks from the Hub: image models that transformers loads from safetensors.

Distances in the features of such a model, say DINOv2's, agreed better with people's judgments than
those in Inception's (arXiv 2306.04675). The whole image is resized to the size that the model was
trained on, by antialiased bicubic interpolation, and scaled by its mean and standard deviation.

Every file is compared with the Hub's hashes, no code of the repository runs, and the model must be
as large as its weights. Needs transformers (requirements-prompt.txt).

Notation: B images of a batch, D features.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ddpm.download import download_snapshot
from ddpm.errors import UserError, foreign_errors
from ddpm.file_io import read_json
from ddpm.sampling.unet_files import require_safetensors
from ddpm.typed_json import parse_json

CONFIG, IMAGES = "config.json", "preprocessor_config.json"
FILES = [CONFIG, IMAGES, "model*.safetensors", "model.safetensors.index.json"]
MAX_SIDE = 2048
"""Largest height or width of images in pixels."""
MAX_LAYERS = 1000
"""Largest number in an entry of config.json that counts layers or blocks."""
ADVICE = "Give an image model whose weights transformers loads, such as facebook/dinov2-base."


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """preprocessor_config.json, as far as it is used. ValueError for values that cannot be."""

    size: int | dict[str, int | None] | None = None
    crop_size: int | dict[str, int | None] | None = None
    do_center_crop: bool | None = None
    do_normalize: bool | None = True
    image_mean: list[float] = field(default_factory=lambda: [0.5] * 3)
    image_std: list[float] = field(default_factory=lambda: [0.5] * 3)

    def __post_init__(self) -> None:
        if not all(1 <= side <= MAX_SIDE for side in self.height_and_width):
            raise ValueError(f"its images must have 1 to {MAX_SIDE} pixels a side")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or not min(self.image_std) > 0:
            raise ValueError("image_mean and image_std must be 3 numbers, of which std is above 0")

    @property
    def height_and_width(self) -> tuple[int, int]:
        """Size of the images that the model was trained on; (0, 0) if it is not stated."""
        size = self.crop_size if self.do_center_crop and self.crop_size else self.size
        if isinstance(size, dict):
            height = size.get("height") or size.get("shortest_edge") or 0
            return height, size.get("width") or height
        return size or 0, size or 0


class HubNetwork(nn.Module):
    """An image model of transformers as a feature network: [B, 3, H, W] uint8 to [B, D] float32.

    The features are those that the model names: its image embedding (CLIP), else its pooled output,
    else the class token or the mean over positions of its last hidden state.
    """

    def __init__(self, model: nn.Module, settings: ImageSettings, has_pooler: bool):
        super().__init__()
        self.model, self.has_pooler, self.size = model, has_pooler, settings.height_and_width
        is_scaled = settings.do_normalize
        mean, std = (settings.image_mean, settings.image_std) if is_scaled else ([0.0], [1.0])
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the features of pixels of any size."""
        images = nn.functional.interpolate(
            pixels.float(), self.size, mode="bicubic", antialias=True
        )
        images = (images.clamp(0, 255) / 255 - self.mean) / self.std
        if hasattr(self.model, "get_image_features"):
            output = self.model.get_image_features(pixel_values=images)
        else:
            output = self.model(pixel_values=images)
        if isinstance(output, torch.Tensor):
            return output
        pooled = getattr(output, "pooler_output", None) if self.has_pooler else None
        if pooled is not None:
            return pooled.flatten(1)
        hidden = output.last_hidden_state
        return hidden[:, 0] if hidden.ndim == 3 else hidden.mean((2, 3))


def load_hub_network(repo_id: str, device: torch.device) -> tuple[HubNetwork, str]:
    """Return the image model of a repository as a feature network, and its commit.

    UserError if it cannot be downloaded, is no image model with weights as safetensors, or gives
    other features for the same image each time.
    """
    if find_spec("transformers") is None:
        raise UserError(
            f"--features {repo_id} needs transformers: pip install -r requirements-prompt.txt."
        )
    snapshot = download_snapshot(repo_id, allow_patterns=FILES)
    for name in (CONFIG, IMAGES):
        if not (snapshot.folder / name).is_file():
            raise UserError(f"--features {repo_id}: it has no {name}. {ADVICE}")
    source = f"{repo_id}: {IMAGES}"
    settings = parse_json(ImageSettings, read_json(snapshot.folder / IMAGES, source=source), source)
    require_safetensors(snapshot.folder, repo_id)
    with _quiet_transformers():
        model, has_pooler = _load_model(snapshot.folder, repo_id)
    network = HubNetwork(model, settings, has_pooler).to(device).eval()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 3, *settings.height_and_width), generator=generator)
    with foreign_errors(f"--features {repo_id}: it takes no images", ADVICE):
        with torch.inference_mode():
            first, second = (network(pixels.to(device)) for _ in range(2))
        is_stable = torch.allclose(first, second, rtol=1e-3, atol=1e-3)
    if not is_stable:
        raise UserError(
            f"--features {repo_id}: it gives other features for the same image each time. {ADVICE}"
        )
    return network, snapshot.commit


def _load_model(folder: Path, repo_id: str) -> tuple[nn.Module, bool]:
    """Load the model in float32; the bool says whether the weights of its pooler are there."""
    config = read_json(folder / CONFIG, source=f"{repo_id}: {CONFIG}")
    _require_few_layers(config, f"{repo_id}: {CONFIG}")
    with foreign_errors(f"--features {repo_id}: transformers cannot load it", ADVICE):
        from transformers import AutoConfig, AutoModel

        options = {"local_files_only": True, "trust_remote_code": False}
        settings = AutoConfig.from_pretrained(folder, **options)
        with torch.device("meta"):
            described = AutoModel.from_config(settings, trust_remote_code=False).num_parameters()
        stored = _count_weights(folder)
        if described > 1.5 * stored:
            raise UserError(
                f"--features {repo_id}: {CONFIG} describes {described:,} weights, and its files "
                f"have {stored:,}. {ADVICE}"
            )
        model, info = AutoModel.from_pretrained(
            folder,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    missing = {name for name in info["missing_keys"] if not name.startswith("pooler.")}
    if missing:
        raise UserError(
            f"--features {repo_id}: its files lack {len(missing)} of its weights, such as "
            f"{min(missing)}. {ADVICE}"
        )
    return model, not info["missing_keys"]


def _count_weights(folder: Path) -> int:
    """Return the number of weights in the safetensors files of a folder."""
    count = 0
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes = (file.get_slice(name).get_shape() for name in file.keys())  # noqa: SIM118
            count += sum(torch.Size(shape).numel() for shape in shapes)
    return count


def _require_few_layers(config: dict[str, Any], source: str) -> None:
    """Raise UserError for more layers than MAX_LAYERS: each takes time and memory to describe."""
    for name, value in config.items():
        if isinstance(value, dict):
            _require_few_layers(value, source)
        if re.search("layer|depth|num_block", name):
            numbers = value if isinstance(value, list) else [value]
            if sum(number for number in numbers if isinstance(number, int)) > MAX_LAYERS:
                raise UserError(f"{source}: {name} is above {MAX_LAYERS}.")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Load without the progress bars and reports of transformers."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
