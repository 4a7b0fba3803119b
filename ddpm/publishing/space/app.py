"""Draw images with a diffusion model in the browser.

    python app.py              the model that space.json, next to this file, names on the Hub
    python app.py FOLDER       a model in a folder

Image k of a batch comes from seed + k alone. The text of each PNG says what it was made from.
Images are [B, C, H, W] float32 in [-1, 1]; T is the number of timesteps of the model.
"""

import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import spaces  # on ZeroGPU it must come before torch
except ImportError:
    spaces = None

import diffusers
import gradio as gr
import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

SAMPLERS = {
    "dpmsolver-sde": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero"},
    ),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"final_sigmas_type": "zero"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
}
"""Scheduler classes of diffusers with their settings."""
MAX_BATCH, MAX_SEED, MAX_GALLERY = 16, 2**32 - 1, 64
NUM_FRAMES = 25
"""Pictures shown of a batch on its way from noise to images."""
FRAME_SIDE, GAP = 512, 4
"""Width of such a picture and the gap between its images; small images are enlarged to it."""
Image.MAX_IMAGE_PIXELS = 2**26  # Pillow refuses pictures of more than twice as many

# Load the model

SETTINGS = {}
if (Path(__file__).parent / "space.json").is_file():
    SETTINGS = json.loads((Path(__file__).parent / "space.json").read_text(encoding="utf-8"))
MODEL = sys.argv[1] if len(sys.argv) > 1 else SETTINGS.get("model")
if MODEL is None:
    sys.exit(f"Give the folder of a model: python {sys.argv[0]} FOLDER")
if Path(MODEL).is_dir():
    FOLDER = Path(MODEL)
    WEIGHTS = FOLDER / "unet" / "diffusion_pytorch_model.safetensors"
    VERSION = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
else:
    PATTERNS = [
        f"{name}/*.{end}"
        for name in ("unet", "conditional", "scheduler")
        for end in ("json", "safetensors")
    ]
    FOLDER = Path(
        snapshot_download(MODEL, revision=SETTINGS.get("revision"), allow_patterns=PATTERNS)
    )
    VERSION = FOLDER.name
NAMES = {}
if (FOLDER / "conditional").is_dir():
    NAMES = json.loads((FOLDER / "conditional" / "labels.json").read_text(encoding="utf-8"))
