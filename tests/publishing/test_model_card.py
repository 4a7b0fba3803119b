"""The model card: recorded facts, nothing unknown, and what people wrote is kept."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from ddpm.config.parser import parse_train
from ddpm.errors import UserError
from ddpm.file_io import write_json
from ddpm.publishing import card_metadata, model_card, publish
from ddpm.run_folder import EVALUATION, PIPELINE_FILES, RECORD, SCHEDULER_CONFIG, TRAIN_CONFIG
from ddpm.run_record import write_record


def test_the_card_states_the_recorded_facts(run_folder):
    text = model_card.render_card(run_folder, "alice/my-run", "apache-2.0")
    data = ModelCard(text).data
    assert data.license == "apache-2.0" and data.library_name == "diffusers"
    assert data.pipeline_tag == "unconditional-image-generation"
    assert data.datasets == ["someone/pictures"] and "ddpm" in data.tags
    for fact in (
        "# my-run",
        "trained on 10 images",
        "`" + "0" * 40 + "`",
        "| final loss | 0.5000 |",
        "6 (2.4 epochs, 24 images)",
        "`prediction_type=v_prediction`, `",
        "diffusers ",
        "10 of mode L; 10 of 8x8",
    ):
        assert fact in text


def test_unknown_facts_are_absent(run_folder):
    """A pipeline folder of other origin has no record: the card claims nothing about it."""
    for name in (RECORD, TRAIN_CONFIG):
        (run_folder / name).unlink()
    text = model_card.render_card(run_folder, "alice/x")
    assert "None" not in text and "Training" not in text and "Data" not in text
    assert "license" not in text and "samples.png" not in text
    assert "A diffusion model that draws images from noise.\nIt is" in text


def write_evaluation(folder, **values):
    write_json(folder / EVALUATION, values)


def test_metrics_are_in_the_text_and_the_metadata(run_folder):
    write_evaluation(
        run_folder,
        metrics={"fid": 12.345678, "precision_at_3": 0.5, "note": "x"},
        num_images=2000,
        sampler={"scheduler": "ddim", "num_inference_steps": 1},
        seeds=[0, 1999],
        features={"name": "facebook/dinov2-base", "version": "0" * 40},
    )
    text = model_card.render_card(run_folder, "alice/my-run")
    assert "| FID | 12.3457 |" in text and "| Precision at 3 | 0.5 |" in text
    assert "Measured on 2,000 generated images (`ddim` in 1 step, seeds 0 to 1999), by the " in text
    assert "by the features of facebook/dinov2-base.\n" in text
    write_evaluation(run_folder, metrics={"fid": 12.345678, "precision_at_3": 0.5}, num_images=2000)
    text = model_card.render_card(run_folder, "alice/my-run")
    assert "Measured on 2,000 generated images.\n" in text
    (result,) = ModelCard(text).data.eval_results[:1]
    assert ModelCard(text).data.model_name == "my-run"
    assert (result.metric_type, result.metric_value) == ("fid", 12.345678)
    assert (result.dataset_type, result.dataset_revision) == ("someone/pictures", "0" * 40)
    assert result.task_type == "unconditional-image-generation"
    write_evaluation(run_folder, metrics={"fid": 1.0}, dataset="other/data")
    text = model_card.render_card(run_folder, "alice/my-run")
    assert ModelCard(text).data.eval_results[0].dataset_type == "other/data"


def test_results_of_other_people_are_kept_and_ours_are_replaced(run_folder):
    write_evaluation(run_folder, metrics={"fid": 1.0})
    first = model_card.render_card(run_folder, "alice/my-run")
    theirs = yaml.safe_load(first.split("---\n")[1])
    theirs["model-index"] += [{**theirs["model-index"][0], "name": "by Bob"}]
    edited = f"---\n{yaml.safe_dump(theirs)}---\n{first.split('---', 2)[2]}"
    write_evaluation(run_folder, metrics={"fid": 0.5})
    merged = model_card.merge_card(edited, model_card.render_card(run_folder, "alice/my-run"), None)
    index = yaml.safe_load(merged.split("---\n")[1])["model-index"]
    values = {m["name"]: m["results"][0]["metrics"][0]["value"] for m in index}
    assert values == {"my-run": 0.5, "by Bob": 1.0}
    (run_folder / EVALUATION).unlink()
    merged = model_card.merge_card(merged, model_card.render_card(run_folder, "alice/my-run"), None)
    index = yaml.safe_load(merged.split("---\n")[1])["model-index"]
    assert [model["name"] for model in index] == ["by Bob"]


def test_an_evaluation_without_metrics_is_refused(run_folder):
    write_evaluation(run_folder, fid=1.0)
    with pytest.raises(UserError, match='evaluation.json has no "metrics"'):
        model_card.render_card(run_folder, "a/b")


def test_the_commands_to_repeat_the_run_pin_what_the_settings_leave_open(run_folder):
    text = model_card.render_card(run_folder, "alice/my-run")
    assert "hf download alice/my-run train_config.json --local-dir my-run\n" in text
    line = re.search(r"^accelerate launch .*$", text, flags=re.MULTILINE)[0]
    assert line == (
        "accelerate launch --num_processes 1 train.py --config my-run/train_config.json "
        f"--output_dir my-run-again --dataset_revision {'0' * 40} --mixed_precision no"
    )
    again = line.split("train.py ")[1].replace("my-run/", f"{run_folder}/").split()
    assert parse_train(again).data.dataset_revision == "0" * 40


def test_plots_tracker_and_unfinished_runs_are_shown(run_folder):
    for name in ("samples.png", "loss.png", "evaluation/nearest.png"):
        (run_folder / name).parent.mkdir(exist_ok=True)
        (run_folder / name).touch()
    text = model_card.render_card(run_folder, "a/b")
    assert "![Samples from fixed seeds](samples.png)" in text
    assert "![Loss over the steps](loss.png)" in text and "Weights & Biases" not in text
    assert "](evaluation/nearest.png)" in text and "loss-by-band" not in text
    (run_folder / "loss.png").unlink()
    write_record(
        run_folder,
        wandb="https://wandb.ai/x/y/runs/z",
        finished=False,
        training={"steps": 1200, "final_loss": 0.25},
    )
    text = model_card.render_card(run_folder, "a/b")
    assert "[wandb.ai/x/y/runs/z](https://wandb.ai/x/y/runs/z)" in text and "loss.png" not in text
    assert "for 1,200 steps so far." in text and "| loss | 0.2500 |" in text
    assert "| steps | 1,200 |" in text and "None" not in text


def test_the_papers_are_those_of_what_is_used(run_folder):
    def papers() -> list[str]:
        return re.findall(r"arxiv\.org/abs/([0-9.]+)\)", model_card.render_card(run_folder, "a/b"))

    assert papers() == ["2006.11239", "2303.09556", "2206.00364", "2010.02502"]
    settings = json.loads((run_folder / TRAIN_CONFIG).read_text())
    write_json(run_folder / TRAIN_CONFIG, settings | {"timestep_sampling": "uniform"})
    assert papers() == ["2006.11239", "2303.09556", "2010.02502"]
    config = json.loads((run_folder / SCHEDULER_CONFIG).read_text())
    config |= {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    write_json(run_folder / SCHEDULER_CONFIG, config | {"rescale_betas_zero_snr": True})
    (run_folder / TRAIN_CONFIG).unlink()
    assert papers() == ["2006.11239", "2102.09672", "2305.08891", "2202.00512", "2010.02502"]


def test_a_space_of_trackio_has_a_badge_and_a_tag(run_folder):
    """The next push replaces the tag of an earlier Space; tags of people stay."""

    def card(address: str) -> str:
        write_record(run_folder, trackio=address)
        return model_card.render_card(run_folder, "a/b")

    space = "https://huggingface.co/spaces/you/metrics"
    text = card(space)
    assert f"assets/badge.png)]({space})\n" in text
    assert f"| log | trackio: [{space[8:]}]({space}) |" in text
    assert ModelCard(text).data.tags[-2:] == ["trackio", f"trackio:{space}"]
    edited = text.replace("- trackio\n", "- mine\n- trackio\n", 1)
    merged = ModelCard(model_card.merge_card(edited, card(f"{space}-2"), None)).data.tags
    assert "mine" in merged and f"trackio:{space}" not in merged
    assert merged[-1] == f"trackio:{space}-2" and merged.count("trackio") == 1
    text = card("https://metrics.example.org/a")
    assert "[metrics.example.org/a](https://metrics.example.org/a) |" in text
    assert "badge.png" not in text and "trackio" not in ModelCard(text).data.tags


def test_the_thumbnail_is_the_grid_unless_a_person_chose_one(run_folder):
    assert "thumbnail" not in ModelCard(model_card.render_card(run_folder, "a/b")).data
    (run_folder / "samples.png").touch()
    text = model_card.render_card(run_folder, "a/b", revision="trial")
    address = "https://huggingface.co/a/b/resolve/trial/samples.png"
    assert ModelCard(text).data.thumbnail == address
    edited = text.replace(address, "https://example.org/mine.png")
    merged = model_card.merge_card(edited, text, None)
    assert ModelCard(merged).data.thumbnail == "https://example.org/mine.png"


def test_what_to_cite_is_that_of_the_citation_file(run_folder):
    """Braces are balanced; the model's own entry has what the record knows."""
    text = model_card.render_card(run_folder, "alice/my_run")
    bibtex = re.search(r"```bibtex\n(.*?)```", text, flags=re.DOTALL)[1]
    model, software, paper = re.findall(r"^@\w+\{.*?^\}$", bibtex, flags=re.DOTALL | re.MULTILINE)
    assert all(entry.count("{") == entry.count("}") for entry in (model, software, paper))
    finished_at = json.loads((run_folder / RECORD).read_text())["training"]["finished_at"]
    for fact in ("@misc{my_run,\n", "{alice}", f"year = {{{finished_at[:4]}}}", "co/alice/my_run}"):
        assert fact in model
    citation = yaml.safe_load((Path(__file__).parents[2] / "CITATION.cff").read_text())
    assert f"title = {{{citation['title']}}}" in software
    assert f"{{{{{citation['authors'][0]['name']}}}}}" in software
    (reference,) = citation["references"]
    authors = (f"{a['family-names']}, {a['given-names']}" for a in reference["authors"])
    assert f"author = {{{' and '.join(authors)}}}" in paper
    for fact in ("title", "year", "url"):
        assert f"{fact} = {{{reference[fact]}}}" in paper


