"""Fine-tuning on 100 images compared with training from nothing: distance to the data over steps.

    python benchmarks/fine_tuning.py [--seeds 0 1 2] [--steps 25 50 100 200 400]

A model is trained by the digits' recipe on the digits without two of them. Then it is fine-tuned on
100 images of these two, and another model is trained on the same 100 images from nothing, both with
several learning rates. At each number of steps, images of the averaged weights, by DDIM in 25
steps, are compared in the features of the digits' network with all images of the two digits that no
model was trained on. Each seed is one of the 100 images, of the training and of the noise. Lines of
OUTPUT_DIR/results.jsonl are kept, so the same command goes on after a stop; the table is Markdown.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
import tyro
from accelerate.state import AcceleratorState
from workloads import ROOT

from ddpm.accelerator import make_accelerator
from ddpm.config.parser import explicit_settings, parse_train
from ddpm.diffusion import schedulers
from ddpm.evaluation import features, metrics
from ddpm.publishing.background import Publisher
from ddpm.run_folder import MODEL_INDEX
from ddpm.sampling import generate, pipeline
from ddpm.training import loop
from ddpm.training.pretrained import inherit_settings, load_pretrained

DIGITS = ROOT / "data" / "digits"
FROM_NOTHING = "from nothing"


def main(
    digits: tuple[int, ...] = (8, 9),
    num_images: int = 100,
    steps: tuple[int, ...] = (25, 50, 100, 200, 400),
    learning_rates: tuple[float, ...] = (4e-3, 1e-3, 2e-4),
    rates_from_nothing: tuple[float, ...] = (4e-3, 1e-3),
    seeds: tuple[int, ...] = (0, 1, 2),
    base_steps: int = 1000,
    num_generated: int = 500,
    output_dir: str = "fine-tuning",
) -> None:
    """Print the table."""
    folder = Path(output_dir).absolute()
    rows = [row for split in ("train", "test") for row in datasets.load_dataset(str(DIGITS))[split]]
    chosen = [row["image"] for row in rows if row["label"] in digits]
    others = [row["image"] for row in rows if row["label"] not in digits]
    base = folder / "base"
    if not (base / MODEL_INDEX).exists():
        train(write_images(folder / "others", others), base, 0, base_steps, 4e-3, None)
    path = folder / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    results = {tuple(key): value for key, value in map(json.loads, lines)}
    runs = [(FROM_NOTHING, rate) for rate in rates_from_nothing]
    runs += [("fine-tuned", rate) for rate in learning_rates]
    for seed in seeds:
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed)).tolist()
        data = write_images(folder / f"images-{seed}", [chosen[i] for i in order[:num_images]])
        unseen = pixels([chosen[i] for i in order[num_images:]])
        for name, rate in runs:
            if all((name, rate, seed, step) in results for step in steps):
                continue
            run = folder / f"{name.replace(' ', '-')}-{rate:g}-{seed}"
            model = None if name == FROM_NOTHING else base
            train(data, run, seed, max(steps), rate, model, every=min(steps))
            for step in steps:
                key = (name, rate, seed, step)
                results[key] = distance(run / f"checkpoint-{step}", unseen, seed, num_generated)
                with path.open("a") as file:
                    file.write(json.dumps([key, results[key]]) + "\n")
                print(*key, results[key], flush=True)
    print(f"\n| | learning rate | {' | '.join(f'{step} steps' for step in steps)} |")
    print(f"|---|---|{'---|' * len(steps)}")
    for name, rate in runs:
        columns = [[results[name, rate, seed, step] for seed in seeds] for step in steps]
        cells = [f"{sum(c) / len(c):.3g} ({min(c):.3g} to {max(c):.3g})" for c in columns]
        print(f"| {name} | {rate:g} | {' | '.join(cells)} |")


def write_images(folder: Path, images: Sequence) -> Path:
    """Write images as PNG files into a folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        image.save(folder / f"{index}.png")
    return folder


def pixels(images: Sequence) -> torch.Tensor:
    """Return gray images of one size as [N, 1, H, W] uint8."""
    return torch.stack(
        [torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8) for i in images]
    ).view(len(images), 1, 8, 8)


def train(
    data: Path,
    run: Path,
    seed: int,
    steps: int,
    rate: float,
    model: Path | None,
    every: int = 10**6,
) -> None:
    """Train on a folder of images, from a model or from nothing; a finished run does nothing."""
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = [
        f"--config={ROOT / 'recipes' / 'digits.json'}",
        f"--train_data_dir={data}",
        f"--output_dir={run}",
        f"--seed={seed}",
        f"--max_train_steps={steps}",
        f"--learning_rate={rate}",
        f"--checkpointing_steps={every}",
        *("--checkpoints_total_limit=None", "--train_batch_size=64", "--lr_warmup_steps=20"),
        *("--lr_scheduler=constant_with_warmup", "--save_images_epochs=0", "--save_model_epochs=0"),
        *(
            "--eval_steps=0",
            *([] if model is None else [f"--pretrained_model_name_or_path={model}"]),
        ),
    ]
    config = parse_train(flags)
    pretrained = load_pretrained(config)
    if pretrained is not None:
        config = inherit_settings(config, pretrained, explicit_settings(flags))
    publisher = Publisher(run, config.hub)
    loop.train(make_accelerator("no"), config, publisher, pretrained=pretrained)


def distance(checkpoint: Path, real: torch.Tensor, seed: int, count: int) -> float:
    """Return the Frechet distance of `count` images of a checkpoint to real ones."""
    model = pipeline.load_model(str(checkpoint))
    scheduler = schedulers.build_sampling_scheduler("ddim", model.scheduler_config, 25)
    first = 10**6 * (seed + 1)
    drawn = generate.generate_images(model.unet, scheduler, range(first, first + count), count)
    images = torch.stack([image for _, image in drawn])
    extractor = features.load_feature_extractor(None, str(DIGITS), torch.device("cpu"))
    value = metrics.frechet_distance(extractor.extract(images), extractor.extract(real))
    return round(float(value), 3)


if __name__ == "__main__":
    tyro.cli(main)
