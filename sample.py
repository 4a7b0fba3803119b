"""Generate images with a published model or one in a folder; image k comes from seed --seed + k.

    python sample.py MODEL [--num_images 16] [--seed 0] [--scheduler ddpm] [--revision COMMIT]
    python sample.py MODEL --trajectory | --interpolate 3 7
    python sample.py MODEL --image FILE [--noise_level 0.5 | --mask FILE]
    python sample.py MODEL --class_label NAME|ID|all [--guidance_scale 2.0]
    python sample.py MODEL --prompt "an apple in the outer space"
    python sample.py MODEL --quality good     the sampler that was measured to be worth its time
    python sample.py MODEL --verify           are the images here those of the proof?
    python sample.py --like samples/seed-00003.png
    accelerate launch --num_processes 2 sample.py MODEL --num_images 50000 --parquet

MODEL is an id on the Hub, a folder with a pipeline, or a checkpoint of a run folder.
docs/sampling.md describes every option.
"""

import os
import sys
from pathlib import Path

from ddpm import errors
from ddpm.config.parser import given_flags, parse_sample
from ddpm.config.sample import SampleConfig


def main() -> None:
    config = parse_sample(sys.argv[1:])

    # Heavy imports wait until the command line has been checked.
    from ddpm.device import import_diffusers_for_unets

    if config.prompt is None and config.like is None:  # --like may bring a prompt
        import_diffusers_for_unets()
    if config.verify:
        verify(config)
        return
    from ddpm.sampling import outputs

    if config.like:
        config = outputs.config_from_image(config, given_flags(sys.argv[1:]))
    if config.restores:
        restore(config)
    elif config.like:
        reproduce(config)
    else:
        generate(config)


def generate(config: SampleConfig) -> None:
    """Generate the images that the output folder lacks, then the grid and the collections."""
    from ddpm.sampling import outputs, sampler

    # Load the model and see which images are missing
    rank, world_size = outputs.join_processes()
    model = sampler.load_sampler(config)
    images = outputs.OutputFolder(
        Path(config.output_dir),
        model.metadata,
        sampler.image_seeds(config, model.labels),
        "between" if config.interpolate else "seed",
        rank,
        world_size,
        model.class_names,
    )
    missing = images.missing_seeds(again=config.trajectory)
    say(model.note)
    say(f"{model}: {count(len(images.seeds))}.")

    # Generate and save them, each process its own
    save_with_progress(images, model.generate(missing), len(missing))
    outputs.wait_for_everyone()
    if rank > 0:
        return

    # Collect the images of all processes
    images.require_complete()
    written = images.write_collections(config.npz, config.parquet)
    if config.interpolate:
        written.append(images.write_gif())
    kept = len(images.local_seeds) - len(missing)
    existing = f", {kept} were there already" if kept else ""
    by_process = f" in process 1 of {world_size}" if world_size > 1 else ""
    more = " and on" if len(images.seeds) > 1 else ""
    say(
        f"Drew {count(len(missing))}{by_process}{existing}: {images.path(images.seeds[0])}{more}; "
        f"all together: {', '.join(map(str, written))}"
    )


def save_with_progress(images, generated, total: int) -> None:
    """Save images as they come, with a progress bar on a terminal."""
    from tqdm.auto import tqdm

    hidden = None if images.rank == 0 else True  # None hides the bar unless stderr is a terminal
    for _ in tqdm(images.save(generated), total=total, unit=" images", disable=hidden):
        pass


def reproduce(config: SampleConfig) -> None:
    """--like: generate an image again, and say whether its pixels are the same."""
    from ddpm.sampling import outputs, sampler

    model = sampler.load_sampler(config)
    if is_first_process():
        say(f"{model}.")
        images = outputs.OutputFolder(
            Path(config.output_dir),
            model.metadata,
            sampler.image_seeds(config, model.labels)[:1],
            class_names=model.class_names,
        )
        say(outputs.reproduce_image(Path(config.like), images, model.generate))


def restore(config: SampleConfig) -> None:
    """--image: add noise to an image, remove it again, and say how far off the result is."""
    from ddpm.sampling import inpaint, sampler

    model = sampler.load_unconditional(config)
    results = inpaint.restore_to_folder(
        model.unet, model.scheduler, config, model.metadata, model.guidance
    )
    say(model.note)
    say(inpaint.format_errors(results))
    say(
        f"noisy.png, prediction.png and restored.png are of level {results[0].level:.2f}; all "
        f"levels: {Path(config.output_dir) / 'strip.png'}"
    )


def verify(config: SampleConfig) -> None:
    """--verify: generate the model's proof images here and compare the pixels."""
    from ddpm.device import prepare_device
    from ddpm.sampling import proof

    prepare_device("cpu", config.cpu_wait_policy)
    result = proof.verify_model(config.model, config.revision)
    rounding = "" if result.difference == 0 else f" (rounding explains {proof.TOLERANCE})"
    print(
        f"{result.name} at {result.version[:12]}: {result.num_images} proof images drawn "
        f"again on the CPU; largest difference of a pixel {result.difference} of 255{rounding}."
    )


def count(num_images: int) -> str:
    """1 image, 2 images."""
    return f"{num_images} image{'' if num_images == 1 else 's'}"


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a text, if there is one, on the first process."""
    if text and is_first_process():
        print(text)


if __name__ == "__main__":
    errors.run(main)
