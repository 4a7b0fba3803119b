"""Make the pictures of docs/diffusion.md from a finished digits run, with the project's own code.

    accelerate launch train.py && accelerate launch train.py --config recipes/digits-classes.json
    python docs/make_note_pictures.py ddpm-digits ddpm-digits-classes

Writes forward, unet, schedules, score, trajectory, restored and loss-by-noise .png to docs/images,
and guidance.png of the second run.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from diffusers import DDIMScheduler, DDPMScheduler  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from ddpm.config.data import DataConfig  # noqa: E402
from ddpm.config.train import DiffusionConfig  # noqa: E402
from ddpm.data import dataset, transforms  # noqa: E402
from ddpm.diffusion import objective, schedulers, unet  # noqa: E402
from ddpm.sampling import generate, image_io, pipeline  # noqa: E402
from ddpm.sampling.guidance import ClassGuidance  # noqa: E402

FOLDER = ROOT / "docs" / "images"
SCHEDULES = {"linear": "#1f77b4", "scaled_linear": "#2ca02c", "squaredcos_cap_v2": "#d62728"}
INK, PALE, CELL = "#222222", "#dddddd", 80
TRAJECTORY_SEED = 20
"""A seed whose digit is easy to read at 8x8 pixels."""
GUIDANCE_SCALES = (0.0, 1.0, 2.0, 4.0)
LEVELS = (0, 100, 200, 300, 400, 500, 600, 700, 800, 999)


def main() -> None:
    torch.manual_seed(0)
    artifact = pipeline.load_model(sys.argv[1])
    scheduler = DDPMScheduler.from_config(artifact.scheduler_config)
    config = DataConfig(dataset_name=str(ROOT / "data" / "digits"), resolution=8, split="test")
    held_out = dataset.load_images(config, show_progress=False)
    clean = transforms.to_model(torch.stack([held_out.pixels(row) for row in range(len(held_out))]))
    FOLDER.mkdir(exist_ok=True)
    forward(clean[2:3]).save(FOLDER / "forward.png", optimize=True)
    unet_levels().save(FOLDER / "unet.png", optimize=True)
    schedules().save(FOLDER / "schedules.png", optimize=True)
    score().save(FOLDER / "score.png", optimize=True)
    trajectory(artifact).save(FOLDER / "trajectory.png", optimize=True)
    restored(artifact, scheduler, clean[2:3]).save(FOLDER / "restored.png", optimize=True)
    loss_by_noise(artifact, scheduler, clean).save(FOLDER / "loss-by-noise.png", optimize=True)
    classes = pipeline.load_model(sys.argv[2], conditional=True)
    guidance_scales(classes).save(FOLDER / "guidance.png", optimize=True)


def alphas_of(schedule: str) -> torch.Tensor:
    """alpha-bar of a schedule of 1000 steps, as train.py makes it: [1000] float32."""
    return unet.build_scheduler(DiffusionConfig(ddpm_beta_schedule=schedule)).alphas_cumprod


def forward(digit: torch.Tensor) -> Image.Image:
    """One digit and one noise at ten noise levels, for two schedules."""
    steps = torch.tensor(LEVELS)
    noise = torch.randn(digit.shape, generator=torch.Generator().manual_seed(0))
    many, same_noise = digit.repeat(len(steps), 1, 1, 1), noise.repeat(len(steps), 1, 1, 1)
    rows = {
        name: objective.add_noise(alphas_of(name), many, same_noise, steps)
        for name in ("linear", "squaredcos_cap_v2")
    }
    return table({name: list(row) for name, row in rows.items()}, [f"t = {t}" for t in LEVELS])


def unet_levels(resolution: int = 32) -> Image.Image:
    """The UNet of a preset: its levels with the shapes of a forward pass, skips and attention."""
    config = unet.preset_config(resolution, 3)
    network = unet.empty_unet(config, "preset")
    shapes: dict[torch.nn.Module, torch.Size] = {}
    blocks = [*network.down_blocks, network.mid_block, *network.up_blocks]
    for block in blocks:
        block.resnets[-1].register_forward_hook(
            lambda resnet, _, output: shapes.update({resnet: output.shape})
        )
    network(
        torch.zeros(1, 3, resolution, resolution, device="meta"), torch.zeros((), device="meta")
    )

    levels = len(config["block_out_channels"])
    width, row, box = 960, 92, (220, 58)
    sheet = Image.new("RGB", (width, 74 + levels * row + box[1] + 14), "white")
    draw = ImageDraw.Draw(sheet)

    def draw_block(block: torch.nn.Module, left: int, top: int) -> None:
        _, channels, height, _ = shapes[block.resnets[-1]]
        has_attention = bool(getattr(block, "attentions", None))
        draw.rectangle(
            (left, top, left + box[0], top + box[1]), "#fff1d6" if has_attention else "#eef3f8", INK
        )
        middle = left + box[0] // 2
        text(sheet, (middle, top + 8), f"{height} x {height}, {channels} channels", anchor="ma")
        parts = f"{len(block.resnets)} residual blocks" + (", attention" * has_attention)
        text(sheet, (middle, top + 32), parts, size=13, anchor="ma")

    def arrow(start: tuple[int, int], end: tuple[int, int], colour: str = INK) -> None:
        """A horizontal or vertical line with a head."""
        draw.line([start, end], colour, 2)
        x, y = end
        if start[1] == y:
            draw.polygon([(x, y), (x - 9, y - 5), (x - 9, y + 5)], colour)
        else:
            back = 9 if start[1] > y else -9
            draw.polygon([(x, y), (x - 5, y + back), (x + 5, y + back)], colour)

    embedding = network.time_embedding.linear_2.out_features
    line = f"timestep t -> {embedding} numbers, which every residual block receives"
    text(sheet, (width // 2, 8), line, "#2ca02c", anchor="ma")
    for level in range(levels):
        left, top = 20 + 55 * level, 74 + level * row
        right = width - left - box[0]
        draw_block(network.down_blocks[level], left, top)
        draw_block(network.up_blocks[levels - 1 - level], right, top)
        arrow((left + box[0] + 6, top + 29), (right - 6, top + 29), "#1f77b4")
        skips = len(network.up_blocks[levels - 1 - level].resnets)
        text(sheet, (width // 2, top + 8), f"{skips} skips", "#1f77b4", anchor="ma")
        if level + 1 < levels:
            down, up = left + box[0] - 40, right + 40
            arrow((down, top + box[1] + 2), (down, top + row - 2))
            text(sheet, (down - 8, top + box[1] + 9), "half the size", size=13, anchor="ra")
            arrow((up, top + row - 2), (up, top + box[1] + 2))
            text(sheet, (up + 8, top + box[1] + 9), "twice the size", size=13)
    text(sheet, (20 + box[0] // 2, 32), "noisy picture x_t", anchor="ma")
    arrow((20 + box[0] // 2, 52), (20 + box[0] // 2, 72))
    text(sheet, (width - 20 - box[0] // 2, 32), "prediction", anchor="ma")
    arrow((width - 20 - box[0] // 2, 72), (width - 20 - box[0] // 2, 52))
    left, top = (width - box[0]) // 2, 74 + levels * row
    draw_block(network.mid_block, left, top)
    edges = (20 + 55 * (levels - 1) + 110, width - 20 - 55 * (levels - 1) - 110)
    draw.line([(edges[0], top - row + box[1]), (edges[0], top + 29)], INK, 2)
    arrow((edges[0], top + 29), (left - 4, top + 29))
    draw.line([(left + box[0], top + 29), (edges[1], top + 29)], INK, 2)
    arrow((edges[1], top + 29), (edges[1], top - row + box[1] + 2))
    return sheet


def schedules() -> Image.Image:
    """sqrt(alpha-bar) and the SNR of the three schedules, over t."""
    steps = torch.arange(1000)
    signal = {name: alphas_of(name).sqrt().tolist() for name in SCHEDULES}
    ratio = {
        name: objective.compute_snr(alphas_of(name), steps).clamp(min=1e-12).log10().tolist()
        for name in SCHEDULES
    }
    left = plot("signal: sqrt(alpha-bar) over t", signal, (0, 1), [0, 0.5, 1], "{:g}".format)
    right = plot("SNR over t, logarithmic", ratio, (-6, 4), [-6, -4, -2, 0, 2, 4], "1e{:g}".format)
    return beside(left, right)


def score() -> Image.Image:
    """Density of noisy pictures of one pixel, -1 or 1, and its score, at three noise levels."""
    places = torch.linspace(-2.5, 2.5, 501)
    densities, scores = {}, {}
    for alpha in (0.9, 0.5, 0.1):
        name = f"alpha-bar {alpha}"
        means = torch.tensor([[-1.0], [1.0]]) * alpha**0.5
        parts = torch.distributions.Normal(means, (1 - alpha) ** 0.5).log_prob(places).exp() / 2
        density = parts.sum(0)
        slope = -(parts * (places - means)).sum(0) / (1 - alpha)
        densities[name], scores[name] = density.tolist(), (slope / density).tolist()
    colours = dict(zip(densities, SCHEDULES.values(), strict=True))
    over, ticks = places.tolist(), [-2, -1, 0, 1, 2]
    left = plot(
        "density q(x_t) over x_t",
        densities,
        (0, 0.7),
        [0, 0.2, 0.4, 0.6],
        "{:g}".format,
        over,
        colours,
        ticks,
    )
    right = plot(
        "score over x_t",
        scores,
        (-16, 16),
        [-15, -10, -5, 0, 5, 10, 15],
        "{:g}".format,
        over,
        colours,
        ticks,
    )
    return beside(left, right)


@torch.no_grad()
def trajectory(artifact: pipeline.DiffusionModel) -> Image.Image:
    """x_t and the predicted x_0 at ten of the fifty steps of DDIM, from TRAJECTORY_SEED."""
    scheduler = schedulers.build_sampling_scheduler("ddim", artifact.scheduler_config, 50)
    steps = scheduler.num_inference_steps
    seen, guesses, heads = [], [], []
    walked = iter(range(steps))

    def watch(timestep: int, noisy: torch.Tensor, guess: torch.Tensor) -> None:
        index = next(walked)
        if index % 6 == 0 or index == steps - 1:
            seen.append(noisy[0])
            guesses.append(guess[0])
            heads.append(f"t = {timestep}")

    list(generate.generate_images(artifact.unet, scheduler, [TRAJECTORY_SEED], 1, watch))
    return table({"x_t": seen, "predicted x_0": guesses}, heads)


@torch.no_grad()
def restored(
    artifact: pipeline.DiffusionModel, scheduler: DDPMScheduler, digit: torch.Tensor
) -> Image.Image:
    """A held-out digit noised to several levels, guessed at once, and restored step by step."""
    sampler = DDIMScheduler.from_config(artifact.scheduler_config, timestep_spacing="trailing")
    sampler.set_timesteps(50)
    noise = torch.randn(digit.shape, generator=torch.Generator().manual_seed(1))
    noised, guessed, walked, heads = [], [], [], []
    for level in (99, 199, 399, 599, 799, 999):
        timestep = torch.tensor([level])
        noisy = objective.add_noise(scheduler.alphas_cumprod, digit, noise, timestep)
        noised.append(noisy[0])
        first = sampler.step(artifact.unet(noisy, timestep).sample, level, noisy)
        guessed.append(first.pred_original_sample[0])
        for step in sampler.timesteps[sampler.timesteps <= level]:
            noisy = sampler.step(artifact.unet(noisy, step).sample, step, noisy).prev_sample
        walked.append(noisy[0])
        heads.append(f"t = {level}")
    rows = {
        "original": [digit[0]] * len(heads),
        "noised": noised,
        "one look: predicted x_0": guessed,
        "step by step (DDIM)": walked,
    }
    return table(rows, heads)


@torch.no_grad()
def loss_by_noise(
    artifact: pipeline.DiffusionModel, scheduler: DDPMScheduler, clean: torch.Tensor
) -> Image.Image:
    """Squared error over the held-out digits at 25 noise levels, in x_0 and in the noise."""
    alphas, kind = scheduler.alphas_cumprod, scheduler.config.prediction_type
    levels = list(range(19, 1000, 40))
    errors: dict[str, list[float]] = {"v": [], "x_0": [], "epsilon": []}
    generator = torch.Generator().manual_seed(0)
    for level in levels:
        timesteps = torch.full((len(clean),), level)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = objective.add_noise(alphas, clean, noise, timesteps)
        wanted = objective.prediction_target(kind, alphas, clean, noise, timesteps)
        error = objective.diffusion_loss(artifact.unet(noisy, timesteps).sample, wanted, None)
        signal, sigma = alphas[level], 1 - alphas[level]
        # x_0 = a x_t - s v and noise = s x_t + a v, so an error of v counts s^2 and a^2 times.
        errors["v"].append(float(error))
        errors["x_0"].append(float(error * sigma))
        errors["epsilon"].append(float(error * signal))
    colours = dict(zip(errors, SCHEDULES.values(), strict=True))
    return plot(
        "mean squared error on held-out digits, over t",
        errors,
        (0, 1),
        [0, 0.5, 1],
        "{:g}".format,
        levels,
        colours,
    )


def guidance_scales(artifact: pipeline.DiffusionModel) -> Image.Image:
    """Images of the same seeds at four guidance scales, two for each of five classes."""
    steps = min(50, artifact.scheduler_config["num_train_timesteps"])
    scheduler = schedulers.build_sampling_scheduler("ddim", artifact.scheduler_config, steps)
    labels = range(0, 2 * (len(artifact.class_names) // 2), 2)
    seeds = range(2 * len(labels))
    rows = {}
    for scale in GUIDANCE_SCALES:
        guidance = ClassGuidance(lambda seed: labels[seed // 2], scale)
        images = generate.generate_images(
            artifact.unet, scheduler, seeds, len(seeds), guidance=guidance
        )
        rows[f"guidance {scale:g}"] = [transforms.to_model(image) for _, image in images]
    return table(rows, [artifact.class_names[labels[seed // 2]] for seed in seeds])


def text(
    sheet: Image.Image,
    place: tuple[int, int],
    words: str,
    colour: str = INK,
    size: int = 14,
    anchor: str = "la",
) -> None:
    """Words in Pillow's own font, so that the pictures are alike on all machines."""
    font = ImageFont.load_default(size)
    ImageDraw.Draw(sheet).text(place, words, colour, font=font, anchor=anchor)


