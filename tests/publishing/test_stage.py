"""Staging: only the allow-list is published, and a foreign folder is not trusted."""

import hashlib
import io
import json
import pickle
import shutil
import struct
import zlib

import pytest
import safetensors.torch
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ddpm.config.base import require_flags, setting_fields
from ddpm.config.parser import parse_push
from ddpm.config.train import TrainConfig
from ddpm.errors import UserError, printable
from ddpm.evaluation import plots
from ddpm.file_io import file_sha256, write_json
from ddpm.publishing import stage as stage_module
from ddpm.publishing.stage import is_published_name, stage_files
from ddpm.run_folder import (
    BEST_JSON,
    EVALUATION,
    METRICS,
    PIPELINE_FILES,
    PROOF,
    RECORD,
    SAMPLER_TABLE,
    SAMPLES,
    TRAIN_CONFIG,
    UNET_WEIGHTS,
    default_repo_name,
)
from ddpm.run_record import write_record
from ddpm.sampling import proof, sampler_results
from tests.publishing.test_publish import PUBLISHED_NAMES
from tests.sampling.test_sampler_results import make_entry, make_table


@pytest.fixture
def stage(run_folder, tmp_path):
    """stage() -> the files that would ship, staged in an empty folder."""

    def call():
        config = parse_push([str(run_folder)])
        return stage_files(run_folder, tmp_path / "staged", "you/x", config)

    return call


class Bomb:
    def __reduce__(self):
        return (print, ("a foreign folder's code was run",))


@pytest.fixture(autouse=True)
def no_code_is_run(capfd):
    yield
    assert "code was run" not in capfd.readouterr().out


def test_only_the_allow_list_is_staged(stage, run_folder, tmp_path):
    for name in (
        "checkpoint-6/optimizer.bin",
        "logs/host.txt",
        "notes.txt",
        "unet/extra.py",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        ".env",
    ):
        (run_folder / name).parent.mkdir(exist_ok=True)
        (run_folder / name).write_bytes(b"private")
    files = stage()
    assert set(files) == PUBLISHED_NAMES
    staged = {
        p.relative_to(tmp_path / "staged").as_posix()
        for p in (tmp_path / "staged").rglob("*")
        if p.is_file()
    }
    assert staged == PUBLISHED_NAMES and all(
        is_published_name(name) for name in PUBLISHED_NAMES - {"README.md"}
    )


def test_the_loss_plot_comes_from_the_metrics(stage, run_folder):
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 50)]
    (run_folder / METRICS).write_text("\n".join(lines) + "\n")
    assert "loss.png" in stage()


def test_measured_samplers_are_staged_with_the_weights_they_were_measured_for(stage, run_folder):
    table = make_table(
        make_entry("ddim", 5, 2.5, 0.01),
        make_entry("ddpm", 20, 1.5, 0.2),
        weights=sampler_results.unet_weights_sha256(run_folder),
    )
    table.write(run_folder / SAMPLER_TABLE)
    plots.save(plots.plot_sampler_table(table), run_folder / "evaluation" / "trade-off.png")
    files = stage()
    assert set(files) == PUBLISHED_NAMES | {"samplers.json", "evaluation/trade-off.png"}
    assert is_published_name("samplers.json")
    card = files["README.md"].read_text()
    assert "| `ddim` | 5 | 2.5 | 10 | fast |" in card
    assert "| `ddpm` | 20 | 1.5 | 200 | good, best |" in card
    assert "| sampler | steps | Frechet distance | ms an image |" in card
    assert "1,000 images each, of the same seeds; on a machine, 64 at once." in card
    make_table(*table.entries, weights="of an earlier step").write(run_folder / SAMPLER_TABLE)
    files = stage()
    assert set(files) == PUBLISHED_NAMES and "| sampler |" not in files["README.md"].read_text()


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.bin", "x.pkl", "scheduler/s.PT"])
def test_pickles_are_refused(stage, run_folder, name):
    (run_folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="looks like pickled data.*Only safetensors"):
        stage()


def test_a_pickle_under_the_name_of_safetensors_is_refused(stage, run_folder):
    torch.save({"w": Bomb()}, run_folder / UNET_WEIGHTS)
    (run_folder / PROOF).unlink()
    with pytest.raises(UserError, match="diffusers cannot load the pipeline in"):
        stage()


