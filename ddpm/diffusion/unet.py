"""The UNet and the noise schedule: config -> UNet2DModel and DDPMScheduler.

`python -m ddpm.diffusion.unet` measures and prints the table of presets in docs/presets.md.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel

from ddpm import hub
from ddpm.config.train import DiffusionConfig, ModelConfig
from ddpm.errors import UsageError, UserError


@dataclass(frozen=True)
class Preset:
    """A UNet for resolutions from `resolution` up to that of the next preset.

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
    Preset(8, (32, 64), 1, (), 32),
    Preset(16, (64, 128, 128), 2, (8,), 64),
    Preset(32, (128, 256, 256, 256), 2, (16,), 64),
    Preset(64, (128, 256, 256, 512), 2, (16, 8), 64),
    Preset(128, (128, 128, 256, 256, 512), 2, (16, 8), 64),
    Preset(256, (128, 128, 256, 256, 512, 512), 2, (16,), 64),
)


def build_unet(config: ModelConfig, resolution: int, channels: int) -> UNet2DModel:
    """Return a UNet2DModel with random weights for images [B, channels, resolution, resolution].

    The weights are drawn from torch's global generator. Raise UsageError for a resolution that the
    levels cannot halve, UserError for a config that cannot be read or makes no model.
    """
    if config.model_config_name_or_path is not None:
        unet_config = _load_config(config.model_config_name_or_path)
        unet_config |= {
            "sample_size": resolution,
            "in_channels": channels,
            "out_channels": channels,
        }
    else:
        unet_config = preset_config(resolution, channels)
    unet_config["dropout"] = config.dropout or unet_config.get("dropout", 0.0)
    levels = len(unet_config["block_out_channels"])
    _require_divisible(resolution, 2 ** (levels - 1))
    try:
        return UNet2DModel.from_config(unet_config)
    except (ValueError, TypeError) as error:
        raise UserError(f"This UNet2DModel config makes no model: {error}") from error


def preset_config(resolution: int, channels: int) -> dict[str, Any]:
    """Return the arguments of UNet2DModel for a resolution."""
    smaller = [preset for preset in PRESETS if preset.resolution <= resolution]
    preset = smaller[-1] if smaller else PRESETS[0]
    sizes = [resolution >> level for level in range(len(preset.block_out_channels))]
    # Between two presets, a feature map counts as the nearest attention size below its own.
    has_attention = [any(s <= size < 2 * s for s in preset.attention_sizes) for size in sizes]
    return {
        "sample_size": resolution,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": preset.block_out_channels,
        "layers_per_block": preset.layers_per_block,
        "attention_head_dim": preset.attention_head_dim,
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


def activation_bytes(unet: UNet2DModel, resolution: int) -> int:
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

    images = torch.zeros(1, unet.config.in_channels, resolution, resolution)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = unet(images, 0).sample  # keeps the saved tensors alive until they are counted
    del output
    return sum(saved_bytes.values())


def _require_divisible(resolution: int, factor: int) -> None:
    """Raise UsageError unless `resolution` is a positive multiple of `factor`."""
    if resolution % factor or resolution < factor:
        below, above = resolution // factor * factor, -(-resolution // factor) * factor
        nearest = f"{below} or {above}" if below else f"{above}"
        raise UsageError(
            f"--resolution {resolution} is not a multiple of {factor}, by which this UNet divides "
            f"it. Use {nearest}."
        )


def _load_config(name: str) -> dict[str, Any]:
    """Read the config of a UNet2DModel from a folder or the Hub."""
    subject = f"The model config {name}"
    advice = "give a folder or Hub id with a config.json of a UNet2DModel."
    with hub.hub_errors(subject):
        try:
            config = _read_config_json(name)
        except OSError as error:
            # diffusers wraps every cause in an OSError; hub_errors describes those of the Hub.
            if hub.describe_error(error, subject):
                raise
            raise UserError(f"{subject} cannot be read: {advice}") from error
    if config.get("_class_name") != "UNet2DModel" or "block_out_channels" not in config:
        raise UserError(f"{subject} describes no UNet2DModel: {advice}")
    return config


def _read_config_json(name: str) -> dict[str, Any]:
    """Read config.json of a folder or repository, or that of the UNet of a pipeline."""
    try:
        return dict(UNet2DModel.load_config(name))
    except OSError as error:
        try:
            return dict(UNet2DModel.load_config(name, subfolder="unet"))
        except OSError:
            raise error from None


def _print_presets() -> None:
    print(
        "| from resolution | channels per level | layers | attention at | parameters | "
        "activations, MiB per image |\n|---|---|---|---|---|---|"
    )
    for preset in PRESETS:
        unet = build_unet(ModelConfig(), preset.resolution, 3)
        sizes = ", ".join(map(str, preset.attention_sizes)) or "middle only"
        activations = activation_bytes(unet, preset.resolution) / 2**20
        print(
            f"| {preset.resolution} | {', '.join(map(str, preset.block_out_channels))} | "
            f"{preset.layers_per_block} | {sizes} | {unet.num_parameters() / 1e6:.2f} M | "
            f"{activations:.1f} |"
        )


if __name__ == "__main__":
    _print_presets()
