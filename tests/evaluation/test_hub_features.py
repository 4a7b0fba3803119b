"""Feature networks from the Hub: tiny models of transformers, served by the tests' Hub.

transformers takes ten seconds to load its models: the tests that do so are slow. The others end
before that, or with a model in its place.
"""

import json
import secrets
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save

from ddpm.errors import UserError
from ddpm.evaluation import hub_features, report
from ddpm.evaluation.features import load_feature_extractor
from tests.hub import LARGE_DOWNLOADS, Fault

IMAGES = {
    "size": {"shortest_edge": 20},
    "crop_size": {"height": 16, "width": 16},
    "do_center_crop": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
SMALL = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16},
    **{"patch_size": 8, "intermediate_size": 16},
}
CPU = torch.device("cpu")
SLOW = pytest.mark.slow


def write_model(folder: Path, kind: str) -> None:
    """Save a tiny model of transformers."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)


@pytest.fixture
def saved(shared_folder):
    """saved(kind) -> the folder of a tiny model of transformers."""
    return lambda kind: shared_folder(f"hub-{kind}", lambda folder: write_model(folder, kind))


def files_with(config: bytes, weights: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """Return the files of a repository with a model."""
    return {
        "config.json": config,
        "preprocessor_config.json": json.dumps(IMAGES).encode(),
        "model.safetensors": save(weights, {"format": "pt"}),
    }


def files_of(folder: Path, *, without: str = " ") -> dict[str, bytes]:
    """Return the files of a repository with this model, without some of its weights."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if without not in name}
    return files_with((folder / "config.json").read_bytes(), kept)


@pytest.fixture
def publish(hub):
    """publish(files) -> the id of a new repository with these files."""

    def publish_files(files: dict[str, bytes]) -> str:
        repository = hub.create_repo("model", f"alice/network-{secrets.token_hex(4)}")
        repository.write({name: content for name, content in files.items() if content is not None})
        return repository.id

    return publish_files


@SLOW
def test_features_are_those_of_transformers(publish, hub, open_digits, saved):
    """With its own image processor, of images that need no resizing. The distances in them are not
    called FID, and the network is named with its commit."""
    from transformers import AutoModel, BitImageProcessor

    repo_id = publish(files_of(saved("Dinov2")))
    evaluator = open_digits(f"--features={repo_id}")
    pixels = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)
    processor = BitImageProcessor(**{**IMAGES, "size": {"shortest_edge": 16}})
    inputs = processor(images=list(pixels), return_tensors="pt")
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(saved("Dinov2"))(**inputs).pooler_output
    torch.testing.assert_close(evaluator.extractor.extract(pixels), expected)
    evaluation = report.compute_metrics(evaluator, report.extract_features(evaluator))
    assert evaluation.features["name"] == repo_id
    assert evaluation.features["version"] == hub.repo("model", repo_id).resolve()
    assert evaluation.num_features == 16 and evaluation.metrics["frechet_distance"] > 0
    assert {"frechet_distance", "kernel_distance"} < set(evaluation.metrics)


@SLOW
def test_without_pooler_weights_the_class_token_is_used(publish, saved):
    repo_id = publish(files_of(saved("ViT"), without="pooler"))
    extractor = load_feature_extractor(repo_id, None, CPU)
    pixels = torch.zeros(2, 1, 16, 16, dtype=torch.uint8)
    images = extractor.network.mean.neg().div(extractor.network.std).expand(2, 3, 16, 16)
    with torch.inference_mode():
        hidden = extractor.network.model(pixel_values=images).last_hidden_state
    torch.testing.assert_close(extractor.extract(pixels), hidden[:, 0])


def test_damaged_files_of_the_model_are_refused(publish, hub):
    """Before anything of them is read: they need not be a model."""
    weights = save({"new": torch.rand(99)})  # Xet's cache has what was downloaded before
    files = {"config.json": b"{}", "preprocessor_config.json": b"{}", "model.safetensors": weights}
    hub.inject(Fault("corrupt", path=LARGE_DOWNLOADS, times=None))
    with pytest.raises(UserError, match="differ from the Hub's hashes"):
        load_feature_extractor(publish(files), None, CPU)


def changed(name: str, **entries):
    return lambda files: {**files, name: json.dumps(json.loads(files[name]) | entries).encode()}


CONFIG, SETTINGS = "config.json", "preprocessor_config.json"
REMOTE = {"model_type": "theirs", "auto_map": {"AutoConfig": "c.C", "AutoModel": "m.M"}}


UNUSABLE = [
    ("Dinov2", lambda files: {**files, SETTINGS: None}, "it has no preprocessor_config.json"),
    (
        "Dinov2",
        lambda files: {**files, "model.safetensors": None, "pytorch_model.bin": b"x"},
        "no safetensors in ",
    ),
    ("Dinov2", changed(CONFIG, num_hidden_layers=10**9), "num_hidden_layers is above 1000"),
    ("Dinov2", changed(SETTINGS, image_std=[0, 1, 1]), "std is above 0"),
    ("Dinov2", changed(SETTINGS, crop_size=10**6), "1 to 2048 pixels a side"),
    ("Dinov2", changed(SETTINGS, size=None, crop_size=None), "1 to 2048 pixels a side"),
    ("Dinov2", changed(SETTINGS, size="big"), "size is 'big'; it must be a whole number"),
]
"""What is refused before transformers loads anything."""


