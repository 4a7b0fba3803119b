"""evaluation.json: one file, written by evaluate.py or by hand."""

import json

import pytest

from ddpm import run_folder
from ddpm.errors import UserError
from ddpm.evaluation import results
from ddpm.evaluation.results import Evaluation, ModelVersion, SamplerSettings, TimestepLosses


def test_what_is_written_is_read_again(tmp_path):
    losses = {"model": [0.5, 0.25]}
    evaluation = Evaluation(
        metrics={"fid": 3.5},
        num_images=1000,
        model=ModelVersion(name="m", version="v"),
        seeds=[0, 999],
        sampler=SamplerSettings(scheduler="ddim", num_inference_steps=50),
        loss_by_band=TimestepLosses(
            num_images=20, bands=[[0, 9], [10, 19]], held_out=losses, trained=losses
        ),
    )
    evaluation.write(tmp_path / run_folder.EVALUATION)
    assert results.read_evaluation(tmp_path) == evaluation
    entries = json.loads((tmp_path / run_folder.EVALUATION).read_text())
    assert list(entries) == ["metrics", "num_images", "model", "seeds", "sampler", "loss_by_band"]


def test_metrics_that_are_no_finite_numbers_and_unknown_entries_are_left_out(tmp_path):
    assert results.read_evaluation(tmp_path) is None
    content = '{"metrics": {"fid": 3.5, "kid": NaN, "note": "x", "flag": true}, "mood": "good"}'
    (tmp_path / run_folder.EVALUATION).write_text(content)
    assert results.read_evaluation(tmp_path) == Evaluation(metrics={"fid": 3.5})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"fid": 3.5}, 'has no "metrics"'),
        ({"metrics": {}, "num_images": "many"}, "num_images"),
        ({"metrics": {}, "sampler": {"scheduler": "ddim"}}, "num_inference_steps"),
        ({"metrics": {}, "seeds": [1, 2, 3]}, "first and the last"),
    ],
)
def test_entries_of_a_wrong_type_are_refused(tmp_path, entries, message):
    (tmp_path / run_folder.EVALUATION).write_text(json.dumps(entries))
    with pytest.raises(UserError, match=f"evaluation.json.*{message}"):
        results.read_evaluation(tmp_path)
