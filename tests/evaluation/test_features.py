"""The spaces in which images are compared: what goes in, what comes out, and from which files."""

import importlib.util
import subprocess
import sys
import urllib.error
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ddpm.errors import UserError
from ddpm.evaluation import features

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")

CPU = torch.device("cpu")
DIGITS = Path(__file__).parents[2] / "data" / "digits"
BROUGHT = DIGITS / features.DATASET_FEATURES


class Means(nn.Module):
    """Mean of each channel, and that of the first row: [B, 3, H, W] uint8 -> [B, 4]."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        values = pixels.float()
        return torch.cat((values.mean((2, 3)), values[:, :, 0].mean((1, 2))[:, None]), 1)


def digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    rows = datasets.load_dataset(str(DIGITS), split=split)
    pixels = np.stack([np.asarray(image) for image in rows["image"]])
    return torch.from_numpy(pixels)[:, None], torch.tensor(rows["label"])


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make", DIGITS.parent / "make_digit_features.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_digits_network_reads_held_out_digits_as_well_as_its_file_says():
    pixels, labels = digits("test")
    net = features.load_digit_net(BROUGHT)
    with torch.inference_mode():
        right = float((net.classify(pixels).argmax(1) == labels).float().mean())
    with safe_open(BROUGHT, framework="pt") as file:
        said = float(file.metadata()["held_out_accuracy"])
    assert abs(right - said) < 1 / 360 + 1e-4
    assert right > 0.98
    assert BROUGHT.stat().st_size < 1e6


def test_the_script_trains_on_the_training_digits_alone(script, monkeypatch, tmp_path):
    """One pass of it, into another folder: it learns, and writes what `load_digit_net` loads."""
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    asked = []
    monkeypatch.setattr(script, "split", lambda name: asked.append(name) or digits(name))
    trained_on = []
    really = script.train
    monkeypatch.setattr(
        script,
        "train",
        lambda pixels, labels, n: trained_on.append(pixels) or really(pixels, labels, n),
    )
    right = script.main(epochs=1)
    assert asked == ["train", "test"]
    assert torch.equal(trained_on[0], digits("train")[0])
    assert 0.5 < right < 1
    net = features.load_digit_net(tmp_path / features.DATASET_FEATURES)
    assert script.accuracy(net, *digits("test")) == right


def test_gray_and_repeated_gray_have_the_same_features():
    found = features.load_feature_extractor(str(BROUGHT), None, CPU)
    gray = digits("test")[0][:5]
    one = found.of(gray)
    assert one.shape == (5, 64) and one.dtype == torch.float32
    assert torch.equal(one, found.of(gray.repeat(1, 3, 1, 1)))
    assert not torch.equal(one[0], one[1])


def test_features_of_batches_are_those_of_one_batch():
    found = features.load_feature_extractor(str(BROUGHT), None, CPU)
    gray = digits("test")[0][:10]
    torch.testing.assert_close(found.of_batches(gray.split(4)), found.of(gray))
    assert len(found.of_batches([])) == 0


def test_a_dataset_brings_its_own_network_and_a_flag_wins(tmp_path):
    assert features.load_feature_extractor(None, str(DIGITS), CPU).name == features.DATASET_FEATURES
    own = tmp_path / "own.pt"
    torch.jit.script(Means()).save(str(own))
    found = features.load_feature_extractor(str(own), str(DIGITS), CPU)
    assert found.name == "own.pt" and not found.is_inception
    assert len(found.version) == 64


@pytest.mark.parametrize("kind", ["pt", "pt2"])
def test_a_module_of_ones_own(kind, tmp_path):
    path = tmp_path / f"own.{kind}"
    if kind == "pt":
        torch.jit.script(Means()).save(str(path))
    else:
        example = torch.zeros(2, 3, 6, 6, dtype=torch.uint8)
        batch = {"pixels": {0: torch.export.Dim("batch")}}
        torch.export.save(torch.export.export(Means(), (example,), dynamic_shapes=batch), path)
    found = features.load_feature_extractor(str(path), None, CPU)
    images = torch.arange(5 * 36).reshape(5, 1, 6, 6).to(torch.uint8)
    rows = images[:, 0].float()
    expected = torch.stack([rows.mean((1, 2))] * 3 + [rows[:, 0].mean(1)], dim=1)
    torch.testing.assert_close(found.of(images), expected)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.pt", None, "no such file"),
        ("bad.pt", b"PK not a module", "holds no TorchScript"),
        ("bad.pt2", b"neither is this", "holds no TorchScript"),
        ("bad.safetensors", b"nor this", "is no feature network of data/make_digit_features.py"),
    ],
)
def test_files_without_a_network_are_refused(name, content, words, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        features.load_feature_extractor(str(path), None, CPU)


@pytest.mark.parametrize("name", ["else.pt", "else.pt2"])
def test_an_archive_of_something_else_is_one_sentence(name, tmp_path):
    """In a process of its own, where torch's warnings and its log of tracebacks would be seen."""
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("folder/file.txt", "nothing")
    code = (
        "import sys, torch; from ddpm import errors; from ddpm.evaluation import features; errors.run("
        "lambda: features.load_feature_extractor(sys.argv[1], None, torch.device('cpu')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / name)],
        cwd=DIGITS.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and done.stderr.endswith(".\n"), done.stderr
    assert "holds no TorchScript (.pt) or torch.export (.pt2) module: " in done.stderr


def test_weights_of_something_else_are_refused(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "else.safetensors")
    with pytest.raises(UserError, match="is no feature network"):
        features.load_feature_extractor(str(tmp_path / "else.safetensors"), None, CPU)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lambda pixels: pixels.float(), r"gave \[2, 3, 8, 8\] for 2 images"),
        (lambda pixels: pixels.float().mean((1, 2, 3)), r"gave \[2\] for 2 images"),
        (lambda pixels: {"features": 1}, "gave dict for 2 images"),
        (lambda pixels: pixels.float().flatten(1) / 0, "not finite"),
        (lambda pixels: pixels @ torch.zeros(3, 3), "cannot take a batch"),
    ],
)
def test_networks_that_give_no_vectors_are_refused(network, words):
    found = features.FeatureExtractor(network, "own.pt", "0", CPU)
    with pytest.raises(UserError, match=words):
        found.of(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


def test_digits_of_another_size_are_refused():
    found = features.load_feature_extractor(str(BROUGHT), None, CPU)
    with pytest.raises(UserError, match="it knows images of 8x8 pixels"):
        found.of(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))


