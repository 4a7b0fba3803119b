"""Train a UNet2DModel with a DDPMScheduler; the result is a DDPMPipeline in --output_dir.

    accelerate launch train.py                                  the digits in data/
    accelerate launch train.py --dataset_name owner/name        a dataset on the Hub
    accelerate launch train.py --help

The same command again goes on where it was stopped. When it has finished: push.py.
"""

import sys
from pathlib import Path

from ddpm import errors
from ddpm.commandline import parse_train, take_hub_token
from ddpm.config import PushConfig


def main() -> None:
    sys.argv[1:] = take_hub_token(sys.argv[1:])  # W&B notes the command line
    config = parse_train(sys.argv[1:])

    # Heavy imports wait until the command line is known to be good.
    from ddpm import hub, publishing, runfolder
    from ddpm.budget import seconds_since_launch
    from ddpm.rehearsal import rehearse
    from ddpm.tracking import make_accelerator
    from ddpm.training import train

    accelerator = make_accelerator(config.optimization.mixed_precision, config.tracking)
    if config.dry_run:
        rehearse(accelerator, config)
        return
    folder, publishes = Path(config.output_dir), config.hub.push_to_hub
    if publishes and accelerator.is_main_process:
        repo_id = hub.require_write(config.hub.hub_model_id, runfolder.repo_name(folder))
    train(accelerator, config, spent=seconds_since_launch())
    if publishes and accelerator.is_main_process:
        settings = PushConfig(output_dir=config.output_dir, private=config.hub.hub_private_repo)
        print(publishing.summary(publishing.publish(folder, repo_id, settings)))


if __name__ == "__main__":
    errors.run(main)