NO_CLASS = len(NAMES)
"""The id of images without a class, which follows those of the classes."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNET = UNet2DModel.from_pretrained(
    FOLDER, subfolder="conditional" if NAMES else "unet", use_safetensors=True
)
UNET = UNET.to(DEVICE).eval()
NOISE = DDPMScheduler.from_pretrained(FOLDER, subfolder="scheduler")
LIMIT = NOISE.config.clip_sample_range if NOISE.config.clip_sample else math.inf
SIZE = UNET.config.sample_size
HEIGHT, WIDTH = (SIZE, SIZE) if isinstance(SIZE, int) else SIZE
CHANNELS = UNET.config.in_channels
MODE = {1: "L", 3: "RGB", 4: "RGBA"}[CHANNELS]
T = NOISE.config.num_train_timesteps
STEPS = [steps for steps in range(1, T + 1) if T % steps == 0]
"""Numbers of steps: every sampler spaces the divisors of T evenly."""


# Draw


def signal_and_sigma(timestep: torch.Tensor) -> tuple[float, float]:
    """Return the factors of x_0 and of the noise in x_t (DDPM, arXiv 2006.11239, eq. 4)."""
    abar = float(NOISE.alphas_cumprod[int(timestep)])
    return abar**0.5, (1 - abar) ** 0.5


def predict(noisy: torch.Tensor, timestep: torch.Tensor, label: int, scale: float) -> torch.Tensor:
    """Return what the model predicts, guided to a class (arXiv 2207.12598)."""
    if not NAMES:
        return UNET(noisy, timestep).sample
    labels = torch.full((len(noisy),), label, device=noisy.device)
    none = torch.full_like(labels, NO_CLASS)
    if label == NO_CLASS or scale == 1:
        return UNET(noisy, timestep, labels).sample
    both = UNET(torch.cat((noisy, noisy)), timestep, torch.cat((labels, none))).sample
    for_class, for_none = both.chunk(2)
    return for_none + scale * (for_class - for_none)


def predict_x0(
    prediction: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Return the image that a prediction stands for, clipped to the range of pixels."""
    signal, sigma = signal_and_sigma(timestep)
    if NOISE.config.prediction_type == "epsilon":
        prediction = (noisy - sigma * prediction) / signal
    elif NOISE.config.prediction_type == "v_prediction":
        prediction = signal * noisy - sigma * prediction
    return prediction.clamp(-LIMIT, LIMIT)


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """Return images as [B, H, W, C] uint8."""
    pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def denoise(
    seeds: list[int],
    sampler: str,
    steps: int,
    label: int,
    scale: float,
    pixels: np.ndarray | None,
    level: float,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (steps done, pixels [B, H, W, C]) on the way from noise to images.

    With the pixels of a picture [H, W, C], from the picture with noise of `level` in 0 to 1.
    """
    is_guided = label != NO_CLASS and scale != 1
    takes_x0 = sampler != "ddim" or is_guided  # DDIM's noise is that of the prediction
    kind, settings = SAMPLERS[sampler]
    if takes_x0:  # since not every scheduler can clip it
        settings = {**settings, "prediction_type": "sample", "clip_sample": False}
    scheduler = kind.from_config(NOISE.config, timestep_spacing="trailing", **settings)
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    extra = {} if sampler == "unipc" else {"generator": generators}

    noise = [torch.randn((1, CHANNELS, HEIGHT, WIDTH), generator=g) for g in generators]
    images, begin = torch.cat(noise).to(DEVICE), 0
    if pixels is not None:
        begin = steps - max(1, round(level * steps))
        picture = torch.from_numpy(pixels).to(DEVICE).permute(2, 0, 1) / 127.5 - 1
        signal, sigma = signal_and_sigma(scheduler.timesteps[begin])
        images = signal * picture + sigma * images
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    yield begin, to_pixels(images)
    for done, timestep in enumerate(scheduler.timesteps[begin:], begin + 1):
        output = predict(images, timestep, label, scale)
        if takes_x0:
            output = predict_x0(output, images, timestep)
        images = scheduler.step(output, timestep, images, **extra).prev_sample
        if done % math.ceil(steps / NUM_FRAMES) == 0 or done == steps:
            yield done, to_pixels(images)


def gpu_seconds(seeds: list[int], sampler: str, steps: int, *rest) -> int:
    """Return the seconds to ask ZeroGPU for; a visitor without an account has 120 a day."""
    return min(120, 10 + steps * (4 + len(seeds)) // 50)


if spaces is not None:
    denoise = spaces.GPU(duration=gpu_seconds)(denoise)


# Pictures and files


def read_picture(path: str) -> np.ndarray:
    """Return a picture at the size of the model: [H, W, C] uint8. gr.Error if it cannot be read."""
    try:
        image = Image.open(path)
        if image.mode.startswith("I"):  # 16 bits
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        image = ImageOps.exif_transpose(image).convert("RGBA")
    except Exception:  # Pillow's readers raise errors of many kinds
        message = "This picture cannot be read, or is too large. Give another."
        raise gr.Error(message, print_exception=False) from None
    image = ImageOps.fit(image, (WIDTH, HEIGHT))
    if MODE != "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert(MODE)).reshape(HEIGHT, WIDTH, CHANNELS)


def to_image(pixels: np.ndarray) -> Image.Image:
    """Return [H, W, C] as a picture in mode L, RGB or RGBA."""
    return Image.fromarray(pixels[:, :, 0] if CHANNELS == 1 else pixels)


def make_grid(batch: np.ndarray) -> Image.Image:
    """Return a batch side by side; small images are enlarged by repeating pixels."""
    columns = math.ceil(math.sqrt(len(batch)))
    rows = math.ceil(len(batch) / columns)
    factor = max(1, FRAME_SIDE // (columns * WIDTH))
    height, width = factor * HEIGHT + GAP, factor * WIDTH + GAP
    grid = Image.new(MODE, (columns * width - GAP, rows * height - GAP), "white")
    for k, pixels in enumerate(batch):
        image = to_image(pixels.repeat(factor, 0).repeat(factor, 1))
        grid.paste(image, (k % columns * width, k // columns * height))
    return grid


def describe(sampler: str, steps: int, label: int, scale: float) -> dict[str, str]:
    """Return the text of a PNG: what it was made from, except its seed."""
    text = {
        "model": MODEL,
        "version": VERSION,
        "scheduler": sampler,
        "num_inference_steps": str(steps),
        "dtype": "fp32",
        "software": f"diffusers {diffusers.__version__}, torch {torch.__version__}",
    }
    if label == NO_CLASS:
        return text
    guidance = {"guidance_scale": str(float(scale)), "guidance_interval": "0.0,1.0"}
    return {**text, "class_label": str(label), "class_name": NAMES[str(label)], **guidance}


def save(image: Image.Image, path: Path, text: dict[str, str]) -> str:
    """Write a PNG with its text and return its path."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    image.save(path, pnginfo=info)
    return str(path)


def draw(seed, batch, moves_on, sampler, steps, label, scale, picture, level, gallery):
    """Yield (grid, gallery, next seed) while a batch is drawn; `picture` is the path of one."""
    if None in (seed, batch, sampler, steps, label, scale, level):
        message = "A field is empty: fill in a seed, a sampler and steps, or load the page again."
        raise gr.Error(message, print_exception=False)
    seeds = list(range(seed, seed + int(batch)))
    pixels = None if picture is None else read_picture(picture)
    text = describe(sampler, steps, label, scale)
    text |= {} if picture is None else {"noise_level": str(level)}
    for done, images in denoise(seeds, sampler, steps, label, scale, pixels, level):
        yield gr.Image(make_grid(images), label=f"Step {done} of {steps}"), gr.skip(), gr.skip()

    title = f"{text['class_name']}, " if "class_name" in text else ""
    with tempfile.TemporaryDirectory() as folder:  # the gallery copies what it is given
        new = [
            (
                save(to_image(image), Path(folder, f"seed-{k:05d}.png"), {**text, "seed": str(k)}),
                f"{title}seed {k}",
            )
            for k, image in zip(seeds, images, strict=True)
        ]
        old = [item for item in gallery or [] if Path(item[0]).is_file()]
        next_seed = min(seeds[-1] + 1, MAX_SEED) if moves_on else seed
        yield gr.skip(), (new + old)[:MAX_GALLERY], next_seed


# The page

with gr.Blocks(title=MODEL, analytics_enabled=False, delete_cache=(600, 3600)) as demo:
    gr.Markdown(
        f"# {Path(MODEL).name}\nA diffusion model of images of {WIDTH}x{HEIGHT} pixels. Each "
        "begins as noise, which its seed decides."
    )
    with gr.Row():
        with gr.Column():
            label = gr.Dropdown(
                [("no class", NO_CLASS), *((name, int(k)) for k, name in NAMES.items())],
                value=NO_CLASS,
                label="Class",
                visible=bool(NAMES),
            )
            scale = gr.Slider(0, 10, 2, label="Guidance", visible=bool(NAMES))
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                batch = gr.Slider(1, MAX_BATCH, 4, step=1, label="Images")
            moves_on = gr.Checkbox(True, label="Go on to the next seeds after each batch")
            with gr.Row():
                sampler = gr.Dropdown([*SAMPLERS], label="Sampler")
                steps = gr.Dropdown(
                    STEPS, value=next(n for n in STEPS if n >= min(50, T)), label="Steps"
                )
            with gr.Accordion("Start from your picture", open=False):
                # Not an Image, which fails on a broken file before `draw` can say so.
                picture = gr.File(label="Your picture", file_types=["image"], height=120)
                level = gr.Slider(
                    0.05, 1, 0.5, label="Noise to add and remove again: 1 leaves nothing of it"
                )
            with gr.Row():
                start = gr.Button("Draw", variant="primary")
                stop = gr.Button("Stop")
        grid = gr.Image(
            label="From noise to images", format="png", interactive=False, elem_classes="pixels"
        )
    gr.Markdown("Your images: click one to enlarge it and to download it with its settings.")
    gallery = gr.Gallery(
        show_label=False,
        columns=8,
        fit_columns=False,
        height="auto",
        object_fit="contain",
        interactive=False,
        type="filepath",
        elem_classes="pixels",
    )
    event = start.click(
        draw,
        [seed, batch, moves_on, sampler, steps, label, scale, picture, level, gallery],
        [grid, gallery, seed],
        show_progress_on=grid,
    )
    stop.click(None, cancels=event)

if __name__ == "__main__":
    demo.queue(max_size=20).launch(
        show_error=True, max_file_size="20mb", css=".pixels img {image-rendering: pixelated}"
    )
