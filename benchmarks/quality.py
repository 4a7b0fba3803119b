"""Quality per minute: a recipe trained with several budgets, evaluated with several seeds.

    python benchmarks/quality.py [--budgets 1m 2m 3m] [--seeds 0 1000 2000] [--output_dir quality]

Each model is trained by `accelerate launch train.py --budget ...` and evaluated by evaluate.py; the
last one also with one sampling step, which gives noise. Finished runs and evaluations are kept, so
the same command continues after a stop. The table gives means and ranges over the seeds.
"""

import subprocess
import sys
from pathlib import Path

import tyro
from program import LAUNCH
from workloads import ROOT

from ddpm import file_io, run_folder, run_record


def main(
    budgets: tuple[str, ...] = ("1m", "2m", "3m"),
    seeds: tuple[int, ...] = (0, 1000, 2000),
    num_images: int = 1000,
    config: str = "recipes/digits.json",
    scheduler: str = "dpmsolver-sde",
    num_inference_steps: int = 50,
    output_dir: str = "quality",
) -> None:
    """Print a table of budgets."""
    print(
        f"{'budget':12}{'steps':>8}{'seconds':>9}{'loss':>9}{'Frechet distance':>24}"
        f"{'precision':>11}{'recall':>8}"
    )
    flags = [f"--num_images={num_images}", f"--scheduler={scheduler}"]
    for budget in budgets:
        folder = Path(output_dir).absolute() / budget
        train(config, budget, folder)
        measured = [measure(folder, seed, num_inference_steps, flags) for seed in seeds]
        show(budget, run_record.read_record(folder).training, measured)
    noise = [measure(folder, seed, 1, flags) for seed in seeds]
    show("in 1 step", None, noise)
    floor = measured[0].get("held_out")
    if floor:
        floor = {"metrics": floor, "as_many_as_held_out": floor}
        show(f"floor, {floor['metrics']['num_images']}", None, [floor])
        same = [{"metrics": result["as_many_as_held_out"]} for result in measured]
        show("as many", None, same)


def train(config: str, budget: str, folder: Path) -> None:
    """Train, unless the run is finished."""
    record = folder / run_folder.RECORD
    if record.is_file() and run_record.read_record(folder).finished:
        return
    flags = ["--config", config, "--budget", budget, "--output_dir", str(folder)]
    call([*LAUNCH, "--quiet", "train.py", *flags])


def measure(folder: Path, seed: int, steps: int, flags: list[str]) -> dict:
    """Return the evaluation.json of a model, with seeds from `seed` on."""
    output_dir = folder / f"seed-{seed}-steps-{steps}"
    path = output_dir / run_folder.EVALUATION
    if not path.is_file():
        call(
            [
                sys.executable,
                "evaluate.py",
                str(folder),
                f"--seed={seed}",
                f"--num_inference_steps={steps}",
                *flags,
                f"--output_dir={output_dir}",
            ]
        )
    return file_io.read_json(path)


def call(command: list[str]) -> None:
    """Run a script of the project; its output goes to stderr."""
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed")


def show(name: str, training: run_record.TrainingRecord | None, measured: list[dict]) -> None:
    """Print a row of the table."""
    values = [
        [result["metrics"].get(key, result["metrics"].get("fid")) for result in measured]
        for key in ("frechet_distance", "precision", "recall")
    ]
    means = [sum(column) / len(column) for column in values]
    cells = (
        f"{training.steps:>8,}{training.seconds:>9.0f}{training.final_loss:>9.4f}"
        if training
        else " " * 26
    )
    distance = f"{means[0]:.3g} ({min(values[0]):.3g} to {max(values[0]):.3g})"
    print(f"{name:12}{cells}{distance:>24}{means[1]:>11.2f}{means[2]:>8.2f}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
