"""Images -> feature vectors: the space in which distances between sets of images are measured.

Every network has one contract: pixels [B, 3, H, W] uint8 (gray ones repeated) go in, [B, D] float32
come out; what resizing and scaling it wants it does itself. Three kinds:

    Inception              of torch-fidelity, with its TensorFlow weights and resize: what FID means
    features.safetensors   a DigitNet; the folder of a dataset may bring one, as data/digits does
    FILE.pt, FILE.pt2      a TorchScript or torch.export module of one's own, for other domains

A TorchScript file is a program: --features takes only a file that the user names.
"""

import hashlib
import logging
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ddpm.errors import UserError

BROUGHT = "features.safetensors"
"""Name of the feature network that the folder of a dataset may bring."""
LIBRARY = "requirements-evaluate.txt"


@dataclass(frozen=True)
class Features:
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
            raise UserError(f"{self.name} gave {shape} for {len(images)} images; one vector each, "
                            f"[{len(images)}, D], is wanted.")  # fmt: skip
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
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Flatten(), nn.Linear(2 * width * 4 * 4, num_features), nn.ReLU(),
        )  # fmt: skip
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


def open_features(file: str | None, dataset: str | None, device: torch.device) -> Features:
    """The network of --features FILE; else the one that the folder of `dataset` brings; else
    Inception.

    UserError for a file that is missing or holds no network, and where Inception cannot be had.
    """
    brought = Path(dataset or "") / BROUGHT
    if file is None and dataset is not None and brought.is_file():
        file = str(brought)
    if file is None:
        return _inception(device)
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--features {file}: there is no such file.")
    network = _load(path, device)
    return Features(network, path.name, hashlib.sha256(path.read_bytes()).hexdigest(), device)


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


def _inception(device: torch.device) -> Features:
    """torch-fidelity's Inception v3: the 2048 numbers of its last pooling, as FID is defined.

    UserError where its weights cannot be fetched, or are not those that they should be.
    """
    fidelity = library()
    from torch_fidelity.utils import create_feature_extractor

    network = create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, verbose=False,
        feature_extractor_weights_path=str(_inception_weights()),
    )  # fmt: skip
    version = f"torch-fidelity {fidelity.__version__}"
    return Features(network.to(device), "Inception v3", version, device, is_inception=True)


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


def library():
    """torch_fidelity. UserError where it is not installed."""
    try:
        import torch_fidelity
    except ImportError:
        raise UserError(f"torch-fidelity is missing: pip install -r {LIBRARY}") from None
    return torch_fidelity
