"""Feature extractors: what they accept and return, their files, cached features of a dataset."""

import importlib.util
import sys
import urllib.error
import zipfile

import datasets
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ddpm.accelerator import make_accelerator
from ddpm.config.data import DataConfig
from ddpm.data import dataset
from ddpm.errors import UserError
from ddpm.evaluation import features
from ddpm.evaluation.features import FeatureExtractor, SmallClassifier, load_feature_extractor
from tests.evaluation.conftest import DIGITS

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")

CPU = torch.device("cpu")
DIGIT_NET = DIGITS / features.DATASET_FEATURES


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
def make_features():
    """data/make_features.py as a module."""
    path = DIGITS.parent / "make_features.py"
    spec = importlib.util.spec_from_file_location("make_features", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("dataset", "lowest"), [("digits", 0.98), ("emoji", 0.5)])
def test_a_network_has_the_accuracy_that_its_file_names(make_features, dataset, lowest):
    path = make_features.FOLDERS[dataset] / features.DATASET_FEATURES
    pixels, labels = make_features.split(dataset, "test")
    net = features.load_small_classifier(path)
    accuracy = make_features.accuracy(net, pixels, labels)
    with safe_open(path, framework="pt") as file:
        recorded = float(file.metadata()["held_out_accuracy"])
    assert abs(accuracy - recorded) < 1 / len(labels) + 1e-4
    assert accuracy > lowest
    assert path.stat().st_size < 1e6


@pytest.mark.parametrize("dataset", ["digits", pytest.param("emoji", marks=pytest.mark.slow)])
def test_a_network_is_trained_on_the_training_images_alone(
    make_features, dataset, monkeypatch, tmp_path
):
    """One epoch of the script, into another file, which `load_small_classifier` loads."""
    splits, trained_on, split, train = {}, [], make_features.split, make_features.train
    monkeypatch.setattr(
        make_features, "split", lambda *names: splits.setdefault(names[1], split(*names))
    )
    monkeypatch.setattr(
        make_features,
        "train",
        lambda pixels, *args, **shape: trained_on.append(pixels) or train(pixels, *args, **shape),
    )
    path = tmp_path / features.DATASET_FEATURES
    accuracy = make_features.main(dataset, path, epochs=1)
    assert [*splits] == ["train", "test"] and trained_on[0] is splits["train"][0]
    if dataset == "digits":
        assert torch.equal(trained_on[0], digits("train")[0])
    assert {"digits": 0.5, "emoji": 0.1}[dataset] < accuracy < 1
    net = features.load_small_classifier(path)
    assert make_features.accuracy(net, *splits["test"]) == accuracy


def test_emoji_are_changed_without_black_corners(make_features):
    """Nor digits with white ones: the background stays as it is, but for the noise."""
    torch.manual_seed(0)
    white = torch.full((64, 3, 16, 16), 255, dtype=torch.uint8)
    assert make_features.augment(white).min() > 230
    black = torch.zeros(64, 1, 8, 8, dtype=torch.uint8)
    assert make_features.augment(black).max() < 25


def test_gray_and_repeated_gray_have_the_same_features():
    extractor = load_feature_extractor(str(DIGIT_NET), None, CPU)
    gray = digits("test")[0][:5]
    vectors = extractor.extract(gray)
    assert vectors.shape == (5, 64) and vectors.dtype == torch.float32
    assert torch.equal(vectors, extractor.extract(gray.repeat(1, 3, 1, 1)))
    assert not torch.equal(vectors[0], vectors[1])


def test_a_dataset_has_its_own_network_unless_a_file_is_given(tmp_path):
    assert load_feature_extractor(None, str(DIGITS), CPU).name == features.DATASET_FEATURES
    path = tmp_path / "own.pt"
    torch.jit.script(Means()).save(str(path))
    extractor = load_feature_extractor(str(path), str(DIGITS), CPU)
    assert extractor.name == "own.pt" and not extractor.is_inception
    assert len(extractor.version) == 64


@pytest.mark.parametrize("suffix", ["pt", "pt2"])
def test_a_module_of_ones_own_is_used_as_it_is(suffix, tmp_path):
    path = tmp_path / f"own.{suffix}"
    if suffix == "pt":
        torch.jit.script(Means()).save(str(path))
    else:
        example = torch.zeros(2, 3, 6, 6, dtype=torch.uint8)
        batch = {"pixels": {0: torch.export.Dim("batch", max=64)}}
        torch.export.save(torch.export.export(Means(), (example,), dynamic_shapes=batch), path)
    images = torch.arange(5 * 36).reshape(5, 1, 6, 6).to(torch.uint8)
    gray = images[:, 0].float()
    expected = torch.stack([gray.mean((1, 2))] * 3 + [gray[:, 0].mean(1)], dim=1)
    extractor = load_feature_extractor(str(path), None, CPU)
    torch.testing.assert_close(extractor.extract(images), expected)


class Classifier(Means):
    """Features, and logits of two classes."""

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = pixels.float().mean((2, 3))
        return values, torch.stack((values[:, 0], 100 - values[:, 1]), 1)