def test_inception_out_of_reach_is_one_sentence(monkeypatch, tmp_path):
    """The way to its weights is cut: urllib raises its own kind of OSError."""
    pytest.importorskip("torch_fidelity")

    def cut(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "urlopen", cut)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="cannot be fetched.*--features FILE"):
        features.load_feature_extractor(None, None, CPU)


def test_other_weights_under_inceptions_name_are_not_unpickled(monkeypatch, tmp_path):
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"a pickle of somebody else")
    with pytest.raises(UserError, match="holds other weights than its name says"):
        features.load_feature_extractor(None, None, CPU)


def test_inceptions_numbers_are_those_of_the_librarys_network(monkeypatch, tmp_path):
    """Its weights drawn at random: the real ones are a download. [2, 1, 8, 8] -> [2, 2048]."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    path = tmp_path / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(Network, "load_state_dict", lambda *_, **__: None)
        drawn = Network("drawn", ["2048"], feature_extractor_weights_path=str(path)).eval()
    torch.save(drawn.state_dict(), path)
    monkeypatch.setattr(features, "_inception_weights", lambda: path)
    ours = features.load_feature_extractor(None, None, CPU)
    gray = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    found = torch.as_tensor(ours.of(gray))
    assert ours.is_inception and ours.name == "Inception v3"
    assert found.shape == (2, 2048) and found.std() > 0
    with torch.no_grad():
        torch.testing.assert_close(found.float(), drawn(gray.expand(-1, 3, -1, -1))[0].float())
