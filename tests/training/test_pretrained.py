"""--pretrained_model_name_or_path: what comes from a model, what is refused, what is recorded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from ddpm import run_folder, run_record
from ddpm.config.data import DataConfig
from ddpm.config.train import ModelConfig, TrainConfig
from ddpm.data import order
from ddpm.data.dataset import load_images
from ddpm.diffusion.objective import sample_noise_and_timesteps
from ddpm.diffusion.unet import image_size
from ddpm.publishing import model_card
from ddpm.run_record import BaseModel
from ddpm.sampling import pipeline
from ddpm.training import loop, pretrained, step
from tests import tiny
from tests.files import edit_json
from tests.sampling.tiny_stable import files_of
from tests.training.bits import Killed, assert_same_bits, final_state, kill

SCHEDULE = {
    "num_train_timesteps": 40,
    "beta_start": 0.002,
    "beta_end": 0.03,
    "prediction_type": "v_prediction",
    "clip_sample_range": 0.9,
    "timestep_spacing": "trailing",
}


def write_model(folder: Path, class_names: tuple[str, ...] | None = None, channels: int = 3):
    unet = tiny.make_unet(channels=channels, num_classes=class_names and len(class_names))
    pipeline.export_pipeline(unet, DDPMScheduler(**SCHEDULE), folder, class_names)


@pytest.fixture
def model(shared_folder, tmp_path):
    """A pipeline of 8x8 RGB images with a schedule of its own."""
    return Path(shutil.copytree(shared_folder("base-model", write_model), tmp_path / "base"))


@pytest.fixture
def class_pictures(shared_folder):
    return shared_folder("class-pictures", tiny.write_class_pictures)


@pytest.fixture
def fine_tune(run_main, class_pictures, tmp_path):
    """fine_tune(model, *flags) -> exit code of train.py; one step on ten pictures of 8x8."""

    def run(model: object, *flags: str) -> int:
        with tiny.as_new_process():
            return run_main(
                "train.py",
                f"--pretrained_model_name_or_path={model}",
                f"--output_dir={tmp_path / 'run'}",
                f"--train_data_dir={class_pictures}",
                *("--train_batch_size=4", "--max_train_steps=1", "--lr_warmup_steps=0"),
                *("--logging_steps=1", "--save_images_epochs=0", "--mixed_precision=no"),
                *flags,
            )

    return run


def test_a_run_begins_with_the_published_weights_schedule_and_loss(
    model, hub, fine_tune, class_pictures, tmp_path, monkeypatch, capsys
):
    """The loss of the first step is the one that stock diffusers computes with the model. Settings
    and clipping are the model's; record and card name it, its commit and its license. The same
    works from the cache alone."""
    card = b"---\nlicense: cc-by-nc-4.0\n---\n# Published\n"
    repository = hub.create_repo("model", "alice/published")
    commit = repository.write({**files_of(model), "README.md": card}, "all")
    assert fine_tune("alice/published") == 0
    output, run = capsys.readouterr().out, tmp_path / "run"
    assert f"Fine-tuning alice/published, version {commit[:12]}, of images of 8x8." in output
    assert "Its license is cc-by-nc-4.0, with conditions that may hold" in output

    stock = DDPMPipeline.from_pretrained("alice/published")
    images = load_images(DataConfig(train_data_dir=str(class_pictures), resolution=8), False)
    rows = order.row_indices(0, len(images), 0, 4)
    clean = torch.stack([images.pixels(row) for row in rows]) / 127.5 - 1
    noise, timesteps = sample_noise_and_timesteps(
        clean.shape, stock.scheduler.alphas_cumprod, order.make_generator(0, "noise", 0, 0)
    )
    with torch.no_grad():
        noisy = stock.scheduler.add_noise(clean, noise, timesteps)
        prediction = stock.unet(noisy, timesteps).sample
    target = stock.scheduler.get_velocity(clean, noise, timesteps)
    loss = float((prediction - target).square().mean())
    assert run_folder.read_metrics(run)[0]["loss"] == pytest.approx(loss, rel=1e-5)

    exported = DDPMPipeline.from_pretrained(run)
    assert dict(exported.scheduler.config) == dict(stock.scheduler.config)
    config = TrainConfig.from_json(run / run_folder.TRAIN_CONFIG)
    assert (config.data.resolution, config.data.channels) == (8, 3)
    assert config.diffusion.prediction_type == "v_prediction"
    base = run_record.read_record(run).base_model
    assert (base.name, base.version, base.license) == ("alice/published", commit, "cc-by-nc-4.0")
    card = ModelCard(model_card.render_card(run, "bob/tuned"))
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("alice/published", "finetune")
    assert (data["base_model_revision"], data["license"]) == (commit, "cc-by-nc-4.0")
    assert "fine-tuned from [alice/published](https://huggingface.co/alice/pub" in card.text
    assert f"--pretrained_revision {commit}" in card.text

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.clear_requests()
    cached = pretrained.load_pretrained(replace(config, overwrite_output_dir=True))
    assert cached.record == base and not hub.requests


def test_averages_begin_with_the_weights_of_the_model(model, fine_tune, tmp_path, monkeypatch):
    """Before the first export, checkpoints are loaded by the settings in the run folder."""
    states = []

    def build(*args):
        states.append(step.build_train_state(*args))
        return states[0]

    monkeypatch.setattr(loop, "build_train_state", build)
    monkeypatch.setattr(loop, "_train", lambda *args: None)
    assert fine_tune(model, "--post_hoc_ema") == 0
    weights = load_file(model / run_folder.UNET_WEIGHTS)
    for average in (states[0].ema.average, *states[0].power_ema.averages.values()):
        assert_same_bits(average, weights)
    config = json.loads((tmp_path / "run" / run_folder.UNET_CONFIG).read_text())
    assert config["block_out_channels"] == [8, 16]


@pytest.mark.parametrize("known", [None, ("dark", "other")])
def test_classes_begin_as_those_of_the_model_by_name(tmp_path, known):
    """Others begin as what it draws without a class: of a model without classes, all of them."""
    write_model(tmp_path, known)
    base = pretrained.load_pretrained(
        TrainConfig(model=ModelConfig(pretrained_model_name_or_path=str(tmp_path)))
    )
    config = TrainConfig(model=ModelConfig(dropout=0.5), data=DataConfig(resolution=(16, 8)))
    data = SimpleNamespace(channels=3, class_names=["light", "dark"])
    unet = base.build_unet(config, data).eval()
    assert (image_size(unet), unet.config.dropout) == ((16, 8), 0.5)
    without = pipeline.load_model(str(tmp_path)).unet
    expected, noisy = [without(*INPUT).sample] * 3, (INPUT[0].repeat(3, 1, 1, 1), INPUT[1])
    lines = base.describe(data)
    if known:
        expected[1] = base.model.unet(*INPUT, torch.tensor([0])).sample
        assert (expected[1] - expected[0]).abs().max() > 0.01
        assert "Classes: 1 begin as the class of that name in the pretrained model, 1" in lines[1]
        assert "left out" in base.describe(replace_names(data))[1]
    with torch.no_grad():
        drawn = unet(*noisy, torch.tensor([0, 1, 2])).sample
    assert (drawn - torch.cat(expected)).abs().max() < 1e-5
    plain = base.build_unet(config, replace_names(data))
    assert_same_bits(plain.state_dict(), without.state_dict())


INPUT = (torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(7))


def replace_names(data: SimpleNamespace) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(data), "class_names": None})


def test_a_resumed_run_reads_its_checkpoint_and_not_the_model(
    model, fine_tune, tmp_path, monkeypatch, capsys
):
    """Not even a model that is gone changes its bits; a run that names another one is refused."""
    flags = (f"--max_train_steps={tiny.STEPS}", "--checkpointing_steps=2", "--class_conditional")
    assert fine_tune(model, *flags, f"--output_dir={tmp_path / 'straight'}") == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, step, "diffusion_loss", 4)
        fine_tune(model, *flags)
    base = run_record.read_record(tmp_path / "run").base_model
    loaded = pipeline.load_model(str(tmp_path / "run" / "checkpoint-2"), conditional=None)
    assert loaded.class_names == ("dark", "light")
    assert loaded.scheduler_config["beta_end"] == 0.03
    model.rename(tmp_path / "gone")
    assert fine_tune(model, *flags) == 0
    assert "Its weights replace those of the pretrained model." in capsys.readouterr().out
    assert_same_bits(final_state(tmp_path / "run"), final_state(tmp_path / "straight"))
    assert run_record.read_record(tmp_path / "run").base_model == base
    assert fine_tune(tmp_path / "gone", *flags) == 2
    error = capsys.readouterr().err
    assert f"pretrained_model_name_or_path was {model}, now {tmp_path / 'gone'}" in error


def test_a_run_and_its_checkpoint_are_models_to_fine_tune(model, fine_tune, tmp_path):
    """The license goes along; another resolution is taken over into the pipeline."""
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: my-license\n---\n")
    assert fine_tune(model) == 0
    again = tmp_path / "again"
    assert fine_tune(tmp_path / "run", f"--output_dir={again}", "--resolution=16") == 0
    assert json.loads((again / run_folder.UNET_CONFIG).read_text())["sample_size"] == 16
    base = run_record.read_record(again).base_model
    assert (base.resolution, base.license_name) == ([8, 8], "my-license")
    checkpoint = ModelConfig(pretrained_model_name_or_path=str(tmp_path / "run" / "checkpoint-1"))
    record = pretrained.load_pretrained(TrainConfig(model=checkpoint)).record
    assert (base.name, record.name) == ("run", "run/checkpoint-1")
    assert record.license_name == "my-license"
    metadata = ModelCard(model_card.render_card(again, "bob/again")).data.to_dict()
    assert (metadata["license"], metadata["license_name"]) == ("other", "my-license")
    assert "base_model" not in metadata  # no repository that can be named


def test_gray_images_train_an_rgb_model_as_rgb(model, fine_tune, tmp_path):
    pictures = tmp_path / "gray"
    pictures.mkdir()
    for value in range(4):
        Image.fromarray(np.full((8, 8), value * 60, np.uint8)).save(pictures / f"{value}.png")
    assert fine_tune(model, f"--train_data_dir={pictures}") == 0
    assert run_record.read_record(tmp_path / "run").dataset.channels == 3


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--prediction_type=epsilon"], 2, "prediction_type is epsilon, and the model has v_pred"),
        (["--ddpm_num_steps=1000"], 2, "ddpm_num_steps is 1000, and the model has 40"),
        (["--channels=1"], 2, "channels is 1, and the model has 3"),
        (["--channels=4"], 2, "channels is 4, and the model has 3"),
        (["--resolution=9"], 2, "--resolution 9 is not a multiple of 2"),
        (["--model_config_name_or_path=x"], 2, "not both"),
        (["--pretrained_revision=main"], 2, "A revision belongs to models on the Hub"),
        (["--pretrained_model_name_or_path=alice/nothing"], 1, "alice/nothing"),
    ],
)
def test_what_contradicts_the_model_is_refused(model, fine_tune, capsys, flags, code, message):
    assert fine_tune(model, *flags) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_agreeing_settings_of_a_file_are_fine(model, fine_tune, tmp_path, capsys):
    assert fine_tune(model) == 0
    config = tmp_path / "run" / run_folder.TRAIN_CONFIG
    assert fine_tune(model, f"--config={config}", "--dry_run") == 0
    edit_json(config, ddpm_beta_schedule="scaled_linear")
    assert fine_tune(model, f"--config={config}", f"--output_dir={tmp_path / 'other'}") == 2
    assert "is scaled_linear, and the model has linear" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "LDMPipeline"},
            "LDMPipeline that this command cannot",
        ),
        ("model_index.json", {"_class_name": "ScoreSdeVePipeline"}, "noise is not that of DDPM"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "must be one of linear"),
        ("unet/config.json", {"in_channels": 5, "out_channels": 5}, "turns 5 channels into 5"),
        ("unet/config.json", {"num_class_embeds": 10}, "draws a class that must be named"),
    ],
)
def test_models_of_another_kind_are_refused(model, fine_tune, capsys, file, change, message):
    edit_json(model / file, **change)
    assert fine_tune(model) == 1
    assert message in capsys.readouterr().err


def test_a_gray_model_asks_what_to_do_with_color(tmp_path, fine_tune, capsys):
    write_model(tmp_path / "gray", channels=1)
    assert fine_tune(tmp_path / "gray") == 1
    assert "draws gray images, and those of the data have color" in capsys.readouterr().err
    assert fine_tune(tmp_path / "gray", "--channels=3") == 2
    assert "channels is 3, and the model has 1" in capsys.readouterr().err
    assert fine_tune(tmp_path / "gray", "--channels=1") == 0


def test_an_rgba_model_goes_on_with_transparency_alone(tmp_path, fine_tune, capsys):
    write_model(tmp_path / "rgba", channels=4)
    assert fine_tune(tmp_path / "rgba") == 1
    assert "None of the 10 images of" in capsys.readouterr().err
    pictures = tmp_path / "rgba-pictures"
    pictures.mkdir()
    tiny.write_transparent_pictures(pictures)
    assert fine_tune(tmp_path / "rgba", f"--train_data_dir={pictures}") == 0
    assert run_record.read_record(tmp_path / "run").dataset.channels == 4


def test_another_kind_of_pipeline_is_refused_before_its_weights_are_downloaded(
    model, hub, fine_tune, capsys
):
    edit_json(model / "model_index.json", _class_name="StableDiffusionPipeline")
    hub.create_repo("model", "bob/stable-diffusion").write(files_of(model), "all")
    assert fine_tune("bob/stable-diffusion") == 1
    assert "is a StableDiffusionPipeline that this command cannot" in capsys.readouterr().err
    assert not [r for r in hub.requests if "safetensors" in r.path and "/resolve/" in r.path]


def test_the_note_on_a_license_says_what_is_known():
    base = BaseModel(name="a/b", version="0" * 40, resolution=[8, 8])
    assert "states no license" in base.license_note
    assert replace(base, license="mit").license_note == "Its license is mit."
    openrail = replace(base, license=["openrail", "other"], license_name="mine")
    assert openrail.license_note.startswith("Its license is openrail, mine, with conditions")
