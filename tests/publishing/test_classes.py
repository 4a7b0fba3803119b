"""Models with classes: what is published of them, what their card shows, and what others draw."""

import json
import re

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file

from ddpm import file_io, run_folder
from ddpm.config.parser import parse_push
from ddpm.config.train import HubConfig
from ddpm.diffusion.schedulers import build_sampling_scheduler
from ddpm.errors import UserError
from ddpm.evaluation.results import ClassResult, Evaluation, ModelVersion
from ddpm.publishing import card_metadata, model_card, publish
from ddpm.publishing.background import Publisher
from ddpm.publishing.stage import stage_files
from ddpm.run_folder import CONDITIONAL_FILES, CONDITIONAL_LABELS, CONDITIONAL_WEIGHTS
from ddpm.run_record import write_record
from ddpm.sampling import generate, pipeline, proof, sampler_results
from ddpm.sampling.guidance import ClassGuidance, predictor
from tests.publishing.test_model_card import HOSTILE, structure
from tests.publishing.test_publish import files_on_branch
from tests.sampling.test_guidance_results import CURVE
from tests.tiny import CLASS_NAMES

LABEL_PROOF = {f"proof/label-{label:05d}.png" for label in (0, 2)}


def push(folder, repo_id, *, check_images=True):
    config = parse_push([str(folder), repo_id])
    return publish.publish(folder, repo_id, config, check_images=check_images)


def write_labels(folder, names):
    labels = {str(index): name for index, name in enumerate(names)}
    file_io.write_json(folder / CONDITIONAL_LABELS, labels)


def test_classes_are_published_proved_and_removed_with_their_model(
    hub, alice, class_folder, run_folder
):
    repo_id = "alice/classes"
    assert push(class_folder, repo_id).difference == 0
    assert files_on_branch(hub, repo_id) >= {*CONDITIONAL_FILES, *LABEL_PROOF}
    published = json.loads((class_folder / "published.json").read_text())
    weights = class_folder / CONDITIONAL_WEIGHTS
    assert published["sha256"][CONDITIONAL_WEIGHTS] == file_io.file_sha256(weights)
    assert not push(class_folder, repo_id, check_images=False).is_new
    api = HfApi()
    assert card_metadata.CLASS_TAG in api.model_info(repo_id).tags
    assert pipeline.load_model(repo_id, conditional=None).class_names == CLASS_NAMES
    push(run_folder, repo_id, check_images=False)  # a model without classes
    assert not files_on_branch(hub, repo_id) & {*CONDITIONAL_FILES, *LABEL_PROOF}
    assert card_metadata.CLASS_TAG not in api.model_info(repo_id).tags
    assert pipeline.load_model(repo_id, conditional=None).class_names is None


def test_a_changed_byte_of_the_classes_is_found_and_repaired(hub, alice, class_folder, tmp_path):
    """Both where it makes the weights another model's, and where only the images tell."""
    repo_id = "alice/changed-classes"
    push(class_folder, repo_id, check_images=False)
    content = bytearray((class_folder / CONDITIONAL_WEIGHTS).read_bytes())
    weights = load_file(class_folder / CONDITIONAL_WEIGHTS)
    content[-2] ^= 0x40
    weights["class_embedding.weight"][0] *= -1  # not in the pipeline, which has the null class
    save_file(weights, tmp_path / "other")
    for changed, message in (
        (bytes(content), "one of them was replaced"),
        ((tmp_path / "other").read_bytes(), "draws other images than its proof"),
    ):
        hub.repo("model", repo_id).write({CONDITIONAL_WEIGHTS: changed}, "changed")
        with pytest.raises(UserError, match=message):
            proof.verify_model(repo_id)
        assert push(class_folder, repo_id, check_images=False).is_new
    result = proof.verify_model(repo_id)
    assert result.num_images == 4 and result.difference <= proof.TOLERANCE


def test_an_upload_during_training_has_the_classes(hub, alice, class_folder):
    config = HubConfig(push_to_hub=True, hub_model_id="alice/background")
    messages = []
    publisher = Publisher(class_folder, config, main=True, report=messages.append)
    publisher.submit(5)
    publisher._pipelines.join(60)
    assert files_on_branch(hub, publisher.repo_id) >= {*CONDITIONAL_FILES, *LABEL_PROOF}, messages


def test_the_snippet_draws_a_class_with_stock_diffusers(
    hub, alice, class_folder, tmp_path, monkeypatch
):
    """As it stands on the card; its images are ours with the same noise, to one gray level."""
    push(class_folder, "alice/stock", check_images=False)
    card = hub.repo("model", "alice/stock").read("README.md").decode()
    stock, with_classes = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert "ddpm" not in with_classes and len(with_classes.splitlines()) <= 17
    monkeypatch.chdir(tmp_path)
    exec(stock, {})
    torch.manual_seed(0)
    names = {}
    exec(with_classes, names)
    torch.manual_seed(0)
    noise = torch.randn(4, 1, 8, 8)
    model = pipeline.load_model("alice/stock", conditional=True)
    scheduler = build_sampling_scheduler("ddim", model.scheduler_config, 40)
    predict = predictor(model.unet, scheduler, range(4), ClassGuidance(lambda seed: 0, 2.0))
    ours = generate.denoise(predict, scheduler, noise, [None] * 4)
    assert (names["images"] - ours).abs().max() < 1 / 255
    assert ours.std() > 0.1
    with Image.open("class.png") as image:
        assert image.size == (8, 8)


