"""Evaluation against torch-fidelity's own command: the same PNGs, network and metrics.

    python benchmarks/evaluation.py ddpm-digits [--num_images 1000] [--rounds 3]
    python benchmarks/evaluation.py ddpm-digits --network inception --num_images 64

MODEL is a run folder of the digits. First, the fractions of evaluate.py's time that sampling,
features and distances take. Then its images and as many of the dataset are written to two folders
of PNGs, and ours (decode, features, distances) and theirs (the `fidelity` command) are timed on
them in turn, each in its own process without a cache. Their distances must agree.

`inception` is torch-fidelity's Inception v3 with random weights: for the time, not the distances.
"""

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from workloads import ROOT

NETWORK = ROOT / "data" / "digits" / "features.safetensors"
TOLERANCE = 1e-3
"""Relative difference of two Frechet distances of the same images, from decoding and summing."""


def main(
    model: tyro.conf.Positional[str],
    num_images: int = 1000,
    rounds: int = 3,
    network: Literal["digits", "inception"] = "digits",
    batch_size: int = 64,
    num_inference_steps: int = 10,
) -> None:
    """Print fractions, distances and times."""
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {network}, {num_images} "
        f"images against {num_images}, batch {batch_size}, {rounds} rounds in turn"
    )
    with tempfile.TemporaryDirectory() as scratch:
        evaluator = open_model(model, num_images, num_inference_steps, batch_size)
        print_fractions(evaluator)
        folders = write_images(evaluator, Path(scratch))
        weights = random_inception(Path(scratch)) if network == "inception" else NETWORK
        unet = evaluator.model.unet.config
        options = {
            "network": network,
            "weights": str(weights),
            "folders": [str(folder) for folder in folders],
            "side": unet.sample_size,
            "channels": unet.in_channels,
            "batch_size": batch_size,
            "subset": min(1000, num_images // 2),
        }
        compare(options, rounds, num_images)


def compare(options: dict, rounds: int, num_images: int) -> None:
    """Time both in turn: the process, and the work after its imports."""
    process_seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    work_seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    distances = {}
    for _ in range(rounds):
        for name in ("ours", "theirs"):
            started = time.perf_counter()
            seconds, distances[name] = run(name, options)
            process_seconds[name].append(time.perf_counter() - started)
            work_seconds[name].append(seconds)
    difference = abs(distances["ours"] / distances["theirs"] - 1)
    assert difference < TOLERANCE, f"different distances: {distances}"
    print(f"the same distance up to {difference:.1e}: {distances['ours']:.4f}")
    for label, times in (("work", work_seconds), ("process", process_seconds)):
        ratios = [theirs / ours for ours, theirs in zip(*times.values(), strict=True)]
        ours, theirs = (statistics.median(values) for values in times.values())
        print(
            f"{label}: ours {ours:.2f} s, theirs {theirs:.2f} s; {statistics.median(ratios):.2f} "
            f"times their speed ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"{2 * num_images / ours:.0f} images/s"
        )


def run(name: str, options: dict) -> tuple[float, float]:
    """Measure in a new process with an empty cache: seconds of the work, and the distance."""
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [sys.executable, __file__, "--measure", name, json.dumps(options)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HOME": home, "ENV_TORCH_HOME": home},
            check=False,
        )
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds, distance = done.stdout.split()[-2:]
    return float(seconds), float(distance)


def measure(name: str, options: str) -> None:
    """Print the seconds of ours or theirs, and the Frechet distance."""
    print(*(ours if name == "ours" else theirs)(json.loads(options)))


def ours(options: dict) -> tuple[float, float]:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from ddpm.config.data import DataConfig
    from ddpm.data import dataset
    from ddpm.evaluation import features, metrics

    started, weights, cpu = time.perf_counter(), options["weights"], torch.device("cpu")
    if options["network"] == "inception":
        inception = FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=weights
        )
        extractor = features.FeatureExtractor(inception, "Inception", "random", cpu)
    else:
        extractor = features.load_feature_extractor(weights, None, cpu)
    sets = []
    for folder in options["folders"]:
        config = DataConfig(
            train_data_dir=folder, resolution=options["side"], channels=options["channels"]
        )
        images = dataset.load_images(config, show_progress=False)
        pixels = (features.dataset_image(images, row) for row in range(len(images)))
        sets.append(
            torch.cat([extractor.extract(b) for b in batches(pixels, options["batch_size"])])
        )
    distance = metrics.distances(*sets).frechet
    return time.perf_counter() - started, distance


