"""Pictures as files."""

import os

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image

from ddpm import pictures

# Pixels and files


def test_pixels_are_rounded_as_diffusers_does():
    images = torch.linspace(-1.2, 1.2, 5000).view(1, 1, 50, 100)
    array = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    (reference,) = DDPMPipeline.numpy_to_pil(array)
    assert np.array_equal(pictures.to_pixels(images)[0, 0].numpy(), np.array(reference))


def test_pixels_by_hand():
    images = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]).view(1, 1, 1, 5)
    assert pictures.to_pixels(images).flatten().tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_keeps_pixels_and_text(tmp_path, channels, mode):
    image = torch.arange(channels * 6, dtype=torch.uint8).view(channels, 2, 3) * 10
    text = {"model": "you/名前", "seed": "7", "note": "Zürich"}
    pictures.save_png(image, tmp_path / "seed.png", text)
    assert Image.open(tmp_path / "seed.png").mode == mode
    assert torch.equal(pictures.read_png(tmp_path / "seed.png"), image)
    assert pictures.read_png_text(tmp_path / "seed.png") == text
    assert os.listdir(tmp_path) == ["seed.png"]


def test_cut_or_foreign_png_has_no_text(tmp_path):
    pictures.save_png(torch.zeros(3, 64, 64, dtype=torch.uint8), tmp_path / "a.png", {"k": "v"})
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-20])
    (tmp_path / "foreign.png").write_text("no image")
    assert pictures.read_png_text(tmp_path / "cut.png") == {}
    assert pictures.read_png_text(tmp_path / "foreign.png") == {}


def test_grid_enlarges_small_images_by_whole_pixels():
    images = [torch.full((1, 8, 8), 10 * n, dtype=torch.uint8) for n in range(5)]
    images[1][0, 0, 1] = 200
    sheet = pictures.grid(images)
    assert sheet.mode == "L"
    assert sheet.size == (3 * (64 + 2) + 2, 2 * (64 + 2) + 2)
    pixels = np.array(sheet)
    assert (pixels[2:66, 2:66] == 0).all()
    assert (pixels[2:10, 68 + 8 : 68 + 16] == 200).all()
    assert pixels[2, 68 + 7] == pixels[2, 68 + 16] == 10
    assert (pixels[68:132, 68:132] == 40).all()
    assert (pixels[:2] == 255).all()
    assert (pixels[68:132, 134:198] == 255).all()  # the place of a sixth


def test_grid_leaves_large_images_as_they_are():
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    sheet = pictures.grid([image])
    assert (sheet.mode, sheet.size) == ("RGB", (68, 68))
    assert np.array_equal(np.array(sheet)[2:66, 2:66], image.permute(1, 2, 0).numpy())