def test_a_network_of_two_outputs_is_a_classifier(tmp_path):
    torch.jit.script(Classifier()).save(str(tmp_path / "own.pt"))
    extractor = load_feature_extractor(str(tmp_path / "own.pt"), None, CPU)
    images = torch.tensor([10, 90], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    vectors, logits = extractor.extract_with_logits(images)
    assert vectors.tolist() == [[10] * 3, [90] * 3] and logits.tolist() == [[10, 90], [90, 10]]
    assert torch.equal(extractor.extract(images), vectors)
    logits = load_feature_extractor(str(DIGIT_NET), None, CPU).extract_with_logits(
        digits("test")[0]
    )[1]
    assert (logits.argmax(1) == digits("test")[1]).sum() == 359
    for other in (torch.zeros(2), torch.zeros(3, 2), "text", None):
        pair = FeatureExtractor(lambda pixels, other=other: (vectors, other), "own.pt", "0", CPU)
        assert pair.extract_with_logits(images)[1] is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.pt", None, "no such file"),
        ("bad.pt", b"PK not a module", "holds no TorchScript"),
        ("bad.pt2", b"neither is this", "holds no TorchScript"),
        ("bad.safetensors", b"nor this", "is no feature network of data/make_features.py"),
    ],
)
def test_files_without_a_network_are_refused(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_feature_extractor(str(path), None, CPU)


@pytest.mark.parametrize("name", ["else.pt", "else.pt2"])
def test_an_archive_of_something_else_is_refused_in_one_sentence(name, tmp_path, capfd, recwarn):
    """torch itself would warn, and log the traceback of its error."""
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("folder/file.txt", "nothing")
    with pytest.raises(UserError) as refusal:
        load_feature_extractor(str(tmp_path / name), None, CPU)
    message = str(refusal.value)
    assert "holds no TorchScript (.pt) or torch.export (.pt2) module: " in message
    assert "\n" not in message and message.endswith(".")
    assert capfd.readouterr().err == "" and not recwarn.list


def test_weights_of_another_network_are_refused(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "else.safetensors")
    with pytest.raises(UserError, match="is no feature network"):
        load_feature_extractor(str(tmp_path / "else.safetensors"), None, CPU)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda pixels: pixels.float(), r"returned \[2, 3, 8, 8\] for 2 images"),
        (lambda pixels: pixels.float().mean((1, 2, 3)), r"returned \[2\] for 2 images"),
        (lambda pixels: {"features": 1}, "returned dict for 2 images"),
        (lambda pixels: pixels.float().flatten(1) / 0, "not finite"),
        (lambda pixels: pixels @ torch.zeros(3, 3), "cannot take a batch"),
    ],
)
def test_networks_that_return_no_vectors_are_refused(network, message):
    extractor = FeatureExtractor(network, "own.pt", "0", CPU)
    with pytest.raises(UserError, match=message):
        extractor.extract(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


def test_digits_of_another_size_are_refused():
    extractor = load_feature_extractor(str(DIGIT_NET), None, CPU)
    with pytest.raises(UserError, match="must have 8x8 pixels.*give another network with"):
        extractor.extract(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))


def test_larger_emoji_are_averaged_and_smaller_ones_refused():
    extractor = load_feature_extractor(None, str(DIGITS.parent / "emoji"), CPU)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)
    vectors, logits = extractor.extract_with_logits(pixels)
    assert vectors.shape == (4, 64) and logits.shape == (4, 10)
    larger = pixels.repeat_interleave(3, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(extractor.extract(larger), vectors, rtol=1e-4, atol=1e-4)
    transparent = torch.cat((pixels, torch.zeros(4, 1, 16, 16, dtype=torch.uint8)), 1)
    white = torch.full_like(pixels, 255)
    assert torch.equal(extractor.extract(transparent), extractor.extract(white))
    with pytest.raises(UserError, match="must have at least 16x16 pixels.*give another network"):
        extractor.extract(torch.zeros(2, 3, 16, 15, dtype=torch.uint8))


def test_a_classifier_is_loaded_in_the_shape_of_its_weights(tmp_path):
    net = SmallClassifier(3, 32, width=2, num_features=3, num_classes=5).eval()
    save_file(net.state_dict(), tmp_path / "own.safetensors")
    loaded = features.load_small_classifier(tmp_path / "own.safetensors")
    pixels = torch.arange(3 * 40 * 32).remainder(256).view(1, 3, 40, 32).to(torch.uint8)
    with torch.inference_mode():
        results = loaded.features_and_logits(pixels)
        assert [tuple(result.shape) for result in results] == [(1, 3), (1, 5)]
        assert torch.equal(results[1], net.classify(pixels))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"head.weight": torch.empty(2**40, 0)}, "other names or shapes"),
        ({"head.weight": torch.tensor(1.0)}, "other names or shapes"),
        ({"head.weight": torch.zeros(1025, 64)}, "other names or shapes"),
        ({"layers.0.weight": torch.empty(2**30, 3, 3, 0)}, "other names or shapes"),
        ({"layers.0.weight": torch.empty(0, 1, 3, 3)}, "other names or shapes"),
        ({"layers.0.weight": torch.zeros(32, 2, 3, 3)}, "other names or shapes"),
        ({f"{k}": torch.zeros(1, 1, 1, 1) for k in range(40)}, "other names or shapes"),
        ({"head.weight": torch.zeros(10, 65)}, "Error"),
        ({"layers.3.weight": torch.zeros(32, 32, 3, 1)}, "Error"),
        ({"extra": torch.zeros(1)}, "Error"),
    ],
)
def test_weights_of_another_shape_are_refused(changed, reason, tmp_path):
    """Also sizes without weights, before a network as large is made."""
    path = tmp_path / "other.safetensors"
    save_file({**load_file(DIGIT_NET), **changed}, path)
    message = rf"other.safetensors is no feature network of data/make_features.py \(.*{reason}"
    with pytest.raises(UserError, match=message):
        load_feature_extractor(str(path), None, CPU)


