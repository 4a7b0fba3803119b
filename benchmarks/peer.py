"""diffusers' unconditional example as a competitor of quality.py, trained with its README's recipe.

The script is unchanged: probe.py starts it, seeds torch and notes its steps. It has no time limit,
so a number of epochs is chosen that takes about as long as wanted. Its UNet is the preset of 8
pixels with three channels, since it turns every image into RGB and its own UNet has six levels. The
README's --random_flip is left out: digits have a direction.
"""

import math
import sys
from pathlib import Path

from program import LAUNCH, PROBE, Program, killed_at_the_end
from workloads import ROOT, Size, write_workload

from ddpm.cpu_threads import usable_cores

NUM_IMAGES, BATCH_SIZE = 1437, 16
STEPS_PER_EPOCH = math.ceil(NUM_IMAGES / BATCH_SIZE)
CALIBRATION_EPOCHS = 2
UNET = Size(8, BATCH_SIZE, num_images=0)
FLAGS = [
    f"--train_batch_size={BATCH_SIZE}",
    "--learning_rate=1e-4",
    "--lr_warmup_steps=500",
    "--use_ema",
    # It previews and saves after the first epoch and the last: the least that its flags allow
    "--save_images_epochs=1000000",
    "--save_model_epochs=1000000",
    "--checkpointing_steps=1000000",
    "--ddpm_num_inference_steps=1",
    "--eval_batch_size=1",
]


def train(script: Path, steps: int, seed: int, output_dir: Path) -> tuple[int, float]:
    """Train for about `steps` steps and write the EMA pipeline to `output_dir`.

    Return the number of steps, and the seconds from the end of the first to that of the last,
    without previews and saves.
    """
    workload, notes = output_dir.parent / "example", output_dir.parent / "notes" / output_dir.name
    if not workload.exists():
        workload.mkdir()
        write_workload(UNET, workload)
    command = [
        *LAUNCH,
        "--num_processes=1",
        "--num_machines=1",
        "--dynamo_backend=no",
        "--mixed_precision=no",
        *(PROBE, str(notes), str(script.resolve()), *FLAGS),
        f"--dataset_name={ROOT / 'data' / 'digits'}",
        "--resolution=8",
        f"--model_config_name_or_path={workload / 'model'}",
        f"--num_epochs={max(1, round(steps / STEPS_PER_EPOCH))}",
        f"--output_dir={output_dir}",
    ]
    program = Program(
        "the example",
        command,
        notes,
        BATCH_SIZE * STEPS_PER_EPOCH,
        usable_cores(),
        stride=STEPS_PER_EPOCH,
        seed=seed,
    )
    with killed_at_the_end(program):
        program.start()
        if program.process.wait():
            sys.exit(f"{program.name} failed: see {notes / 'output.txt'}")
    epochs = [note for note in program.read() if "time" in note][1:]  # the first is of its start
    seconds = sum(program.step_times(epochs))
    return STEPS_PER_EPOCH * (len(epochs) - 1), seconds
