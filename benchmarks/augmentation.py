"""Augmentation of small data: held-out loss, copies, and distance to the data, at equal steps.

    python benchmarks/augmentation.py [--data digits-100 emoji-100] [--arms none shift] [--seeds 0]

Small networks are trained on some of the digits and of the emoji, each seed on others of them. Then
the averaged weights are measured: their loss on images that were not trained on; the copies, which
are generated images (DDIM, 25 steps) that are nearer to a training image, or to what the
augmentation makes of one, than 99% of the images not trained on; and for digits the Frechet
distance to the images not trained on. Digits are compared in the features of their network, emoji
by their pixels.

"non-leaky" (arXiv 2206.00364, appendix F.2) is no flag of train.py: half of the images are turned,
mirrored or shifted, and the network gets the change as a class; images are drawn without a class,
as those that nothing was done to. Lines of OUTPUT_DIR/results.jsonl are kept, so the same command
goes on after a stop; the tables are Markdown.
"""

import itertools
import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import datasets
import torch
import tyro
from accelerate.state import AcceleratorState
from workloads import ROOT

from ddpm.accelerator import make_accelerator
from ddpm.config.data import DataConfig
from ddpm.config.parser import parse_train
from ddpm.data import dataset, transforms
from ddpm.diffusion import schedulers
from ddpm.diffusion.unet import preset_config
from ddpm.evaluation import features, memorization, metrics, timestep_loss
from ddpm.file_io import write_json
from ddpm.publishing.background import Publisher
from ddpm.sampling import generate, pipeline
from ddpm.training import loop, step


@dataclass(frozen=True)
class Workload:
    """How a network is trained on `count` images of a dataset, and with which of the ARMS."""

    dataset: str
    configuration: str | None
    count: int
    resolution: int
    channels: int
    block_out_channels: tuple[int, ...]
    steps: int
    batch_size: int
    shift: int
    arms: tuple[str, ...]


ARMS = {
    "none": {},
    "flip": {"random_flip": True},
    "vertical flip": {"random_vertical_flip": True},
    "rotate90": {"random_rotate90": True},
    "shift": {"random_shift": True},
    "dropout": {"dropout": 0.1},
    "non-leaky": {},
}
"""Settings of train.py. A shift is that of the workload."""
FOR_DIGITS = ("none", "flip", "shift", "dropout", "non-leaky")
FOR_LONG = ("none", "shift", "dropout", "non-leaky")
FOR_EMOJI = ("none", "flip", "shift", "non-leaky")
FOR_MANY = ("none", "flip", "shift")
EMOJI = "faces-hearts-flags"
WORKLOADS = {
    "digits-50": Workload("digits", None, 50, 8, 1, (32, 32), 1000, 32, 1, FOR_LONG),
    "digits-100": Workload("digits", None, 100, 8, 1, (32, 32), 450, 32, 1, tuple(ARMS)),
    "digits-400": Workload("digits", None, 400, 8, 1, (32, 32), 450, 32, 1, FOR_DIGITS),
    "emoji-100": Workload("emoji", EMOJI, 100, 16, 3, (32, 32, 32), 500, 16, 2, FOR_EMOJI),
    "emoji-413": Workload("emoji", EMOJI, 413, 16, 3, (32, 32, 32), 500, 16, 2, FOR_EMOJI),
    "emoji-1719": Workload("emoji", "default", 1719, 16, 3, (32, 32, 32), 1000, 16, 2, FOR_MANY),
}
PROBABILITY = 0.5
"""Fraction of the images that the non-leaky augmentation changes."""
NUM_GENERATED = 200
MAX_LOSS_IMAGES = 100
"""Images whose loss is measured."""
Key = tuple[str, str, int]
"""Workload, arm and seed."""


