"""The UNet's presets, configs that are refused, and the noise schedule."""

import json
import os
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm.config.train import DiffusionConfig, ModelConfig
from ddpm.diffusion.unet import (
    PRESETS,
    _print_presets,
    activation_bytes,
    build_scheduler,
    build_unet,
    empty_unet,
    preset_config,
    require_divisible,
)
from ddpm.errors import UsageError, UserError


def attention_sizes(unet_config: dict) -> list[int]:
    """Sizes of the feature maps with self-attention in the down blocks."""
    blocks = enumerate(unet_config["down_block_types"])
    return [unet_config["sample_size"] >> level for level, block in blocks if "Attn" in block]


@pytest.mark.parametrize(
    ("resolution", "block_out_channels", "attention"),
    [
        (4, (16, 32), []),
        (8, (16, 32), []),
        (12, (16, 32), []),
        (16, (64, 128, 128), [8]),
        (28, (64, 128, 128), [14]),
        (32, (128, 256, 256, 256), [16]),
        (48, (128, 256, 256, 256), [24]),
        (64, (128, 256, 256, 512), [16, 8]),
        (96, (128, 256, 256, 512), [24, 12]),
        (128, (128, 128, 256, 256, 512), [16, 8]),
        (256, (128, 128, 256, 256, 512, 512), [16]),
        (512, (128, 128, 256, 256, 512, 512), [16]),
    ],
)
def test_preset_belongs_to_the_resolution(resolution, block_out_channels, attention):
    unet_config = preset_config(resolution, 3)
    assert unet_config["block_out_channels"] == block_out_channels
    assert attention_sizes(unet_config) == attention
    up = [block.replace("Up", "Down") for block in unet_config["up_block_types"]]
    assert up == list(reversed(unet_config["down_block_types"]))


@pytest.mark.parametrize(
    ("resolution", "square"),
    [((16, 24), 19), ((48, 80), 61), ((80, 48), 61), ((32, 128), 64), ((8, 128), 32)],
)
def test_rectangle_has_the_preset_of_the_square_of_its_area(resolution, square):
    assert {**preset_config(square, 3), "sample_size": resolution} == preset_config(resolution, 3)


def test_preset_is_a_unet_of_its_rectangle():
    with torch.device("meta"):
        unet, images = build_unet(ModelConfig(), (16, 24), 3), torch.zeros(1, 3, 16, 24)
        assert unet(images, 0).sample.shape == images.shape
    assert tuple(unet.config.sample_size) == (16, 24)


@pytest.mark.parametrize(
    ("preset", "channels"),
    list(zip(PRESETS, [1, 3, 1, 3, 1, 3], strict=True)),
    ids=lambda value: str(getattr(value, "resolution", value)),
)
def test_every_preset_is_a_unet_of_its_resolution(preset, channels):
    with torch.device("meta"):  # shapes without memory or arithmetic
        unet = build_unet(ModelConfig(), preset.resolution, channels)
        images = torch.zeros(2, channels, preset.resolution, preset.resolution)
        assert unet(images, 0).sample.shape == images.shape
    assert unet.config.sample_size == preset.resolution
    heads = [width % preset.attention_head_dim for width in preset.block_out_channels]
    assert heads[-1] == 0  # the middle always attends


def test_presets_are_in_ascending_order():
    resolutions = [preset.resolution for preset in PRESETS]
    assert resolutions == sorted(set(resolutions))


def test_weights_come_from_the_global_generator():
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return build_unet(ModelConfig(), 8, 1).conv_in.weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_dropout_reaches_every_residual_block():
    with torch.device("meta"):
        unet = build_unet(ModelConfig(dropout=0.25), 8, 1)
    rates = {part.p for part in unet.modules() if isinstance(part, torch.nn.Dropout)}
    assert 0.25 in rates
    assert {part.dropout.p for part in unet.down_blocks[0].resnets} == {0.25}


