"""Which network and which noise: config -> UNet2DModel and DDPMScheduler.

`python -m ddpm.model` prints the table of presets in docs/presets.md, measured as it prints.
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
    """A UNet for resolutions from `resolution` up to the next preset's.

    Channels and layers a level, the sides of the feature maps that get self-attention (the middle
    always does), and the width of an attention head, chosen so that flash attention is fast.
    """

    resolution: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    attention_sides: tuple[int, ...]
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
    """A freshly initialised UNet2DModel for [B, channels, resolution, resolution].

    Draws the weights from torch's global generator. UsageError for a resolution that its levels
    cannot halve; UserError for a config that cannot be had or does not fit.
    """
    if config.model_config_name_or_path is not None:
        settings = _load_config(config.model_config_name_or_path)
        settings |= {"sample_size": resolution, "in_channels": channels, "out_channels": channels}
    else:
        settings = preset_config(resolution, channels)
    settings["dropout"] = config.dropout or settings.get("dropout", 0.0)
    levels = len(settings["block_out_channels"])
    require_divisible(resolution, 2 ** (levels - 1))
    try:
        return UNet2DModel.from_config(settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"This UNet2DModel config makes no model: {error}") from error


def preset_config(resolution: int, channels: int) -> dict[str, Any]:
    """The arguments of UNet2DModel that belong to a resolution."""
    fitting = [preset for preset in PRESETS if preset.resolution <= resolution]
    preset = fitting[-1] if fitting else PRESETS[0]
    sides = [resolution >> level for level in range(len(preset.block_out_channels))]
    # At sizes between two presets the maps fall between the named sides: take the nearest below.
    attends = [
        any(wanted <= side < 2 * wanted for wanted in preset.attention_sides) for side in sides
    ]
    return {
        "sample_size": resolution,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": preset.block_out_channels,
        "layers_per_block": preset.layers_per_block,
        "attention_head_dim": preset.attention_head_dim,
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
    }


def require_divisible(resolution: int, factor: int) -> None:
    """UsageError unless `resolution` can be halved as often as the UNet halves it."""
    if resolution % factor or resolution < factor:
        below, above = resolution // factor * factor, -(-resolution // factor) * factor
        nearest = f"{below} or {above}" if below else f"{above}"
        raise UsageError(
            f"--resolution {resolution} is not a multiple of {factor}, by which this UNet divides "
            f"it. Use {nearest}."
        )


def build_scheduler(config: DiffusionConfig) -> DDPMScheduler:
    """The noising chain, as it is exported: trailing spacing, so any step count starts at T."""
    return DDPMScheduler(
        num_train_timesteps=config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        timestep_spacing="trailing",
    )


def activation_bytes(unet: UNet2DModel, resolution: int) -> int:
    """Bytes that one image's forward pass keeps for the backward one, in float32, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.zeros(1, unet.config.in_channels, resolution, resolution)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = unet(images, 0).sample
    del output
    return sum(kept.values())


def _load_config(name: str) -> dict[str, Any]:
    thing = f"The model config {name}"
    advice = "give a folder or Hub id with a config.json of a UNet2DModel."
    with hub.hub_errors(thing):
        try:
            settings = _config_at(name)
        except OSError as error:
            # diffusers wraps every cause in an OSError; those of the Hub are told by the Hub room.
            if hub.describe_error(error, thing):
                raise
            raise UserError(f"{thing} cannot be read: {advice}") from error
    if settings.get("_class_name") != "UNet2DModel" or "block_out_channels" not in settings:
        raise UserError(f"{thing} describes no UNet2DModel: {advice}")
    return settings


def _config_at(name: str) -> dict[str, Any]:
    """config.json at the top of a folder or repository, or that of the unet of a pipeline."""
    try:
        return dict(UNet2DModel.load_config(name))
    except OSError as error:
        try:
            return dict(UNet2DModel.load_config(name, subfolder="unet"))
        except OSError:
            raise error from None


def _print_presets() -> None:
    print(
        "| from resolution | channels a level | layers | attention at | parameters | "
        "activations, MiB an image |\n|---|---|---|---|---|---|"
    )
    for preset in PRESETS:
        unet = build_unet(ModelConfig(), preset.resolution, 3)
        sides = ", ".join(map(str, preset.attention_sides)) or "middle only"
        activations = activation_bytes(unet, preset.resolution) / 2**20
        print(
            f"| {preset.resolution} | {', '.join(map(str, preset.block_out_channels))} | "
            f"{preset.layers_per_block} | {sides} | {unet.num_parameters() / 1e6:.2f} M | "
            f"{activations:.1f} |"
        )


if __name__ == "__main__":
    _print_presets()