def main(
    data: tuple[str, ...] = tuple(WORKLOADS),
    arms: tuple[str, ...] = tuple(ARMS),
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int | None = None,
    output_dir: str = "augmentation",
) -> None:
    """Print the tables. `steps` replaces those of all workloads."""
    folder = Path(output_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    results: dict[Key, dict[str, float]] = {tuple(k): v for k, v in map(json.loads, lines)}
    for seed, name in itertools.product(seeds, data):
        for arm in arms:
            key = (name, arm, seed)
            if key not in results and arm in WORKLOADS[name].arms:
                results[key] = run(folder, key, steps or WORKLOADS[name].steps)
                with path.open("a") as file:
                    file.write(json.dumps([key, results[key]]) + "\n")
                print(*key, results[key], flush=True)
    for name in data:
        print(f"\n{name}\n\n{to_markdown(results, name, seeds)}")


def run(folder: Path, key: Key, steps: int) -> dict[str, float]:
    """Train and measure one model."""
    name, arm, seed = key
    workload, settings = WORKLOADS[name], {**ARMS[arm]}
    if "random_shift" in settings:
        settings["random_shift"] = workload.shift
    folders = write_folders(folder / f"{name}-{seed}", workload, seed)
    output_dir = folder / "-".join(map(str, key)).replace(" ", "-")
    shutil.rmtree(output_dir, ignore_errors=True)  # of a training that was stopped
    train(
        folders[0], output_dir, arm, workload, {**settings, "seed": seed, "max_train_steps": steps}
    )
    settings.pop("dropout", None)
    images = [load_folder(path, workload) for path in folders]
    values = measure(output_dir, *images, workload, seed, DataConfig(**settings))
    shutil.rmtree(output_dir)
    return values


def write_folders(folder: Path, workload: Workload, seed: int) -> tuple[Path, Path]:
    """Write the images to train on and all others as PNG files, and return the two folders."""
    trained, unseen = (folder.with_name(f"{folder.name}-{part}") for part in ("trained", "unseen"))
    if not unseen.exists():
        dataset_folder = ROOT / "data" / workload.dataset
        splits = datasets.load_dataset(str(dataset_folder), workload.configuration).values()
        first, held_out = ([row["image"] for row in split] for split in splits)
        order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed)).tolist()
        first = [first[index] for index in order]
        parts = (first[: workload.count], held_out + first[workload.count :])
        for path, images in zip((trained, unseen), parts, strict=True):
            path.mkdir(exist_ok=True)
            for index, image in enumerate(images):
                image.save(path / f"{index:04}.png")
    return trained, unseen


def load_folder(path: Path, workload: Workload) -> torch.Tensor:
    """Return the images of a folder as they are trained on: [N, C, R, R] uint8."""
    config = DataConfig(train_data_dir=str(path), resolution=workload.resolution)
    images = dataset.load_images(config, False)
    return torch.stack([images.pixels(row) for row in range(len(images))])


def train(data: Path, output_dir: Path, arm: str, workload: Workload, settings: dict) -> None:
    """Train the model of an arm on a folder of images."""
    AcceleratorState._reset_state(reset_partial_state=True)
    unet = output_dir.with_name(f"unet-{workload.resolution}")
    unet.mkdir(exist_ok=True)
    levels = len(workload.block_out_channels)
    config = {
        **preset_config(8, workload.channels),
        "_class_name": "UNet2DModel",
        "sample_size": workload.resolution,
        "block_out_channels": workload.block_out_channels,
        "down_block_types": ["DownBlock2D"] * levels,
        "up_block_types": ["UpBlock2D"] * levels,
        "norm_num_groups": 32,
    }
    write_json(unet / "config.json", config)
    flags = [
        f"--config={ROOT / 'recipes' / 'digits.json'}",
        f"--train_data_dir={data}",
        f"--model_config_name_or_path={unet}",
        f"--output_dir={output_dir}",
        f"--resolution={workload.resolution}",
        f"--train_batch_size={workload.batch_size}",
        *("--learning_rate=4e-3", "--lr_warmup_steps=40", "--checkpointing_steps=1000000"),
        "--timestep_sampling=uniform",
        *("--save_images_epochs=0", "--save_model_epochs=0", "--eval_steps=0"),
        *(f"--{name}" + f"={value}" * (value is not True) for name, value in settings.items()),
    ]
    parsed = parse_train(flags)
    with tell_the_network(workload.shift) if arm == "non-leaky" else nullcontext():
        loop.train(make_accelerator("no"), parsed, Publisher(output_dir, parsed.hub))


def all_draws(config: DataConfig) -> torch.Tensor:
    """Return draws [V, 7] of all changes that an augmentation makes; the first one makes none."""
    size = 2 * config.random_shift + 1
    shifts = [(0.5 + (config.random_shift + offset) % size) / size for offset in range(size)]
    values = [
        [0.0],
        [0.0],
        [0.9, 0.1] if config.random_flip else [0.9],
        [0.9, 0.1] if config.random_vertical_flip else [0.9],
        [0.0, 0.3, 0.6, 0.8] if config.random_rotate90 else [0.0],
        shifts,
        shifts,
    ]
    return torch.tensor(list(itertools.product(*values)))


