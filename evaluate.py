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
from ddpm.config.parser import given_flags, parse_evaluate


def main() -> None:
    config = parse_evaluate(sys.argv[1:])

    # Heavy imports wait until the command line is known to be good.
    from ddpm.accelerator import make_accelerator
    from ddpm.evaluation import compare_ema, compare_samplers, ema_lengths, evaluator, report
    from ddpm.evaluation.features import require_torch_fidelity

    require_torch_fidelity()
    folder = evaluator.require_output_dir(config)
    config = evaluator.complete_config(config, given_flags(sys.argv[1:]))
    basis = ema_lengths.require_posthoc_run(config) if config.ema_lengths is not None else None
    accelerator = make_accelerator(None)
    opened = evaluator.open_evaluator(accelerator, config)
    accelerator.print(str(opened))

    # Samplers against each other, for sample.py --quality
    if config.samplers is not None:
        made = compare_samplers.compare_samplers(opened, folder)
        accelerator.print(compare_samplers.format_sampler_table(made))
        accelerator.print(compare_samplers.next_step(opened, folder))
        accelerator.end_training()
        return

    # Draw, compare, look for copies, denoise, keep
    looked, lengths_tried = report.extract_features(opened), None
    if basis is not None:  # what is exported there is measured below
        opened, looked, lengths_tried = compare_ema.run_comparison(opened, looked, basis, folder)
    found = report.compute_metrics(opened, looked)
    copies = report.measure_memorization(opened, looked, folder)
    found["metrics"]["memorised"] = copies.pop("memorised")
    found["memorisation"] = copies
    levels = report.measure_timestep_loss(opened)
    if levels is not None:
        found["loss_by_band"] = levels
        report.plot_timestep_loss(opened, levels, folder)
    if lengths_tried is not None:
        found["ema_lengths"] = lengths_tried
    path = report.write_evaluation(opened, found, folder)

    accelerator.print(report.format_metrics(found))
    accelerator.print(report.format_memorization({**found["metrics"], **copies}))
    if levels is not None:
        accelerator.print(report.format_timestep_loss(levels))
    accelerator.print(f"Measured: {path}")
    accelerator.end_training()


if __name__ == "__main__":
    errors.run(main)