def test_the_card_has_the_classes_and_the_guidance(class_folder):
    counts = dict(zip(CLASS_NAMES, (1200, 30, 4), strict=True))
    write_record(class_folder, dataset={"name": "a/b", "classes": counts})
    text = model_card.render_card(class_folder, "alice/x", revision="trial")
    assert "| 0 | cat | 1,200 |\n| 1 | dog | 30 |\n| 2 | a/../b | 4 |\n" in text
    assert text.count('revision="trial"') == 3 and "scale = 0, 3, 2.0" in text
    assert "## Guidance" not in text and "abs/2207.12598" in text and "A row" not in text
    (class_folder / "samples.png").touch()
    text = model_card.render_card(class_folder, "alice/x")
    assert "A row for each of the first 3 classes: at the left without guidance" in text
    write_record(class_folder, dataset={"name": "a/b", "classes": counts, "probed": 1234})
    assert "| 0 | cat |  |\n" in model_card.render_card(class_folder, "alice/x")
    write_record(class_folder, dataset={"name": "a/b", "classes": counts})
    weights = sampler_results.unet_weights_sha256(class_folder)
    result = ClassResult(
        name="dog", num_images=9, metrics={"label_accuracy": 0.875, "fid": 12.34}, copies=0
    )
    Evaluation(
        metrics={"fid": 3.0}, model=ModelVersion(version=weights), guidance=CURVE, classes=[result]
    ).write(class_folder / run_folder.EVALUATION)
    text = model_card.render_card(class_folder, "alice/x")
    assert "| id | class | images trained on | label accuracy | FID |\n|---|" in text
    assert "| 0 | cat | 1,200 |  |  |\n| 1 | dog | 30 | 0.875 | 12.3 |" in text
    assert "| 1 | 2.01 | 0.800 | as good as the best |\n| 1.5 | 2 | 0.900 | best |" in text
    assert "scale = 0, 3, 1.5" in text


def test_many_classes_are_cut_off(class_folder, make_unet, chain):
    names = [f"class {index}" for index in range(1500)]
    pipeline.export_pipeline(make_unet(num_classes=1500), chain, class_folder, names)
    text = model_card.render_card(class_folder, "alice/x")
    assert "| 19 | class 19 |  |\n\n1,480 more are in `conditional/labels.json`." in text
    assert (
        "class 20" not in text
        and "all 1,500 classes" in text
        and "no_class, scale = 0, 1500" in text
    )


def test_names_of_classes_are_nothing_but_text(class_folder):
    expected = structure(model_card.render_card(class_folder, "alice/x"))
    for name in HOSTILE[::3]:
        write_labels(class_folder, ["cat", name, "b"])
        card = model_card.render_card(class_folder, "alice/x")
        assert structure(card) == expected, name
        assert all(line.isprintable() for line in card.split("\n")), name
        assert yaml.safe_load(card.split("---\n")[1])["tags"][-1] == card_metadata.CLASS_TAG


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"0": "cat", "2": "b"}, "does not number its classes"),
        ({"0": "cat", "1": 5, "2": "b"}, "it must be a text"),
        ({}, "does not number its classes"),
        ({"0": "cat", "1": "hf_" + "a" * 34, "2": "b"}, "looks like a token"),
    ],
)
def test_bad_names_of_classes_are_not_published(class_folder, tmp_path, labels, message):
    file_io.write_json(class_folder / CONDITIONAL_LABELS, labels)
    for name in (run_folder.PROOF, run_folder.RECORD):
        (class_folder / name).unlink(missing_ok=True)
    with pytest.raises(UserError, match=message):
        stage_files(class_folder, tmp_path / "staged", "a/b", parse_push([str(class_folder)]))


def test_links_pickles_and_missing_files_of_the_classes_are_refused(class_folder, tmp_path):
    def message():
        with pytest.raises(UserError) as refusal:
            stage_files(class_folder, tmp_path / "staged", "a/b", parse_push([str(class_folder)]))
        return str(refusal.value)

    (class_folder / "conditional/weights.bin").write_bytes(b"x")
    assert "looks like pickled data" in message()
    (class_folder / "conditional/weights.bin").rename(tmp_path / "weights.bin")
    (class_folder / CONDITIONAL_LABELS).rename(tmp_path / "labels.json")
    assert "conditional/labels.json missing" in message()
    (class_folder / CONDITIONAL_LABELS).symlink_to(tmp_path / "labels.json")
    assert "is a link" in message()
