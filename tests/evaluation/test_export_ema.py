"""Weights exported into a finished run, which no interruption damages."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ddpm import file_io, run_record
from ddpm import run_folder as run_files
from ddpm.config.push import PushConfig
from ddpm.errors import UserError
from ddpm.evaluation import export_ema
from ddpm.publishing import model_card, stage
from ddpm.sampling import pipeline, proof

ENTRY = {"sigma_rel": 0.07, "step": 6}


def export(folder, offset=0.1):
    """Export other weights, as of an average of another length, and return them."""
    weights = load_file(folder / run_files.UNET_WEIGHTS)
    weights = {name: value + offset for name, value in weights.items()}
    export_ema.export_weights(folder, weights, ENTRY)
    return weights


@pytest.fixture
def run(run_folder):
    """A finished run whose grid has two images in two steps."""
    path = run_folder / run_files.TRAIN_CONFIG
    small = {"eval_batch_size": 2, "ddpm_num_inference_steps": 2}
    file_io.write_json(path, {**file_io.read_json(path), **small})
    return run_folder


def test_exported_weights_are_the_pipeline_and_have_a_proof(run, tmp_path):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    weights = export(run)
    model = pipeline.load_model(str(run))
    state_dict = model.unet.state_dict()
    assert all(torch.equal(state_dict[name], value) for name, value in weights.items())
    assert proof.verify_model(str(run)).difference == 0
    assert file_io.read_json(run / run_files.RECORD)["exported_ema"] == {
        **ENTRY,
        "sha256": model.version,
    }
    unchanged = set(run_files.PIPELINE_FILES) - {run_files.UNET_WEIGHTS}
    assert all((run / n).read_bytes() == before[run / n] for n in unchanged)
    assert "length of sigma_rel 0.07" in model_card.render_card(run, "you/run", None, None)
    grid = next((run / "samples").glob("*.png"))
    assert grid.read_bytes() != before[grid]
    config = PushConfig(output_dir=str(run))
    files = stage.stage_files(run, tmp_path / "staged", "you/run", config)
    assert run_files.PROOF in files and not any(name.startswith("ema") for name in files)
    # Back again, with the command of docs/evaluation.md
    shutil.copytree(run / run_files.REPLACED_PIPELINE, run, dirs_exist_ok=True)
    assert proof.verify_model(str(run)).difference == 0
    assert [p.name for p, content in before.items() if p.read_bytes() != content] == []


def test_exported_weights_with_classes_are_both_unets(class_folder):
    """As of another EMA length: the pipeline is the null class of the UNet with classes."""
    model = pipeline.load_model(str(class_folder), conditional=True)
    weights = {name: value + 0.1 for name, value in model.unet.state_dict().items()}
    export_ema.export_weights(class_folder, weights, None)
    exported = pipeline.load_model(str(class_folder), conditional=True)  # checks both
    state_dict = exported.unet.state_dict()
    assert all(torch.equal(state_dict[name], value) for name, value in weights.items())
    assert exported.class_names == model.class_names and exported.version != model.version
    assert proof.verify_model(str(class_folder)).difference == 0
    shutil.copytree(class_folder / run_files.REPLACED_PIPELINE, class_folder, dirs_exist_ok=True)
    assert pipeline.load_model(str(class_folder), conditional=True).version == model.version
    assert proof.verify_model(str(class_folder)).difference == 0


def test_an_export_cut_off_between_two_unets_is_completed(class_folder, monkeypatch):
    """The old and the new weights are both in the folder, and the same export goes on."""
    model = pipeline.load_model(str(class_folder), conditional=True)
    weights = {name: value + 0.1 for name, value in model.unet.state_dict().items()}
    rename = os.replace

    def kill(source, destination):
        if str(destination).endswith(run_files.CONDITIONAL_WEIGHTS):
            raise Killed
        rename(source, destination)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", kill)
        export_ema.export_weights(class_folder, weights, None)
    with pytest.raises(UserError, match="same train.py command again, or copy ema/before/ back"):
        proof.write_proof_from_folder(class_folder, "x")
    assert pipeline.load_model(str(class_folder), conditional=None).version != model.version
    export_ema.export_weights(class_folder, weights, None)
    assert proof.verify_model(str(class_folder)).difference == 0


def test_only_what_training_exported_is_kept(run):
    """A second export replaces an average that can be built again."""
    before = (run / run_files.UNET_WEIGHTS).read_bytes()
    kept = run / run_files.REPLACED_PIPELINE / run_files.UNET_WEIGHTS
    export(run)
    export(run, offset=0.2)
    assert kept.read_bytes() == before
    export_ema.export_weights(run, load_file(kept), None)
    assert run_record.read_record(run).exported_ema is None
    assert "sigma_rel" not in model_card.render_card(run, "you/run", None, None)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (export_ema.shutil, "copyfile"),
        (pipeline, "export_pipeline"),
        (run_record, "write_record"),
        (proof, "write_json"),
        pytest.param(os, "replace", marks=pytest.mark.slow),
        pytest.param(proof, "write_proof", marks=pytest.mark.slow),
        pytest.param(export_ema, "_generate_grid", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_export_claims_nothing_false(run, monkeypatch, owner, name):
    """The pipeline loads, a proof is its own, and the same command again completes the export."""
    before = (run / run_files.UNET_WEIGHTS).read_bytes()

    def kill(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, kill)
        export(run)
    version = pipeline.load_model(str(run)).version
    if (run / run_files.PROOF).exists():
        assert proof.verify_model(str(run)).difference == 0
    recorded = run_record.read_exported_ema(run, version)
    assert recorded is None or recorded.sigma_rel == 0.07
    export(run)
    assert proof.verify_model(str(run)).difference == 0
    kept = run / run_files.REPLACED_PIPELINE / run_files.UNET_WEIGHTS
    assert kept.read_bytes() == before
    assert not [*run.glob(".*.partial"), *(run / "ema").glob(".*.partial")]


def test_a_run_that_trains_is_left_alone(run):
    before = (run / run_files.UNET_WEIGHTS).read_bytes()
    with (
        run_files.run_lock(run),
        pytest.raises(UserError, match="Another run is writing"),
    ):
        export(run)
    assert (run / run_files.UNET_WEIGHTS).read_bytes() == before


def test_a_full_disk_leaves_the_pipeline(run, monkeypatch):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    before.pop(run / run_files.LOCK, None)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_ema.shutil, "copyfile", full)
    with pytest.raises(UserError, match=r"ema/before could not.*No space.*left as it is"):
        export(run)
    assert {p: p.read_bytes() for p in before} == before
    assert not [*(run / "ema").glob(".*")]