HOSTILE = [
    "![x](https://evil.example/x.png)",
    "[click](javascript:alert(1))",
    "<img src=x onerror=alert(1)>",
    "<!-- -->",
    model_card.END,
    model_card.BEGIN,
    "https://evil.example",
    "www.evil.example",
    "alice@evil.example",
    "@alice",
    "a | b |",
    "`a` ``b`` ```",
    "a\n\n# Heading\n\n---\n",
    "a\n```\n![x](y)\n",
    "</details><script>",
    "*a* **b** ~~c~~ $$d$$ \\(e\\)",
    "&lt;script&gt;",
    "\u202egnp.exe \x1b]0;t\x07",
    "a\\",
    "a' ; rm -rf ~ #",
    "- a",
    "---\nlicense: mit\n---\n",
]


def write_texts(folder, text: str) -> None:
    """Write the files that a card is made from, with `text` in every place for a text."""
    counts = {text: 3}
    dataset = {
        **dict.fromkeys(("config_name", "split", "image_column", "title"), text),
        **{
            "name": f"{text} name",
            "revision": text,
            "license": [text, text, [text]],
            "modes": counts,
            "sizes": counts,
        },
        **{"on_hub": True, "images": 3, "channels": 1},
    }
    environment = {
        **dict.fromkeys(("device", "mixed_precision", "python", "git_commit"), text),
        **{"versions": {text: text}, "num_processes": 1},
    }
    base = {
        **dict.fromkeys(("version", "license_name", "license_link"), text),
        **{"name": f"{text} name", "on_hub": True, "license": [text, "other"]},
        "resolution": [8, 8],
    }
    facts = {"dataset": dataset, "environment": environment, "base_model": base}
    write_record(folder, **facts, wandb=f"{text} {text}", trackio=f"{text} {text}", demo=text)
    settings = json.loads((folder / TRAIN_CONFIG).read_text())
    for name in ("dataset_name", "image_column", "split"):
        settings[name] = text
    write_json(folder / TRAIN_CONFIG, settings | {"seed": [text]})
    write_evaluation(
        folder,
        metrics={"fid": 1.0, f"{text} longer": 2.0},
        num_images=3,
        sampler={"scheduler": text, "num_inference_steps": 2},
        features={"name": text},
    )


