"""Quality by seconds of training: recipes, and diffusers' example, in a race on the same cores.

    python benchmarks/quality.py [--data digits] [--recipes default ...]
        [--peer train_unconditional.py] [--seconds 30 60 120 180] [--training_seeds 0 1 2]
        [--sampling_seeds 0 1000 2000] [--samplers dpmsolver-sde:50 ddim:25] [--output_dir quality]

DATA is digits or emoji-16: the data and settings of that file in recipes/. Everything trains on
them, one model after the other, for as many seconds from the end of its first step to the end of
its last, each time as a training of its own, since the learning rate ends with the time. The words
of a recipe are those of recipes.py; peer.py runs the example, on digits.

Then images of each sampler and sampling seed are compared with the training images in the features
of the data's network ("first") and of one of another shape and seed ("second"). That is not timed:
--only train and --only measure do one of the two. OUTPUT_DIR/results.jsonl keeps what is done, so
the same command goes on after a stop. table.md gives means and ranges over all seeds, and
quality.png draws them.
"""

import functools
import itertools
import json
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest.mock import patch

import torch
import tyro
from accelerate.state import AcceleratorState
from torch.optim.optimizer import register_optimizer_step_post_hook
from workloads import ROOT

sys.path.insert(0, str(ROOT / "data"))

import make_features  # noqa: E402
import peer as example  # noqa: E402

import recipes as words  # noqa: E402
from ddpm.accelerator import make_accelerator  # noqa: E402
from ddpm.config.parser import parse_train  # noqa: E402
from ddpm.config.values import parse_sampler_choice  # noqa: E402
from ddpm.data import dataset  # noqa: E402
from ddpm.diffusion import schedulers  # noqa: E402
from ddpm.evaluation import features, metrics, plots  # noqa: E402
from ddpm.file_io import read_json  # noqa: E402
from ddpm.publishing.background import Publisher  # noqa: E402
from ddpm.run_record import read_record  # noqa: E402
from ddpm.sampling import generate, pipeline  # noqa: E402
from ddpm.training import loop, schedule  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXAMPLE = "diffusers-example"
HELD_OUT, REAL = "held-out images", "training images"
SECOND_NETWORK = {"width": 24, "num_features": 48}
SECONDS_AROUND = 30
"""Time before the first step of a training and after its last, for --stop_after."""
FILE = "results.jsonl"
FOLDERS = {"digits": ROOT / "data" / "digits", "emoji-16": ROOT / "data" / "emoji"}
"""The folder of the images of each recipe that can be measured."""
Run = tuple[str, int, int]
"""Recipe, seconds and training seed."""
Results = dict[tuple, dict[str, float]]
"""The facts of a training by its Run; the distance in each network's features by (*Run, sampler,
sampling seed, number of images) or, for real images, by (kind, number)."""
Distances = dict[tuple, dict[tuple[str, str], list[float]]]
"""The distances of all seeds by (recipe, seconds), or (kind, number), and (sampler, network)."""


@dataclass(frozen=True)
class Race:
    """The recipe of recipes/ that all trainings change, and the folder of the results."""

    data: str
    folder: Path

    @property
    def file(self) -> Path:
        return ROOT / "recipes" / f"{self.data}.json"

    def unet_config(self) -> dict[str, Any] | None:
        """Return the config of the recipe's own UNet, or None for a preset."""
        own = read_json(self.file).get("model_config_name_or_path")
        return read_json(ROOT / own / "config.json") if own else None


