"""The model against stock diffusers: exported, loaded from every layout, or refused."""

import json
import os
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from ddpm import file_io, run_folder
from ddpm.config.base import flatten
from ddpm.config.parser import parse_train
from ddpm.diffusion.unet import build_unet
from ddpm.errors import UsageError, UserError
from ddpm.sampling import pipeline, pipeline_folder
from tests.files import edit_json
from tests.sampling.tiny_stable import files_of


@pytest.fixture
def folder(tmp_path, make_unet, chain):
    """A pipeline of 8x8 gray images, as training exports it."""
    pipeline.export_pipeline(make_unet(), chain, tmp_path / "model")
    return tmp_path / "model"


# Export


def test_stock_diffusers_loads_what_is_exported(folder, make_unet):
    loaded = DDPMPipeline.from_pretrained(folder)
    assert type(loaded.unet) is UNet2DModel
    assert type(loaded.scheduler) is DDPMScheduler
    assert loaded.scheduler.config.num_train_timesteps == 20
    for name, weight in make_unet().state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], weight)
    assert sorted(os.listdir(folder)) == ["model_index.json", "scheduler", "unet"]


def test_loaded_model_is_the_exported_one(folder, make_unet):
    model = pipeline.load_model(str(folder))
    assert model.name == "model"
    assert model.version == file_io.file_sha256(folder / run_folder.UNET_WEIGHTS)
    assert not model.unet.training
    assert model.unet.dtype == torch.float32
    assert model.scheduler_config["num_train_timesteps"] == 20
    for name, weight in make_unet().state_dict().items():
        assert torch.equal(model.unet.state_dict()[name], weight)


def test_current_folder_has_its_own_name(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert pipeline.load_model(".").name == "model"


@pytest.fixture
def interrupt_rename(monkeypatch):
    """interrupt_rename(n): rename number n is interrupted; returns the list of those before it."""

    def interrupt(number: int) -> list:
        renamed, rename = [], os.replace

        def interrupted(source, destination):
            if len(renamed) == number:
                raise KeyboardInterrupt
            renamed.append(destination)
            rename(source, destination)

        monkeypatch.setattr(os, "replace", interrupted)
        return renamed

    return interrupt


@pytest.mark.parametrize("number", range(4))
def test_interrupted_export_leaves_each_file_old_or_new(
    number, folder, make_unet, chain, interrupt_rename, monkeypatch
):
    """The pipeline still loads, and the next export completes it."""
    old, new = make_unet().state_dict(), make_unet(seed=1).state_dict()
    renamed = interrupt_rename(number)
    with pytest.raises(KeyboardInterrupt):
        pipeline.export_pipeline(make_unet(seed=1), chain, folder)
    monkeypatch.undo()

    weights = load_file(folder / run_folder.UNET_WEIGHTS)
    expected = new if folder / run_folder.UNET_WEIGHTS in renamed else old
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    DDPMPipeline.from_pretrained(folder)

    pipeline.export_pipeline(make_unet(seed=1), chain, folder)
    weights = load_file(folder / run_folder.UNET_WEIGHTS)
    assert all(torch.equal(weights[name], new[name]) for name in new)
    assert sorted(os.listdir(folder)) == ["model_index.json", "scheduler", "unet"]


@pytest.mark.parametrize("number", [0, 3])
def test_interrupted_first_export_is_no_pipeline(
    number, tmp_path, make_unet, chain, interrupt_rename
):
    """model_index.json comes last, so a folder that has one is complete."""
    interrupt_rename(number)
    with pytest.raises(KeyboardInterrupt):
        pipeline.export_pipeline(make_unet(), chain, tmp_path)
    with pytest.raises(UserError, match="cut short, run train.py again"):
        pipeline.load_model(str(tmp_path))


def test_export_out_of_disk_space_touches_nothing(folder, make_unet, chain, monkeypatch):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full_disk(self, *args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(UNet2DModel, "save_pretrained", full_disk)
    with pytest.raises(UserError, match="No space .* untouched"):
        pipeline.export_pipeline(make_unet(seed=1), chain, folder)
    assert not list(folder.glob(".*.partial"))
    for path, content in before.items():
        assert path.read_bytes() == content


# What is refused


def test_pickled_weights_are_refused_unopened(folder):
    (folder / run_folder.UNET_WEIGHTS).unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"would run code")
    with pytest.raises(UserError, match="Only safetensors are loaded"):
        pipeline.load_model(str(folder))


@pytest.mark.parametrize("name", [run_folder.UNET_CONFIG, run_folder.SCHEDULER_CONFIG])
def test_incomplete_folder_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"model is not whole: {name} missing"):
        pipeline.load_model(str(folder))


