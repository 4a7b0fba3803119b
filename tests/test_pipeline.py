"""The artifact and what it draws, against stock diffusers. Folders only: the Hub has its own tests.

Equality is exact where one program computes the same thing twice. A batch of another size may take
other kernels, so there a pixel may differ by one level of 255.
"""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from ddpm import pipeline, runfolder
from ddpm.errors import UsageError, UserError

SAMPLERS = list(pipeline.SAMPLERS)


@pytest.fixture
def folder(tmp_path, make_unet, chain):
    """A pipeline of 8x8 gray images, as training exports it."""
    pipeline.export(make_unet(), chain, tmp_path / "model")
    return tmp_path / "model"


def draw(artifact, seeds, *, sampler="ddpm", steps=5, batch_size=16) -> torch.Tensor:
    made, steps = pipeline.build_sampler(sampler, artifact.scheduler_config, steps)
    drawn = list(pipeline.generate(artifact.unet, made, steps, seeds, batch_size))
    assert [seed for seed, _ in drawn] == list(seeds)
    return torch.stack([image for _, image in drawn])


def at_most_one_level_apart(images: torch.Tensor, others: torch.Tensor) -> bool:
    return bool((images.int() - others.int()).abs().max() <= 1)


# The artifact


def test_stock_diffusers_loads_what_is_exported(folder, make_unet):
    loaded = DDPMPipeline.from_pretrained(folder)
    assert type(loaded.unet) is UNet2DModel
    assert type(loaded.scheduler) is DDPMScheduler
    assert loaded.scheduler.config.num_train_timesteps == 20
    for name, weight in make_unet().state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], weight)
    assert sorted(os.listdir(folder)) == ["model_index.json", "scheduler", "unet"]


def test_load_gives_back_what_was_exported(folder, make_unet):
    artifact = pipeline.load(str(folder))
    assert artifact.name == "model"
    assert artifact.version == pipeline.sha256_of(folder / runfolder.UNET_WEIGHTS)
    assert not artifact.unet.training
    assert artifact.unet.dtype == torch.float32
    assert artifact.scheduler_config["num_train_timesteps"] == 20
    for name, weight in make_unet().state_dict().items():
        assert torch.equal(artifact.unet.state_dict()[name], weight)


def test_folder_is_called_by_its_own_name_from_inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert pipeline.load(".").name == "model"


@pytest.mark.parametrize("cut", range(4))
def test_export_cut_short_leaves_each_file_old_or_new(cut, folder, make_unet, chain, monkeypatch):
    """Killed at the rename of file number `cut`; what is there still loads and draws."""
    old, new = make_unet().state_dict(), make_unet(seed=1).state_dict()
    renames, rename = [], os.replace

    def killed(source, destination):
        if len(renames) == cut:
            raise KeyboardInterrupt
        renames.append(destination)
        rename(source, destination)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.export(make_unet(seed=1), chain, folder)
    monkeypatch.undo()

    weights = load_file(folder / runfolder.UNET_WEIGHTS)
    expected = new if runfolder.UNET_WEIGHTS in map(str_of(folder), renames) else old
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    DDPMPipeline.from_pretrained(folder)

    pipeline.export(make_unet(seed=1), chain, folder)
    weights = load_file(folder / runfolder.UNET_WEIGHTS)
    assert all(torch.equal(weights[name], new[name]) for name in new)
    assert sorted(os.listdir(folder)) == ["model_index.json", "scheduler", "unet"]


def str_of(folder):
    return lambda path: path.relative_to(folder).as_posix()


@pytest.mark.parametrize("cut", range(4))
def test_first_export_cut_short_is_no_pipeline_yet(cut, tmp_path, make_unet, chain, monkeypatch):
    """model_index.json comes last, so a folder with one is whole."""
    renames, rename = [], os.replace

    def killed(source, destination):
        if len(renames) == cut:
            raise KeyboardInterrupt
        renames.append(destination)
        rename(source, destination)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.export(make_unet(), chain, tmp_path)
    with pytest.raises(UserError, match="cut short, run train.py again"):
        pipeline.load(str(tmp_path))


