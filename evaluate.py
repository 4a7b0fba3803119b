"""Measure how good a model is, against the images that it was trained on.

    accelerate launch evaluate.py MODEL [--num_images 1000] [--scheduler ddpm] [--seed 0]
    accelerate launch evaluate.py owner/name --dataset_name owner/data --features FILE
    accelerate launch evaluate.py MODEL --samplers      which sampler is worth its steps?
    accelerate launch evaluate.py MODEL --ema_lengths 0.02,0.05,0.10,0.15 [--export_best]
    accelerate launch evaluate.py MODEL --guidance_scales 0,1,1.5,2,4     of a model with classes

MODEL is a run folder of train.py, or what sample.py takes. The numbers go to evaluation.json in the
run folder, from which push.py puts them on the card. docs/evaluation.md says what each one means.
"""

import sys
from dataclasses import replace

from ddpm import errors
from ddpm.config.parser import given_flags, parse_evaluate


def main() -> None:
    config = parse_evaluate(sys.argv[1:])

    # Heavy imports wait until the command line has been checked.
    from ddpm.device import import_diffusers_for_unets

    import_diffusers_for_unets()
    from ddpm.accelerator import make_accelerator
    from ddpm.evaluation import compare_ema, compare_guidance, compare_samplers, report
    from ddpm.evaluation.evaluator import complete_config, open_evaluator, require_output_dir
    from ddpm.evaluation.features import require_torch_fidelity
    from ddpm.rank_failure import end_together

    require_torch_fidelity()
    folder = require_output_dir(config)
    config = complete_config(config, given_flags(sys.argv[1:]))
    posthoc_ema = compare_ema.require_posthoc_ema(config) if config.ema_lengths else None
    accelerator = make_accelerator(None, cpu_wait_policy=config.cpu_wait_policy)
    with end_together():
        evaluator = open_evaluator(accelerator, config)
        accelerator.print(str(evaluator))

        # Compare samplers, for sample.py --quality
        if config.samplers is not None:
            table = compare_samplers.compare_samplers(evaluator, folder)
            accelerator.print(compare_samplers.format_sampler_table(table))
            accelerator.print(compare_samplers.next_step(evaluator, folder))
            accelerator.end_training()
            return

        # Generate images and extract their features
        extracted, ema_lengths, guidance = report.extract_features(evaluator), None, None

        # Compare EMA lengths; what is exported here is evaluated below
        if posthoc_ema is not None:
            evaluator, extracted, ema_lengths = compare_ema.run_comparison(
                evaluator, extracted, posthoc_ema, folder
            )

        # Compare guidance scales, for sample.py --quality
        if config.scales:
            guidance = compare_guidance.compare_guidance_scales(evaluator, extracted, folder)
            accelerator.print(compare_guidance.format_guidance(guidance))

        # Compute metrics, memorization and loss by timestep
        evaluation = report.evaluate(evaluator, extracted, folder)
        evaluation = replace(evaluation, ema_lengths=ema_lengths, guidance=guidance)
        path = report.write_evaluation(evaluator, evaluation, folder)
        accelerator.print(report.format_evaluation(evaluation))
        accelerator.print(f"Measured: {path}")
        accelerator.end_training()


if __name__ == "__main__":
    errors.run(main)