def structure(card: str) -> list[tuple[str, str | None]]:
    """Return all that a card is besides text: headings, links, images, tables, HTML, fences."""
    blocks = MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
    tokens = [token for block in blocks for token in (block, *(block.children or []))]
    return [
        (token.type, token.attrs.get("href") or token.attrs.get("src"))
        for token in tokens
        if token.type not in ("text", "code_inline")
    ]


@pytest.mark.parametrize("texts", [HOSTILE[::3], pytest.param(HOSTILE, marks=pytest.mark.slow)])
def test_recorded_text_is_nothing_but_text(run_folder, texts):
    """Whatever it holds, the card has the headings, links, images and tables of another one."""
    write_texts(run_folder, "words")
    expected = structure(model_card.render_card(run_folder, "alice/my-run"))
    for text in texts:
        write_texts(run_folder, text)
        card = model_card.render_card(run_folder, "alice/my-run")
        body = card.split("---\n", 2)[2]
        assert structure(card) == expected, text
        assert card.count(model_card.BEGIN) == card.count(model_card.END) == 1, text
        assert all(line.isprintable() for line in card.split("\n")), text
        words = re.sub(r"```.*?```|`[^`\n]*`", "", body, flags=re.DOTALL)
        assert "evil.example" not in words, f"{text} becomes a link on the Hub"
        data = ModelCard(card).data
        assert not {"datasets", "base_model"} & data.to_dict().keys(), text
        assert "other" in data.license, text
        assert model_card.merge_card(card, card, None) == card, text