def main(
    recipes: tuple[str, ...] = ("default",),
    seconds: tuple[int, ...] = (30, 60, 120, 180),
    training_seeds: tuple[int, ...] = (0, 1, 2),
    sampling_seeds: tuple[int, ...] = (0, 1000, 2000),
    samplers: tuple[str, ...] = ("dpmsolver-sde:50", "ddim:25"),
    peer: Path | None = None,
    num_images: int = 1000,
    output_dir: str = "quality",
    data: Literal["digits", "emoji-16"] = "digits",
    only: Literal["train", "measure"] | None = None,
    stop_after: float = float("inf"),
) -> None:
    """Train, measure, and print the table of everything in OUTPUT_DIR.

    `stop_after` seconds from the start no measurement begins, and before that no training that
    would end later.
    """
    if peer and data != "digits":
        sys.exit("--peer trains on digits: leave out --data or --peer.")
    race = Race(data, Path(output_dir).absolute())
    folder = race.folder
    folder.mkdir(parents=True, exist_ok=True)
    results = read_results(folder)
    deadline = time.monotonic() + stop_after
    names = [*recipes, *([EXAMPLE] if peer else [])]
    runs = [(name, limit, seed) for seed in training_seeds for limit in seconds for name in names]
    if only != "measure":
        for run in runs:
            if run not in results and time.monotonic() + run[1] + SECONDS_AROUND <= deadline:
                add_result(results, folder, run, train(run, race, peer, results))
    if only != "train":
        measure_real(results, race, num_images)
        trained = [run for run in runs if run in results]
        for key in itertools.product(trained, samplers, sampling_seeds, [num_images]):
            run, *sampling = key
            if (*run, *sampling) not in results and time.monotonic() < deadline:
                images = sample(model_folder(folder, run), *sampling)
                add_result(results, folder, (*run, *sampling), measure(images, race))
    table = to_markdown(results, num_images)
    (folder / "table.md").write_text(table)
    plots.save(draw(results, num_images), folder / "quality.png")
    print(table)


def read_results(folder: Path) -> Results:
    """Return what earlier runs of this command have added to results.jsonl."""
    path = folder / FILE
    lines = path.read_text().splitlines() if path.exists() else []
    return {tuple(key): values for key, values in map(json.loads, lines)}


def add_result(results: Results, folder: Path, key: tuple, values: dict[str, float]) -> None:
    with (folder / FILE).open("a") as file:
        file.write(json.dumps([key, values]) + "\n")
    results[key] = values
    print(*key, values, flush=True)


def model_folder(folder: Path, run: Run) -> Path:
    return folder / "{}-{}s-{}".format(*run)


def train(run: Run, race: Race, peer: Path | None, results: Results) -> dict[str, float]:
    """Train a model in its folder; return its steps, seconds and images per second."""
    name, limit, seed = run
    output_dir = model_folder(race.folder, run)
    shutil.rmtree(output_dir, ignore_errors=True)  # of a training that was stopped
    if name == EXAMPLE:
        wanted = round(limit * example_speed(peer, race.folder, results))
        steps, seconds = example.train(peer, wanted, seed, output_dir)
        batch_size = example.BATCH_SIZE
    else:
        seconds = train_recipe(run, race, output_dir)
        training = read_record(output_dir).training
        steps, batch_size = training.steps, training.images_seen / training.steps
    if steps == 1:
        sys.exit(f"{name} took a single step within {limit} s: give more --seconds.")
    rate = (steps - 1) * batch_size / seconds
    return {"steps": steps, "seconds": round(seconds, 2), "images_per_s": round(rate, 1)}


def example_speed(peer: Path, folder: Path, results: Results) -> float:
    """Return the steps per second of the example's last training, or else of a short one."""
    for key in reversed(results):
        if key[0] == EXAMPLE and len(key) == 3:
            return results[key]["images_per_s"] / example.BATCH_SIZE
    steps = example.CALIBRATION_EPOCHS * example.STEPS_PER_EPOCH
    steps, seconds = example.train(peer, steps, 0, folder / "calibration")
    return (steps - 1) / seconds


