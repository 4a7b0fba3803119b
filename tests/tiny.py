"""Tiny models, images and runs that fixtures of conftest.py hand to tests of all packages."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

from ddpm.accelerator import make_accelerator
from ddpm.config.base import flatten
from ddpm.config.parser import parse_train
from ddpm.config.values import Resolution
from ddpm.file_io import write_json
from ddpm.publishing.background import Publisher
from ddpm.run_folder import METRICS, SAMPLES, TRAIN_CONFIG
from ddpm.run_record import Environment, write_record
from ddpm.sampling import pipeline, proof
from ddpm.training import loop
from ddpm.training.signals import STOP_SIGNALS

TINY_UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
STEPS = 6
FLAGS = [
    "--resolution=8",
    "--random_flip",
    "--random_vertical_flip",
    "--random_shift=1",
    "--train_batch_size=4",
    f"--max_train_steps={STEPS}",
    "--lr_warmup_steps=2",
    "--learning_rate=1e-2",
    "--dropout=0.1",
    "--checkpointing_steps=2",
    "--save_images_epochs=1",
    "--save_model_epochs=1",
    "--eval_batch_size=2",
    "--ddpm_num_inference_steps=2",
    "--logging_steps=1",
    "--snr_gamma=5",
    "--prediction_type=v_prediction",
    "--checkpoints_total_limit=None",
]

RGBA_CLASSES = (
    "--train_data_dir=None",
    f"--dataset_name={Path(__file__).parent.parent / 'data' / 'emoji'}",
    "--dataset_config_name=faces-hearts-flags",
    "--split=train[:40]",
    "--channels=4",
    "--class_conditional",
)


def write_unet_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(TINY_UNET))


def write_pictures(folder: Path) -> None:
    """Write ten RGB PNGs, 8 high and 8 to 12 wide."""
    noise = np.random.default_rng(0)
    for index in range(10):
        pixels = noise.integers(0, 256, (8, 8 + index % 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


def write_transparent_pictures(folder: Path) -> None:
    """Write ten PNGs of 8x8: nine with a transparent edge, whose hidden colors differ, one RGB."""
    noise = np.random.default_rng(0)
    for index in range(10):
        pixels = noise.integers(0, 256, (8, 8, 4), dtype=np.uint8)
        pixels[..., 3] = 255
        pixels[:, :3, 3] = 0
        Image.fromarray(pixels if index else pixels[..., :3].copy()).save(folder / f"{index}.png")


def write_class_pictures(folder: Path) -> None:
    """Write ten RGB PNGs of 8x8 in the class folders dark and light."""
    noise = np.random.default_rng(0)
    for index in range(10):
        name, low = ("light", 128) if index % 2 else ("dark", 0)
        (folder / name).mkdir(exist_ok=True)
        pixels = noise.integers(low, low + 128, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{index}.png")


def make_unet(
    resolution: Resolution = 8, channels: int = 1, seed: int = 0, num_classes: int | None = None
) -> UNet2DModel:
    """Return a two-level UNet with the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=resolution,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            num_class_embeds=None if num_classes is None else num_classes + 1,
        ).eval()


@contextmanager
def as_new_process() -> Iterator[None]:
    """Train in this process as train.py does in a new one: no Accelerator yet, default signals."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(folder: Path, pictures: Path, unet: Path, *flags: str) -> Path:
    """Train FLAGS and flags into `folder`, and return it."""
    command = [
        f"--train_data_dir={pictures}",
        f"--model_config_name_or_path={unet}",
        f"--output_dir={folder}",
        *FLAGS,
        *flags,
    ]
    config = parse_train(command)
    with as_new_process():
        accelerator = make_accelerator(config.optimization.mixed_precision, config.tracking.loggers)
        loop.train(accelerator, config, Publisher(Path(config.output_dir), config.hub))
    return folder


CLASS_NAMES = ("cat", "dog", "a/../b")


def write_class_pipeline(folder: Path) -> None:
    """Write a pipeline of 8x8 gray images with CLASS_NAMES, and its proof, without training it.

    The class embedding is large enough to change each image.
    """
    unet = make_unet(num_classes=len(CLASS_NAMES))
    unet.class_embedding.weight.data *= 4
    scheduler = DDPMScheduler(40, timestep_spacing="trailing")
    pipeline.export_pipeline(unet, scheduler, folder, CLASS_NAMES)
    proof.write_proof(folder, unet, scheduler)


def write_run_folder(folder: Path) -> None:
    """Write a finished run of one-channel images, without training it."""
    torch.manual_seed(0)
    unet = UNet2DModel.from_config({**TINY_UNET, "in_channels": 1, "out_channels": 1})
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    pipeline.export_pipeline(unet, scheduler, folder)
    proof.write_proof(folder, unet, scheduler)
    write_json(folder / TRAIN_CONFIG, flatten(parse_train([])))
    write_record(
        folder,
        finished=True,
        dataset={
            "name": "someone/pictures",
            "on_hub": True,
            "revision": "0" * 40,
            "config_name": None,
            "rows": 10,
            "split": "train",
            "image_column": "image",
            "pixels_sha256": "f" * 64,
            "images": 10,
            "channels": 1,
            "modes": {"L": 10},
            "sizes": {"8x8": 10},
            "unreadable": 0,
            "unreadable_first": [],
        },
        model={"parameters": unet.num_parameters(), "channels": 1},
        environment=Environment.current(None, 1, "no"),
        training={
            "steps": 6,
            "images_seen": 24,
            "epochs": 2.4,
            "seconds": 1.5,
            "images_per_s": 16.0,
            "final_loss": 0.5,
            "finished_at": "2026-01-01T00:00:00Z",
        },
    )
    (folder / METRICS).write_text('{"step": 6, "loss": 0.5}\n')
    (folder / SAMPLES).mkdir()
    Image.new("L", (20, 20)).save(folder / SAMPLES / "step-000006.png")