def test_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is no diffusers pipeline: it has no model_index\.json"):
        pipeline.load_model(str(tmp_path))


def test_conditional_pipeline_is_refused(folder):
    edit_json(
        folder / "model_index.json",
        _class_name="StableDiffusionPipeline",
        unet=["diffusers", "UNet2DConditionModel"],
    )
    with pytest.raises(UserError, match="model is a StableDiffusionPipeline that this command"):
        pipeline.load_model(str(folder))


def test_latent_pipeline_is_refused(folder):
    """Its UNet is a UNet2DModel too, but draws latents for another network, not pixels."""
    edit_json(
        folder / "model_index.json", _class_name="LDMPipeline", vqvae=["diffusers", "VQModel"]
    )
    with pytest.raises(UserError, match="model is a LDMPipeline that this command"):
        pipeline.load_model(str(folder))


@pytest.mark.parametrize("index", ["{}", '{"unet": null}', '{"unet": []}'])
def test_index_of_something_else_is_refused(folder, index):
    (folder / "model_index.json").write_text(index)
    with pytest.raises(UserError, match="that this command cannot sample"):
        pipeline.load_model(str(folder))


def test_damaged_index_is_refused(folder):
    (folder / "model_index.json").write_text('{"_class_name": ')
    with pytest.raises(UserError, match=r"model_index\.json cannot be read as JSON"):
        pipeline.load_model(str(folder))


def test_cut_weights_are_refused(folder):
    path = folder / run_folder.UNET_WEIGHTS
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="model cannot be loaded"):
        pipeline.load_model(str(folder))


def test_weights_of_another_size_are_refused(folder):
    edit_json(folder / run_folder.UNET_CONFIG, block_out_channels=[8, 32])
    with pytest.raises(UserError, match="model cannot be loaded"):
        pipeline.load_model(str(folder))


def test_revision_belongs_to_the_hub(folder):
    with pytest.raises(UsageError, match="A revision belongs to models on the Hub"):
        pipeline.load_model(str(folder), revision="main")


@pytest.mark.parametrize("name", ["./absent", "/absent/too", "a/b/c", "no spaces"])
def test_neither_folder_nor_id_is_refused_without_the_network(name):
    with pytest.raises(UserError, match="neither a folder here nor the id of a model"):
        pipeline.load_model(name)


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert file_io.file_sha256(tmp_path / "file").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_moved_folder_still_loads(folder, tmp_path):
    shutil.move(folder, tmp_path / "elsewhere")
    assert pipeline.load_model(str(tmp_path / "elsewhere")).name == "elsewhere"


# Other layouts