def table(rows: dict[str, Sequence[torch.Tensor]], heads: Sequence[str]) -> Image.Image:
    """Rows of [1, 8, 8] images in [-1, 1] under column heads, each row under its name."""
    gap, line = 6, 26
    height = line + len(rows) * (CELL + line)
    sheet = Image.new("RGB", (len(heads) * (CELL + gap) + gap, height), "white")
    for column, head in enumerate(heads):
        text(sheet, (gap + column * (CELL + gap) + CELL // 2, 6), head, anchor="ma")
    for number, (name, row) in enumerate(rows.items()):
        top = line + number * (CELL + line)
        text(sheet, (gap, top + 3), name)
        for column, pixels in enumerate(transforms.to_pixels(torch.stack(list(row)))):
            cell = image_io.to_pil(pixels).resize((CELL, CELL), Image.Resampling.NEAREST)
            sheet.paste(cell, (gap + column * (CELL + gap), top + line - 4))
    return sheet


def plot(
    title: str,
    curves: dict[str, list[float]],
    span: tuple[float, float],
    ticks: list[float],
    label: Callable[[float], str],
    over: Sequence[float] = range(1000),
    colours: dict[str, str] | None = None,
    marks: Sequence[float] = (0, 250, 500, 750, 1000),
) -> Image.Image:
    """Curves with their names below, over `over` with `marks`: by default t = 0..1000."""
    width, height, left, top, fine = 480, 300, 50, 34, 4
    right, bottom = width - 28, height - 64
    first, last = min(*marks, over[0]), max(*marks, over[-1])

    def x(t: float) -> float:
        return left + (t - first) / (last - first) * (right - left)

    def y(value: float) -> float:
        share = (min(max(value, span[0]), span[1]) - span[0]) / (span[1] - span[0])
        return bottom - share * (bottom - top)

    large = Image.new("RGB", (width * fine, height * fine), "white")  # smoothed when made smaller
    draw = ImageDraw.Draw(large)
    for tick in ticks:
        draw.line([(left * fine, y(tick) * fine), (right * fine, y(tick) * fine)], PALE, fine)
    for name, values in curves.items():
        points = [(x(t) * fine, y(v) * fine) for t, v in zip(over, values, strict=True)]
        draw.line(points, (colours or SCHEDULES)[name], 2 * fine, joint="curve")
    sheet = large.resize((width, height), Image.Resampling.LANCZOS)
    text(sheet, (left, 8), title, size=15)
    for tick in ticks:
        text(sheet, (left - 6, int(y(tick))), label(tick), anchor="rm")
    for t in marks:
        text(sheet, (int(x(t)), bottom + 6), str(t), anchor="ma")
    for number, name in enumerate(curves):
        place = (left + number * 130, height - 24)
        text(sheet, place, name, (colours or SCHEDULES)[name])
    return sheet


def beside(*sheets: Image.Image) -> Image.Image:
    """Pictures of the same height next to each other."""
    whole = Image.new("RGB", (sum(sheet.width for sheet in sheets), sheets[0].height), "white")
    left = 0
    for sheet in sheets:
        whole.paste(sheet, (left, 0))
        left += sheet.width
    return whole


if __name__ == "__main__":
    main()
