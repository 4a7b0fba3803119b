"""Measure how good a model is, against the images that it was trained on.

    accelerate launch evaluate.py MODEL [--num_images 1000] [--scheduler ddim] [--seed 0]
    accelerate launch evaluate.py owner/name --dataset_name owner/data --features FILE

MODEL is a run folder of train.py, or what sample.py takes. The numbers go to evaluation.json in the
run folder, from which push.py puts them on the card. docs/evaluation.md says what each one means.
"""

import sys

from ddpm import errors
from ddpm.commandline import parse_evaluate


def main() -> None:
    config = parse_evaluate(sys.argv[1:])

    # Heavy imports wait until the command line is known to be good.
    from ddpm import evaluation
    from ddpm.config import TrackingConfig
    from ddpm.features import library
    from ddpm.tracking import make_accelerator

    library()
    folder = evaluation.require_place(config)
    config = evaluation.complete(config, sys.argv[1:])
    accelerator = make_accelerator(None, TrackingConfig())
    exam = evaluation.open_exam(accelerator, config)
    accelerator.print(str(exam))

    # Draw, compare, keep
    found = evaluation.measure(exam)
    path = evaluation.save(exam, found, folder)

    accelerator.print(evaluation.table(found))
    accelerator.print(f"Measured: {path}")
    accelerator.end_training()


if __name__ == "__main__":
    errors.run(main)