def test_export_out_of_disk_space_touches_nothing(folder, make_unet, chain, monkeypatch):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full_disk(self, *args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(UNet2DModel, "save_pretrained", full_disk)
    with pytest.raises(UserError, match="No space .* untouched"):
        pipeline.export(make_unet(seed=1), chain, folder)
    assert not list(folder.glob(".*.partial"))
    for path, content in before.items():
        assert path.read_bytes() == content


# What is refused


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_pickled_weights_are_refused_unopened(folder):
    (folder / runfolder.UNET_WEIGHTS).unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"would run code")
    with pytest.raises(UserError, match="Only safetensors are loaded"):
        pipeline.load(str(folder))


@pytest.mark.parametrize("name", [runfolder.UNET_CONFIG, runfolder.SCHEDULER_CONFIG])
def test_half_a_folder_is_refused_by_name(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"model is not whole: {name} missing"):
        pipeline.load(str(folder))


def test_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is no diffusers pipeline: it has no model_index\.json"):
        pipeline.load(str(tmp_path))


def test_conditional_pipeline_is_refused(folder):
    edit_json(folder / "model_index.json", _class_name="StableDiffusionPipeline",
              unet=["diffusers", "UNet2DConditionModel"])  # fmt: skip
    with pytest.raises(UserError, match="model is a StableDiffusionPipeline that this command"):
        pipeline.load(str(folder))


def test_latent_pipeline_is_refused(folder):
    """Its UNet is a UNet2DModel too, but draws latents for another network, not pixels."""
    edit_json(folder / "model_index.json", _class_name="LDMPipeline",
              vqvae=["diffusers", "VQModel"])  # fmt: skip
    with pytest.raises(UserError, match="model is a LDMPipeline that this command"):
        pipeline.load(str(folder))


def test_pipeline_with_another_kind_of_noise_is_refused(folder):
    """Variance-exploding chains have no alpha-bar: our samplers would draw nonsense from them."""
    edit_json(folder / "model_index.json", _class_name="ScoreSdeVePipeline",
              scheduler=["diffusers", "ScoreSdeVeScheduler"])  # fmt: skip
    with pytest.raises(UserError, match="model is a ScoreSdeVePipeline that this command"):
        pipeline.load(str(folder))


@pytest.mark.parametrize("index", ["[]", "{}", '{"unet": null}', '{"unet": []}', '"text"', "7"])
def test_index_of_something_else_is_refused(folder, index):
    (folder / "model_index.json").write_text(index)
    with pytest.raises(UserError, match="that this command cannot sample"):
        pipeline.load(str(folder))


def test_damaged_index_is_refused(folder):
    (folder / "model_index.json").write_text('{"_class_name": ')
    with pytest.raises(UserError, match=r"model_index\.json cannot be read as JSON"):
        pipeline.load(str(folder))


def test_cut_weights_are_refused(folder):
    path = folder / runfolder.UNET_WEIGHTS
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="model cannot be loaded"):
        pipeline.load(str(folder))


def test_weights_of_another_size_are_refused(folder):
    edit_json(folder / runfolder.UNET_CONFIG, block_out_channels=[8, 32])
    with pytest.raises(UserError, match="model cannot be loaded"):
        pipeline.load(str(folder))


def test_revision_belongs_to_the_hub(folder):
    with pytest.raises(UsageError, match="--revision belongs to models on the Hub"):
        pipeline.load(str(folder), revision="main")


@pytest.mark.parametrize("name", ["./absent", "/absent/too", "a/b/c", "no spaces"])
def test_neither_folder_nor_id_is_refused_without_the_network(name):
    with pytest.raises(UserError, match="neither a folder here nor the id of a model"):
        pipeline.load(name)


# What is drawn