@pytest.mark.parametrize("name", ["手寫數字 (8x8), 2. Auflage", "Mona's photos: cats/dogs + 100%"])
def test_ordinary_titles_are_shown_as_they_are(run_folder, name):
    write_texts(run_folder, name)
    assert f"3 images of {name} for 6 steps." in model_card.render_card(run_folder, "alice/my-run")


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://w.example/a%20b?c=d", "[`w.example/a%20b?c=d`](https://w.example/a%20b?c=d)"),
        ("https://me:secret@w.example/a", "[`***@w.example/a`](https://w.example/a)"),
        ("javascript:alert(1)", "javascript:alert(1)"),
        ("https://x) ![a](https://y", "`https://x) ![a](https://y`"),
    ],
)
def test_the_log_shows_where_its_link_leads(run_folder, address, shown):
    write_record(run_folder, wandb=address)
    card = model_card.render_card(run_folder, "a/b")
    assert f"| log | Weights & Biases: {shown} |" in card and "secret" not in card


def test_the_hub_accepts_the_metadata(run_folder, hub, tmp_path):
    write_evaluation(run_folder, metrics={"fid": 1.0})
    readme = tmp_path / "README.md"
    readme.write_text(model_card.render_card(run_folder, "a/b", "apache-2.0"))
    publish._validate_card(readme, "a/b")
    readme.write_text(model_card.render_card(run_folder, "a/b", "free"))
    with pytest.raises(UserError, match="does not accept the card of a/b: .*license"):
        publish._validate_card(readme, "a/b")


