"""Feature extractors: the space in which sets of images are compared, and features of a dataset.

An extractor maps pixels [B, 3, H, W] uint8 (gray images repeated, RGBA over a background) to
[B, D] float32 and does the resizing and scaling that its network needs. There are four kinds:

    Inception              torch-fidelity's, with the TensorFlow weights and resize that define FID
    features.safetensors   a SmallClassifier; a dataset's folder may hold one, as those in data/ do
    FILE.pt, FILE.pt2      a TorchScript or torch.export module of your own, for other domains
    owner/name             an image model of the Hub, such as facebook/dinov2-base

A network that returns two tensors is a classifier too: the features, and logits [B, K] of the K
classes in the order of their ids. A SmallClassifier is one.

A TorchScript file is a program: only a file that the user names with --features is loaded.

The features of a dataset are computed once and kept next to its decoded pixels, in
ddpm-features/KEY.safetensors: [N, D] float32. KEY is a function of pixels and network, so a file is
never out of date. Training with --eval_images and evaluate.py share the files.

Notation: N images, B images of a batch, D features.
"""

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from tqdm.auto import tqdm

from ddpm import file_io
from ddpm.config.values import parse_color
from ddpm.data import order
from ddpm.data.dataset import ImageDataset
from ddpm.data.transforms import composite
from ddpm.errors import UserError, foreign_errors
from ddpm.evaluation.hub_features import load_hub_network
from ddpm.hub import is_repo_id

DATASET_FEATURES = "features.safetensors"
"""Name of the feature network that a dataset's folder may hold."""
SUFFIXES = (".safetensors", ".pt", ".pt2")
REQUIREMENTS = "requirements-evaluate.txt"
MAX_CLASSIFIER_BLOCKS, MAX_CLASSIFIER_CHANNELS = 4, 1024
"""Largest SmallClassifier that is loaded: its blocks, and channels, features or classes."""
CACHE_VERSION = 1
"""Raise when the meaning of a cached file changes; old files are then ignored."""
CACHE_KEY = "features"
"""Name of the tensor in a cached file."""


@dataclass(frozen=True)
class FeatureExtractor:
    """A feature network on its device.

    `version` is the sha256 of the network's file, the commit of its repository, or the version of
    the library that it is part of.
    With `is_inception`, the distances of its features are FID and KID. `background` is the color
    behind RGBA images.
    """

    network: Callable[[torch.Tensor], torch.Tensor]
    name: str
    version: str
    device: torch.device
    is_inception: bool = False
    background: str = "white"

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [B, 1, 3 or 4, H, W] uint8 to features [B, D] float32 on the CPU.

        UserError for a network of one's own that accepts or returns something else.
        """
        return self.extract_with_logits(images)[0]

    @torch.inference_mode()
    def extract_with_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the features, as `extract` does, and the logits [B, K] of a classifier."""
        assert images.dtype == torch.uint8 and images.ndim == 4, "images are uint8 batches"
        if images.shape[1] == 4:
            color = torch.tensor(parse_color(self.background), device=images.device)
            images = composite(images, color[:, None, None])
        pixels = images.to(self.device).expand(-1, 3, -1, -1)
        sentence = f"{self.name} cannot take a batch {list(pixels.shape)} of uint8 pixels"
        advice = "It must, with any number of images: give another network with --features."
        with foreign_errors(sentence, advice):
            output = self.network(pixels)
        logits = None
        if isinstance(output, (tuple, list)) and output:
            output, logits = (*output, None)[:2]
        if not isinstance(output, torch.Tensor) or output.ndim != 2 or len(output) != len(images):
            is_tensor = isinstance(output, torch.Tensor)
            shape = list(output.shape) if is_tensor else type(output).__name__
            raise UserError(
                f"{self.name} returned {shape} for {len(images)} images; it must return one vector "
                f"each, [{len(images)}, D]."
            )
        if not bool(output.isfinite().all()):
            raise UserError(f"{self.name} returned features that are not finite.")
        is_classifier = isinstance(logits, torch.Tensor) and logits.shape[:-1] == (len(images),)
        return output.float().cpu(), logits.float().cpu() if is_classifier else None


