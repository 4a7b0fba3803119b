"""Train a dataset's feature network: data/digits/features.safetensors or that of data/emoji.

    pip install -r requirements-dev.txt && python data/make_features.py digits
    python data/make_features.py emoji

Inception was trained on photographs of 299x299 pixels; its distances mean little for images this
small. These classifiers are trained on the training split alone, on one thread from fixed seeds,
and their accuracy on the held-out images is printed. evaluate.py compares images by the features of
their last hidden layer.
"""

import hashlib
import sys
from pathlib import Path
from typing import Literal

import datasets
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).parent.parent))

from ddpm.config.data import DataConfig  # noqa: E402
from ddpm.data.dataset import load_images  # noqa: E402
from ddpm.evaluation.features import DATASET_FEATURES, SmallClassifier  # noqa: E402
from ddpm.file_io import write_bytes  # noqa: E402

RESOLUTIONS = {"digits": 8, "emoji": 16}
WIDTHS = {"digits": 32, "emoji": 16}
FOLDERS = {name: Path(__file__).parent / name for name in RESOLUTIONS}
EPOCHS, BATCH_SIZE, LEARNING_RATE = 60, 64, 3e-3


def main(
    dataset: Literal["digits", "emoji"],
    path: Path | None = None,
    epochs: int = EPOCHS,
    seed: int = 0,
    **shape: int,
) -> float:
    """Train, write the file (None: that of the dataset's folder), and return the accuracy on the
    held-out images."""
    torch.set_num_threads(1)
    net = train(*split(dataset, "train"), epochs, seed, **{"width": WIDTHS[dataset], **shape})
    held_out_accuracy = accuracy(net, *split(dataset, "test"))
    weights = {name: value.contiguous() for name, value in net.state_dict().items()}
    content = save(
        weights, {"held_out_accuracy": f"{held_out_accuracy:.4f}", "epochs": str(epochs)}
    )
    path = path or FOLDERS[dataset] / DATASET_FEATURES
    write_bytes(path, content)
    parameters = sum(weight.numel() for weight in net.parameters())
    print(
        f"{path}: {parameters:,} weights, {len(content) / 1e6:.2f} MB, sha256 "
        f"{hashlib.sha256(content).hexdigest()[:12]}; {held_out_accuracy:.2%} accuracy on the "
        f"held-out {dataset}."
    )
    return held_out_accuracy


def split(dataset: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixels [N, C, R, R] uint8 of a split, as evaluate.py reads them, and labels [N]."""
    folder = str(FOLDERS[dataset])
    config = DataConfig(dataset_name=folder, split=name, resolution=RESOLUTIONS[dataset])
    images = load_images(config, show_progress=False)
    pixels = torch.stack([images.pixels(row) for row in range(len(images))])
    return pixels, torch.tensor(datasets.load_dataset(folder, split=name)["label"])


def train(
    pixels: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int = 0, **shape: int
) -> SmallClassifier:
    """Return a classifier of a shape, trained for `epochs` epochs with random augmentations."""
    torch.manual_seed(seed)
    net = SmallClassifier(*pixels.shape[1:3], **shape).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    batches = -(-len(pixels) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(pixels)).split(BATCH_SIZE):
            scores = net.classify(augment(pixels[rows]))
            loss = F.cross_entropy(scores, labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def augment(pixels: torch.Tensor) -> torch.Tensor:
    """Randomly rotate, shear, move and scale the contrast of [B, C, R, R] uint8.

    Gray images are on black. RGB images, on white, are changed more and mirrored too: there are few
    of a kind, and the network must not know them by heart.
    """
    count, is_rgb = len(pixels), pixels.shape[1] == 3
    background, change, contrast = (255, 0.17, 0.3) if is_rgb else (0, 0.12, 0.2)
    maps = torch.eye(2, 3).repeat(count, 1, 1)
    maps[:, :, :2] += change * torch.randn(count, 2, 2)
    maps[:, :, 2] += change * torch.randn(count, 2)
    if is_rgb:
        maps[:, :, 0] *= 2 * torch.randint(2, (count, 1)) - 1
    grid = F.affine_grid(maps, list(pixels.shape), align_corners=False)
    # Outside of the image grid_sample returns 0, which is the background here
    moved = F.grid_sample(pixels.float() - background, grid, align_corners=False)
    ink = 1 - contrast + 2 * contrast * torch.rand(count, 1, 1, 1)
    noisy = background + moved * ink + 4 * torch.randn(moved.shape)
    return noisy.round().clamp(0, 255).to(torch.uint8)


@torch.inference_mode()
def accuracy(net: SmallClassifier, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the fraction of images that are classified correctly."""
    return float((net.classify(pixels).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main(tyro.cli(tyro.conf.Positional[Literal["digits", "emoji"]]))