def test_the_same_files_give_the_same_card(run_folder):
    first = model_card.render_card(run_folder, "a/b")
    assert model_card.render_card(run_folder, "a/b") == first


def test_the_snippet_runs_with_stock_diffusers(run_folder, hub, alice, tmp_path, monkeypatch):
    text = model_card.render_card(run_folder, "alice/snippet")
    files = {name: (run_folder / name).read_bytes() for name in PIPELINE_FILES}
    hub.create_repo("model", "alice/snippet").write(files, "first")
    code = re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert os.path.getsize("sample.png") > 0


def test_edits_survive_the_next_push(run_folder):
    first = model_card.render_card(run_folder, "alice/my-run")
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
    merged = model_card.merge_card(edited, model_card.render_card(run_folder, "alice/my-run"), None)
    assert "# My digits\n\nDrawn in 2026." in merged and merged.endswith("## Thanks\n\nTo Bob.\n")
    assert "| final loss | 0.2500 |" in merged and "0.5000" not in merged
    assert merged.count(model_card.BEGIN) == merged.count(model_card.END) == 1
    data = ModelCard(merged).data.to_dict()
    assert data["language"] == "zh" and data["tags"][0] == "mine" and "ddpm" in data["tags"]
    again = model_card.merge_card(merged, model_card.render_card(run_folder, "alice/my-run"), None)
    assert again == merged


def test_a_license_set_by_hand_is_kept_unless_one_is_asked_for(run_folder):
    theirs = model_card.render_card(run_folder, "a/b").replace("---\n", "---\nlicense: mit\n", 1)
    ours = model_card.render_card(run_folder, "a/b")
    assert ModelCard(model_card.merge_card(theirs, ours, None)).data.license == "mit"
    asked = model_card.render_card(run_folder, "a/b", "apache-2.0")
    assert (
        ModelCard(model_card.merge_card(theirs, asked, "apache-2.0")).data.license == "apache-2.0"
    )


def test_a_foreign_readme_keeps_all_its_text(run_folder):
    ours = model_card.render_card(run_folder, "a/b")
    for theirs in ("# Mine\n\nHello.\n", "---\nlicense: mit\n---\n# Mine\n\nHello.\n", ""):
        merged = model_card.merge_card(theirs, ours, None)
        assert theirs.split("---\n")[-1].rstrip() in merged and model_card.BEGIN in merged
        assert model_card.merge_card(merged, ours, None) == merged


def test_unreadable_metadata_is_refused(run_folder):
    ours = model_card.render_card(run_folder, "a/b")
    for text in ("- a list", "a: !!bool x", "a: &a [*a]", "a: " + "[" * 5000):
        with pytest.raises(UserError, match="The README.md on the Hub cannot be read"):
            model_card.merge_card(f"---\n{text}\n---\ntext", ours, None)


@pytest.mark.parametrize(
    ("tags", "kept"),
    [
        ("mine", ["mine"]),
        ("5", [5]),
        ("{a: b}", [{"a": "b"}]),
        ("[[a], mine]", [["a"], "mine"]),
        ("[ddpm, mine]", ["ddpm", "mine"]),
        ("", []),
    ],
)
def test_any_tags_are_kept(run_folder, tags, kept):
    ours = model_card.render_card(run_folder, "a/b")
    merged = model_card.merge_card(f"---\ntags: {tags}\n---\ntext\n", ours, None)
    united = yaml.safe_load(merged.split("---\n")[1])["tags"]
    assert united == [*kept, *(tag for tag in card_metadata.TAGS if tag not in kept)]
    assert model_card.merge_card(merged, ours, None) == merged
