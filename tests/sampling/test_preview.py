import pytest
import torch

from ddpm.diffusion.schedulers import build_sampling_scheduler
from ddpm.sampling import generate, image_io, preview
from ddpm.sampling.guidance import ClassGuidance

STEPS = 2


def cells(grid, rows, columns):
    """The images of a grid of enlarged 8x8 images, row by row, without the names at the left."""
    pixels = image_io.pil_to_tensor(grid)
    side = 64 + image_io.GRID_PADDING
    assert pixels.shape[1] == rows * side + image_io.GRID_PADDING
    left = pixels.shape[2] - columns * side
    return [
        pixels[:, 2 + row * side : 2 + row * side + 64 : 8, x : x + 64 : 8]
        for row in range(rows)
        for x in range(left, pixels.shape[2], side)
    ]


def images_of(unet, config, seeds, label=None, scale=1.0):
    scheduler = build_sampling_scheduler(preview.schedulers.DEFAULT_SCHEDULER, config, STEPS)
    guidance = None if label is None else ClassGuidance(lambda seed: label, scale)
    images = generate.generate_images(unet, scheduler, seeds, 8, guidance=guidance)
    return [image for _, image in images]


def test_without_classes_the_grid_has_the_images_of_the_first_seeds(make_unet, chain):
    unet = make_unet()
    grid = preview.generate_preview(unet, chain.config, 4, STEPS)
    expected = images_of(unet, chain.config, range(4))
    assert all(map(torch.equal, cells(grid, 2, 2), expected))


def test_with_classes_a_row_has_one_class_without_and_with_guidance(make_unet, chain):
    unet = make_unet(num_classes=3)
    grid = preview.generate_preview(unet, chain.config, 7, STEPS, ["cat", "犬", "bird"])
    found = cells(grid, 3, 4)
    for row in range(3):
        expected = [
            *images_of(unet, chain.config, range(2), row, 1.0),
            *images_of(unet, chain.config, range(2), row, preview.DEFAULT_GUIDANCE_SCALE),
        ]
        for cell, image in zip(found[4 * row : 4 * row + 4], expected, strict=True):
            assert (cell.int() - image.int()).abs().max() <= 1


def test_many_classes_are_cut_to_ten_rows(make_unet, chain):
    unet = make_unet(num_classes=12)
    grid = preview.generate_preview(unet, chain.config, 4, STEPS, [str(n) for n in range(12)])
    assert len(cells(grid, 10, 2)) == 20


@pytest.mark.parametrize("num_classes", [None, 2])
def test_processes_draw_their_parts_of_the_same_grid(make_unet, chain, num_classes):
    unet, names = make_unet(num_classes=num_classes), num_classes and ["a", "b"]
    alone = preview.generate_preview(unet, chain.config, 5, STEPS, names)
    parts = {0: [], 1: []}

    def draw(rank, gather):
        return preview.generate_preview(unet, chain.config, 5, STEPS, names, rank, 2, gather)

    draw(1, lambda images: parts[1].append(images) or torch.cat((images, images)))
    grid = draw(0, lambda images: torch.cat((images, parts[1].pop(0))))
    difference = image_io.pil_to_tensor(alone).int() - image_io.pil_to_tensor(grid).int()
    assert difference.abs().max() <= 1