@pytest.mark.parametrize(
    "name",
    [
        *("record.json", "train_config.json", "metrics.jsonl", "model_index.json", UNET_WEIGHTS),
        *("unet", "samples", "proof/seed-00000.png"),
    ],
)
def test_links_out_of_the_folder_are_refused(stage, run_folder, tmp_path, name):
    (tmp_path / "outside").mkdir()
    outside = tmp_path / "outside" / "thing"
    (run_folder / name).rename(outside)
    (run_folder / name).symlink_to(outside)
    with pytest.raises(UserError, match="is a link, so what it holds may change"):
        stage()


def test_links_to_a_checkpoint_inside_are_refused_too(stage, run_folder):
    (run_folder / "checkpoint-6").mkdir()
    (run_folder / "checkpoint-6" / "secret").write_text("{}")
    (run_folder / METRICS).unlink()
    (run_folder / METRICS).symlink_to("checkpoint-6/secret")
    with pytest.raises(UserError, match="is a link"):
        stage()


@pytest.mark.parametrize(
    "change",
    [
        {"scheduler": ["../../evil", "DDPMScheduler"]},
        {"scheduler": ["evil", "DDPMScheduler"]},
        {"scheduler": ["diffusers", "../evil"]},
        {"unet": ["evil.module", "UNet2DModel"]},
        {"_class_name": ["pipeline", "MyPipeline"]},
        {"_class_name": "StableDiffusionPipeline"},
        {"safety": ["transformers", "CLIPModel"]},
        {"scheduler": None},
    ],
    ids=str,
)
def test_paths_and_modules_in_the_index_are_refused(stage, run_folder, change):
    index = json.loads((run_folder / "model_index.json").read_text())
    (run_folder / "model_index.json").write_text(json.dumps({**index, **change}))
    (run_folder / "evil.py").write_text("print('code was run')")
    (run_folder / PROOF).unlink()
    with pytest.raises(UserError, match="names other parts than a UNet2DModel"):
        stage()


def test_folders_and_broken_images_are_refused(stage, run_folder):
    (run_folder / EVALUATION).mkdir()
    with pytest.raises(UserError, match="evaluation.json is not a file"):
        stage()
    (run_folder / EVALUATION).rmdir()
    (run_folder / SAMPLES / "step-999999.png").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="step-999999.png is no image"):
        stage()


@pytest.mark.parametrize("name", ["record.json", "metrics.jsonl", "train_config.json"])
def test_a_token_in_a_text_stops_the_push(stage, run_folder, name):
    token = "hf_" + "a1B2" * 8
    if name.endswith(".jsonl"):
        (run_folder / name).write_text(json.dumps({"step": 1, token: 1}) + "\n")
    else:
        values = json.loads((run_folder / name).read_text())
        write_json(run_folder / name, {**values, "wandb": token, "split": token})
    with pytest.raises(UserError, match=f"{name} holds what looks like a token") as caught:
        stage()
    assert token not in str(caught.value)


INNER = {"dataset", "training", "environment", "model"}
"""Entries of the JSON files that are objects of known entries."""
TOKENS = {
    "Hugging Face": "hf_" + "aB3d" * 8,
    "GitHub": "ghp_" + "aB3d" * 9,
    "GitHub, fine-grained": "github_pat_" + "aB3d_" * 16,
    "GitLab": "glpat-" + "aB3d" * 5,
    "AWS": "AKIA" + "ABC2" * 4,
    "Google": "AIza" + "aB3d5" * 7,
    "OpenAI": "sk-proj-" + "aB3d" * 30,
    "OpenAI, old": "sk-" + "aB3d" * 12,
    "Anthropic": "sk-ant-api03-" + "aB3d" * 23,
    "W&B": "wandb_v1_" + "aB3d" * 10,
    "Slack": "xoxb-123456789012-" + "aB3d" * 6,
    "npm": "npm_" + "aB3d" * 9,
    "PyPI": "pypi-AgEIcHlwaS5vcmc" + "aB3d" * 20,
    "JWT": "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.aB3dozjgNryP4J3jVmNHl0w5N",
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "password": "http://alice:secret@proxy:8080",
}


