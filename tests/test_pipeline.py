"""The artifact and what it draws, against stock diffusers. Folders only: the Hub has its own tests.

Equality is exact where one program computes the same thing twice. A batch of another size may take
other kernels, so there a pixel may differ by one level of 255.
"""

import json
import os
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from ddpm import pipeline, runfolder
from ddpm.errors import UsageError, UserError


@pytest.fixture
def folder(tmp_path, make_unet, chain):
    """A pipeline of 8x8 gray images, as training exports it."""
    pipeline.export(make_unet(), chain, tmp_path / "model")
    return tmp_path / "model"


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


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert pipeline.sha256_of(tmp_path / "file").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_moved_folder_still_loads(folder, tmp_path):
    shutil.move(folder, tmp_path / "elsewhere")
    assert pipeline.load(str(tmp_path / "elsewhere")).name == "elsewhere"
