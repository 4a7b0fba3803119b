"""The UNet and the noise schedule: config -> UNet2DModel and DDPMScheduler.

Configs may come from strangers, and diffusers checks little of them: `parse_unet_config` checks
types and ranges, and `empty_unet` the cost of the model, before any memory is allocated.

`python -m ddpm.diffusion.unet` measures and prints the table of presets in docs/presets.md.
"""

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import no_init_weights

from ddpm import download, hub
from ddpm.config.base import as_flag
from ddpm.config.train import DiffusionConfig, ModelConfig
from ddpm.config.values import Resolution, size_of
from ddpm.errors import UsageError, UserError, foreign_errors
from ddpm.file_io import read_json
from ddpm.run_folder import UNET_CONFIG
from ddpm.typed_json import require_settings


@dataclass(frozen=True)
class Preset:
    """A UNet for resolutions from `resolution` up to that of the next preset, by their area.

    `block_out_channels` and `layers_per_block` are per level. Feature maps of the sizes
    `attention_sizes` get self-attention, as the middle block always does. `attention_head_dim` is a
    width at which flash attention is fast.
    """

    resolution: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    attention_sizes: tuple[int, ...]
    attention_head_dim: int


# 32 and 256 are the sizes of the DDPM paper (arXiv 2006.11239, appendix B), with wider heads.
PRESETS = (
    Preset(8, (16, 32), 1, (), 32),
    Preset(16, (64, 128, 128), 2, (8,), 64),
    Preset(32, (128, 256, 256, 256), 2, (16,), 64),
    Preset(64, (128, 256, 256, 512), 2, (16, 8), 64),
    Preset(128, (128, 128, 256, 256, 512), 2, (16, 8), 64),
    Preset(256, (128, 128, 256, 256, 512, 512), 2, (16,), 64),
)


PLAIN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D")
"""Blocks that fit each other in any order."""
SETTINGS: dict[str, Any] = {
    **get_type_hints(UNet2DModel.__init__),
    # Narrower or wider than the hints of diffusers
    "time_embedding_type": Literal["positional", "fourier", "learned"],
    "down_block_types": tuple[
        Literal[
            "DownBlock2D",
            "AttnDownBlock2D",
            "ResnetDownsampleBlock2D",
            "SkipDownBlock2D",
            "AttnSkipDownBlock2D",
        ],
        ...,
    ],
    "mid_block_type": Literal["UNetMidBlock2D"] | None,
    "up_block_types": tuple[
        Literal[
            "UpBlock2D",
            "AttnUpBlock2D",
            "ResnetUpsampleBlock2D",
            "SkipUpBlock2D",
            "AttnSkipUpBlock2D",
        ],
        ...,
    ],
    "downsample_type": Literal["conv", "resnet"],
    "upsample_type": Literal["conv", "resnet"],
    "norm_num_groups": int | None,
}
"""Types of the settings of a UNet2DModel: the blocks are those that need no text."""
LIMITS = {
    "sample_size": (1, 2**14),
    "in_channels": (1, 2**10),
    "out_channels": (1, 2**10),
    "time_embedding_dim": (1, 2**15),
    "freq_shift": (0, 1),
    "block_out_channels": (1, 2**14),
    "layers_per_block": (1, 16),
    "mid_block_scale_factor": (1e-3, 1e3),
    "downsample_padding": (0, 1),
    "dropout": (0, 1),
    "attention_head_dim": (1, 2**14),
    "norm_num_groups": (1, 2**14),
    "attn_norm_num_groups": (1, 2**14),
    "norm_eps": (0, 1),
    "num_class_embeds": (1, 10**6),
    "num_train_timesteps": (1, 10**5),
    "": (-math.inf, math.inf),
}
"""Lowest and highest number of each setting: those of real models lie far inside."""
MAX_LEVELS = 12


def build_unet(
    config: ModelConfig, resolution: Resolution, channels: int, num_classes: int | None = None
) -> UNet2DModel:
    """Return a UNet2DModel with random weights for images [B, channels, H, W] of a resolution.

    With `num_classes` it has a class embedding for these and the null class; it is 0, so that a new
    UNet predicts the same for all. The weights are drawn from torch's global generator. Raise
    UsageError for a resolution that the levels cannot halve, UserError for a config that cannot be
    read or makes no model.
    """
    name = config.model_config_name_or_path
    source = f"The model config {name}"
    unet_config = preset_config(resolution, channels)
    if name is not None:
        shape = {key: unet_config[key] for key in ("sample_size", "in_channels", "out_channels")}
        unet_config = {**parse_unet_config(_load_config(name), source), **shape}
    unet_config["dropout"] = config.dropout or unet_config.get("dropout", 0.0)
    require_divisible(resolution, None if name is None else unet_config["block_out_channels"])
    if name is not None:
        empty_unet(unet_config, source)
    if num_classes is None:
        return UNet2DModel(**unet_config)
    unet = UNet2DModel(**{**unet_config, "num_class_embeds": num_classes + 1})
    torch.nn.init.zeros_(unet.class_embedding.weight)
    return unet


