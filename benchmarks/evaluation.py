"""Measuring images against torch-fidelity's own command: the same PNGs, network and numbers.

    python benchmarks/evaluation.py ddpm-digits [--num_images 1000] [--rounds 3]
    python benchmarks/evaluation.py ddpm-digits --network inception --num_images 64

MODEL is a run folder of the digits. First: the share of evaluate.py's time that drawing, features
and distances take. Then its images and as many of the data are laid into two folders of PNGs, and
ours (decode, features, distances, by the rooms of evaluate.py) and theirs (the `fidelity` command)
are timed from there in turn, each in a process of its own without a cache, so that what else the
machine does meets both. Their distances must agree.

The digits' feature network is made known to their command as any other is, by a function of their
library. `inception` is their Inception v3 with random weights: its time, not its numbers.
"""

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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
NETWORK = ROOT / "data" / "digits" / "features.safetensors"
SAME = 1e-3
"""Relative difference of two Frechet distances of the same images: decoding and summing alone."""

BEGIN = """
import sys, time
sys.path.insert(0, {root!r})
import torch
import torch_fidelity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
network, kind, drawn, real = sys.argv[1:5]
"""
OURS = """
from pathlib import Path
from ddpm.config.train import DataConfig
from ddpm.data import dataset
from ddpm.evaluation import evaluator, features, metrics
began = time.perf_counter()
if kind == "inception":
    net = FeatureExtractorInceptionV3("i", ["2048"], feature_extractor_weights_path=network)
    net = features.FeatureExtractor(net, "Inception", "random", torch.device("cpu"))
else:
    net = features.load_feature_extractor(network, None, torch.device("cpu"))
sets = []
for folder in (drawn, real):
    data = DataConfig(train_data_dir=folder, resolution={side}, channels={channels})
    found = dataset.load_images(data, False)[0]
    rows = range(len(found))
    sets.append(net.of_batches(
        torch.stack([evaluator.dataset_image(found, row) for row in rows[start : start + {batch_size}]])
        for start in range(0, len(found), {batch_size})))
result = metrics.distances(*sets)
print(time.perf_counter() - began, result.frechet)
"""
THEIRS = """
import json, io, contextlib
from torch_fidelity import fidelity
from ddpm.evaluation import features
class Digits(torch_fidelity.FeatureExtractorBase):
    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)
        self.network = features.load_digit_net(__import__("pathlib").Path(network))
        self.requires_grad_(False)
    @staticmethod
    def get_provided_features_list():
        return ("64",)
    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "64"
    @staticmethod
    def can_be_compiled():
        return False
    def forward(self, pixels):
        return (self.network(pixels),)
torch_fidelity.register_feature_extractor("digits", Digits)
chosen = (["--feature-extractor", "digits"] if kind == "digits" else
          ["--feature-extractor-weights-path", network])
sys.argv = ["fidelity", "--cpu", "--fid", "--kid", "--prc", "--json", "--silent", "--no-cache",
            "--samples-find-ext", "png", "--kid-subset-size", "{subset}",
            "--batch-size", "{batch_size}", "--input1", drawn, "--input2", real, *chosen]
began = time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()) as said:
    fidelity.main()
seconds = time.perf_counter() - began
print(seconds, json.loads(said.getvalue())["frechet_inception_distance"])
"""