@pytest.mark.parametrize(
    ("resolution", "message"),
    [
        (30, "--resolution 30 is not a multiple of 4, by which this UNet divides it. Use 28 or 32"),
        (9, "is not a multiple of 2, by which this UNet divides it. Use 8 or 10."),
        (1, "is not a multiple of 2, by which this UNet divides it. Use 2."),
        (100, "is not a multiple of 8, by which this UNet divides it. Use 96 or 104."),
        (
            (50, 83),
            "--resolution 50,83 is not a multiple of 8, by which this UNet divides each side. "
            "Use 48,80 or 48,88.",
        ),
        ((50, 80), "Use 48,80 or 56,80."),
        ((8, 2048), "is not a multiple of 16, by which this UNet divides each side. Use 16,2048."),
        ((4, 2048), "Use 16,2048."),
    ],
)
def test_resolution_that_cannot_be_halved_is_refused_with_the_nearest_ones(resolution, message):
    with pytest.raises(UsageError) as error:
        build_unet(ModelConfig(), resolution, 3)
    assert message in str(error.value)


# A config instead of a preset


def save_config(folder, make_unet, **changes) -> ModelConfig:
    make_unet().save_config(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return ModelConfig(model_config_name_or_path=str(folder))


def test_config_of_a_folder_takes_the_sizes_of_the_data(tmp_path, make_unet):
    """It keeps its levels and widths, with the resolution and channels of this run."""
    unet = build_unet(save_config(tmp_path, make_unet), 16, 3)
    assert unet.config.block_out_channels == [8, 16]
    assert (unet.config.sample_size, unet.config.in_channels, unet.config.out_channels) == (
        16,
        3,
        3,
    )
    assert unet(torch.zeros(1, 3, 16, 16), 0).sample.shape == (1, 3, 16, 16)


def test_config_keeps_its_dropout_unless_another_is_given(tmp_path, make_unet):
    config = save_config(tmp_path, make_unet, dropout=0.3)
    assert build_unet(config, 8, 1).config.dropout == 0.3
    config = ModelConfig(model_config_name_or_path=str(tmp_path), dropout=0.1)
    assert build_unet(config, 8, 1).config.dropout == 0.1


@pytest.mark.parametrize("side", [1, 7, 15, 16, 30, 33, 63, 66, 127, 130])
def test_sizes_that_are_named_work(side):
    for other in (1, 4, 15, 33, 62, 127, 514, 2047):
        with suppress(UsageError):
            require_divisible((side, other))
            continue
        with pytest.raises(UsageError) as error:
            require_divisible((side, other))
        for choice in str(error.value).partition("Use ")[2].rstrip(".").split(" or "):
            require_divisible(tuple(map(int, choice.split(","))))


def test_resolution_is_checked_against_the_levels_of_the_config(tmp_path, make_unet):
    require_divisible((8, 10), (32, 64))
    with pytest.raises(UsageError, match="Use 8,12 or 12,12"):
        require_divisible((10, 12), (32, 64, 64))
    with pytest.raises(UsageError, match="--resolution 9 is not a multiple of 2"):
        build_unet(save_config(tmp_path, make_unet), 9, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_num_groups": 7},
        {"block_out_channels": [8, 16, 32]},
    ],
)
def test_config_that_makes_no_model_is_refused(tmp_path, make_unet, changes):
    with pytest.raises(UserError, match="This UNet2DModel config makes no model"):
        build_unet(save_config(tmp_path, make_unet, **changes), 8, 1)


@pytest.mark.parametrize("changes", [{"num_class_embeds": 10}, {"class_embed_type": "identity"}])
def test_config_with_class_labels_is_refused(tmp_path, make_unet, changes):
    """Training gives none, so the first step would fail."""
    with pytest.raises(UserError, match="The model config .* draws a class that must be named"):
        build_unet(save_config(tmp_path, make_unet, **changes), 8, 1)