@pytest.mark.parametrize("kind", TOKENS)
def test_keys_of_common_services_are_found(kind):
    assert stage_module.SECRET.search(json.dumps({"note": TOKENS[kind]}).encode())
    assert "***" in printable(TOKENS[kind]) and "aB3d" not in printable(TOKENS[kind])


def test_hashes_numbers_and_addresses_are_no_keys():
    hashes = [hashlib.sha256(b"%d" % n).hexdigest() for n in range(1000)]
    lines = [json.dumps({"sha256": sha256, "step": n}) for n, sha256 in enumerate(hashes)]
    lines += ["https://huggingface.co/a/b", "task-" + "a1" * 20, "a b@c.org", "x://host:8080/@a"]
    noise = hashlib.shake_256(b"pixels").digest(2**20)
    assert not any(stage_module.SECRET.search(line.encode()) for line in lines)
    assert not stage_module.SECRET.search(noise) and printable("\n".join(lines)).find("***") < 0


@pytest.mark.parametrize("chunk", ["tEXt", "zTXt", "iTXt", "after the pixels"])
def test_a_token_in_the_text_of_an_image_stops_the_push(stage, run_folder, chunk):
    path = run_folder / SAMPLES / "step-999999.png"
    if chunk == "after the pixels":
        path.write_bytes(text_after_the_pixels(TOKENS["GitHub"]))
    else:
        text = PngInfo()
        add = text.add_itxt if chunk == "iTXt" else text.add_text
        add("Comment", TOKENS["GitHub"], zip=chunk != "tEXt")
        Image.new("L", (8, 8)).save(path, pnginfo=text)
    with pytest.raises(UserError, match="samples.png holds what looks like a token"):
        stage()


def text_after_the_pixels(text: str) -> bytes:
    """Return a PNG with a compressed text between its pixels and its end."""
    png = io.BytesIO()
    Image.new("L", (8, 8)).save(png, "PNG")
    end, chunk = png.getvalue()[-12:], b"zTXtComment\0\0" + zlib.compress(text.encode())
    length, crc = struct.pack(">I", len(chunk) - 4), struct.pack(">I", zlib.crc32(chunk))
    return png.getvalue()[:-12] + length + chunk + crc + end


def test_a_text_bomb_is_no_image(stage, run_folder):
    text = PngInfo()
    text.add_text("Comment", "a" * 10**7, zip=True)
    Image.new("L", (8, 8)).save(run_folder / SAMPLES / "step-999999.png", pnginfo=text)
    with pytest.raises(UserError, match="step-999999.png is no image"):
        stage()
    png = text_after_the_pixels("a" * 10**7)
    (run_folder / SAMPLES / "step-999999.png").write_bytes(png)
    with pytest.raises(UserError, match="samples.png is no image"):
        stage()


def test_a_token_in_the_header_of_the_weights_stops_the_push(stage, run_folder):
    weights = safetensors.torch.load_file(run_folder / UNET_WEIGHTS)
    metadata = {"format": "pt", "note": TOKENS["AWS"]}
    safetensors.torch.save_file(weights, run_folder / UNET_WEIGHTS, metadata)
    (run_folder / PROOF).unlink()
    with pytest.raises(UserError, match=f"{UNET_WEIGHTS} holds what looks like a token"):
        stage()


def test_metrics_of_other_content_are_not_published(stage, run_folder):
    good = '{"step": 1, "loss": 0.5}\n'
    lines = (
        "password: 1234",
        '{"step": 1, "note": "x"}',
        "[1]",
        '[["step", 1]]',
        "[" * 10**5,
        "1",
        "{",
    )
    for line in lines:
        (run_folder / METRICS).write_text(f"{good}{line}\n")
        with pytest.raises(UserError, match="metrics.jsonl: line 2 is not a JSON object of num"):
            stage()
    for line in ("password: 1234\r", "password: 1234\x0b{}", "password: 1234\x85"):
        (run_folder / METRICS).write_text(f"{good}{line}\n{good}", newline="")
        with pytest.raises(UserError, match="metrics.jsonl: line 2 is not"):
            stage()
    twice = good.replace('"loss"', '"loss": "password: 1234", "loss"')
    for content in (f"{good}{lines[0]}", twice, good.replace("\n", "\r\n"), f" {good}"):
        (run_folder / METRICS).write_text(content, newline="")
        assert stage()[METRICS].read_text() == good