def assert_refused(repo_id: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        load_feature_extractor(repo_id, None, CPU)
    assert len(str(refusal.value)) < 700


@pytest.mark.parametrize(("kind", "change", "message"), UNUSABLE)
def test_files_that_cannot_be_used_are_refused(publish, kind, change, message):
    config = json.dumps({"model_type": kind.lower(), **SMALL}).encode()
    assert_refused(publish(change(files_with(config, {"weight": torch.zeros(9)}))), message)


@SLOW
@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        *UNUSABLE,
        ("Dinov2", lambda files: {**files, "model.safetensors": b"x" * 99}, "cannot load it"),
        ("Dinov2", changed(CONFIG, **REMOTE), "transformers cannot load it"),
        ("Dinov2", changed(CONFIG, hidden_size=10**6), "describes .* weights, and its files have"),
        ("Dinov2", changed(CONFIG, num_hidden_layers=2, mlp_ratio=1), "transformers cannot load"),
        ("ViTMAE", dict, "other features for the same image each time"),
        ("Bert", dict, "it takes no images"),
    ],
)
def test_what_is_no_image_model_is_refused(publish, saved, kind, change, message):
    assert_refused(publish(change(files_of(saved(kind)))), message)


class Stand(torch.nn.Module):
    """In the place of a model of transformers: the last hidden state has a token of means and one
    of zeros, the pooled output is the negative of the first."""

    def __init__(self, noise: float = 0.0):
        super().__init__()
        self.weight, self.noise = torch.nn.Parameter(torch.zeros(9)), noise

    def num_parameters(self) -> int:
        return self.weight.numel()

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        means = pixel_values.mean((2, 3)) + self.noise * torch.rand(())
        hidden = torch.stack((means, torch.zeros_like(means)), 1)
        return SimpleNamespace(last_hidden_state=hidden, pooler_output=-means)


@pytest.fixture
def transformers(monkeypatch):
    """A transformers that loads `model`, with the keyword arguments of its calls in `calls`."""
    from transformers.utils import logging  # noqa: F401, which the code under test uses too

    fake = SimpleNamespace(__spec__="not None", model=Stand(), missing=[], calls=[])

    def load(answer):
        return lambda *args, **options: fake.calls.append(options) or answer()

    fake.AutoConfig = SimpleNamespace(from_pretrained=load(lambda: "config"))
    fake.AutoModel = SimpleNamespace(
        from_config=load(lambda: fake.model),
        from_pretrained=load(lambda: (fake.model, {"missing_keys": fake.missing})),
    )
    monkeypatch.setitem(sys.modules, "transformers", fake)
    return fake


@pytest.fixture
def repo_id(publish) -> str:
    config = json.dumps({"model_type": "any", **SMALL}).encode()
    return publish(files_with(config, {"weight": torch.zeros(9)}))


@pytest.mark.parametrize("missing", [[], ["pooler.weight"]], ids=["pooled", "class token"])
def test_images_are_scaled_by_the_settings_and_no_code_is_trusted(transformers, repo_id, missing):
    """The pooled output, or without weights for it the class token."""
    transformers.missing = missing
    extractor = load_feature_extractor(repo_id, None, CPU)
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 20, 30)
    scaled = (torch.tensor([[0, 0.2, 1]]) - torch.tensor(IMAGES["image_mean"])) / torch.tensor(
        IMAGES["image_std"]
    )
    torch.testing.assert_close(extractor.extract(pixels), scaled if missing else -scaled)
    assert [calls["trust_remote_code"] for calls in transformers.calls] == [False] * 3
    assert transformers.calls[-1]["use_safetensors"] is True


def test_models_that_give_no_features_are_refused(transformers, repo_id):
    transformers.model = Stand(noise=1.0)
    assert_refused(repo_id, "other features for the same image each time")
    transformers.model = torch.nn.Module()
    transformers.model.num_parameters = lambda: 9
    assert_refused(repo_id, "it takes no images")
    transformers.model.num_parameters = lambda: 10**6
    assert_refused(repo_id, "describes 1,000,000 weights, and its files have 9")
    transformers.model, transformers.missing = Stand(), ["encoder.weight", "pooler.weight"]
    assert_refused(repo_id, "lack 1 of its weights, such as encoder.weight")


@SLOW
def test_missing_weights_are_refused(publish, saved):
    repo_id = publish(files_of(saved("Dinov2"), without="attention.key"))
    with pytest.raises(UserError, match="lack 2 of its weights, such as encoder"):
        load_feature_extractor(repo_id, None, CPU)


def test_transformers_is_needed_and_a_path_is_no_repository(monkeypatch):
    monkeypatch.setattr(hub_features, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs transformers: pip install -r requirements-prompt"):
        load_feature_extractor("alice/dino", None, CPU)
    for path in ("nets/absent.pt", "absent", "../absent/net", "a/b/c"):
        with pytest.raises(UserError, match="there is no such file"):
            load_feature_extractor(path, None, CPU)
