"""CPU seconds from a command to its first step or image, next to those of bare imports.

    python benchmarks/startup.py MODEL [--peer train_unconditional.py] [--before OTHER_CHECKOUT]

MODEL is a folder with an unconditional pipeline. The seconds are those of all threads and processes
of a command, in user and system mode: unlike seconds of a clock, other programs change them little.
Commands run in turn; the first turn, which fills the caches, does not count.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro
from program import LAUNCH
from sampling import START
from workloads import ROOT, SIZES, write_workload

FIRST_STEP = """
import os, runpy, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(0))
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
IMPORTS = (
    "import torch",
    "import torch._dynamo",
    "from diffusers import DDPMPipeline",
    "import datasets",
    "from accelerate import Accelerator",
)


def main(
    model: tyro.conf.Positional[str],
    peer: Path | None = None,
    before: Path | None = None,
    rounds: int = 5,
) -> None:
    """Print a table: median, lowest and highest."""
    checkouts = {"": ROOT, **({" before": before} if before else {})}
    with tempfile.TemporaryDirectory() as scratch:
        commands = list_commands(model, peer, checkouts, Path(scratch))
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for index in range(rounds + 1):
            for name, command in commands.items():
                used = cpu_seconds(command)
                shutil.rmtree(Path(scratch) / "samples", ignore_errors=True)
                if index:
                    seconds[name].append(used)
    print("| command | CPU seconds |\n|---|---|")
    for name, values in seconds.items():
        low, high = min(values), max(values)
        print(f"| {name} | {statistics.median(values):.1f} ({low:.1f} to {high:.1f}) |")


def list_commands(
    model: str, peer: Path | None, checkouts: dict[str, Path], scratch: Path
) -> dict[str, list[str]]:
    """Return the commands by their names."""
    probe = scratch / "first_step.py"
    probe.write_text(FIRST_STEP)
    launch = [*LAUNCH, "--num_processes=1", "--num_machines=1", "--dynamo_backend=no"]
    launch += ["--mixed_precision=no", str(probe)]
    flags = [*write_workload(SIZES["8"], scratch), "--train_batch_size=64"]
    flags += ["--logger=tensorboard", f"--output_dir={scratch / 'run'}", "--overwrite_output_dir"]
    sample = [model, "--num_images=1", "--num_inference_steps=1"]
    commands = {}
    for name, root in checkouts.items():
        train = [str(root / "train.py"), *flags, "--channels=3"]
        commands[f"`accelerate launch train.py`{name}"] = [*launch, *train]
        commands[f"`python train.py`{name}"] = [sys.executable, str(probe), *train]
        commands[f"`sample.py`{name}"] = [
            *(sys.executable, str(root / "sample.py"), *sample),
            f"--output_dir={scratch / 'samples'}",
        ]
    if peer:
        commands["the example by `accelerate launch`"] = [*launch, str(peer.resolve()), *flags]
    stock = [sys.executable, "-c", START, model, str(scratch / "a.png")]
    commands["an image of `DDPMPipeline`"] = stock
    return commands | {f"`{line}`": [sys.executable, "-c", line] for line in IMPORTS}


def cpu_seconds(command: list[str]) -> float:
    """Run a command, and return the CPU seconds of it and its children."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed:\n{errors.decode()}")
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    tyro.cli(main)
