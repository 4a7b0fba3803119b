"""Which EMA length is best, whether that is more than chance, and its export."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm import run_folder, run_record
from ddpm.config.parser import parse_evaluate
from ddpm.diffusion.power_ema import PosthocEMA, PowerEMA
from ddpm.errors import UsageError, UserError
from ddpm.evaluation import compare_ema, metrics, report
from ddpm.evaluation.compare_ema import PIPELINE, RAW, EMAComparison, EMAResult
from ddpm.sampling import pipeline, proof
from tests.diffusion.test_ema import walk

pytest.importorskip("torch_fidelity")


@pytest.fixture
def posthoc_run(digits_run, make_unet, chain):
    """The run with two averages of 8 steps, whose first is exported, and a checkpoint of step 8."""
    unet = make_unet()
    averages, generator = PowerEMA(unet), torch.Generator().manual_seed(0)
    for step in range(1, 9):
        walk(unet, generator)
        averages.update(step)
        if step % 4 == 0:
            averages.snapshot(digits_run, step, main=True)
    checkpoint = digits_run / "checkpoint-8"
    checkpoint.mkdir()
    (checkpoint / run_folder.CHECKPOINT_STATE).write_text("{}")
    save_file(unet.state_dict(), checkpoint / run_folder.RAW_WEIGHTS)
    save_file(averages.averages[0.05], checkpoint / run_folder.EMA_WEIGHTS)
    unet.load_state_dict(averages.averages[0.05])
    pipeline.export_pipeline(unet, chain, digits_run)
    proof.write_proof(digits_run, unet, chain)
    return digits_run


@pytest.fixture
def compare(posthoc_run, open_digits, monkeypatch):
    """compare(lengths, best=index) runs the command; the candidate with that index is the best."""
    monkeypatch.setattr(report, "MAX_LOSS_IMAGES", 16)

    def run(lengths, best):
        monkeypatch.setattr(EMAComparison, "best", property(lambda self: self.rows[best]))
        flags = (f"--ema_lengths={lengths}", "--export_best", "--num_inference_steps=1")
        evaluator = open_digits(*flags)
        extracted = report.extract_features(evaluator)
        posthoc_ema = compare_ema.require_posthoc_ema(evaluator.config)
        return extracted, compare_ema.run_comparison(evaluator, extracted, posthoc_ema, posthoc_run)

    return run


def test_candidates_are_measured_alike_and_the_best_is_exported(
    compare, posthoc_run, open_digits, capsys
):
    before = pipeline.load_model(str(posthoc_run)).version
    extracted, (evaluator, exported, entry) = compare("0.05,0.1", best=-1)
    rows = {row["name"]: row for row in entry["rows"]}
    assert list(rows) == [PIPELINE, RAW, "0.05", "0.1"]
    # 0.05 is in the pipeline: the same images, the same numbers
    for key in ("frechet_distance", "held_out_loss_by_band"):
        assert rows["0.05"][key] == rows[PIPELINE][key] != rows["0.1"][key]
    assert rows["0.05"]["difference"] == rows["0.05"]["standard_error"] == 0
    assert len(rows[RAW]["held_out_loss_by_band"]) == 10
    assert entry["step"] == 8 and entry["kept"] == [0.05, 0.10]
    json.dumps(entry, allow_nan=False)
    # The evaluator has the exported weights
    average = PosthocEMA.build(compare_ema.require_posthoc_ema(evaluator.config), 0.1)
    weights = load_file(posthoc_run / run_folder.UNET_WEIGHTS)
    assert all(torch.equal(weights[name], value) for name, value in average.items())
    assert evaluator.model.version == pipeline.load_model(str(posthoc_run)).version != before
    generated = evaluator.generated_features()
    assert torch.equal(exported.generated, generated)
    distance = metrics.frechet_distance(generated, extracted.trained)
    assert rows["0.1"]["frechet_distance"] == pytest.approx(distance, rel=1e-6)
    assert (posthoc_run / "evaluation" / run_folder.EMA_LENGTHS).is_file()
    assert "now holds EMA length 0.1" in capsys.readouterr().out
    # The raw weights of that step are still known, and training's average is a candidate now
    evaluator = open_digits()
    assert evaluator.load_raw_unet() is not None
    assert set(compare_ema._references(evaluator)) == {compare_ema.TRAINED, RAW}


def test_an_interrupted_export_is_completed(compare, posthoc_run, monkeypatch, capsys):
    """Killed after the weights: the same command finds them best, and still ends the export."""

    def kill(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(proof, "write_proof", kill)
        patch.setattr(run_record, "write_record", kill)
        compare("0.1", best=-1)
    assert run_folder.export_was_interrupted(posthoc_run)
    _, (evaluator, _, _) = compare("0.1", best=0)
    recorded = run_record.read_exported_ema(posthoc_run, evaluator.model.version)
    assert recorded is not None and recorded.sigma_rel == 0.1
    assert not run_folder.export_was_interrupted(posthoc_run)
    assert "now holds EMA length 0.1" in capsys.readouterr().out


def test_what_is_no_run_with_averages_is_refused(posthoc_run):
    for model in (posthoc_run / "checkpoint-8", "owner/name"):
        with pytest.raises(UsageError, match="needs a run folder"):
            compare_ema.require_posthoc_ema(parse_evaluate([str(model), "--ema_lengths=0.05"]))
    with pytest.raises(UserError, match="Give lengths from"):
        compare_ema.require_posthoc_ema(parse_evaluate([str(posthoc_run), "--ema_lengths=0.001"]))


def result(name, frechet, leaving_out, sigma_rel=None, weight=0.0):
    return EMAResult(
        name=name,
        sigma_rel=sigma_rel,
        weights={"w": torch.tensor(weight)},
        generated=torch.zeros(1),
        frechet=frechet,
        kernel=(0.0, 0.0),
        leaving_out=leaving_out,
        losses=None,
    )


CURRENT = result(PIPELINE, 2.0, [2.0] * 3)


def test_raw_weights_cannot_be_the_best():
    rows = [CURRENT, result(RAW, 1.0, [1.0] * 3)]
    comparison = EMAComparison(rows, PosthocEMA({}))
    assert comparison.best is comparison.pipeline
    assert "No length is better" in compare_ema.format_verdict(comparison)


def test_an_interrupted_export_of_unknown_weights_is_refused(tmp_path):
    """The length with the weights of the pipeline is exported; without one they are unknown."""
    rows = [CURRENT, result("0.05", 3.0, [3.0] * 3, 0.05, weight=1.0)]
    comparison = EMAComparison(rows, PosthocEMA({}), interrupted=tmp_path)
    with pytest.raises(UserError, match="was cut off in .*Give the same --ema_lengths"):
        _ = comparison.to_export
    comparison.rows.append(result("0.1", 2.0, [2.0] * 3, 0.1))
    assert comparison.to_export.name == "0.1"


def test_what_may_be_chance_is_said(tmp_path):
    by_chance = [CURRENT, result("0.05", 1.9, [1.0, 2.0, 1.5], 0.05)]
    comparison = EMAComparison(by_chance, PosthocEMA({}))
    verdict = compare_ema.format_verdict(comparison)
    assert verdict.startswith("NOT SIGNIFICANT: the lowest is EMA length 0.05")
    assert "NOTE: the difference" in compare_ema.format_export(comparison, tmp_path)
    significant = [CURRENT, result("0.05", 1.0, [1.0, 1.01, 0.99], 0.05)]
    comparison = EMAComparison(significant, PosthocEMA({}))
    verdict = compare_ema.format_verdict(comparison)
    assert verdict.startswith("Best is EMA length 0.05: 1 against 2")
    assert "NOTE" not in compare_ema.format_export(comparison, tmp_path)
    table = compare_ema.format_comparison(comparison)
    assert "+" not in table and "-1" in table
