"""Train a UNet2DModel with a DDPMScheduler; the result is a DDPMPipeline in --output_dir.

    accelerate launch train.py                                  the digits in data/
    accelerate launch train.py --dataset_name owner/name        a dataset on the Hub
    accelerate launch train.py --help

The same command again goes on where it was stopped. When it has finished: push.py.
"""

import sys
from pathlib import Path

from ddpm import errors
from ddpm.config.parser import parse_train, take_hub_token


def main() -> None:
    sys.argv[1:] = take_hub_token(sys.argv[1:])  # W&B notes the command line
    config = parse_train(sys.argv[1:])

    # Heavy imports wait until the command line is known to be good. Where these are installed,
    # diffusers would load them for models and schedulers that are not trained here.
    hidden = [name for name in ("transformers", "scipy", "torchvision") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    from ddpm.accelerator import make_accelerator
    from ddpm.publishing.background import Publisher
    from ddpm.training.dry_run import dry_run
    from ddpm.training.loop import train
    from ddpm.training.schedule import seconds_since_launch

    for name in hidden:
        del sys.modules[name]
    accelerator = make_accelerator(
        config.optimization.mixed_precision, config.tracking.logger, config.tracking.logging_dir
    )
    if config.dry_run:
        dry_run(accelerator, config)
        return
    # Check the right to write to the Hub before the first step
    publisher = Publisher(Path(config.output_dir), config.hub, main=accelerator.is_main_process)
    train(accelerator, config, publisher, spent=seconds_since_launch())


if __name__ == "__main__":
    errors.run(main)
