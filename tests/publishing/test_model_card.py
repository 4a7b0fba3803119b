"""The card: recorded facts, nothing unknown, and people's own words kept."""

import os
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from ddpm.config.parser import parse_train
from ddpm.errors import UserError
from ddpm.publishing import model_card
from ddpm.run_folder import (
    EVALUATION,
    PIPELINE_FILES,
    RECORD,
    TRAIN_CONFIG,
    read_json,
    write_json,
    write_record,
)


def test_the_card_says_what_was_recorded(run_folder):
    text = model_card.render_card(run_folder, "alice/my-run", "apache-2.0", "samples.png")
    data = ModelCard(text).data
    assert data.license == "apache-2.0" and data.library_name == "diffusers"
    assert data.pipeline_tag == "unconditional-image-generation"
    assert data.datasets == ["someone/pictures"] and "ddpm" in data.tags
    for fact in (
        "# my-run",
        "![Samples from fixed seeds](samples.png)",
        "trained on 10 images",
        "`" + "0" * 40 + "`",
        "| final loss | 0.5000 |",
        "6 (2.4 epochs, 24 images)",
        "`prediction_type=v_prediction`, `",
        "diffusers ",
        "10 of mode L; 10 of 8x8",
    ):
        assert fact in text


def test_what_is_unknown_is_absent(run_folder):
    """A pipeline folder of other origin has no record: the card claims nothing about it."""
    for name in (RECORD, TRAIN_CONFIG):
        (run_folder / name).unlink()
    text = model_card.render_card(run_folder, "alice/x", None, None)
    assert "None" not in text and "Training" not in text and "Data" not in text
    assert "license" not in text and "samples.png" not in text
    assert "A diffusion model that draws images from noise.\nIt is" in text


def evaluate(folder, **values):
    write_json(folder / EVALUATION, values)


def test_what_was_measured_stands_in_text_and_metadata(run_folder):
    evaluate(
        run_folder, metrics={"fid": 12.345678, "precision_at_3": 0.5, "note": "x"}, num_images=2000
    )
    text = model_card.render_card(run_folder, "alice/my-run", None, None)
    assert "| FID | 12.3457 |" in text and "| Precision at 3 | 0.5 |" in text
    assert "Measured on 2,000 drawn images." in text
    (result,) = ModelCard(text).data.eval_results[:1]
    assert ModelCard(text).data.model_name == "my-run"
    assert (result.metric_type, result.metric_value) == ("fid", 12.345678)
    assert (result.dataset_type, result.dataset_revision) == ("someone/pictures", "0" * 40)
    assert result.task_type == "unconditional-image-generation"
    evaluate(run_folder, metrics={"fid": 1.0}, dataset="other/data")
    text = model_card.render_card(run_folder, "alice/my-run", None, None)
    assert ModelCard(text).data.eval_results[0].dataset_type == "other/data"


def test_results_of_other_people_stay_and_stale_ones_of_ours_go(run_folder):
    evaluate(run_folder, metrics={"fid": 1.0})
    first = model_card.render_card(run_folder, "alice/my-run", None, None)
    theirs = yaml.safe_load(first.split("---\n")[1])
    theirs["model-index"] += [{**theirs["model-index"][0], "name": "by Bob"}]
    edited = f"---\n{yaml.safe_dump(theirs)}---\n{first.split('---', 2)[2]}"
    evaluate(run_folder, metrics={"fid": 0.5})
    merged = model_card.merge_card(
        edited, model_card.render_card(run_folder, "alice/my-run", None, None), None
    )
    index = yaml.safe_load(merged.split("---\n")[1])["model-index"]
    values = {m["name"]: m["results"][0]["metrics"][0]["value"] for m in index}
    assert values == {"my-run": 0.5, "by Bob": 1.0}
    (run_folder / EVALUATION).unlink()
    merged = model_card.merge_card(
        merged, model_card.render_card(run_folder, "alice/my-run", None, None), None
    )
    index = yaml.safe_load(merged.split("---\n")[1])["model-index"]
    assert [model["name"] for model in index] == ["by Bob"]


def test_a_file_that_evaluate_did_not_write_is_told(run_folder):
    evaluate(run_folder, fid=1.0)
    with pytest.raises(UserError, match='evaluation.json has no "metrics"'):
        model_card.render_card(run_folder, "a/b", None, None)


def test_how_to_do_it_again_pins_what_the_settings_leave_open(run_folder):
    text = model_card.render_card(run_folder, "alice/my-run", None, None)
    assert "hf download alice/my-run train_config.json --local-dir my-run\n" in text
    line = re.search(r"^accelerate launch .*$", text, flags=re.MULTILINE)[0]
    assert line == (
        "accelerate launch --num_processes 1 train.py --config my-run/train_config.json "
        f"--output_dir my-run-again --dataset_revision {'0' * 40} --mixed_precision no"
    )
    again = line.split("train.py ")[1].replace("my-run/", f"{run_folder}/").split()
    assert parse_train(again).data.dataset_revision == "0" * 40