def test_flat_layout_of_the_first_diffusers_is_loaded(folder, tmp_path, hub, make_unet):
    """Everything at the top, the UNet under its first name: from a folder and from the Hub."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in (*run_folder.PIPELINE_FILES,):
        shutil.copy(folder / name, flat / os.path.basename(name))
    edit_json(flat / "model_index.json", unet=["diffusers", "UNetDiffusionModel"])
    expected = make_unet().state_dict()
    model = pipeline.load_model(str(flat))
    assert model.version == file_io.file_sha256(flat / os.path.basename(run_folder.UNET_WEIGHTS))
    files = {path.name: path.read_bytes() for path in flat.iterdir()}
    repository = hub.create_repo("model", "google/flat")
    commit = repository.write({**files, "diffusion_pytorch_model.bin": b"code"}, "all")
    published = pipeline.load_model("google/flat")
    assert (published.name, published.version) == ("google/flat", commit)
    assert published.scheduler_config["num_train_timesteps"] == 20
    for loaded in (model.unet, published.unet):
        assert all(torch.equal(loaded.state_dict()[name], expected[name]) for name in expected)
    assert not list(pipeline_folder.find_pipeline("google/flat").folder.rglob("*.bin"))

    (flat / "diffusion_pytorch_model.safetensors").unlink()
    (flat / "diffusion_pytorch_model.bin").write_bytes(b"code")
    with pytest.raises(UserError, match="only diffusion_pytorch_model.bin in flat/. Only safet"):
        pipeline.load_model(str(flat))


@pytest.mark.parametrize("kind", ["DDIMPipeline", "PNDMPipeline"])
def test_other_pipelines_with_the_same_noise_are_loaded(folder, kind):
    edit_json(folder / "model_index.json", _class_name=kind)
    assert pipeline.load_model(str(folder)).kind == kind


def test_only_the_components_in_the_index_are_downloaded(folder, hub):
    files = files_of(folder)
    extra_names = (
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "other/model.safetensors",
        "code.py",
        "samples/a.png",
    )
    extras = dict.fromkeys(extra_names, b"x")
    hub.create_repo("model", "bob/parts").write({**files, **extras}, "all")
    snapshot = pipeline_folder.find_pipeline("bob/parts")
    assert set(files_of(snapshot.folder)) == set(files)


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": ["pipeline", "MyPipeline"]},
        {"unet": ["my_unet", "MyUNet"]},
        {"unet": ["my.models", "MyUNet"]},
    ],
)
def test_code_of_the_repository_is_refused(folder, change):
    edit_json(folder / "model_index.json", **change)
    with pytest.raises(UserError, match="wants code of its own .* never runs code of a repos"):
        pipeline.load_model(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_class_embeds": 10}, "draws a class that must be named"),
        ({"in_channels": 5, "out_channels": 5}, "turns 5 channels into 5"),
        ({"sample_size": None}, "does not say how large"),
    ],
)
def test_unet_must_make_images_of_a_known_kind(folder, change, message):
    config = {**json.loads((folder / run_folder.UNET_CONFIG).read_text()), **change}
    unet = UNet2DModel.from_config(config)
    unet.save_pretrained(folder / "unet")
    edit_json(folder / run_folder.UNET_CONFIG, **change)
    with pytest.raises(UserError, match=message):
        pipeline.load_model(str(folder))


def test_checkpoint_of_a_run_is_a_model(tmp_path, make_unet, tiny_unet):
    """Its average if it has one, else its raw weights, with the run's own architecture and chain;
    a run folder that has nothing else says so."""
    run, flags = tmp_path / "run", [f"--model_config_name_or_path={tiny_unet}", "--resolution=8"]
    config = parse_train([*flags, "--dataset_name=x", "--prediction_type=v_prediction"])
    checkpoint = run / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    file_io.write_json(run / run_folder.TRAIN_CONFIG, flatten(config))
    file_io.write_json(checkpoint / run_folder.CHECKPOINT_STATE, {"step": 5})
    raw, average = (build_unet(config.model, 8, 1).state_dict() for _ in range(2))
    save_file(raw, checkpoint / "model.safetensors")
    assert_loads(str(checkpoint), raw)
    save_file(average, checkpoint / "ema.safetensors")
    model = assert_loads(str(checkpoint), average)
    assert model.name == "run/checkpoint-5"
    assert model.scheduler_config["prediction_type"] == "v_prediction"
    assert model.version == file_io.file_sha256(checkpoint / "ema.safetensors")
    with pytest.raises(UserError, match="It has checkpoints: give .*checkpoint-5, or finish"):
        pipeline.load_model(str(run))
    with pytest.raises(UsageError, match="A revision belongs"):
        pipeline.load_model(str(checkpoint), revision="main")
    (checkpoint / "ema.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="checkpoint-5 cannot be loaded"):
        pipeline.load_model(str(checkpoint))


def assert_loads(name, weights):
    model = pipeline.load_model(name)
    assert all(torch.equal(model.unet.state_dict()[key], weights[key]) for key in weights)
    return model