def parse_unet_config(
    config: dict[str, Any], source: str, num_classes: int | None = None
) -> dict[str, Any]:
    """Return the settings of a UNet2DModel in its config.json; other entries are left out.

    Raise UserError, which begins with `source`, for a wrong type, a number outside LIMITS, and
    classes other than `num_classes` and the null class, by default any.
    """
    config = dict(config)
    for name in ("down_block_types", "up_block_types"):
        if isinstance(config.get(name), list):  # the first diffusers began their names with UNetRes
            config[name] = [str(block).removeprefix("UNetRes") for block in config[name]]
    settings = require_settings(SETTINGS, LIMITS, config, source)
    if any(len(value) > MAX_LEVELS for value in settings.values() if isinstance(value, list)):
        raise UserError(f"{source} has more than {MAX_LEVELS} levels.")
    num_embeddings = None if num_classes is None else num_classes + 1
    classes = (settings.get("num_class_embeds"), settings.get("class_embed_type"))
    if classes != (num_embeddings, None) and num_classes is not None:
        raise UserError(
            f"{source}: its num_class_embeds is not {num_classes + 1}, one for each of the "
            f"{num_classes} names in labels.json and one for none: one of the files was changed."
        )
    if classes != (num_embeddings, None):
        raise UserError(
            f"{source}: the UNet draws a class that must be named, which this command cannot do."
        )
    return settings


def empty_unet(settings: dict[str, Any], source: str) -> UNet2DModel:
    """Return a UNet2DModel without memory for its weights (device "meta").

    Raise UserError, which begins with `source`, for settings that make no model, or one that does
    not run or that needs more memory than there is.
    """
    sentence = f"{source}: This UNet2DModel config makes no model"
    with foreign_errors(sentence), no_init_weights(), torch.device("meta"):
        unet = UNet2DModel(**settings)
    if any(module.heads < 1 for module in unet.modules() if isinstance(module, Attention)):
        raise UserError(f"{source}: attention_head_dim is larger than a level has channels.")
    height, width = image_size(unet)
    factor = _factor(unet.config.block_out_channels)
    if height % factor or width % factor:
        raise UserError(f"{source}: sample_size is not a multiple of {factor}, as its levels need.")
    _require_memory(unet, height, width, source)
    if not {*unet.config.down_block_types, *unet.config.up_block_types} <= {*PLAIN_BLOCKS}:
        images = torch.zeros(1, unet.config.in_channels, 8 * factor, 8 * factor, device="meta")
        with foreign_errors(f"{source}: its blocks do not fit each other"), torch.no_grad():
            unet(images, torch.ones((), device="meta"))
    return unet


def image_size(unet: UNet2DModel) -> tuple[int, int]:
    """Return height and width of the model's images."""
    return size_of(unet.config.sample_size)