def batches(images, size: int):
    batch = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def theirs(options: dict) -> tuple[float, float]:
    from fidelity import register_digits
    from torch_fidelity import fidelity

    from ddpm.evaluation import features

    if options["network"] == "digits":
        register_digits(features.load_small_classifier(Path(options["weights"])))
        chosen = ["--feature-extractor", "digits"]
    else:
        chosen = ["--feature-extractor-weights-path", options["weights"]]
    first, second = options["folders"]
    flags = "--cpu --fid --kid --prc --json --silent --no-cache --samples-find-ext png"
    sys.argv = [
        "fidelity",
        *flags.split(),
        f"--kid-subset-size={options['subset']}",
        f"--batch-size={options['batch_size']}",
        "--input1",
        first,
        "--input2",
        second,
        *chosen,
    ]
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        fidelity.main()
    distance = json.loads(output.getvalue())["frechet_inception_distance"]
    return time.perf_counter() - started, distance


def open_model(model: str, num_images: int, steps: int, batch_size: int):
    """Return an evaluator of the model, with at most `num_images` of the dataset."""
    from ddpm.accelerator import make_accelerator
    from ddpm.config.parser import given_flags, parse_evaluate
    from ddpm.evaluation.evaluator import complete_config, open_evaluator

    argv = [
        model,
        f"--num_images={num_images}",
        f"--num_inference_steps={steps}",
        f"--batch_size={batch_size}",
        f"--split=train[:{num_images}]",
    ]
    config = complete_config(parse_evaluate(argv), given_flags(argv))
    evaluator = open_evaluator(make_accelerator(None), config)
    if len(evaluator.trained) < num_images:
        raise SystemExit(f"The dataset has {len(evaluator.trained)} images: lower --num_images.")
    return replace(evaluator, held_out=None)


def print_fractions(evaluator) -> None:
    """Print how evaluate.py's time divides, by its own functions in this process."""
    from ddpm.evaluation import compare_samplers, metrics

    stopwatch, start = compare_samplers.Stopwatch(evaluator.config.batch_size), time.perf_counter()
    generated = evaluator.generated_features(stopwatch.measure)
    after_generated = time.perf_counter()
    real = evaluator.dataset_features(evaluator.trained)
    after_real = time.perf_counter()
    metrics.distances(generated, real)
    end = time.perf_counter()
    sampling, steps = sum(stopwatch.waits), evaluator.scheduler.num_inference_steps
    parts = {
        f"sampling ({evaluator.scheduler_name}, {steps} steps)": sampling,
        "features of the generated images": after_generated - start - sampling,
        "decoding and features of the dataset": after_real - after_generated,
        "distances": end - after_real,
    }
    for name, seconds in parts.items():
        print(f"{name}: {seconds:.2f} s, {seconds / (end - start):.1%}")


def write_images(evaluator, scratch: Path) -> list[Path]:
    """Write the generated and the real images to two folders of PNGs."""
    from ddpm.evaluation import features
    from ddpm.sampling import generate, image_io

    folders = [scratch / "generated", scratch / "real"]
    for folder in folders:
        folder.mkdir()
    config, unet = evaluator.config, evaluator.model.unet
    generated = generate.generate_images(
        unet, evaluator.scheduler, range(config.num_images), config.batch_size
    )
    for number, image in generated:
        image_io.save_png(image, folders[0] / f"{number:05d}.png", {})
    for row in range(config.num_images):
        image = features.dataset_image(evaluator.trained, row)
        image_io.save_png(image, folders[1] / f"{row:05d}.png", {})
    return folders


def random_inception(scratch: Path) -> Path:
    """Save torch-fidelity's Inception v3 with the random weights of its constructor."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            return None

    path = scratch / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    network = Untrained("inception", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(network.state_dict(), path)
    return path


if __name__ == "__main__":
    measure(*sys.argv[2:]) if sys.argv[1:2] == ["--measure"] else tyro.cli(main)