@contextmanager
def tell_the_network(shift: int) -> Iterator[None]:
    """Train on images that are changed with PROBABILITY, with the number of the change as class.

    The null class, which the exported pipeline has, is that of unchanged images.
    """
    turned = DataConfig(random_flip=True, random_rotate90=True)
    shifted = DataConfig(random_shift=shift)
    both = DataConfig(random_flip=True, random_rotate90=True, random_shift=shift)
    draws = torch.cat([all_draws(turned), all_draws(shifted)[1:]])
    load_images = dataset.load_images

    def load(*arguments, **keywords) -> dataset.ImageDataset:
        images = load_images(*arguments, **keywords)
        images.class_names = [str(change) for change in range(1, len(draws))]
        plain_batch = images.batch

        def batch(rows: Sequence[int], generator: torch.Generator, _: DataConfig):
            pixels = plain_batch(rows, generator).images
            changes = torch.randint(1, len(draws), (len(rows),), generator=generator)
            changes[torch.rand(len(rows), generator=generator) >= PROBABILITY] = 0
            labels = (changes - 1) % len(draws)  # the last one is the null class
            return transforms.Batch(transforms.augment(pixels, draws[changes], both), labels)

        images.batch = batch
        return images

    with (
        patch.object(dataset, "load_images", load),
        patch.object(step, "drop_labels", lambda labels, *_: labels),
    ):
        yield


def measure(
    model_folder: Path,
    trained: torch.Tensor,
    unseen: torch.Tensor,
    workload: Workload,
    seed: int,
    augmentation: DataConfig,
) -> dict[str, float]:
    """Return the loss on unseen images [N, C, R, R], the copies, and for digits the distance."""
    model = pipeline.load_model(str(model_folder))
    scheduler = schedulers.build_sampling_scheduler("ddim", model.scheduler_config, 25)
    values = {}
    for name, images in (("held_out_loss", unseen), ("training_loss", trained)):
        inputs = transforms.to_model(images[:MAX_LOSS_IMAGES])
        loss = timestep_loss.loss_by_timestep(model.unet, scheduler, inputs, range(len(inputs)))
        values[name] = loss.mean()
    first = 10**6 * (seed + 1)
    seeds = range(first, first + NUM_GENERATED)
    drawn = generate.generate_images(model.unet, scheduler, seeds, 100)
    generated = torch.stack([image for _, image in drawn])
    draws = all_draws(augmentation)
    variants = trained.repeat_interleave(len(draws), 0)
    variants = transforms.augment(variants, draws.repeat(len(trained), 1), augmentation)
    extract = extractor(workload)
    nearest = [
        memorization.nearest_neighbors(extract(images), extract(variants))
        for images in (generated, unseen)
    ]
    values["copies"] = memorization.memorization_stats(*nearest).memorised
    if workload.dataset == "digits":
        values["distance"] = metrics.frechet_distance(extract(generated), extract(unseen))
    return {name: round(float(value), 4) for name, value in values.items()}


def extractor(workload: Workload):
    """Return the function from images [N, C, R, R] uint8 to features [N, D] float32."""
    if workload.dataset != "digits":
        return lambda images: images.flatten(1).float()
    folder = str(ROOT / "data" / "digits")
    return features.load_feature_extractor(None, folder, torch.device("cpu")).extract


def to_markdown(results: dict[Key, dict[str, float]], name: str, seeds: Sequence[int]) -> str:
    """Return a table with means and ranges over the seeds, of arms that all seeds have."""
    arms = [arm for arm in ARMS if all((name, arm, seed) in results for seed in seeds)]
    columns = list(results[name, arms[0], seeds[0]])
    rows = [["", *(column.replace("_", " ") for column in columns)], ["---"] * (len(columns) + 1)]
    for arm in arms:
        values = [[results[name, arm, seed][column] for seed in seeds] for column in columns]
        cells = [f"{statistics.fmean(v):.3g} ({min(v):.3g} to {max(v):.3g})" for v in values]
        rows.append([arm, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    tyro.cli(main)
