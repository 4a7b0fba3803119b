"""Training with class labels: exact, and exported as a pipeline that stock diffusers draws with."""

import json

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from safetensors.torch import load_file

from ddpm import run_folder, run_record
from ddpm.diffusion import schedulers
from ddpm.diffusion.class_labels import EMBEDDING
from ddpm.sampling import generate, pipeline, proof
from ddpm.training import step
from tests import tiny
from tests.training.bits import Killed, assert_same_bits, final_state, kill


@pytest.fixture(scope="module")
def flags(shared_folder):
    pictures = shared_folder("class-pictures", tiny.write_class_pictures)
    return f"--train_data_dir={pictures}", "--class_conditional", "--class_dropout_prob=0.3"


def test_a_run_with_classes_resumes_bit_exact(
    train_tiny, trained_run, monkeypatch, tmp_path, flags
):
    straight = trained_run("straight", *flags)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, step, "diffusion_loss", 4)
        train_tiny(tmp_path / "killed", *flags)
    folder = train_tiny(tmp_path / "killed", *flags)
    assert_same_bits(final_state(folder), final_state(straight))
    conditional = [load_file(run / run_folder.CONDITIONAL_WEIGHTS) for run in (folder, straight)]
    assert_same_bits(*conditional)
    rows = conditional[0][EMBEDDING]
    assert rows.shape[0] == 3 and all(row.abs().max() > 0 for row in rows)  # all were trained


def test_the_export_is_the_null_class_for_stock_diffusers(trained_run, flags):
    folder = trained_run("run", *flags)
    record = run_record.read_record(folder).dataset
    assert record.classes == {"dark": 5, "light": 5}
    labels = json.loads((folder / run_folder.CONDITIONAL_LABELS).read_text())
    assert labels == {"0": "dark", "1": "light"}

    stock = DDPMPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    array = stock(2, generators, num_inference_steps=10, output_type="np").images
    expected = (torch.from_numpy(array) * 255).round().permute(0, 3, 1, 2)

    model = pipeline.load_model(str(folder), conditional=True)
    scheduler = schedulers.build_sampling_scheduler("ddpm", model.scheduler_config, 10)
    images = generate.generate_images(model.unet, scheduler, (0, 1), 2)
    ours = torch.stack([image for _, image in images])
    assert (ours - expected).abs().max() <= 1

    assert proof.read_proof(folder, "run").labels == [0, 1]
    assert proof.compare_with_proof(folder, "run", "").num_images == 4
    assert UNet2DModel.from_pretrained(folder / "conditional").config.num_class_embeds == 3


def test_a_checkpoint_is_loaded_with_and_without_its_classes(trained_run, flags):
    folder = trained_run("run", *flags)
    checkpoint = str(folder / "checkpoint-6")
    with_classes = pipeline.load_model(checkpoint, conditional=True)
    assert with_classes.class_names == ("dark", "light")
    exported = load_file(folder / run_folder.CONDITIONAL_WEIGHTS)
    assert_same_bits(with_classes.unet.state_dict(), exported)
    without = pipeline.load_model(checkpoint).unet.state_dict()
    assert_same_bits(without, load_file(folder / run_folder.UNET_WEIGHTS))


def test_an_exported_unet_with_other_classes_is_refused(trained_run, flags):
    folder = trained_run("run", *flags)
    path = folder / run_folder.CONDITIONAL_WEIGHTS
    weights = load_file(path)
    weights[EMBEDDING][2] += 1
    from safetensors.torch import save_file

    save_file(weights, path)
    with pytest.raises(Exception, match="the UNet in conditional/ is not that of the pipeline"):
        pipeline.load_model(str(folder), conditional=True)
    with pytest.raises(Exception, match="the UNet in conditional/ is not that of the pipeline"):
        proof.compare_with_proof(folder, "run", "")


def test_labels_are_those_of_the_rows_and_dropped_by_step_and_micro_batch(
    train_tiny, monkeypatch, tmp_path, flags
):
    seen = []
    drop = step.drop_labels

    def recorded(labels, null, probability, generator):
        dropped = drop(labels, null, probability, generator)
        seen.append((labels, dropped))
        assert (null, probability) == (2, 0.3)
        return dropped

    monkeypatch.setattr(step, "drop_labels", recorded)
    train_tiny(tmp_path / "run", *flags, "--gradient_accumulation_steps=2", "--max_train_steps=5")
    labels, dropped = (torch.cat(column) for column in zip(*seen, strict=True))
    assert len(labels) == 40 and labels.bincount().tolist() == [20, 20]  # 4 epochs of 10 rows
    assert 4 <= (dropped == 2).sum() <= 22
    patterns = [tuple((one != two).tolist()) for one, two in seen]
    assert len(set(patterns)) > 3


def test_dry_run_takes_steps_with_labels(train_tiny, monkeypatch, tmp_path, capsys):
    """Also of images with transparency."""
    from ddpm.training import dry_run, loop

    monkeypatch.setattr(
        loop, "train", lambda accelerator, config, publisher: dry_run.dry_run(accelerator, config)
    )
    train_tiny(tmp_path / "dry", *tiny.RGBA_CLASSES, "--dry_run")
    output = capsys.readouterr().out
    assert "RGBA images of 8x8 of 3 classes" in output and "Classes: 3, from column label" in output
    assert "Memory of this process at its peak" in output
