"""Speed of the training loop against its limit, and against diffusers' unconditional example.

    python benchmarks/training.py [--peer train_unconditional.py] [--sizes 8 32 64]
        [--mixed_precision bf16] [--device cuda] [--turns 6] [--seconds 4]

Four programs train the same UNet on the same images in the same batches: train.py as the README
launches it, bare.py (the limit), the example with as many threads as ours, and the example as its
own README launches it. Previews, checkpoints, exports and TensorBoard are on in all but bare.py.
The example's file is unchanged: probe.py starts all four and times their steps by torch's hooks.

They take turns: all but one are suspended with SIGSTOP, so that other work on the machine slows all
of them. Only steps that lie within a turn count, without the periodic work in them (preview,
checkpoint, export), which has its own table. A ratio is that of the means of one round; the result
is the median of the rounds, with the lowest and highest. Start-up is timed alone, also in turn.

--device cuda uses the presets for 32, 64 and 128 pixels, and adds model FLOPs utilization.
"""

import hashlib
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import tyro
from flops import peak_tflops, training_flops
from program import LAUNCH, PROBE, Program, killed_at_the_end, machine, spread
from tables import to_markdown
from workloads import ROOT, SIZES, Size, write_workload


def main(
    peer: Path | None = None,
    sizes: tuple[str, ...] = (),
    mixed_precision: Literal["no", "bf16"] = "no",
    turns: int = 6,
    seconds: float = 4.0,
    starts: int = 3,
    device: Literal["cpu", "cuda"] = "cpu",
    compile: Literal["on", "off"] = "off",
    output: Path = Path("benchmark-training"),
) -> None:
    """Measure, print each time as it comes and a table, and write OUTPUT.json and OUTPUT.md.

    `starts` is how often start-up is timed, at the first size. `compile` is the flag of train.py;
    with "on" train.py is timed compiled and not compiled.
    """
    sizes = sizes or (
        ("8", "32", "64") if device == "cpu" else ("preset-32", "preset-64", "preset-128")
    )
    peak = peak_tflops(device)
    results: dict[str, Any] = {
        "machine": machine(device),
        "command": " ".join(["python", "benchmarks/training.py", *sys.argv[1:]]),
        "precision": mixed_precision,
        "peer_sha256": hashlib.sha256(peer.read_bytes()).hexdigest() if peer else None,
        "sizes": {},
    }
    for name in sizes:
        size = SIZES[name]
        print(f"{name}:", flush=True)
        with tempfile.TemporaryDirectory(prefix="ddpm-benchmark-") as scratch:
            programs = prepare(size, Path(scratch), peer, mixed_precision, device, compile)
            result = compare(programs, turns, seconds, starts if name == sizes[0] else 0)
        gflop = training_flops(size.unet_config(), size.batch_size) / size.batch_size / 1e9
        result |= {"model": asdict(size), "gflop_an_image": gflop}
        if peak and mixed_precision == "bf16":
            rates = result["images_per_s"].items()
            result["mfu"] = {program: rate * gflop / 1e3 / peak for program, rate in rates}
        results["sizes"][name] = result
        output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        output.with_suffix(".md").write_text(to_markdown(results))
    print(to_markdown(results))


def prepare(
    size: Size, scratch: Path, peer: Path | None, precision: str, device: str, compile: str
) -> list[Program]:
    """Write the workload of a size, and return its programs."""
    flags = [
        *write_workload(size, scratch),
        f"--train_batch_size={size.batch_size}",
        "--center_crop",
        "--random_flip",
        f"--mixed_precision={precision}",
        "--eval_batch_size=16",
        "--ddpm_num_inference_steps=25",
        "--checkpointing_steps=50",
        "--checkpoints_total_limit=2",
        "--save_images_epochs=1",
        "--save_model_epochs=1",
        "--logger=tensorboard",
        "--num_epochs=1000000",
    ]
    stride = 1 if device == "cpu" else 10
    cores = len(os.sched_getaffinity(0))
    launch = [
        *LAUNCH,
        "--num_processes=1",
        "--num_machines=1",
        "--dynamo_backend=no",
        f"--mixed_precision={precision}",
    ]

    def program(name: str, script: list[str], threads: int | None) -> Program:
        notes = scratch / name.replace(" ", "-")
        return Program(
            name,
            [*launch, PROBE, str(notes), *script],
            notes,
            size.batch_size * stride,
            threads,
            stride=stride,
            device=device,
        )

    out = f"--output_dir={scratch}"
    ours = [str(ROOT / "train.py"), *flags, "--channels=3"]
    bare = [
        str(ROOT / "benchmarks" / "bare.py"),
        str(scratch / "model"),
        str(size.batch_size),
        f"--mixed_precision={precision}",
        f"--device={device}",
    ]
    programs = [
        program("ours", [*ours, f"--compile={compile}", f"{out}/out-ours"], None),
        program("bare", bare, cores),
    ]
    if compile == "on":
        plain = [*ours, "--compile=off", f"{out}/out-plain"]
        programs.append(program("ours not compiled", plain, None))
    if peer:
        example = [str(peer.resolve()), *flags, "--use_ema"]
        programs.append(program("example", [*example, f"{out}/out-example"], cores))
        if device == "cpu":
            launched = [*example, f"{out}/out-launched"]
            programs.append(program("example as launched", launched, None))
    return programs


def compare(programs: list[Program], turns: int, seconds: float, starts: int) -> dict[str, Any]:
    """Time the start-up and then the turns of programs that do the same work."""
    first_step: dict[str, list[float]] = {program.name: [] for program in programs}
    means: dict[str, list[float]] = {program.name: [] for program in programs}
    with killed_at_the_end(*programs):
        for index in range(starts + 1):
            for program in programs:
                elapsed = program.start()
                print(f"  {program.name}: first step after {elapsed:.1f} s", flush=True)
                if index:  # the first start fills the caches of all
                    first_step[program.name].append(elapsed)
                program.suspend() if index == starts else program.kill()
        for _ in range(turns):
            for program in programs:
                mean = statistics.fmean(program.turn(seconds)) / program.images
                print(f"  {program.name}: {1 / mean:.1f} images/s", flush=True)
                means[program.name].append(mean)
        return {
            "images_per_s": {name: 1 / statistics.median(own) for name, own in means.items()},
            "ratios": {
                name: spread([b / a for a, b in zip(means["ours"], other, strict=True)])
                for name, other in means.items()
                if name != "ours"
            },
            "seconds_to_first_step": {n: spread(v) for n, v in first_step.items() if v},
            "peak_memory_mib": {p.name: round(p.peak_memory_mib()) for p in programs},
            "fractions": {p.name: p.fractions() for p in programs},
            "periodic": {
                p.name: {n: [len(v), statistics.median(v)] for n, v in p.periodic.items()}
                for p in programs
            },
        }


if __name__ == "__main__":
    tyro.cli(main)