def train_recipe(run: Run, race: Race, output_dir: Path) -> float:
    """Train a recipe for its seconds from the start of its first step.

    Return the seconds from the end of the first step to that of the last.
    """
    name, limit, seed = run
    AcceleratorState._reset_state(reset_partial_state=True)
    unets = race.folder / "unets"
    with words.recipe(name, unets, race.unet_config()) as flags, all_time_for_steps() as times:
        config = parse_train(
            [
                f"--config={race.file}",
                f"--dataset_name={FOLDERS[race.data]}",
                "--max_train_steps=None",
                f"--budget={limit}s",
                "--save_images_epochs=0",
                "--save_model_epochs=0",
                "--eval_steps=0",
                "--checkpointing_steps=1000000",
                f"--seed={seed}",
                f"--output_dir={output_dir}",
                *flags,
            ]
        )
        loop.train(make_accelerator("no"), config, Publisher(output_dir, config.hub))
    return times[-1] - times[0]


@contextmanager
def all_time_for_steps() -> Iterator[list[float]]:
    """Keep no time of a budget for the work at the end; yield a list of the times of all steps."""
    times: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: times.append(time.monotonic()))
    try:
        with (
            patch.object(schedule, "EXIT_SECONDS", 0.0),
            patch.object(loop, "_final_work", lambda *_: {}),
        ):
            yield times
    finally:
        hook.remove()


def measure_real(results: Results, race: Race, num_images: int) -> None:
    """Add the distances of the held-out images and of as many training images as are generated."""
    pixels, held_out = real_images(race)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    for name, images in ((HELD_OUT, held_out), (REAL, pixels[order[:num_images]])):
        if (name, len(images)) not in results:
            add_result(results, race.folder, (name, len(images)), measure(images, race))


@functools.cache
def real_images(race: Race) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images that are trained on, and the held-out ones: [N, C, R, R] uint8."""
    flags = [f"--config={race.file}", f"--dataset_name={FOLDERS[race.data]}"]
    config = parse_train([*flags, "--model_config_name_or_path=None"]).data
    images = [dataset.load_images(replace(config, split=name), False) for name in ("train", "test")]
    trained, held_out = (torch.stack([*map(part.pixels, range(len(part)))]) for part in images)
    return trained, held_out


def sample(model: Path, sampler: str, seed: int, num_images: int) -> torch.Tensor:
    """Return images [N, C, R, R] uint8 of a trained model, from the seeds `seed`, `seed` + 1..."""
    loaded, (name, steps) = pipeline.load_model(str(model)), parse_sampler_choice(sampler)
    scheduler = schedulers.build_sampling_scheduler(name, loaded.scheduler_config, steps)
    seeds = range(seed, seed + num_images)
    images = generate.generate_images(loaded.unet, scheduler, seeds, num_images)
    return torch.stack([image for _, image in images])


def measure(images: torch.Tensor, race: Race) -> dict[str, float]:
    """Return the Frechet distance of images [N, C, R, R] uint8 to the data, by network."""
    return {
        name: round(metrics.frechet_distance(network.extract(images), reference), 3)
        for name, (network, reference) in feature_networks(race).items()
    }


@functools.cache
def feature_networks(race: Race) -> dict[str, tuple[features.FeatureExtractor, torch.Tensor]]:
    """Return the data's feature network and one of another shape and seed, each with its features
    of the training images. The second is trained at the first call and kept in the folder."""
    folder = FOLDERS[race.data]
    path = race.folder / "second-features.safetensors"
    if not path.exists():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the same weights in every race on this machine
        make_features.main(folder.name, path, seed=1, **SECOND_NETWORK)
        torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    extractors = {
        "first": features.load_feature_extractor(None, str(folder), cpu),
        "second": features.load_feature_extractor(str(path), None, cpu),
    }
    reference = real_images(race)[0]
    return {name: (network, network.extract(reference)) for name, network in extractors.items()}


def trainings_by_recipe(results: Results) -> dict[tuple, list[dict[str, float]]]:
    """Return the facts of the trainings of all seeds by (recipe, seconds)."""
    trainings = defaultdict(list)
    for key in [key for key in results if len(key) == 3]:
        trainings[key[:2]].append(results[key])
    return trainings


def collect_distances(results: Results, num_images: int) -> Distances:
    """Return the distances of `num_images` images of each model, and those of real images, which
    are the same for all samplers."""
    distances: Distances = defaultdict(lambda: defaultdict(list))
    for key in [key for key in results if len(key) == 6 and key[-1] == num_images]:
        for network, distance in results[key].items():
            distances[key[:2]][key[3], network].append(distance)
    columns = columns_of(distances)
    for key in [key for key in results if len(key) == 2]:
        distances[key] = {
            (sampler, network): [results[key][network]] for sampler, network in columns
        }
    return distances


def columns_of(distances: Distances) -> list[tuple[str, str]]:
    return sorted({column for by_column in distances.values() for column in by_column})


def to_markdown(results: Results, num_images: int) -> str:
    """Return a table with means and ranges over the seeds."""
    distances, trainings = collect_distances(results, num_images), trainings_by_recipe(results)
    columns = columns_of(distances)
    heads = ["recipe", "seconds", "steps", "images/s", *map(", ".join, columns)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for key in [*sorted(trainings), *(key for key in distances if key not in trainings)]:
        facts = [
            spread([training[name] for training in trainings.get(key, [])])
            for name in ("seconds", "steps", "images_per_s")
        ]
        name = key[0] if key in trainings else f"{key[0]}, {key[1]:,} images"
        cells = [spread(distances[key].get(column, [])) for column in columns]
        lines.append(f"| {' | '.join([name, *facts, *cells])} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Return "mean (lowest to highest)", or the number if there is one, or nothing."""
    if not values:
        return ""
    low, mean, high = (
        f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        for value in (min(values), statistics.fmean(values), max(values))
    )
    return mean if low == high else f"{mean} ({low} to {high})"