def test_entries_that_are_not_known_are_not_published(stage, run_folder):
    """Neither of an object nor of one inside it; what training wrote is published as it is."""
    table = make_table(
        make_entry("ddim", 5, 2.5, 0.01),
        weights=sampler_results.unet_weights_sha256(run_folder),
    )
    table.write(run_folder / SAMPLER_TABLE)
    model = {"version": file_sha256(run_folder / UNET_WEIGHTS)}
    write_json(run_folder / EVALUATION, {"metrics": {"fid": 1.0}, "model": model})
    names = (RECORD, PROOF, SAMPLER_TABLE, EVALUATION)
    before = {name: json.loads((run_folder / name).read_text()) for name in names}
    for name, content in before.items():
        inner = {key: {**content[key], "diary": "x"} for key in INNER if content.get(key)}
        write_json(run_folder / name, {"diary": "x", **content, **inner})
    files = stage()
    assert not [name for name, path in files.items() if b"diary" in path.read_bytes()]
    for name, content in before.items():
        published = json.loads(files[name].read_text())
        for key, value in content.items():
            kept = published.get(key)
            assert kept == value or kept.items() >= value.items(), (name, key)
    assert files[PROOF].read_text() == json.dumps(before[PROOF], indent=2) + "\n"


def test_metrics_that_are_a_hard_link_are_refused(stage, run_folder, tmp_path):
    (tmp_path / "elsewhere").hardlink_to(run_folder / METRICS)
    with pytest.raises(UserError, match="is a file elsewhere too"):
        stage()


def test_recorded_text_cannot_break_out_of_the_card(stage, run_folder):
    record = json.loads((run_folder / "record.json").read_text())
    end = "<!-- generated from the run's record: end -->"
    record["dataset"]["title"] = f"cats\n\n{end}\n# Mine | <script>alert(1)</script>"
    record["dataset"]["on_hub"] = False
    write_json(run_folder / "record.json", record)
    text = stage()["README.md"].read_text()
    assert text.count(end) == 1 and "<script" not in text and "\n# Mine" not in text


def test_no_setting_of_this_machine_is_published(stage, run_folder):
    """Neither in the file nor on the card: what needs a flag, where things are, unknown names."""
    settings = json.loads((run_folder / TRAIN_CONFIG).read_text())
    for name, item in setting_fields(TrainConfig).items():
        if item.metadata:
            settings[name] = True if item.type is bool else "/home/alice/cats"
    settings |= {"logger": "wandb", "model_config_name_or_path": "~/../unet", "diary": "/home"}
    settings |= {"dataset_name": None, "lr_scheduler": "linear"}
    settings["pretrained_model_name_or_path"] = "/home/alice/my-run"
    write_json(run_folder / TRAIN_CONFIG, settings)
    files = stage()
    text = files["README.md"].read_text() + files[TRAIN_CONFIG].read_text()
    assert not [word for word in ("/home", "wandb", "diary", "..", "push_to_hub") if word in text]
    published = json.loads(files[TRAIN_CONFIG].read_text())
    places = {"dataset_name": None, "train_data_dir": "cats", "model_config_name_or_path": "unet"}
    places["pretrained_model_name_or_path"] = "my-run"
    assert published.items() >= {**places, "lr_scheduler": "linear"}.items()
    shared = {name for name, item in setting_fields(TrainConfig).items() if not item.metadata}
    assert set(published) <= shared | set(places)
    require_flags(
        TrainConfig, published, files[TRAIN_CONFIG]
    )  # train.py --config takes it as it is


def test_names_of_files_that_were_no_data_are_not_published(stage, run_folder):
    """Their number is, as they may have nothing to do with the model."""
    record = json.loads((run_folder / "record.json").read_text())
    record["dataset"] |= {"left_out": {"hidden": 1}, "left_out_first": {"hidden": [".me.png"]}}
    write_json(run_folder / "record.json", record)
    published = json.loads(stage()["record.json"].read_text())
    assert published["dataset"]["left_out"] == {"hidden": 1}
    assert "left_out_first" not in published["dataset"]
    assert ".me.png" in (run_folder / "record.json").read_text()