def test_same_generators_give_the_pixels_of_stock_diffusers(folder):
    stock = DDPMPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    expected = stock(batch_size=3, generator=generators, num_inference_steps=7).images
    drawn = draw(pipeline.load(str(folder)), [3, 4, 5], steps=7)
    for image, reference in zip(drawn, expected, strict=True):
        assert np.array_equal(image[0].numpy(), np.array(reference))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_depends_only_on_its_seed(folder, sampler):
    artifact = pipeline.load(str(folder))
    torch.manual_seed(0)
    three = draw(artifact, [7, 8, 9], sampler=sampler)
    torch.manual_seed(1)
    torch.rand(5)
    assert torch.equal(draw(artifact, [7, 8, 9], sampler=sampler), three)
    assert at_most_one_level_apart(draw(artifact, [8], sampler=sampler)[0], three[1])
    assert at_most_one_level_apart(draw(artifact, [9, 7], sampler=sampler), three[[2, 0]])
    assert not torch.equal(three[0], three[1])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batch_size_changes_no_image(folder, batch_size):
    artifact = pipeline.load(str(folder))
    drawn = draw(artifact, range(5), batch_size=batch_size)
    assert at_most_one_level_apart(drawn, draw(artifact, range(5), batch_size=5))


def test_no_seeds_no_images(folder):
    artifact = pipeline.load(str(folder))
    made, steps = pipeline.build_sampler("ddim", artifact.scheduler_config, 2)
    assert list(pipeline.generate(artifact.unet, made, steps, [], 4)) == []


def test_generating_leaves_no_gradient_and_no_trace_in_the_global_generator(folder):
    artifact = pipeline.load(str(folder))
    before = torch.get_rng_state()
    draw(artifact, [0])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in artifact.unet.parameters())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clean_image_stays_in_range(make_unet, monkeypatch, sampler, prediction_type):
    """Predictions are far too large: clip_sample keeps the image in [-1, 1], else it leaves."""
    unet = make_unet()
    with torch.no_grad():
        unet.conv_out.weight *= 30
    reached = {}
    monkeypatch.setattr(
        pipeline, "to_pixels", lambda x: reached.update(top=x.abs().max().item()) or x
    )
    for clips in (True, False):
        config = DDPMScheduler(
            num_train_timesteps=20, prediction_type=prediction_type, clip_sample=clips
        ).config
        made, steps = pipeline.build_sampler(sampler, config, 10)
        list(pipeline.generate(unet, made, steps, [0], 1))
        assert (reached["top"] <= 1.001) == clips


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("steps", [1, 2, 13])
def test_every_sampler_draws_on_every_schedule(make_unet, sampler, schedule, steps):
    config = DDPMScheduler(num_train_timesteps=20, beta_schedule=schedule).config
    made, steps = pipeline.build_sampler(sampler, config, steps)
    ((_, image),) = pipeline.generate(make_unet(channels=3), made, steps, [0], 1)
    assert image.shape == (3, 8, 8)
    assert image.dtype == torch.uint8
    assert image.float().std() > 0


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 10, 25, 50, 61, 103])
def test_chain_is_walked_from_pure_noise_to_its_end(make_unet, monkeypatch, sampler, steps):
    """61 and 103 are two of the counts for which diffusers' trailing spacing, an arange with a
    float step, appends timestep -1: the noisiest entry of alphas_cumprod, taken after the last."""
    seen = []

    def saying_zero(images: torch.Tensor, timestep: torch.Tensor) -> SimpleNamespace:
        seen.append(int(timestep))
        return SimpleNamespace(sample=torch.zeros_like(images))

    unet = make_unet()
    monkeypatch.setattr(unet, "forward", saying_zero)
    made, counted = pipeline.build_sampler(sampler, dict(DDPMScheduler().config), steps)
    list(pipeline.generate(unet, made, counted, [0], 1))
    assert len(seen) == counted == steps
    assert seen[0] == 999
    assert seen == sorted(set(seen), reverse=True)
    assert seen[-1] >= 0


@pytest.mark.parametrize("steps", [0, -1, 21])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_step_count_outside_the_chain_is_refused(chain, sampler, steps):
    with pytest.raises(UsageError, match="give a number from 1 to 20"):
        pipeline.build_sampler(sampler, chain.config, steps)