def main(
    model: tyro.conf.Positional[str],
    num_images: int = 1000,
    rounds: int = 3,
    network: Literal["digits", "inception"] = "digits",
    batch_size: int = 64,
    num_inference_steps: int = 10,
) -> None:
    """Print what the head of this file names."""
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {network}, {num_images} "
        f"images against {num_images}, batch {batch_size}, {rounds} rounds in turn"
    )
    with tempfile.TemporaryDirectory() as scratch:
        exam = open_model(model, num_images, num_inference_steps, batch_size)
        shares(exam, num_inference_steps, num_images)
        folders = write_images(exam, num_inference_steps, num_images, Path(scratch))
        weights = random_inception(Path(scratch)) if network == "inception" else NETWORK
        fill = {
            "root": str(ROOT),
            "side": exam.artifact.unet.config.sample_size,
            "subset": min(1000, num_images // 2),
            "channels": exam.artifact.unet.config.in_channels,
            "batch_size": batch_size,
        }
        compare(fill, [str(weights), network, *map(str, folders)], rounds, num_images)


def compare(fill: dict, words: list[str], rounds: int, num_images: int) -> None:
    """Seconds of both in turn: of the whole process, and of the work after its imports."""
    whole: dict[str, list[float]] = {"ours": [], "theirs": []}
    work: dict[str, list[float]] = {"ours": [], "theirs": []}
    distances = {}
    for _ in range(rounds):
        for name, code in (("ours", OURS), ("theirs", THEIRS)):
            began = time.perf_counter()
            seconds, distances[name] = run((BEGIN + code).format(**fill), words)
            whole[name].append(time.perf_counter() - began)
            work[name].append(seconds)
    apart = abs(distances["ours"] / distances["theirs"] - 1)
    assert apart < SAME, f"other distances: {distances}"
    print(f"the same distance but for {apart:.1e}: {distances['ours']:.4f}")
    for what, taken in (("work", work), ("whole process", whole)):
        ratios = [theirs / ours for ours, theirs in zip(*taken.values(), strict=True)]
        mine, other = (statistics.median(times) for times in taken.values())
        print(
            f"{what}: ours {mine:.2f} s, theirs {other:.2f} s; {statistics.median(ratios):.2f} "
            f"times their speed ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"{2 * num_images / mine:.0f} images/s"
        )


def run(code: str, words: list[str]) -> tuple[float, float]:
    """The two numbers that a program prints last; it has an empty cache."""
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
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


def open_model(model: str, num_images: int, steps: int, batch_size: int):
    """An exam of the model, with at most `num_images` of the data."""
    from ddpm.accelerator import make_accelerator
    from ddpm.config.parser import given_flags, parse_evaluate
    from ddpm.evaluation import evaluator

    argv = [
        model,
        f"--num_images={num_images}",
        f"--num_inference_steps={steps}",
        f"--batch_size={batch_size}",
        f"--split=train[:{num_images}]",
    ]
    config = evaluator.complete_config(parse_evaluate(argv), given_flags(argv))
    opened = evaluator.open_evaluator(make_accelerator(None), config)
    if len(opened.trained) < num_images:
        raise SystemExit(f"The data have {len(opened.trained)} images: lower --num_images.")
    return replace(opened, held_out=None)


def shares(exam, steps: int, num_images: int) -> None:
    """Where evaluate.py's time goes, by its own functions in this process."""
    from ddpm.evaluation import compare_samplers, evaluator, metrics

    watch, began = compare_samplers.Stopwatch(exam.config.batch_size), time.perf_counter()
    scheduler = replace(exam.scheduler, num_inference_steps=steps)
    drawn = evaluator.generated_features(exam, scheduler, num_images, watch.through)
    looked = time.perf_counter()
    real = evaluator.split_features(exam, exam.trained)
    seen = time.perf_counter()
    metrics.distances(drawn, real)
    end = time.perf_counter()
    drawing = sum(watch.waits)
    parts = {
        f"drawing ({exam.scheduler_name}, {steps} steps)": drawing,
        "features of the drawn": looked - began - drawing,
        "decoded rows and their features": seen - looked,
        "distances": end - seen,
    }
    print(
        json.dumps(
            {
                name: f"{seconds:.2f} s, {seconds / (end - began):.1%}"
                for name, seconds in parts.items()
            },
            indent=2,
        )
    )


def write_images(exam, steps: int, num_images: int, scratch: Path) -> list[Path]:
    """The drawn and the real images as two folders of PNGs."""
    from ddpm.evaluation import evaluator
    from ddpm.sampling import generate, image_io

    folders = [scratch / "drawn", scratch / "real"]
    for folder in folders:
        folder.mkdir()
    scheduler = replace(exam.scheduler, num_inference_steps=steps)
    drawn = generate.generate_images(
        exam.artifact.unet, scheduler, range(num_images), exam.config.batch_size
    )
    for number, image in drawn:
        image_io.save_png(image, folders[0] / f"{number:05d}.png", {})
    for row in range(num_images):
        image_io.save_png(
            evaluator.real_image(exam.trained, row), folders[1] / f"{row:05d}.png", {}
        )
    return folders


def random_inception(scratch: Path) -> Path:
    """torch-fidelity's Inception v3 without its weights: what its constructor makes of none."""
    from torch_fidelity import feature_extractor_inceptionv3 as room

    class Untrained(room.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            return None

    path = scratch / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    network = Untrained("inception", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(network.state_dict(), path)
    return path


if __name__ == "__main__":
    tyro.cli(main)