@pytest.mark.parametrize("text", ["[]", "5", "{", '{"seed": "x"}', '{"split": "a\\u001b"}'])
def test_settings_of_a_wrong_shape_are_refused(stage, run_folder, text):
    (run_folder / TRAIN_CONFIG).write_text(text)
    with pytest.raises(UserError, match="train_config.json"):
        stage()


# The proof


def test_the_proof_of_training_is_staged_unchanged(stage, run_folder):
    files = stage()
    for name in ("proof.json", "proof/seed-00000.png", "proof/seed-00001.png"):
        assert files[name].read_bytes() == (run_folder / name).read_bytes()


def test_a_folder_without_a_proof_gets_one_in_the_staged_copy(stage, run_folder, tmp_path):
    (run_folder / PROOF).unlink()
    files = stage()
    assert not (run_folder / PROOF).exists()
    assert proof.compare_with_proof(files["proof.json"].parent, "staged", "x").difference == 0


def test_damage_since_training_is_found_before_anything_is_sent(stage, run_folder):
    weights = run_folder / UNET_WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="not the one that proof.json was made for"):
        stage()
    write_record(run_folder, finished=False)
    assert set(stage()) == PUBLISHED_NAMES  # an unfinished run has exported again


def test_plots_of_the_evaluation_are_staged_and_shown_on_the_card(stage, run_folder):
    """Those on the allow-list, without the plot of a sampler table that is not there."""
    (run_folder / "evaluation").mkdir()
    ours = ("nearest.png", "loss-by-band.png", "held-out-loss.png")
    for name in (*ours, "trade-off.png", "mine.png"):
        Image.new("L", (4, 4)).save(run_folder / "evaluation" / name)
    files = stage()
    shipped = {f"evaluation/{name}" for name in ours}
    assert set(files) == PUBLISHED_NAMES | shipped
    assert all(is_published_name(name) for name in shipped)
    text = files["README.md"].read_text()
    assert all(f"]({name})" in text for name in shipped) and "mine.png" not in text
    assert text.count("Loss by noise level") == 2  # the caption and the alternative text
    (run_folder / "evaluation" / "nearest.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"nearest\.png is no image"):
        stage()


def test_an_evaluation_of_other_weights_is_left_out(stage, run_folder, capfd):
    weights = file_sha256(run_folder / UNET_WEIGHTS)
    picture = run_folder / "evaluation" / "nearest.png"
    picture.parent.mkdir()
    Image.new("L", (4, 4)).save(picture)
    facts = {"metrics": {"fid": 34.95}, "num_images": 64, "model": {"version": weights}}
    write_json(run_folder / EVALUATION, facts)
    files = stage()
    assert {"evaluation.json", "evaluation/nearest.png"} <= set(files)
    assert "34.95" in files["README.md"].read_text()
    for name in ("guidance.png", "ema-lengths.png", "loss-by-band.png"):
        Image.new("L", (4, 4)).save(picture.with_name(name))
    assert set(stage()) == set(files)  # plots of entries that are not there
    facts["model"]["version"] = "of an earlier step"
    write_json(run_folder / EVALUATION, facts)
    files = stage()
    assert set(files) == PUBLISHED_NAMES and "34.95" not in files["README.md"].read_text()
    assert "evaluation.json is of other weights and is left out" in capfd.readouterr().out


def test_the_best_pipeline_is_published_alone_and_under_its_own_name(stage, run_folder, tmp_path):
    """It never goes with its run; given by its folder it is a run folder like any other."""
    best = run_folder / "best"
    (best / "unet").mkdir(parents=True)
    for name in (*PIPELINE_FILES, RECORD, TRAIN_CONFIG):
        (best / name).parent.mkdir(exist_ok=True)
        shutil.copy(run_folder / name, best / name)
    (best / BEST_JSON).write_text('{"step": 4, "value": 0.5}')
    assert set(stage()) == PUBLISHED_NAMES
    config = parse_push([str(best)])
    files = stage_files(best, tmp_path / "staged-best", "you/my-run-best", config)
    assert set(files) == PUBLISHED_NAMES - {"metrics.jsonl", "samples.png"}
    assert default_repo_name(best) == "my-run-best"