def test_memory_is_that_of_the_machine_or_of_its_gpu(monkeypatch, make_unet):
    settings = dict(make_unet().config)
    monkeypatch.setattr(os, "sysconf", lambda name: 2**5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="this machine has 0 GiB"):
        empty_unet(settings, "x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 2**36))
    assert empty_unet(settings, "x").num_parameters() > 2**10 / 4


def test_folder_without_a_config_is_refused(tmp_path):
    config = ModelConfig(model_config_name_or_path=str(tmp_path))
    with pytest.raises(UserError, match="The model config .* cannot be read: give a folder or Hub"):
        build_unet(config, 8, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must be a JSON object"),
        ('"someone/other"', "must be a JSON object"),
        ('{"_class_name": "UNet2DModel", "block_out_channels": 8}', "it must be a list"),
        ('{"sample_size": 8}', "describes no UNet2DModel"),
        ('{"_class_name": "UNet2DModel"}', "describes no UNet2DModel"),
    ],
)
def test_config_of_something_else_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        build_unet(ModelConfig(model_config_name_or_path=str(tmp_path)), 8, 1)


def test_config_of_a_conditional_unet_is_refused(tmp_path, make_unet):
    with pytest.raises(UserError, match="describes no UNet2DModel"):
        build_unet(save_config(tmp_path, make_unet, _class_name="UNet2DConditionModel"), 8, 1)


def test_folder_that_is_not_there_is_refused_without_the_network():
    with pytest.raises(UserError, match="The model config ./absent cannot be read"):
        build_unet(ModelConfig(model_config_name_or_path="./absent"), 8, 1)


# The noise schedule


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_scheduler_is_that_of_diffusers_with_trailing_steps(schedule):
    config = DiffusionConfig(
        ddpm_num_steps=50, ddpm_beta_schedule=schedule, prediction_type="v_prediction"
    )
    built = build_scheduler(config)
    reference = DDPMScheduler(num_train_timesteps=50, beta_schedule=schedule)
    assert torch.equal(built.alphas_cumprod, reference.alphas_cumprod)
    assert built.config.prediction_type == "v_prediction"
    assert built.config.clip_sample
    built.set_timesteps(5)
    assert built.timesteps.tolist() == [49, 39, 29, 19, 9]


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_zero_terminal_snr_ends_in_pure_noise(schedule):
    """sqrt(alpha-bar) is shifted to end at 0 and scaled to begin as before: arXiv 2305.08891."""
    config = DiffusionConfig(
        ddpm_beta_schedule=schedule, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    built = build_scheduler(config)
    root = DDPMScheduler(beta_schedule=schedule).alphas_cumprod.double().sqrt()
    wanted = (root - root[-1]) * root[0] / (root[0] - root[-1])
    assert torch.allclose(built.alphas_cumprod.double().sqrt(), wanted, atol=1e-4)
    assert built.alphas_cumprod[-1] == 0.0


# Memory


class Scaling(torch.nn.Module):
    """relu(weight * images): its backward pass needs the images and the result."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.config = SimpleNamespace(in_channels=1, sample_size=(2, 8))

    def forward(self, images, timestep):
        return SimpleNamespace(sample=(self.weight * images).relu())


def test_activation_bytes_by_hand():
    assert activation_bytes(Scaling()) == 2 * 4 * 2 * 8  # two maps of 2x8 float32


def test_activations_grow_with_the_area_and_weights_do_not_count(make_unet):
    unets = [make_unet(resolution=resolution) for resolution in (16, 32)]
    small, large = map(activation_bytes, unets)
    assert 3.5 < large / small < 4.1
    assert all(parameter.grad is None for parameter in unets[0].parameters())


@pytest.mark.slow
def test_the_table_of_presets_is_what_the_code_makes(capsys):
    """Every cell but the last, which may move a little with torch's version."""
    _print_presets()
    table = capsys.readouterr().out.strip().splitlines()
    written = (Path(__file__).parents[2] / "docs" / "presets.md").read_text().splitlines()
    start = written.index(table[0])
    assert written[start + 1] == table[1]
    for line, now in zip(written[start + 2 :], table[2:], strict=False):
        (*facts, memory, _), (*facts_now, memory_now, _) = line.split("|"), now.split("|")
        assert facts == facts_now
        assert float(memory) == pytest.approx(float(memory_now), rel=0.05)
