"""Train the feature network of the digits: data/digits/features.safetensors.

    pip install -r requirements-dev.txt && python data/make_digit_features.py

Inception was trained on photographs of 299x299 pixels; its distances mean little for 8x8 digits.
This classifier of digits is trained on the training split alone, on one thread from fixed seeds,
and its accuracy on the held-out digits is printed. evaluate.py compares digits by the features of
its last hidden layer.
"""

import hashlib
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).parent.parent))

from ddpm.evaluation.features import DATASET_FEATURES, DigitNet  # noqa: E402
from ddpm.file_io import write_bytes  # noqa: E402

FOLDER = Path(__file__).parent / "digits"
EPOCHS, BATCH_SIZE, LEARNING_RATE = 60, 64, 3e-3


def main(epochs: int = EPOCHS) -> float:
    """Train, write the file, and return the accuracy on the held-out digits."""
    torch.set_num_threads(1)
    net = train(*split("train"), epochs)
    held_out_accuracy = accuracy(net, *split("test"))
    weights = {name: value.contiguous() for name, value in net.state_dict().items()}
    content = save(
        weights, {"held_out_accuracy": f"{held_out_accuracy:.4f}", "epochs": str(epochs)}
    )
    write_bytes(FOLDER / DATASET_FEATURES, content)
    parameters = sum(weight.numel() for weight in net.parameters())
    print(
        f"{FOLDER / DATASET_FEATURES}: {parameters:,} weights, {len(content) / 1e6:.2f} MB, sha256 "
        f"{hashlib.sha256(content).hexdigest()[:12]}; {held_out_accuracy:.2%} accuracy on the "
        "held-out digits."
    )
    return held_out_accuracy


def split(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixels [N, 1, 8, 8] uint8 and labels [N] of a split."""
    rows = datasets.load_dataset(str(FOLDER), split=name)
    pixels = np.stack([np.asarray(image) for image in rows["image"]])
    return torch.from_numpy(pixels)[:, None], torch.tensor(rows["label"])


def train(
    pixels: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int = 0, **shape: int
) -> DigitNet:
    """Return a DigitNet of a shape, trained for `epochs` epochs with random augmentations."""
    torch.manual_seed(seed)
    net = DigitNet(**shape).train()
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
    """Randomly rotate, shear, move and scale the brightness of [B, 1, 8, 8] uint8."""
    count = len(pixels)
    maps = torch.eye(2, 3).repeat(count, 1, 1)
    maps[:, :, :2] += 0.12 * torch.randn(count, 2, 2)
    maps[:, :, 2] += 0.12 * torch.randn(count, 2)
    grid = F.affine_grid(maps, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels.float(), grid, align_corners=False)
    ink = 0.8 + 0.4 * torch.rand(count, 1, 1, 1)
    return (moved * ink + 4 * torch.randn(moved.shape)).round().clamp(0, 255).to(torch.uint8)


@torch.inference_mode()
def accuracy(net: DigitNet, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the fraction of images that are classified correctly."""
    return float((net.classify(pixels).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