def test_inception_that_cannot_be_downloaded_is_one_sentence(monkeypatch, tmp_path):
    """urllib raises its own kind of OSError."""
    pytest.importorskip("torch_fidelity")

    def fail(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "urlopen", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="cannot be fetched.*--features FILE"):
        load_feature_extractor(None, None, CPU)


def test_other_weights_under_inceptions_name_are_not_unpickled(monkeypatch, tmp_path):
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"a pickle of somebody else")
    with pytest.raises(UserError, match="holds other weights than its name says"):
        load_feature_extractor(None, None, CPU)


def test_inceptions_features_are_those_of_the_library(monkeypatch, tmp_path):
    """With random weights, since the real ones are a download: [2, 1, 8, 8] -> [2, 2048]."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    path = tmp_path / "weights.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(Network, "load_state_dict", lambda *_, **__: None)
        network = Network("random", ["2048"], feature_extractor_weights_path=str(path)).eval()
    torch.save(network.state_dict(), path)
    monkeypatch.setattr(features, "_inception_weights", lambda: path)
    extractor = load_feature_extractor(None, None, CPU)
    gray = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    vectors = extractor.extract(gray)
    assert extractor.is_inception and extractor.name == "Inception v3"
    assert vectors.shape == (2, 2048) and vectors.std() > 0
    with torch.no_grad():
        torch.testing.assert_close(vectors, network(gray.expand(-1, 3, -1, -1))[0].float())


def test_torch_fidelity_that_is_missing_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match="pip install -r requirements-evaluate.txt"):
        features.require_torch_fidelity()


class CountingNetwork(torch.nn.Module):
    """Mean and largest value of each image; counts its images."""

    count = 0

    def forward(self, pixels):
        self.count += len(pixels)
        values = pixels.float().flatten(1)
        return torch.stack([values.mean(1), values.amax(1)], dim=1)


@pytest.fixture
def digit_features(tmp_path):
    """digit_features(version, **data settings) -> (features, number of images computed)."""
    accelerator = make_accelerator(None)

    def compute(version="1", **settings):
        data = DataConfig(
            dataset_name=str(DIGITS),
            split="train[:40]",
            resolution=8,
            cache_dir=str(tmp_path),
            **settings,
        )
        network = CountingNetwork()
        extractor = FeatureExtractor(network, "mean", version, CPU)
        images = dataset.load_images(data, False)
        return features.dataset_features(accelerator, extractor, images, 16, None), network.count

    return compute


def test_features_of_a_dataset_are_computed_once(digit_features):
    first, count = digit_features()
    assert count == 40 and first.shape == (40, 2)
    again, count = digit_features()
    assert count == 0 and torch.equal(first, again)


def test_other_images_or_another_network_have_features_of_their_own(digit_features):
    digit_features()
    assert digit_features(version="2")[1] == 40
    half, count = digit_features(held_out=0.5)
    assert count == 20 and len(half) == 20
    assert digit_features()[1] == 0


def test_a_damaged_cache_file_is_computed_again(digit_features, tmp_path):
    first, _ = digit_features()
    (file,) = (tmp_path / "ddpm-features").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    again, count = digit_features()
    assert count == 40 and torch.equal(first, again)
    assert digit_features()[1] == 0


class FakeAccelerator:
    """One of four processes, whose rows are gathered in `parts`."""

    num_processes, is_main_process, device = 4, False, torch.device("cpu")

    def __init__(self, rank, parts):
        self.process_index, self.parts = rank, parts

    def gather(self, rows):
        self.parts[self.process_index] = rows
        return torch.cat([self.parts.get(rank, torch.full_like(rows, -1)) for rank in range(4)])


def test_processes_compute_equal_parts_that_are_gathered_in_order():
    parts = {}
    for rank in range(4):
        counts = []

        def batches(indices, counts=counts):
            counts.append(len(indices))
            for start in range(0, len(indices), 2):
                yield torch.tensor(indices[start : start + 2], dtype=torch.float32)[:, None]

        rows = features.map_over_processes(FakeAccelerator(rank, parts), 10, batches, None)
        assert counts == [3]
    assert rows.flatten().tolist() == list(range(10))