class SmallClassifier(nn.Module):
    """A small classifier of RxR images, whose last hidden layer is the feature vector.

    Blocks of two convolutions reduce the images to 4x4 positions, so R is 4, 8, 16 or 32. A gray
    network (one channel) reads images of RxR pixels only, an RGB network (three) also larger ones,
    which are averaged to RxR. data/make_features.py trains it and measures its accuracy.
    """

    def __init__(
        self,
        channels: int,
        resolution: int,
        width: int = 32,
        num_features: int = 64,
        num_classes: int = 10,
    ):
        super().__init__()
        self.channels, self.resolution = channels, resolution
        layers: list[nn.Module] = []
        for block in range(resolution.bit_length() - 2):
            outputs, stride = width * 2**block, 1 if block == 0 else 2
            for inputs, step in ((channels, stride), (outputs, 1)):
                convolution = nn.Conv2d(inputs, outputs, 3, step, padding=1)
                layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
            channels = outputs
        layers += [nn.Flatten(), nn.Linear(channels * 4 * 4, num_features), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map [B, C, H, W] uint8 to [B, num_features] float32, none below 0."""
        images, size = pixels.float(), f"{self.resolution}x{self.resolution}"
        if self.channels == 1:
            if pixels.shape[2:] != (self.resolution, self.resolution):
                raise RuntimeError(f"its images must have {size} pixels")
            images = images.mean(1, keepdim=True)
        elif min(pixels.shape[2:]) < self.resolution:
            raise RuntimeError(f"its images must have at least {size} pixels")
        else:
            images = nn.functional.adaptive_avg_pool2d(images, self.resolution)
        return self.layers(images / 127.5 - 1)

    def classify(self, pixels: torch.Tensor) -> torch.Tensor:
        """Map [B, C, H, W] uint8 to logits of the classes [B, num_classes]."""
        return self.features_and_logits(pixels)[1]

    def features_and_logits(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `forward` and `classify` do."""
        features = self(pixels)
        return features, self.head(features)


def load_small_classifier(path: Path) -> SmallClassifier:
    """Load a SmallClassifier of any shape from a safetensors file.

    UserError for weights of another network.
    """
    advice = "For a network of your own give a TorchScript (.pt) or torch.export (.pt2) file."
    with foreign_errors(f"{path} is no feature network of data/make_features.py", advice):
        weights = load_file(path)
        net = SmallClassifier(**_classifier_shape(weights))
        net.load_state_dict(weights)
    return net.eval()


def _classifier_shape(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return the arguments of the SmallClassifier of these weights. ValueError if there is none."""
    first, head = (weights.get(name, torch.empty(0)) for name in ("layers.0.weight", "head.weight"))
    num_blocks = sum(weight.ndim == 4 for weight in weights.values()) // 2
    sizes = [len(first) * 2**num_blocks // 2, *head.shape]
    if (
        (first.ndim, head.ndim) != (4, 2)
        or first.shape[1] not in (1, 3)
        or not 1 <= num_blocks <= MAX_CLASSIFIER_BLOCKS
        or not all(1 <= size <= MAX_CLASSIFIER_CHANNELS for size in sizes)
    ):
        raise ValueError("its weights have other names or shapes")
    return {
        "channels": first.shape[1],
        "resolution": 2 * 2**num_blocks,
        "width": len(first),
        "num_features": head.shape[1],
        "num_classes": len(head),
    }


def load_feature_extractor(
    file: str | None, dataset: str | None, device: torch.device
) -> FeatureExtractor:
    """Load the network of --features `file`, else that in the folder of `dataset`, else Inception.

    `file` may be the id of an image model on the Hub. UserError for a file that is missing or holds
    no network, and for what cannot be downloaded.
    """
    if file is None and dataset is not None and (Path(dataset) / DATASET_FEATURES).is_file():
        file = str(Path(dataset) / DATASET_FEATURES)
    if file is None:
        return _load_inception(device)
    path = Path(file)
    if not path.is_file() and path.suffix not in SUFFIXES and "/" in file and is_repo_id(file):
        network, commit = load_hub_network(file, device)
        return FeatureExtractor(network, file, commit, device)
    if not path.is_file():
        raise UserError(f"--features {file}: there is no such file.")
    network = _load_network(path, device)
    version = hashlib.sha256(path.read_bytes()).hexdigest()
    return FeatureExtractor(network, path.name, version, device)


def _load_network(path: Path, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_small_classifier(path).to(device).features_and_logits
    logger = logging.getLogger("torch.export")  # it logs the tracebacks of its own errors
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        if path.suffix == ".pt2":
            from torch.export.passes import move_to_device_pass

            return move_to_device_pass(torch.export.load(path), str(device)).module()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return torch.jit.load(path, map_location=device).eval()
    except Exception as error:  # the parsers of the two formats raise many types
        reason = re.split(r"\. |\n|  ", str(error).strip())[0].rstrip(".")
        raise UserError(
            f"--features {path} holds no TorchScript (.pt) or torch.export (.pt2) module: {reason}."
        ) from error
    finally:
        logger.setLevel(level)


def _load_inception(device: torch.device) -> FeatureExtractor:
    """Load torch-fidelity's Inception v3 up to its last pooling: 2048 features, as FID is defined.

    UserError if its weights cannot be downloaded or have the wrong hash.
    """
    fidelity = require_torch_fidelity()
    from torch_fidelity.utils import create_feature_extractor

    network = create_feature_extractor(
        "inception-v3-compat",
        ["2048"],
        cuda=False,
        verbose=False,
        feature_extractor_weights_path=str(_inception_weights()),
    )
    version = f"torch-fidelity {fidelity.__version__}"
    return FeatureExtractor(network.to(device), "Inception v3", version, device, is_inception=True)


def _inception_weights() -> Path:
    """Return the path of the weights in torch's cache, after downloading them once.

    The library unpickles them without a check, so their hash is compared here each time.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as url

    expected = Path(url).stem.rpartition("-")[2]  # the first 8 digits of the sha256
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=expected, progress=False)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"The weights of Inception cannot be fetched from {url} ({error}). Put that file "
            f"at {path}, or give --features FILE, a feature network of your own."
        ) from error
    if not sha256.startswith(expected):
        raise UserError(f"{path} holds other weights than its name says: delete it, and run again.")
    return path


