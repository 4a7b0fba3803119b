"""Which EMA length is best, and whether that can be told from chance."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm import run_folder
from ddpm.diffusion.power_ema import PowerEMA
from ddpm.errors import UserError
from ddpm.evaluation import compare_ema, ema_lengths, evaluator, metrics, plot_ema_lengths, report
from ddpm.evaluation.compare_ema import EMAComparison, EMAResult
from ddpm.sampling import image_io, pipeline, proof
from tests.diffusion.test_ema import walk
from tests.evaluation.test_evaluate import opened, run  # noqa: F401


@pytest.fixture
def tracked(run, make_unet, chain):  # noqa: F811
    """The run folder with two averages of 8 steps, whose first is what was exported, and a
    checkpoint of the last step."""
    unet = make_unet()
    kept, generator = PowerEMA(unet), torch.Generator().manual_seed(0)
    for step in range(1, 9):
        walk(unet, generator)
        kept.update(step)
        if step % 4 == 0:
            kept.snapshot(run, step, main=True)
    checkpoint = run / "checkpoint-8"
    checkpoint.mkdir()
    (checkpoint / run_folder.CHECKPOINT_STATE).write_text("{}")
    save_file(unet.state_dict(), checkpoint / "model.safetensors")
    save_file(kept.averages[0.05], checkpoint / "ema.safetensors")
    unet.load_state_dict(kept.averages[0.05])
    pipeline.export_pipeline(unet, chain, run)
    proof.write_proof(run, unet, chain)
    return run


def row(name, frechet, leaving_out, sigma_rel=None):
    return EMAResult(
        name, sigma_rel, None, {}, torch.zeros(1), frechet, (0.0, 0.0), leaving_out, None
    )


def test_candidates_are_measured_alike_and_the_best_is_exported(tracked, monkeypatch, capsys):
    monkeypatch.setattr(report, "MAX_LOSS_IMAGES", 16)
    exam = opened(tracked, "--ema_lengths=0.05,0.1", "--export_best", "--num_inference_steps=1")
    looked = report.extract_features(exam)
    basis = ema_lengths.require_posthoc_run(exam.config)
    monkeypatch.setattr(compare_ema.EMAComparison, "best", property(lambda self: self.rows[-1]))
    now, seen, found = compare_ema.run_comparison(exam, looked, basis, tracked)
    rows = {entry["name"]: entry for entry in found["rows"]}
    assert list(rows) == [compare_ema.PIPELINE, compare_ema.RAW, "0.05", "0.1"]
    # 0.05 is what the pipeline holds: the same images, the same numbers
    for key in ("frechet_distance", "held_out_loss_by_band"):
        assert rows["0.05"][key] == rows[compare_ema.PIPELINE][key] != rows["0.1"][key]
    assert rows["0.05"]["difference"] == rows["0.05"]["standard_error"] == 0
    assert len(rows[compare_ema.RAW]["held_out_loss_by_band"]) == 10
    by_hand = metrics.frechet_distance(
        evaluator.generated_features(now, now.scheduler, 40), looked.trained
    )
    assert rows["0.1"]["frechet_distance"] == pytest.approx(by_hand, rel=1e-6)
    assert found["step"] == 8 and found["kept"] == [0.05, 0.10]
    json.dumps(found, allow_nan=False)
    # What is exported is what the exam goes on with
    average = basis.build(0.1)
    exported = load_file(tracked / run_folder.UNET_WEIGHTS)
    assert all(torch.equal(exported[name], value) for name, value in average.items())
    assert (
        now.artifact.version == pipeline.load_model(str(tracked)).version != exam.artifact.version
    )
    assert torch.equal(seen.drawn, evaluator.generated_features(now, now.scheduler, 40))
    assert (tracked / "evaluation" / run_folder.EMA_LENGTHS).is_file()
    assert "now holds EMA length 0.1" in capsys.readouterr().out
    # The raw weights of that step stay known, and training's own average is a candidate now
    assert evaluator.load_raw_unet(opened(tracked)) is not None
    assert set(compare_ema._references(opened(tracked))) == {compare_ema.TRAINED, compare_ema.RAW}


def test_an_export_that_was_cut_off_is_done_to_the_end(tracked, monkeypatch, capsys):
    """Killed after the weights: the same command finds them best, and still finishes the export."""
    argv = ["--ema_lengths=0.1", "--export_best", "--num_inference_steps=1"]

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    def command():
        exam = opened(tracked, *argv)
        basis = ema_lengths.require_posthoc_run(exam.config)
        return compare_ema.run_comparison(exam, report.extract_features(exam), basis, tracked)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(compare_ema.EMAComparison, "best", property(lambda self: self.rows[-1]))
        patch.setattr(proof, "write_proof", killed)
        patch.setattr(run_folder, "write_record", killed)
        command()
    assert run_folder.export_was_interrupted(tracked)
    monkeypatch.setattr(compare_ema.EMAComparison, "best", property(lambda self: self.rows[0]))
    exam, _, _ = command()
    recorded = run_folder.read_exported_ema(tracked, exam.artifact.version)
    assert recorded is not None and recorded.sigma_rel == 0.1
    assert not run_folder.export_was_interrupted(tracked)
    assert "now holds EMA length 0.1" in capsys.readouterr().out
    # With other lengths nobody knows what the weights are
    (tracked / run_folder.PROOF).unlink()
    argv[0] = "--ema_lengths=0.05"
    with pytest.raises(UserError, match="was cut off in .*Give the same --ema_lengths"):
        command()


def test_raw_weights_cannot_win():
    held = EMAComparison(
        (row(compare_ema.PIPELINE, 2.0, (2.0,) * 3), row(compare_ema.RAW, 1.0, (1.0,) * 3)),
        ema_lengths.PosthocEMA({}),
    )
    assert held.best is held.pipeline and "No length is better" in compare_ema.format_verdict(held)


def test_what_cannot_be_told_apart_is_said_loudly(tmp_path):
    noisy = (1.0, 2.0, 1.5)
    first = row(compare_ema.PIPELINE, 2.0, (2.0,) * 3)
    luck = EMAComparison((first, row("0.05", 1.9, noisy, 0.05)), ema_lengths.PosthocEMA({}))
    assert compare_ema.format_verdict(luck).startswith("NOT TOLD APART")
    assert "NOTE that it cannot be told apart" in compare_ema.format_export(luck, tmp_path)
    real = EMAComparison(
        (first, row("0.05", 1.0, (1.0, 1.01, 0.99), 0.05)), ema_lengths.PosthocEMA({})
    )
    assert compare_ema.format_verdict(real).startswith("Best is EMA length 0.05: 1 against 2")
    assert "NOTE" not in compare_ema.format_export(real, tmp_path)
    assert "+" not in compare_ema.format_comparison(real) and "-1" in compare_ema.format_comparison(
        real
    )


def test_the_picture_shows_lower_distances_lower(tmp_path):
    path = tmp_path / "evaluation" / "curve.png"
    points = [(0.02, 3.0, 0.1), (0.05, 1.0, 0.1), (0.2, 2.0, 0.1)]
    assert plot_ema_lengths.plot_ema_lengths(
        points, {"the pipeline": 1.5}, "Frechet distance", path
    )
    image = image_io.read_png(path)
    blue = torch.tensor([0x1F, 0x5F, 0xA8]).view(3, 1, 1)
    rows, columns = torch.where((image == blue).all(0))
    heights = []
    for left, right in ((0, 150), (150, 500), (500, 720)):
        inside = (columns >= left) & (columns < right)
        heights.append(rows[inside].float().mean().item())
    assert heights[0] < heights[2] < heights[1]  # rows count downwards
    assert not plot_ema_lengths.plot_ema_lengths(
        points[:1], {}, "Frechet distance", tmp_path / "none.png"
    )
    assert not (tmp_path / "none.png").exists()