def test_curve_log_and_unfinished_runs_are_shown_where_they_are(run_folder):
    text = model_card.render_card(run_folder, "a/b", None, None, curve="loss.png")
    assert "![Loss over the steps](loss.png)" in text and "Weights & Biases" not in text
    write_record(
        run_folder,
        wandb="https://wandb.ai/x/y/runs/z",
        finished=False,
        training={"steps": 1200, "final_loss": 0.25},
    )
    text = model_card.render_card(run_folder, "a/b", None, None)
    assert "[Weights & Biases](https://wandb.ai/x/y/runs/z)" in text and "loss.png" not in text
    assert "for 1,200 steps so far." in text and "| loss | 0.2500 |" in text
    assert "| steps | 1,200 |" in text and "None" not in text


def test_the_hub_finds_the_metadata_valid(run_folder, hub):
    evaluate(run_folder, metrics={"fid": 1.0})
    ModelCard(model_card.render_card(run_folder, "a/b", "apache-2.0", "samples.png")).validate()
    with pytest.raises(ValueError, match="license"):
        ModelCard(model_card.render_card(run_folder, "a/b", "free", None)).validate()


def test_the_same_record_gives_the_same_card(run_folder):
    assert model_card.render_card(run_folder, "a/b", None, None) == model_card.render_card(
        run_folder, "a/b", None, None
    )


def test_no_path_of_this_machine_is_published(run_folder):
    settings = read_json(run_folder / TRAIN_CONFIG)
    settings |= {
        "train_data_dir": "/home/alice/cats",
        "dataset_name": None,
        "cache_dir": "/home/alice/cache",
        "output_dir": "/home/alice/out",
    }
    write_json(run_folder / TRAIN_CONFIG, settings)
    text = model_card.render_card(run_folder, "alice/x", None, None)
    assert "/home" not in text and "cats" in text
    assert not set(model_card.published_config(run_folder)) & set(model_card.LOCAL)


def test_the_snippet_runs_with_stock_diffusers(run_folder, hub, alice, tmp_path, monkeypatch):
    text = model_card.render_card(run_folder, "alice/snippet", None, None)
    files = {name: (run_folder / name).read_bytes() for name in PIPELINE_FILES}
    hub.create_repo("model", "alice/snippet").write(files, "first")
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert os.path.getsize("sample.png") > 0


def test_words_of_people_survive_the_next_push(run_folder):
    first = model_card.render_card(run_folder, "alice/my-run", None, None)
    edited = first.replace("# my-run", "# My digits\n\nDrawn in 2026.") + "\n## Thanks\n\nTo Bob.\n"
    edited = edited.replace("tags:\n", "language: zh\ntags:\n- mine\n", 1)
    write_record(
        run_folder,
        training={
            "steps": 7,
            "images_seen": 28,
            "epochs": 2.8,
            "seconds": 2.0,
            "images_per_s": 14.0,
            "final_loss": 0.25,
        },
    )
    merged = model_card.merge_card(
        edited, model_card.render_card(run_folder, "alice/my-run", None, None), None
    )
    assert "# My digits\n\nDrawn in 2026." in merged and merged.endswith("## Thanks\n\nTo Bob.\n")
    assert "| final loss | 0.2500 |" in merged and "0.5000" not in merged
    assert merged.count(model_card.BEGIN) == merged.count(model_card.END) == 1
    data = ModelCard(merged).data.to_dict()
    assert data["language"] == "zh" and data["tags"][0] == "mine" and "ddpm" in data["tags"]
    again = model_card.merge_card(
        merged, model_card.render_card(run_folder, "alice/my-run", None, None), None
    )
    assert again == merged


def test_a_licence_set_by_hand_stays_unless_one_is_asked_for(run_folder):
    theirs = model_card.render_card(run_folder, "a/b", None, None).replace(
        "---\n", "---\nlicense: mit\n", 1
    )
    ours = model_card.render_card(run_folder, "a/b", None, None)
    assert ModelCard(model_card.merge_card(theirs, ours, None)).data.license == "mit"
    asked = model_card.render_card(run_folder, "a/b", "apache-2.0", None)
    assert (
        ModelCard(model_card.merge_card(theirs, asked, "apache-2.0")).data.license == "apache-2.0"
    )


def test_a_readme_of_other_origin_keeps_all_its_text(run_folder):
    ours = model_card.render_card(run_folder, "a/b", None, None)
    for theirs in ("# Mine\n\nHello.\n", "---\nlicense: mit\n---\n# Mine\n\nHello.\n", ""):
        merged = model_card.merge_card(theirs, ours, None)
        assert theirs.split("---\n")[-1].rstrip() in merged and model_card.BEGIN in merged
        assert model_card.merge_card(merged, ours, None) == merged


def test_metadata_that_cannot_be_read_is_told(run_folder):
    ours = model_card.render_card(run_folder, "a/b", None, None)
    with pytest.raises(UserError, match="cannot be read"):
        model_card.merge_card("---\n- a list\n---\ntext", ours, None)