def draw(results: Results, num_images: int) -> "Figure | None":
    """Plot distance over seconds, a panel for each sampler and network. None without distances."""
    from matplotlib.figure import Figure

    distances, trainings = collect_distances(results, num_images), trainings_by_recipe(results)
    columns = columns_of(distances)
    if not columns:
        return None
    rows = len({sampler for sampler, _ in columns})
    size = (4 * len(columns) / rows + 1, 3 * rows + 1)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(rows, len(columns) // rows, squeeze=False, sharex=True)
    for axes, column in zip(panels.flat, columns, strict=True):
        axes.set_title("{}, {} feature network".format(*column))
        for recipe in dict.fromkeys(name for name, _ in trainings):
            draw_line(axes, recipe, column, distances, trainings)
        for key in distances:
            if key[0] == HELD_OUT:
                axes.axhline(*distances[key][column], color="0.5", linestyle="--", label=HELD_OUT)
        limits = sorted({limit for _, limit in trainings})
        axes.set_xscale("log")
        axes.set_xticks(limits, map(str, limits))
        axes.set_xticks([], minor=True)
        plots.set_log_scale(axes, "y")
    figure.supxlabel("seconds of training")
    figure.supylabel("Frechet distance (lower is better)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def draw_line(
    axes: "Axes",
    recipe: str,
    column: tuple[str, str],
    distances: Distances,
    trainings: dict[tuple, list[dict[str, float]]],
) -> None:
    """Draw a line through the means of a recipe, with the range shaded."""
    keys = sorted(key for key in trainings if key[0] == recipe and distances[key].get(column))
    seconds = [statistics.fmean(run["seconds"] for run in trainings[key]) for key in keys]
    values = [distances[key][column] for key in keys]
    (line,) = axes.plot(seconds, [*map(statistics.fmean, values)], "o-", label=recipe)
    low, high = [*map(min, values)], [*map(max, values)]
    axes.fill_between(seconds, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


if __name__ == "__main__":
    tyro.cli(main)
