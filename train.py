"""Train a UNet2DModel with a DDPMScheduler; the result is a DDPMPipeline in --output_dir.

    accelerate launch train.py                                  the digits in data/
    accelerate launch train.py --dataset_name owner/name        a dataset on the Hub
    accelerate launch train.py --help

The same command again resumes an interrupted run. When it has finished: push.py.
"""

import sys
from pathlib import Path

from ddpm import errors
from ddpm.config.parser import explicit_settings, parse_train


def main() -> None:
    config = parse_train(sys.argv[1:])

    # Heavy imports wait until the command line has been checked.
    from ddpm.device import import_diffusers_for_unets

    import_diffusers_for_unets()
    from ddpm.accelerator import make_accelerator
    from ddpm.publishing.background import Publisher
    from ddpm.rank_failure import end_together
    from ddpm.training.dry_run import dry_run
    from ddpm.training.loop import train
    from ddpm.training.pretrained import inherit_settings, load_pretrained
    from ddpm.training.schedule import seconds_since_launch

    accelerator = make_accelerator(
        config.optimization.mixed_precision,
        config.tracking.loggers,
        config.cpu_wait_policy,
        config.ddp_timeout,
    )
    with end_together():
        # A model to fine-tune decides some settings
        pretrained = load_pretrained(config)
        if pretrained is not None:
            config = inherit_settings(config, pretrained, explicit_settings(sys.argv[1:]))
        if config.dry_run:
            dry_run(accelerator, config, pretrained)
            return
        # Check the right to write to the Hub before the first step
        main = accelerator.is_main_process
        publisher = Publisher(Path(config.output_dir), config.hub, main=main)
        train(accelerator, config, publisher, elapsed=seconds_since_launch(), pretrained=pretrained)


if __name__ == "__main__":
    errors.run(main)
