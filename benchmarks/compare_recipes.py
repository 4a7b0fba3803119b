"""Recipes trained for as many seconds on the same cores, in turn, and measured by two rulers.

    python benchmarks/compare_recipes.py --names default batch@64+lr@3e-3 muon@0.02 --seconds 60

The words of a recipe are those of recipes.py. Each model is trained from the digits' recipe, with
the time counted from the first step; then images of each sampling seed, by DDIM in 25 steps, are
compared with the training images in the features of the digits' network and of a second one, of
another shape and seed. Lines of OUTPUT_DIR/results.jsonl are kept, so the same command goes on
after a stop, and with --stop_after begins no model that would end later.
"""

import itertools
import json
import sys
import time
from pathlib import Path

import torch
import tyro
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from workloads import ROOT

sys.path.insert(0, str(ROOT / "data"))

import make_digit_features  # noqa: E402

import recipes  # noqa: E402
from ddpm.accelerator import make_accelerator  # noqa: E402
from ddpm.config.parser import parse_train  # noqa: E402
from ddpm.data import dataset  # noqa: E402
from ddpm.diffusion import schedulers  # noqa: E402
from ddpm.evaluation import features, metrics  # noqa: E402
from ddpm.publishing.background import Publisher  # noqa: E402
from ddpm.run_record import read_record  # noqa: E402
from ddpm.sampling import generate, pipeline  # noqa: E402
from ddpm.training import loop  # noqa: E402

CONFIG = str(ROOT / "recipes" / "digits.json")
SECOND_RULER = {"width": 24, "num_features": 48}
SECONDS_TO_MEASURE = 40


def main(
    names: tuple[str, ...] = ("default",),
    seconds: tuple[int, ...] = (60,),
    training_seeds: tuple[int, ...] = (0, 1, 2),
    sampling_seeds: tuple[int, ...] = (0, 1000, 2000),
    num_images: int = 1000,
    output_dir: str = "compared-recipes",
    stop_after: float = float("inf"),
) -> None:
    """Print a line of JSON for each model."""
    start, folder = time.monotonic(), Path(output_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    done = {tuple(json.loads(line)["run"]) for line in lines}
    for run in itertools.product(training_seeds, seconds, names):
        seed, limit, name = run
        left = stop_after - (time.monotonic() - start)
        if run in done or left < limit + SECONDS_TO_MEASURE:
            continue
        output = folder / f"{name}-{limit}s-{seed}"
        train(name, limit, seed, output)
        training = read_record(output).training
        result = {"run": run, "steps": training.steps, "images_per_s": training.images_per_s}
        result |= measure(output, sampling_seeds, num_images, second_ruler(folder))
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)


def train(name: str, limit: int, seed: int, output_dir: Path) -> None:
    """Train a model for `limit` seconds from here."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with recipes.recipe(name, output_dir.parent / "unets") as flags:
        config = parse_train(
            [
                f"--config={CONFIG}",
                f"--dataset_name={ROOT / 'data' / 'digits'}",
                "--max_train_steps=None",
                f"--budget={limit}s",
                "--save_images_epochs=0",
                "--eval_steps=0",
                "--checkpointing_steps=1000000",
                f"--seed={seed}",
                f"--output_dir={output_dir}",
                *flags,
            ]
        )
        loop.train(make_accelerator("no"), config, Publisher(output_dir, config.hub))


def second_ruler(folder: Path) -> features.FeatureExtractor:
    """Return a feature network of another shape and seed, trained at the first call."""
    path = folder / "second-features.safetensors"
    if not path.exists():
        pixels, labels = make_digit_features.split("train")
        net = make_digit_features.train(
            pixels, labels, make_digit_features.EPOCHS, seed=1, **SECOND_RULER
        )
        save_file(net.state_dict(), path)
    net = features.DigitNet(**SECOND_RULER)
    net.load_state_dict(load_file(path))
    return features.FeatureExtractor(net.eval(), path.name, "", torch.device("cpu"))


def measure(
    run: Path, sampling_seeds: tuple[int, ...], num_images: int, second: features.FeatureExtractor
) -> dict[str, list[float]]:
    """Return the Frechet distances by each ruler, one for each sampling seed."""
    config = parse_train([f"--config={CONFIG}", f"--dataset_name={ROOT / 'data' / 'digits'}"]).data
    trained, model = dataset.load_images(config, False), pipeline.load_model(str(run))
    scheduler = schedulers.build_sampling_scheduler("ddim", model.scheduler_config, 25)
    first = features.load_feature_extractor(None, config.dataset_name, torch.device("cpu"))
    rulers = {"first": first, "second": second}
    pixels = torch.stack([trained.pixels(row) for row in range(len(trained))])
    references = {name: ruler.extract(pixels) for name, ruler in rulers.items()}
    distances: dict[str, list[float]] = {name: [] for name in rulers}
    for seed in sampling_seeds:
        drawn = generate.generate_images(
            model.unet, scheduler, range(seed, seed + num_images), num_images
        )
        images = torch.stack([image for _, image in drawn])
        for name, ruler in rulers.items():
            distance = metrics.frechet_distance(ruler.extract(images), references[name])
            distances[name].append(round(float(distance), 3))
    return distances


if __name__ == "__main__":
    tyro.cli(main)