def require_divisible(
    resolution: Resolution, block_out_channels: Sequence[int] | None = None
) -> None:
    """Raise UsageError, with the nearest sizes that they divide, for levels that do not divide it.

    `block_out_channels` are those of a UNet; None are those of the preset for each size.
    """

    def factor_of(size: Resolution) -> int:
        return _factor(block_out_channels or _preset(size).block_out_channels)

    def is_divisible(size: tuple[int, ...]) -> bool:
        return min(size) > 0 and not any(side % factor_of(size) for side in size)

    size, factor = size_of(resolution), factor_of(resolution)
    is_square, nearest, multiple = isinstance(resolution, int), [], factor
    if is_divisible(size):
        return
    while not nearest:  # the preset for a larger size may have more levels
        sides = [(side // multiple * multiple, -(-side // multiple) * multiple) for side in size]
        sizes = {*(zip(*sides, strict=True) if is_square else itertools.product(*sides))}
        nearest, multiple = [*filter(is_divisible, sizes)], 2 * multiple
    nearest.sort(key=lambda other: (math.dist(other, size), other))
    choices = [as_flag(other[0] if is_square else other) for other in sorted(nearest[:2])]
    raise UsageError(
        f"--resolution {as_flag(resolution)} is not a multiple of {factor}, by which this UNet "
        f"divides {'it' if is_square else 'each side'}. Use {' or '.join(choices)}."
    )


def _factor(block_out_channels: Sequence[int]) -> int:
    """Return the number by which the levels divide height and width, all but the last by 2."""
    return 2 ** (len(block_out_channels) - 1)


def _require_memory(unet: UNet2DModel, height: int, width: int, source: str) -> None:
    """Raise UserError unless the weights and one image in the UNet fit into memory, in float32.

    The memory is that of the machine (on POSIX only) or of its GPU, whichever is larger.
    """
    parameters, layers = unet.num_parameters(), unet.config.layers_per_block
    levels = enumerate(unet.config.block_out_channels)
    feature_maps = [width * height * channels // 4**level for level, channels in levels]
    # The skip connections, and in the last level the concatenated input with its copies
    numbers = parameters + (layers + 1) * sum(feature_maps) + 6 * max(feature_maps)
    is_posix = os.name == "posix"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if is_posix else math.inf
    if 4 * numbers > memory and torch.cuda.is_available():
        memory = max(memory, torch.cuda.mem_get_info()[1])
    if 4 * numbers > memory:
        raise UserError(
            f"{source}: {parameters:,} parameters and an image of {width}x{height} take about "
            f"{4 * numbers / 2**30:,.0f} GiB, and this machine has {memory / 2**30:,.0f} GiB."
        )


def _side(resolution: Resolution) -> int:
    """Return the side of the square that has the area of a resolution, rounded down."""
    return math.isqrt(math.prod(size_of(resolution)))


def _preset(resolution: Resolution) -> Preset:
    smaller = [preset for preset in PRESETS if preset.resolution <= _side(resolution)]
    return smaller[-1] if smaller else PRESETS[0]


def preset_config(resolution: Resolution, channels: int) -> dict[str, Any]:
    """Return the arguments of UNet2DModel for a resolution."""
    preset, side = _preset(resolution), _side(resolution)
    sizes = [side >> level for level in range(len(preset.block_out_channels))]
    # Between two presets, a feature map counts as the nearest attention size below its own.
    has_attention = [any(s <= size < 2 * s for s in preset.attention_sizes) for size in sizes]
    return {
        "sample_size": resolution,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": preset.block_out_channels,
        "layers_per_block": preset.layers_per_block,
        "attention_head_dim": preset.attention_head_dim,
        "norm_num_groups": min(32, *preset.block_out_channels),
        "down_block_types": tuple(
            "AttnDownBlock2D" if attention else "DownBlock2D" for attention in has_attention
        ),
        "up_block_types": tuple(
            "AttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(has_attention)
        ),
    }


def build_scheduler(config: DiffusionConfig) -> DDPMScheduler:
    """Return the scheduler that is exported with the model.

    With trailing spacing, any number of sampling steps starts at the last timestep.
    """
    return DDPMScheduler(
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        timestep_spacing="trailing",
    )


def activation_bytes(unet: UNet2DModel) -> int:
    """Return the bytes of activations that the forward pass of one image saves for the backward.

    In float32, without the weights.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    saved_bytes: dict[int, int] = {}  # by address, since a storage may be saved more than once

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.zeros(1, unet.config.in_channels, *image_size(unet))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = unet(images, 0).sample  # keeps the saved tensors alive until they are counted
    del output
    return sum(saved_bytes.values())


def _load_config(name: str) -> dict[str, Any]:
    """Read config.json of a folder or repository, or that of the UNet of a pipeline."""
    subject, files = f"The model config {name}", [Path(UNET_CONFIG).name, UNET_CONFIG]
    advice = "give a folder or Hub id with a config.json of a UNet2DModel."
    folder = Path(name)
    if not folder.exists() and hub.is_repo_id(name):
        snapshot = download.download_snapshot(name, allow_patterns=files, kind="model config")
        folder = snapshot.folder
    paths = [path for path in (folder, *(folder / file for file in files)) if path.is_file()]
    if not paths:
        raise UserError(f"{subject} cannot be read: {advice}")
    config = read_json(paths[0])
    if config.get("_class_name") != "UNet2DModel" or not config.get("block_out_channels"):
        raise UserError(f"{subject} describes no UNet2DModel: {advice}")
    return config


def _print_presets() -> None:
    print(
        "| from resolution | channels per level | layers | attention at | parameters | "
        "activations, MiB per image |\n|---|---|---|---|---|---|"
    )
    for preset in PRESETS:
        unet = build_unet(ModelConfig(), preset.resolution, 3)
        sizes = ", ".join(map(str, preset.attention_sizes)) or "middle only"
        activations = activation_bytes(unet) / 2**20
        print(
            f"| {preset.resolution} | {', '.join(map(str, preset.block_out_channels))} | "
            f"{preset.layers_per_block} | {sizes} | {unet.num_parameters() / 1e6:.2f} M | "
            f"{activations:.1f} |"
        )


if __name__ == "__main__":
    _print_presets()
