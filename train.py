"""Train a UNet2DModel with a DDPMScheduler; the result is a DDPMPipeline in --output_dir.

    accelerate launch train.py                                  the digits in data/
    accelerate launch train.py --dataset_name owner/name        a dataset on the Hub
    accelerate launch train.py --help

The same command again goes on where it was stopped. When it has finished: push.py.
"""

import sys

from ddpm import errors
from ddpm.commandline import parse_train


def main() -> None:
    config = parse_train(sys.argv[1:])

    # Heavy imports wait until the command line is known to be good.
    from ddpm.tracking import make_accelerator
    from ddpm.training import train

    train(make_accelerator(config.optimization.mixed_precision, config.tracking), config)


if __name__ == "__main__":
    errors.run(main)