def require_torch_fidelity() -> Any:
    """Return torch_fidelity. UserError if it is not installed."""
    try:
        import torch_fidelity
    except ImportError:
        raise UserError(f"torch-fidelity is missing: pip install -r {REQUIREMENTS}") from None
    return torch_fidelity


def dataset_image(images: ImageDataset, row: int) -> torch.Tensor:
    """Return a row as training sees it, without augmentation: [C, H, W] uint8 on the CPU.

    Its crop is a function of the row.
    """
    pixels = images.pixels(row)
    if pixels.shape[1:] == images.size:
        return pixels.cpu()
    generator = order.make_generator(0, "pixels", 0, row)
    return images.batch([row], generator).images[0].cpu()


def dataset_features(
    accelerator: Accelerator,
    extractor: FeatureExtractor,
    images: ImageDataset,
    batch_size: int,
    description: str | None,
) -> torch.Tensor:
    """Return the features [N, D] of a dataset, row by row, on every process: call on each.

    They are read from the cache, or computed by all processes if one of them has no cached file.
    `description` labels the progress bar; None shows none.
    """
    path = (
        images.cache_dir.with_name("ddpm-features") / f"{_cache_key(extractor, images)}.safetensors"
    )
    features = _read_cache(path, len(images))
    is_cached = torch.tensor([features is not None], dtype=torch.int, device=accelerator.device)
    if not accelerator.gather(is_cached).all():

        def extract(rows: Sequence[int]) -> Iterator[torch.Tensor]:
            for start in range(0, len(rows), batch_size):
                batch = [dataset_image(images, row) for row in rows[start : start + batch_size]]
                yield extractor.extract(torch.stack(batch))

        features = map_over_processes(accelerator, len(images), extract, description)
        if accelerator.is_local_main_process:
            file_io.write_bytes(path, save({CACHE_KEY: features.contiguous()}))
    assert features is not None
    return features


def map_over_processes(
    accelerator: Accelerator,
    count: int,
    function: Callable[[Sequence[int]], Iterator[torch.Tensor]],
    description: str | None,
) -> torch.Tensor:
    """Return one row of numbers for each index below `count`, computed by all processes.

    Call on every process; each computes every world-size-th index. `function` yields batches of
    rows for the indices that it is given, in their order. All processes compute the same number of
    rows, some twice if need be: a sharded model needs all processes in each of its calls.
    """
    world_size, rank = accelerator.num_processes, accelerator.process_index
    indices = [i % count for i in range(rank, -(-count // world_size) * world_size, world_size)]
    disable = None if accelerator.is_main_process and description else True
    batches = []
    with tqdm(
        total=len(indices), desc=description, unit=" images", disable=disable, leave=False
    ) as bar:
        for batch in function(indices):
            batches.append(batch)
            bar.update(len(batch))
    rows = torch.cat(batches)
    if world_size == 1:
        return rows
    gathered = accelerator.gather(rows.to(accelerator.device)).cpu().view(world_size, *rows.shape)
    return gathered.transpose(0, 1).reshape(-1, rows.shape[1])[:count]


def _cache_key(extractor: FeatureExtractor, images: ImageDataset) -> str:
    content = {
        "layout": CACHE_VERSION,
        "images": images.fingerprint,
        "network": extractor.version,
        "name": extractor.name,
        "device": extractor.device.type,
    }
    if images.channels == 4:
        content["background"] = extractor.background
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _read_cache(path: Path, count: int) -> torch.Tensor | None:
    """Return the features in a cached file; None if it is missing or damaged."""
    try:
        features = load_file(path)[CACHE_KEY]
    except (OSError, KeyError, SafetensorError):
        return None
    return features if features.ndim == 2 and len(features) == count else None
