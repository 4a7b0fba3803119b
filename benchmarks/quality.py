"""Quality per minute: a recipe trained for several budgets, each model measured with several seeds.

    python benchmarks/quality.py [--budgets 1m 2m 3m] [--seeds 0 1000 2000] [--output_dir quality]

Each model is trained by `accelerate launch train.py --budget ...` and measured by evaluate.py, as
anybody would; the last one is also measured in one step, which is noise. What is there already is
not made again, so the command goes on where it was stopped. The table gives means and ranges over
the seeds: a single one misleads.
"""

import subprocess
import sys
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ddpm import run_folder  # noqa: E402


def main(
    budgets: tuple[str, ...] = ("1m", "2m", "3m"),
    seeds: tuple[int, ...] = (0, 1000, 2000),
    num_images: int = 1000,
    config: str = "recipes/digits.json",
    scheduler: str = "dpmsolver-sde",
    num_inference_steps: int = 50,
    output_dir: str = "quality",
) -> None:
    """Print what the head of this file names."""
    print(
        f"{'budget':12}{'steps':>8}{'seconds':>9}{'loss':>9}{'Frechet distance':>24}"
        f"{'precision':>11}{'recall':>8}"
    )
    how = [f"--num_images={num_images}", f"--scheduler={scheduler}"]
    for budget in budgets:
        folder = Path(output_dir).absolute() / budget
        train(config, budget, folder)
        measured = [measure(folder, seed, num_inference_steps, how) for seed in seeds]
        show(budget, run_folder.read_record(folder).training, measured)
    noise = [measure(folder, seed, 1, how) for seed in seeds]
    show("in 1 step", None, noise)
    floor = measured[0].get("held_out")
    if floor:
        floor = {"metrics": floor, "as_many_as_held_out": floor}
        show(f"floor, {floor['metrics']['num_images']}", None, [floor])
        same = [{"metrics": each["as_many_as_held_out"]} for each in measured]
        show("as many", None, same)


def train(config: str, budget: str, folder: Path) -> None:
    """A run of its own, unless it is finished."""
    record = folder / run_folder.RECORD
    if record.is_file() and run_folder.read_record(folder).finished:
        return
    words = ["-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "train.py"]
    call([*words, "--config", config, "--budget", budget, "--output_dir", str(folder)])


def measure(folder: Path, seed: int, steps: int, how: list[str]) -> dict:
    """evaluation.json of a model, of the images from `seed` on."""
    place = folder / f"seed-{seed}-steps-{steps}"
    path = place / run_folder.EVALUATION
    if not path.is_file():
        call(
            [
                "evaluate.py",
                str(folder),
                f"--seed={seed}",
                f"--num_inference_steps={steps}",
                *how,
                f"--output_dir={place}",
            ]
        )
    return run_folder.read_json(path)


def call(words: list[str]) -> None:
    """Run a script of the project; what it says goes to stderr."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=sys.stderr, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed")


def show(name: str, training: run_folder.TrainingRecord | None, measured: list[dict]) -> None:
    """A line of the table."""
    values = [
        [each["metrics"].get(key, each["metrics"].get("fid")) for each in measured]
        for key in ("frechet_distance", "precision", "recall")
    ]
    means = [sum(each) / len(each) for each in values]
    ran = (
        f"{training.steps:>8,}{training.seconds:>9.0f}{training.final_loss:>9.4f}"
        if training
        else " " * 26
    )
    distance = f"{means[0]:.3g} ({min(values[0]):.3g} to {max(values[0]):.3g})"
    print(f"{name:12}{ran}{distance:>24}{means[1]:>11.2f}{means[2]:>8.2f}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
