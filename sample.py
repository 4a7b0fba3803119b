"""Draw images with a published model, or one in a folder; every image has its own seed.

    python sample.py MODEL [--num_images 16] [--seed 0] [--scheduler ddpm] [--revision COMMIT]
    python sample.py MODEL --trajectory | --interpolate 3 7
    python sample.py MODEL --image FILE [--noise_level 0.5 | --mask FILE]
    python sample.py MODEL --prompt "an apple in the outer space"
    python sample.py MODEL --quality good     by the sampler that was measured to be worth its time
    python sample.py MODEL --verify           does it draw here what was drawn where it was made?
    python sample.py --like samples/seed-00003.png
    accelerate launch --num_processes 2 sample.py MODEL --num_images 50000 --parquet

MODEL is an id on the Hub, a folder with a pipeline, or a checkpoint of a run folder. Image k comes
from seed --seed + k. docs/sampling.md says what each option does.
"""

import os
import sys
from pathlib import Path

from ddpm import errors
from ddpm.config.commands import SampleConfig
from ddpm.config.parser import given_flags, parse_sample


def main() -> None:
    config = parse_sample(sys.argv[1:])
    if config.verify:
        verify(config)
        return

    # Heavy imports wait until the command line is known to be good.
    from ddpm.sampling import outputs, sampler

    if config.like:
        config = outputs.with_settings_of_image(config, given_flags(sys.argv[1:]))
    if config.quality:
        config, why = sampler.choose_scheduler(config)
        say(why)
    if config.restores:
        restore(config)
        return

    # Who draws, and what is there already
    painter = sampler.open_sampler(config)
    rank, world = outputs.rank_and_world_size()
    if config.like:
        if rank == 0:
            say(f"{painter}.")
            say(outputs.reproduce_image(config, painter.origin, painter.draw))
        return
    numbers = (
        range(config.num_images)
        if config.interpolate
        else range(config.seed, config.seed + config.num_images)
    )
    images = outputs.OutputFolder(
        Path(config.output_dir),
        painter.origin,
        numbers,
        "between" if config.interpolate else "seed",
        rank,
        world,
    )
    left = outputs.missing_seeds(images, again=config.trajectory)
    say(painter.remark)
    say(f"{painter}: {config.num_images} image{'s' * (config.num_images != 1)}.")

    # Draw what is missing
    draw(painter, images, left)
    if rank > 0:
        return
    outputs.wait_for_other_processes(images)
    made = outputs.write_collections(images, config.npz, config.parquet)
    if config.interpolate:
        made.append(outputs.write_gif(images))

    kept = len(images.share) - len(left)
    there = f", {kept} were there already" if kept else ""
    on = " and on" if len(numbers) > 1 else ""
    drew = f"Drew {len(left)} image{'s' * (len(left) != 1)}{there}"
    say(f"{drew}: {images.path(numbers[0])}{on}; all together: {', '.join(map(str, made))}")


def draw(painter, images, left: list[int]) -> None:
    """Draw the images that are left, with a bar on a terminal."""
    from tqdm.auto import tqdm

    from ddpm.sampling import outputs

    drawn = outputs.save_images(images, painter.draw(left))
    hidden = None if images.rank == 0 else True
    for _ in tqdm(drawn, total=len(left), unit=" images", disable=hidden):
        pass


def restore(config: SampleConfig) -> None:
    """--image: add noise to a picture, take it away again, say how far off the result is."""
    from ddpm.sampling import sampler

    studio = sampler.open_model(config)
    restored = sampler.restore_to_files(studio, config)
    say(sampler.format_errors(studio, config, restored))
    say(
        f"noisy.png, prediction.png and restored.png are of level {restored[0].level:.2f}; every "
        f"level: {Path(config.output_dir) / 'strip.png'}"
    )


def say(words: str) -> None:
    """Print, unless there is nothing to say or this is not the first process."""
    if words and os.environ.get("RANK", "0") == "0":
        print(words)


def verify(config: SampleConfig) -> None:
    """--verify: draw the model's proof images here, and say how far their pixels are off."""
    from ddpm.sampling import proof

    verdict = proof.verify_model(config.model, config.revision)
    rounding = "" if verdict.difference == 0 else f" (rounding explains {proof.TOLERANCE})"
    print(
        f"{verdict.name} at {verdict.version[:12]}: {verdict.num_images} proof images drawn "
        f"again on the CPU; largest difference of a pixel {verdict.difference} of 255{rounding}."
    )


if __name__ == "__main__":
    errors.run(main)
