"""The app of the demo Space: its images, its files, bad input, and the page in a real browser.

The picture and the seconds of docs/publishing.md, of a run with classes:

    DEMO_MODEL=ddpm-digits-classes DEMO_PICTURE=docs/images/demo-space.png \\
        pytest -s -n 0 -m slow tests/publishing/test_space_app.py -k browser
"""

import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from diffusers import DDPMScheduler
from huggingface_hub import snapshot_download
from PIL import Image

from ddpm.config.parser import parse_push
from ddpm.diffusion.schedulers import build_sampling_scheduler
from ddpm.publishing import demo_space, publish
from ddpm.run_folder import CONDITIONAL_LABELS
from ddpm.sampling import image_io, inpaint, pipeline
from ddpm.sampling.unet_files import read_labels
from tests.publishing.test_model_card import HOSTILE

pytestmark = [
    pytest.mark.slow,  # gradio takes seconds to load: where the app is loaded, not when collected
    pytest.mark.skipif(
        find_spec("gradio") is None, reason="the app needs gradio (requirements-dev.txt)"
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

APP = demo_space.APP_FOLDER / "app.py"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT = 120_000
"""Milliseconds that the page may take for anything."""


@pytest.fixture
def load_app(monkeypatch):
    """load_app(folder) -> what app.py defines for the model in a folder."""

    def load(folder):
        monkeypatch.setattr(sys, "argv", ["app.py", str(folder)])
        return SimpleNamespace(**runpy.run_path(str(APP)))

    return load


def draw(app, folder, gallery=None, **changes):
    """Press Draw: the grids, the gallery with copies of its files in `folder`, the next seed."""
    inputs = {
        "seed": 0,
        "batch": 2,
        "moves_on": True,
        "sampler": "dpmsolver-sde",
        "steps": 20,
        "label": app.NO_CLASS,
        "scale": 2,
        "picture": None,
        "level": 0.5,
    }
    *frames, (_, items, seed) = (
        (grid, copy_of(items, folder) if isinstance(items, list) else None, seed)
        for grid, items, seed in app.draw(*(inputs | changes).values(), gallery)
    )
    return [grid.value for grid, _, _ in frames], items, seed


def copy_of(items, folder):
    """Copy the files of a gallery, as the page does, before they are deleted."""
    folder.mkdir(exist_ok=True)
    return [
        (path if Path(path).parent == folder else shutil.copy(path, folder), caption)
        for path, caption in items
    ]


@pytest.mark.parametrize("label", [None, 1])
@pytest.mark.parametrize("sampler", ["dpmsolver-sde", "dpmsolver++", "unipc", "ddim", "ddpm"])
def test_image_of_a_seed_is_that_of_sample(
    load_app, class_folder, run_main, capsys, tmp_path, sampler, label
):
    """Its PNG says all that sample.py --like needs to draw it again."""
    app = load_app(class_folder)
    label = app.NO_CLASS if label is None else label
    frames, items, next_seed = draw(app, tmp_path / "app", seed=5, sampler=sampler, label=label)
    assert len(frames) > 10 and next_seed == 7 and len(items) == 2
    for path, _ in items:
        flags = ("--like", path, "--device", "cpu", "--output_dir", tmp_path / "again")
        assert run_main("sample.py", class_folder, *flags) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "channels", "prediction_type", "sampler"),
    [
        ((8, 12), 1, "epsilon", "ddim"),
        ((12, 8), 3, "v_prediction", "dpmsolver++"),
        (8, 4, "sample", "unipc"),
    ],
)
def test_a_picture_is_restored_as_sample_restores_it(
    load_app, make_unet, tmp_path, size, channels, prediction_type, sampler
):
    """Rectangles and RGBA too. The picture has the size of the model, so nothing is resized."""
    chain = DDPMScheduler(40, timestep_spacing="trailing", prediction_type=prediction_type)
    pipeline.export_pipeline(make_unet(size, channels), chain, tmp_path / "m")
    app = load_app(tmp_path / "m")
    shape = (app.HEIGHT, app.WIDTH, channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    app.to_image(pixels).save(tmp_path / "mine.png")
    picture = str(tmp_path / "mine.png")
    _, items, _ = draw(
        app, tmp_path / "app", batch=1, seed=3, sampler=sampler, picture=picture, level=0.3
    )
    model = pipeline.load_model(str(tmp_path / "m"), conditional=None)
    scheduler = build_sampling_scheduler(sampler, model.scheduler_config, 20)
    original = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    expected = inpaint.restore_image(model.unet, scheduler, original, 6, 3).restored
    image = image_io.read_png(Path(items[0][0]))
    assert image.shape == expected.shape
    assert (image.int() - expected.int()).abs().max() <= 1
    assert image_io.read_png_text(Path(items[0][0]))["noise_level"] == "0.3"


def test_pictures_of_any_kind_are_read(load_app, run_folder, tmp_path):
    """Turned by EXIF, of 16 bits, transparent or a palette: as training reads them."""
    app = load_app(run_folder)
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "16.png")
    assert np.abs(app.read_picture(tmp_path / "16.png")[:, :, 0] - values / 257.0).max() <= 1
    Image.new("RGBA", (20, 30), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (app.read_picture(tmp_path / "clear.png") == 255).all()
    Image.new("P", (5, 50)).save(tmp_path / "palette.gif")
    assert app.read_picture(tmp_path / "palette.gif").shape == (8, 8, 1)
    turned, exif = Image.new("L", (8, 8)), Image.Exif()
    turned.paste(255, (0, 0, 8, 4))
    exif[0x0112] = 8
    turned.save(tmp_path / "turned.png", exif=exif)
    assert (app.read_picture(tmp_path / "turned.png")[:, :4] == 255).all()


@pytest.mark.parametrize("content", ["no picture", "cut short", "too large"])
def test_a_picture_that_cannot_be_read_is_a_message(load_app, run_folder, tmp_path, content):
    path = tmp_path / "picture.png"
    Image.new("L", (20_000, 10_000)).save(path)
    whole = path.read_bytes()
    if content != "too large":
        path.write_bytes(b"no picture" if content == "no picture" else whole[: len(whole) // 2])
    app = load_app(run_folder)
    with pytest.raises(app.gr.Error, match="cannot be read"):
        draw(app, tmp_path / "app", picture=str(path))


@pytest.mark.parametrize("name", ["seed", "batch", "sampler", "steps", "label", "scale", "level"])
def test_an_empty_field_is_a_message(load_app, run_folder, tmp_path, name):
    app = load_app(run_folder)
    with pytest.raises(app.gr.Error, match="field is empty"):
        draw(app, tmp_path / "app", **{name: None})


def test_names_of_classes_are_data(load_app, class_folder, make_unet, chain, tmp_path):
    """Whatever a stranger calls a class: it is a choice of the page and a text of the PNG."""
    names = [*HOSTILE, '"""); raise SystemExit', "{MODEL}", "<script>alert(1)</script>"]
    pipeline.export_pipeline(make_unet(num_classes=len(names)), chain, class_folder, names)
    app = load_app(class_folder)
    assert [name for name, _ in app.label.choices] == ["no class", *names]
    _, items, _ = draw(app, tmp_path / "app", label=len(names) - 1)
    assert image_io.read_png_text(Path(items[0][0]))["class_name"] == names[-1]


def test_the_gallery_keeps_the_newest(load_app, run_folder, tmp_path):
    app = load_app(run_folder)
    gallery, seed = None, 0
    for _ in range(5):
        _, gallery, seed = draw(app, tmp_path / "app", gallery, batch=16, steps=1, seed=seed)
    assert seed == 80 and len(gallery) == app.MAX_GALLERY == 64
    assert [Path(path).name for path, _ in gallery[:2]] == ["seed-00064.png", "seed-00065.png"]
    Path(gallery[0][0]).unlink()
    _, gallery, seed = draw(app, tmp_path / "app", gallery, batch=1, seed=9, moves_on=False)
    assert len(gallery) == 64 and seed == 9


def test_on_zerogpu_drawing_asks_for_a_gpu(load_app, run_folder, tmp_path, monkeypatch):
    """`spaces`, which is installed on such a Space, lends one to the function it decorates."""
    calls, module = [], ModuleType("spaces")

    def lend(duration):
        def decorate(function):
            def decorated(*args):
                calls.append(duration(*args))
                yield from function(*args)

            return decorated

        return decorate

    module.GPU = lend
    monkeypatch.setitem(sys.modules, "spaces", module)
    app = load_app(run_folder)
    draw(app, tmp_path / "app", batch=4, steps=40)
    assert calls == [16] and app.gpu_seconds(range(16), "ddpm", 1000) == 120


@pytest.fixture
def browser():
    """A headless Chromium; the test skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def cpu_seconds(pid):
    """CPU seconds of a process so far, which other programs change little."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def test_the_page_in_a_browser(hub, alice, class_folder, browser, start, tmp_path):
    """The Space as the Hub runs it: its files alone, and the model from the Hub."""
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    if "DEMO_MODEL" in os.environ:
        model = Path(os.environ["DEMO_MODEL"])
        ignore = shutil.ignore_patterns("checkpoint-*", "logs")
        class_folder = Path(shutil.copytree(model, tmp_path / model.name, ignore=ignore))
    repo_id, space_id = f"alice/{class_folder.name}", f"alice/{class_folder.name}-demo"
    config = parse_push([str(class_folder)])
    result = publish.publish(class_folder, repo_id, config, check_images=False)
    demo_space.publish_space(space_id, repo_id, result.commit)
    space = snapshot_download(space_id, repo_type="space", local_dir=tmp_path / "space")
    class_name = read_labels(class_folder / CONDITIONAL_LABELS, "")[2]
    environment = hub.env(None, tmp_path / "home") | {"GRADIO_TEMP_DIR": str(tmp_path / "files")}
    with socket.create_server(("127.0.0.1", 0)) as free:
        environment["GRADIO_SERVER_PORT"] = str(free.getsockname()[1])
    process = start(
        [sys.executable, "-u", f"{space}/app.py"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = []
    address = None
    for line in process.stdout:
        output.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            address = found[0]
            break
    assert address, "".join(output)
    threading.Thread(target=output.extend, args=(process.stdout,), daemon=True).start()

    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(WAIT)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    press = page.get_by_role("button", name="Draw", exact=True).click
    thumbnails = page.locator(".grid-wrap img")

    # A class, and a batch of it
    page.get_by_label("Class").click()
    ready = cpu_seconds(process.pid)
    page.get_by_role("option", name=class_name, exact=True).click()
    press()
    page.get_by_text(re.compile(r"Step \d+ of \d+")).wait_for()
    thumbnails.nth(3).wait_for()
    done = cpu_seconds(process.pid)
    print(f"CPU seconds of the app: {ready:.1f} to its page, {done - ready:.1f} to four images.")
    picture = Path(os.environ.get("DEMO_PICTURE", tmp_path / "demo.png"))
    page.screenshot(path=picture)
    assert Image.open(picture).size == (1280, 900)
    assert page.get_by_label("Seed", exact=True).input_value() == "4"

    # Bad input is a message, and the page works on
    seed, steps = page.get_by_label("Seed", exact=True), page.get_by_label("Steps")
    seed.fill("")
    seed.press_sequentially("text")
    press()
    page.get_by_text("A field is empty").wait_for()
    seed.fill("-1")
    chosen = steps.input_value()
    steps.fill("0")
    press()
    page.get_by_text("less than minimum").wait_for()
    assert steps.input_value() == chosen  # those of the list alone
    seed.fill("100")

    # A picture that is none, then one to start from
    page.get_by_role("button", name="Start from your picture").click()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    Image.new("RGB", (30, 20), "white").save(tmp_path / "white.png")
    upload = page.locator("input[type=file]").first
    upload.set_input_files(tmp_path / "broken.png")
    page.get_by_text("broken.png").wait_for()
    press()
    page.get_by_text("cannot be read").wait_for()
    page.get_by_label("Clear").first.click()
    upload.set_input_files(tmp_path / "white.png")
    page.get_by_text("white.png").wait_for()
    press()
    thumbnails.nth(7).wait_for()

    # Each image is a file with its settings
    thumbnails.last.click()
    with page.expect_download() as download:
        page.get_by_label("Download", exact=True).last.click()
    download.value.save_as(tmp_path / "mine.png")
    text = image_io.read_png_text(tmp_path / "mine.png")
    assert text["model"] == repo_id and text["version"] == result.commit
    assert (text["seed"], text["class_name"]) == ("3", class_name)
    assert errors == []

    # Whoever asks without the page gets a message too
    client = Client(address, verbose=False)
    for bad in ({"seed": "text"}, {"steps": 0}, {"batch": 17}, {"label": "<b>"}, {"level": None}):
        with pytest.raises(AppError):
            client.predict(**{"picture": None} | bad, api_name="/draw")
    assert client.predict(picture=None, seed=7, batch=1, api_name="/draw")[2] == 8
    assert process.poll() is None