def test_step_count_has_a_default_within_the_chain(chain):
    long = DDPMScheduler().config
    assert pipeline.build_sampler("ddpm", long, None)[1] == 1000
    assert pipeline.build_sampler("ddim", long, None)[1] == 50
    assert pipeline.build_sampler("ddim", chain.config, None)[1] == 20


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler_takes_over_the_chain_it_was_trained_with(sampler):
    trained = DDPMScheduler(
        num_train_timesteps=40, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
    )
    made, _ = pipeline.build_sampler(sampler, trained.config, 5)
    assert made.config.prediction_type == "v_prediction"
    assert made.config.timestep_spacing == "trailing"
    torch.testing.assert_close(made.alphas_cumprod, trained.alphas_cumprod)


@pytest.mark.parametrize("sampler", ["dpmsolver++", "unipc"])
def test_solver_without_clipping_takes_the_range_of_the_chain(sampler):
    for clips, limit in ((True, 1.0), (True, 2.0), (False, 1.0)):
        trained = DDPMScheduler(clip_sample=clips, clip_sample_range=limit)
        made, _ = pipeline.build_sampler(sampler, trained.config, 5)
        assert made.config.thresholding == clips
        assert made.config.sample_max_value == limit


# Pixels and files


def test_pixels_are_rounded_as_diffusers_does():
    images = torch.linspace(-1.2, 1.2, 5000).view(1, 1, 50, 100)
    array = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    (reference,) = DDPMPipeline.numpy_to_pil(array)
    assert np.array_equal(pipeline.to_pixels(images)[0, 0].numpy(), np.array(reference))


def test_pixels_by_hand():
    images = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]).view(1, 1, 1, 5)
    assert pipeline.to_pixels(images).flatten().tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_keeps_pixels_and_text(tmp_path, channels, mode):
    image = torch.arange(channels * 6, dtype=torch.uint8).view(channels, 2, 3) * 10
    text = {"model": "you/名前", "seed": "7", "note": "Zürich"}
    pipeline.save_png(image, tmp_path / "seed.png", text)
    assert Image.open(tmp_path / "seed.png").mode == mode
    assert torch.equal(pipeline.read_png(tmp_path / "seed.png"), image)
    assert pipeline.read_png_text(tmp_path / "seed.png") == text
    assert os.listdir(tmp_path) == ["seed.png"]


def test_cut_or_foreign_png_has_no_text(tmp_path):
    pipeline.save_png(torch.zeros(3, 64, 64, dtype=torch.uint8), tmp_path / "a.png", {"k": "v"})
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-20])
    (tmp_path / "foreign.png").write_text("no image")
    assert pipeline.read_png_text(tmp_path / "cut.png") == {}
    assert pipeline.read_png_text(tmp_path / "foreign.png") == {}


def test_grid_enlarges_small_images_by_whole_pixels():
    images = [torch.full((1, 8, 8), 10 * n, dtype=torch.uint8) for n in range(5)]
    images[1][0, 0, 1] = 200
    sheet = pipeline.grid(images)
    assert sheet.mode == "L"
    assert sheet.size == (3 * (64 + 2) + 2, 2 * (64 + 2) + 2)
    pixels = np.array(sheet)
    assert (pixels[2:66, 2:66] == 0).all()
    assert (pixels[2:10, 68 + 8 : 68 + 16] == 200).all()
    assert pixels[2, 68 + 7] == pixels[2, 68 + 16] == 10
    assert (pixels[68:132, 68:132] == 40).all()
    assert (pixels[:2] == 255).all()
    assert (pixels[68:132, 134:198] == 255).all()  # the place of a sixth


def test_grid_leaves_large_images_as_they_are():
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    sheet = pipeline.grid([image])
    assert (sheet.mode, sheet.size) == ("RGB", (68, 68))
    assert np.array_equal(np.array(sheet)[2:66, 2:66], image.permute(1, 2, 0).numpy())


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert pipeline.sha256_of(tmp_path / "file").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_device_by_name():
    assert pipeline.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="--device nonsense cannot be used here"):
        pipeline.choose_device("nonsense")
    assert isinstance(pipeline.choose_device("auto"), torch.device)


def test_moved_folder_still_loads(folder, tmp_path):
    shutil.move(folder, tmp_path / "elsewhere")
    assert pipeline.load(str(tmp_path / "elsewhere")).name == "elsewhere"
