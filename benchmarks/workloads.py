"""The models and images that several benchmarks train on. Importing it makes `ddpm` importable."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Size:
    """A model and its batch. `num_images` noise images are written; 0 means the digits."""

    resolution: int
    batch_size: int
    block_out_channels: tuple[int, ...] | None = None
    attention_head_dim: int = 64
    num_images: int = 1024

    def unet_config(self) -> dict[str, Any]:
        """Return the config of a UNet2DModel: one layer a level and attention in the middle block,
        or the preset of the resolution."""
        if self.block_out_channels is None:
            from ddpm.diffusion.unet import preset_config

            return preset_config(self.resolution, 3)
        levels = len(self.block_out_channels)
        return {
            "sample_size": self.resolution,
            "in_channels": 3,
            "out_channels": 3,
            "layers_per_block": 1,
            "block_out_channels": self.block_out_channels,
            "attention_head_dim": self.attention_head_dim,
            "norm_num_groups": min(32, self.block_out_channels[0]),
            "down_block_types": ("DownBlock2D",) * levels,
            "up_block_types": ("UpBlock2D",) * levels,
        }


SIZES = {
    "toy": Size(8, 4, (8, 16), 8, 16),
    "8": Size(8, 64, (32, 64), 32, 0),
    "32": Size(32, 32, (32, 64, 64)),
    "64": Size(64, 8, (32, 64, 64, 64)),
    "preset-32": Size(32, 128, num_images=8192),
    "preset-64": Size(64, 64, num_images=4096),
    "preset-128": Size(128, 16, num_images=2048),
}


def write_workload(size: Size, folder: Path) -> list[str]:
    """Write the UNet's config and the images, and return the flags that name them."""
    model, images = folder / "model", folder / "images"
    model.mkdir()
    config = {**size.unet_config(), "_class_name": "UNet2DModel"}
    (model / "config.json").write_text(json.dumps(config))
    if size.num_images:
        write_images(images, size.num_images, size.resolution)
        data = f"--train_data_dir={images}"
    else:
        data = f"--dataset_name={ROOT / 'data' / 'digits'}"
    return [data, f"--resolution={size.resolution}", f"--model_config_name_or_path={model}"]


def write_images(folder: Path, count: int, side: int) -> None:
    """Write PNGs of smooth noise, which compress about as well as photographs."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    for index in range(count):
        coarse = noise.integers(0, 256, (max(side // 4, 2), max(side // 4, 2), 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side)).save(folder / f"{index:05d}.png")
