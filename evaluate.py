"""Measure how good a model is, against the images that it was trained on.

    accelerate launch evaluate.py MODEL [--num_images 1000] [--scheduler ddpm] [--seed 0]
    accelerate launch evaluate.py owner/name --dataset_name owner/data --features FILE
    accelerate launch evaluate.py MODEL --samplers      which sampler is worth its steps?
    accelerate launch evaluate.py RUN --ema_lengths 0.02,0.05,0.10,0.15 [--export_best]

MODEL is a run folder of train.py, or what sample.py takes. The numbers go to evaluation.json in the
run folder, from which push.py puts them on the card. docs/evaluation.md says what each one means.
"""

import sys

from ddpm import errors
from ddpm.commandline import parse_evaluate


def main() -> None:
    config = parse_evaluate(sys.argv[1:])

    # Heavy imports wait until the command line is known to be good.
    from ddpm import contest, evaluation, exam, lengths, scoring
    from ddpm.config import TrackingConfig
    from ddpm.features import library
    from ddpm.tracking import make_accelerator

    library()
    folder = exam.require_place(config)
    config = exam.complete(config, sys.argv[1:])
    basis = lengths.require_run(config) if config.ema_lengths is not None else None
    accelerator = make_accelerator(None, TrackingConfig())
    opened = exam.open_exam(accelerator, config)
    accelerator.print(str(opened))

    # Samplers against each other, for sample.py --quality
    if config.samplers is not None:
        made = scoring.score(opened, folder)
        accelerator.print(scoring.table(made))
        accelerator.print(scoring.advice(opened, folder))
        accelerator.end_training()
        return

    # Draw, compare, look for copies, denoise, keep
    looked, lengths_tried = evaluation.look(opened), None
    if basis is not None:  # what is exported there is measured below
        opened, looked, lengths_tried = contest.settle(opened, looked, basis, folder)
    found = evaluation.compare(opened, looked)
    copies = evaluation.find_copies(opened, looked, folder)
    found["metrics"]["memorised"] = copies.pop("memorised")
    found["memorisation"] = copies
    levels = evaluation.noise_levels(opened)
    if levels is not None:
        found["loss_by_band"] = levels
        evaluation.draw_levels(opened, levels, folder)
    if lengths_tried is not None:
        found["ema_lengths"] = lengths_tried
    path = evaluation.save(opened, found, folder)

    accelerator.print(evaluation.table(found))
    accelerator.print(evaluation.remark({**found["metrics"], **copies}))
    if levels is not None:
        accelerator.print(evaluation.levels_table(levels))
    accelerator.print(f"Measured: {path}")
    accelerator.end_training()


if __name__ == "__main__":
    errors.run(main)
