"""The card: recorded facts, nothing unknown, and people's own words kept."""

import os
import re

import pytest
from huggingface_hub import ModelCard

from ddpm import card, runfolder
from ddpm.errors import UserError


def test_the_card_says_what_was_recorded(run_folder):
    text = card.render(run_folder, "alice/my-run", "apache-2.0", "samples.png")
    data = ModelCard(text).data
    assert data.license == "apache-2.0" and data.library_name == "diffusers"
    assert data.pipeline_tag == "unconditional-image-generation"
    assert data.datasets == ["someone/pictures"] and "ddpm" in data.tags
    for fact in ("# my-run", "![Samples from fixed seeds](samples.png)", "trained on 10 images",
                 "`" + "0" * 40 + "`", "| final loss | 0.5000 |", "6 (2.4 epochs, 24 images)",
                 "`prediction_type=v_prediction`", "diffusers "):  # fmt: skip
        assert fact in text


def test_what_is_unknown_is_absent(run_folder):
    """A pipeline folder of other origin has no record: the card claims nothing about it."""
    for name in (runfolder.RECORD, runfolder.TRAIN_CONFIG):
        (run_folder / name).unlink()
    text = card.render(run_folder, "alice/x", None, None)
    assert "None" not in text and "Training" not in text and "Data" not in text
    assert "license" not in text and "samples.png" not in text
    assert "A diffusion model that draws images from noise.\nIt is" in text


def test_the_same_record_gives_the_same_card(run_folder):
    assert card.render(run_folder, "a/b", None, None) == card.render(run_folder, "a/b", None, None)


def test_no_path_of_this_machine_is_published(run_folder):
    settings = runfolder.read_json(run_folder / runfolder.TRAIN_CONFIG)
    settings |= {"train_data_dir": "/home/alice/cats", "dataset_name": None,
                 "cache_dir": "/home/alice/cache", "output_dir": "/home/alice/out"}  # fmt: skip
    runfolder.write_json(run_folder / runfolder.TRAIN_CONFIG, settings)
    text = card.render(run_folder, "alice/x", None, None)
    assert "/home" not in text and "cats" in text
    assert not set(card.published_settings(run_folder)) & set(card.LOCAL)


def test_the_snippet_runs_with_stock_diffusers(run_folder, hub, alice, tmp_path, monkeypatch):
    text = card.render(run_folder, "alice/snippet", None, None)
    files = {name: (run_folder / name).read_bytes() for name in runfolder.PIPELINE_FILES}
    hub.create_repo("model", "alice/snippet").write(files, "first")
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert os.path.getsize("sample.png") > 0


def test_words_of_people_survive_the_next_push(run_folder):
    first = card.render(run_folder, "alice/my-run", None, None)
    edited = first.replace("# my-run", "# My digits\n\nDrawn in 2026.") + "\n## Thanks\n\nTo Bob.\n"
    edited = edited.replace("tags:\n", "language: zh\ntags:\n- mine\n", 1)
    runfolder.write_record(run_folder, training={"steps": 7, "images_seen": 28, "epochs": 2.8,
                           "seconds": 2.0, "images_per_s": 14.0, "final_loss": 0.25})  # fmt: skip
    merged = card.merge(edited, card.render(run_folder, "alice/my-run", None, None), None)
    assert "# My digits\n\nDrawn in 2026." in merged and merged.endswith("## Thanks\n\nTo Bob.\n")
    assert "| final loss | 0.2500 |" in merged and "0.5000" not in merged
    assert merged.count(card.BEGIN) == merged.count(card.END) == 1
    data = ModelCard(merged).data.to_dict()
    assert data["language"] == "zh" and data["tags"][0] == "mine" and "ddpm" in data["tags"]
    again = card.merge(merged, card.render(run_folder, "alice/my-run", None, None), None)
    assert again == merged


def test_a_licence_set_by_hand_stays_unless_one_is_asked_for(run_folder):
    theirs = card.render(run_folder, "a/b", None, None).replace("---\n", "---\nlicense: mit\n", 1)
    ours = card.render(run_folder, "a/b", None, None)
    assert ModelCard(card.merge(theirs, ours, None)).data.license == "mit"
    asked = card.render(run_folder, "a/b", "apache-2.0", None)
    assert ModelCard(card.merge(theirs, asked, "apache-2.0")).data.license == "apache-2.0"


def test_a_readme_of_other_origin_keeps_all_its_text(run_folder):
    ours = card.render(run_folder, "a/b", None, None)
    for theirs in ("# Mine\n\nHello.\n", "---\nlicense: mit\n---\n# Mine\n\nHello.\n", ""):
        merged = card.merge(theirs, ours, None)
        assert theirs.split("---\n")[-1].rstrip() in merged and card.BEGIN in merged
        assert card.merge(merged, ours, None) == merged


def test_metadata_that_cannot_be_read_is_told(run_folder):
    ours = card.render(run_folder, "a/b", None, None)
    with pytest.raises(UserError, match="cannot be read"):
        card.merge("---\n- a list\n---\ntext", ours, None)
