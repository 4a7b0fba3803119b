"""Images -> feature vectors: the space in which distances between sets of images are measured.

Every network has one contract: pixels [B, 3, H, W] uint8 (gray ones repeated) go in, [B, D] float32
come out; what resizing and scaling it wants it does itself. Three kinds:

    Inception              of torch-fidelity, with its TensorFlow weights and resize: what FID means
    features.safetensors   a DigitNet; the folder of a dataset may bring one, as data/digits does
    FILE.pt, FILE.pt2      a TorchScript or torch.export module of one's own, for other domains

A TorchScript file is a program: --features takes only a file that the user names.
"""

import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn
from tqdm.auto import tqdm

from ddpm import run_folder
from ddpm.data import order
from ddpm.data.dataset import ImageDataset
from ddpm.errors import UserError

DATASET_FEATURES = "features.safetensors"
"""Name of the feature network that the folder of a dataset may bring."""
LIBRARY = "requirements-evaluate.txt"


@dataclass(frozen=True)
class FeatureExtractor:
    """A feature network on its device: `name` for people, `version` the sha256 of its file or the
    version of the library that it came with. `is_inception`: distances in it are FID and KID."""

    network: Callable[[torch.Tensor], torch.Tensor]
    name: str
    version: str
    device: torch.device
    is_inception: bool = False

    @torch.inference_mode()
    def of(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 1 or 3, H, W] uint8 -> [B, D] float32 on the CPU.

        UserError for a network of one's own that takes or gives something else.
        """
        assert images.dtype == torch.uint8 and images.ndim == 4, "features are of uint8 batches"
        pixels = images.to(self.device).expand(-1, 3, -1, -1)
        try:
            found = self.network(pixels)
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"{self.name} cannot take a batch {list(pixels.shape)} of uint8 pixels ({reason}). "
                "It must, with any number of images."
            ) from error
        found = found[0] if isinstance(found, (tuple, list)) and found else found
        if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != len(images):
            shape = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise UserError(
                f"{self.name} gave {shape} for {len(images)} images; one vector each, "
                f"[{len(images)}, D], is wanted."
            )
        if not bool(found.isfinite().all()):
            raise UserError(f"{self.name} gave features that are not finite.")
        return found.float().cpu()

    def of_batches(self, batches: Iterable[torch.Tensor]) -> torch.Tensor:
        """`of` for batches that come one by one: [N, D]; [0, 0] when none comes."""
        found = [self.of(batch) for batch in batches]
        return torch.cat(found) if found else torch.empty(0, 0)


class DigitNet(nn.Module):
    """A small classifier of 8x8 digits; its last hidden layer are the features.

    data/make_digit_features.py trains it and says how well it reads digits it has not seen.
    """

    def __init__(self, width: int = 32, num_features: int = 64):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 4 * 4, num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(num_features, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, C, 8, 8] uint8 -> [B, num_features] float32, none below 0."""
        if pixels.shape[2:] != (8, 8):
            raise RuntimeError("it knows images of 8x8 pixels")
        gray = pixels.float().mean(1, keepdim=True)
        return self.layers(gray / 127.5 - 1)

    def classify(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, C, 8, 8] uint8 -> [B, 10] scores of the digits."""
        return self.head(self(pixels))


def load_digit_net(path: Path) -> DigitNet:
    """A DigitNet from a safetensors file. UserError for weights of anything else."""
    net = DigitNet()
    try:
        with safe_open(path, framework="pt") as file:
            net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{path} is no feature network of data/make_digit_features.py ({reason}). For a "
            "network of your own give a TorchScript (.pt) or torch.export (.pt2) file."
        ) from error
    return net.eval()


def load_feature_extractor(
    file: str | None, dataset: str | None, device: torch.device
) -> FeatureExtractor:
    """The network of --features FILE; else the one that the folder of `dataset` brings; else
    Inception.

    UserError for a file that is missing or holds no network, and where Inception cannot be had.
    """
    brought = Path(dataset or "") / DATASET_FEATURES
    if file is None and dataset is not None and brought.is_file():
        file = str(brought)
    if file is None:
        return _inception(device)
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--features {file}: there is no such file.")
    network = _load(path, device)
    return FeatureExtractor(
        network, path.name, hashlib.sha256(path.read_bytes()).hexdigest(), device
    )


def _load(path: Path, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_digit_net(path).to(device)
    exports = logging.getLogger("torch.export")  # logs the traceback of what it raises
    level = exports.level
    try:
        exports.setLevel(logging.ERROR)
        if path.suffix == ".pt2":
            from torch.export.passes import move_to_device_pass

            return move_to_device_pass(torch.export.load(path), str(device)).module()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return torch.jit.load(path, map_location=device).eval()
    except Exception as error:  # each of the two formats raises what its own parser does
        reason = re.split(r"\. |\n|  ", str(error).strip())[0].rstrip(".")
        raise UserError(
            f"--features {path} holds no TorchScript (.pt) or torch.export (.pt2) module: {reason}."
        ) from error
    finally:
        exports.setLevel(level)


def _inception(device: torch.device) -> FeatureExtractor:
    """torch-fidelity's Inception v3: the 2048 numbers of its last pooling, as FID is defined.

    UserError where its weights cannot be fetched, or are not those that they should be.
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
    """Where the weights lie, after fetching them once into torch's cache.

    The library unpickles them, so their hash is looked at each time, which the library does not do.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as address

    expected = Path(address).stem.rpartition("-")[2]  # the first 8 digits of its sha256
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(address).name
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(path), hash_prefix=expected, progress=False)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"The weights of Inception cannot be fetched from {address} ({error}). Put that file "
            f"at {path}, or give --features FILE, a feature network of your own."
        ) from error
    if not found.startswith(expected):
        raise UserError(f"{path} holds other weights than its name says: delete it, and run again.")
    return path


def require_torch_fidelity():
    """torch_fidelity. UserError where it is not installed."""
    try:
        import torch_fidelity
    except ImportError:
        raise UserError(f"torch-fidelity is missing: pip install -r {LIBRARY}") from None
    return torch_fidelity


# The images that others are compared with: their features, looked at once and kept.
#
#     ddpm-features/<key>.safetensors    [N, D] float32, beside the decoded pixels
#
# The key is a function of the pixels and of the network, so a file never goes out of date. Training
# with --eval_images and evaluate.py read the same ones.
#
# Legend: N images, D features.

LAYOUT = 1
"""Raise when the meaning of a kept file changes: old ones are then left alone."""
NAME = "features"


def dataset_image(real: ImageDataset, row: int) -> torch.Tensor:
    """A row as training sees it, its crop a function of the row: [C, R, R] uint8 on the CPU."""
    return real.batch([row], order.make_generator(0, "pixels", 0, row), random_flip=False)[0].cpu()


def dataset_features(
    accelerator: Accelerator,
    network: FeatureExtractor,
    real: ImageDataset,
    batch_size: int,
    words: str | None,
) -> torch.Tensor:
    """Features [N, D] of all of `real`, row by row, the same on all processes: call on each.

    Looked at now, by all processes, only where the file of an earlier look is missing. `words` are
    what the progress bar says; None shows none.
    """
    path = real.cache_dir.with_name("ddpm-features") / f"{_key(network, real)}.safetensors"
    kept = _read(path, len(real))
    if not _everywhere(accelerator, kept is not None):

        def batches(mine: Sequence[int]) -> Iterator[torch.Tensor]:
            for start in range(0, len(mine), batch_size):
                pixels = [dataset_image(real, row) for row in mine[start : start + batch_size]]
                yield network.of(torch.stack(pixels))

        kept = map_over_processes(accelerator, len(real), batches, words)
        if accelerator.is_local_main_process:
            run_folder.write_bytes(path, save({NAME: kept.contiguous()}))
    assert kept is not None
    return kept


def map_over_processes(
    accelerator: Accelerator,
    count: int,
    batches: Callable[[Sequence[int]], Iterator[torch.Tensor]],
    words: str | None,
) -> torch.Tensor:
    """Rows of numbers of images 0 .. count - 1, of which each process makes every world-th.

    `batches` gives those of the numbers that it is handed. All processes make equally many, the
    last ones perhaps once more: a sharded model needs the others in each of its calls.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    mine = [number % count for number in range(rank, -(-count // world) * world, world)]
    hidden = None if accelerator.is_main_process and words else True
    found = []
    with tqdm(total=len(mine), desc=words, unit=" images", disable=hidden, leave=False) as bar:
        for batch in batches(mine):
            found.append(batch)
            bar.update(len(batch))
    own = torch.cat(found)
    if world == 1:
        return own
    every = accelerator.gather(own.to(accelerator.device)).cpu().view(world, *own.shape)
    return every.transpose(0, 1).reshape(-1, own.shape[1])[:count]


def _key(network: FeatureExtractor, real: ImageDataset) -> str:
    what = {
        "layout": LAYOUT,
        "images": real.fingerprint,
        "network": network.version,
        "name": network.name,
        "device": network.device.type,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _read(path: Path, count: int) -> torch.Tensor | None:
    """What is kept in a file; None where there is none, or none that can be used."""
    try:
        found = load_file(path)[NAME] if os.path.exists(path) else None
    except (OSError, KeyError, SafetensorError):
        return None
    return found if found is not None and found.ndim == 2 and len(found) == count else None


def _everywhere(accelerator: Accelerator, here: bool) -> bool:
    """Whether it is so on every process: machines may have caches of their own."""
    return bool(accelerator.gather(torch.tensor([int(here)], device=accelerator.device)).all())
