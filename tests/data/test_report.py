"""The data report: its counts, exact and near duplicates, the printed lines."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image, ImageCms

from ddpm.config.data import DataConfig
from ddpm.data import dataset, report
from ddpm.data.decode import failure_reason
from ddpm.errors import UserError
from ddpm.run_record import DatasetRecord
from tests.files import encoded, gray, noise, photo, tiff, write_parquet


@pytest.fixture
def facts(tmp_path):
    """facts(files, **settings) -> the report of a dataset of these images."""

    def load(files: list[bytes | None], **settings) -> DatasetRecord:
        data = write_parquet(tmp_path / "data.parquet", files)
        config = {"dataset_name": str(data), "resolution": 16, "max_bad_images": 0.9, **settings}
        return dataset.load_images(DataConfig(**config), show_progress=False).facts

    return load


def test_everything_is_counted(facts):
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    counts = facts(
        [
            encoded(noise(16, 32, 3)),
            encoded(noise(16, 16, 3, seed=1), exif=exif),
            encoded(noise(8, 8, 4), icc_profile=profile),
            encoded(np.array([[0, 4095]] * 2, np.uint16)),
            encoded(photo(20), kind="GIF", save_all=True, append_images=[photo(20, 1)]),
            b"bad",
            None,
        ]
    )
    assert counts.modes == {"RGB": 2, "RGBA": 1, "I;16": 1, "P": 1}
    assert counts.sizes == {"32x16": 1, "16x16": 1, "8x8": 1, "2x2": 1, "20x20": 1}
    assert counts.bit_depths == {"8": 4, "16": 1}
    assert counts.value_ranges == {"I;16": [0, 4095]}
    assert (counts.rows, counts.images, counts.unreadable) == (7, 5, 2)
    for flag in ("alpha", "exif_rotated", "icc_profiles", "animated"):
        assert getattr(counts, flag) == 1
    assert counts.enlarged == 2
    assert (counts.crop_loses_mean, counts.crop_loses_most) == (0.1, 0.5)
    assert json.loads(json.dumps(asdict(counts))) == asdict(counts)


def test_no_text_of_the_dataset_makes_a_line_of_its_own(facts):
    bad = "a.png\nerror: run this\x1b]0;t\x07\u202e"
    counts = replace(facts([encoded(noise(16, 16, 3)), None]), image_column=bad, split=bad)
    for lines in (report.format_report(counts), report.format_report(replace(counts, name=bad))):
        assert all(line.isprintable() for line in lines) and len(lines) == 4
    reason = failure_reason({"path": f"/data/{bad}"}, ValueError("b\x1b]"))
    assert reason.isprintable() and reason.count("error: run this") == 1


@pytest.mark.parametrize("mode", ["pad", "stretch"])
def test_only_cropping_cuts_off_pixels(facts, mode):
    assert facts([encoded(noise(16, 32))], resize_mode=mode).crop_loses_most == 0


def test_channels_are_explained(facts):
    assert facts(gray(1)).channels_why == "no image has any color"
    assert facts([encoded(photo(16))]).channels_why == "some images have color"
    assert facts(gray(1), channels=3).channels_why.startswith("set by --channels")


def test_images_with_and_without_transparency_are_counted(facts):
    clear = np.full((16, 16, 4), 255, np.uint8)
    clear[:8, :, 3] = 0
    files = [encoded(clear), encoded(photo(16)), encoded(photo(16).convert("RGBA"))]
    counts = facts(files, channels=4)
    assert (counts.channels, counts.alpha, counts.colors) == (4, 1, "RGBA")
    lines = report.format_report(counts)
    assert lines[1].startswith("Trained as RGBA (set by --channels or the pretrained model). ")
    assert "1 have transparency: the fourth channel." in lines
    assert "2 have no transparency: their fourth channel is opaque." in lines
    with pytest.raises(UserError, match="None of the 1 images of .* has any transparency"):
        facts(files[1:2], channels=4)


# Duplicates


def test_equal_pixels_are_exact_duplicates_in_any_format(facts):
    picture = photo(16)
    files = [
        encoded(picture),
        *gray(7),
        encoded(picture, kind="BMP"),
        encoded(photo(16, 1)),
        encoded(picture, kind="TIFF"),
    ]
    counts = facts(files)
    assert counts.exact_duplicates == 2
    assert counts.exact_first == ["row 2 = row 0", "row 4 = row 0"]
    assert counts.near_duplicates == 0


def test_each_copy_is_paired_with_the_first_row():
    pairs = report.exact_duplicates(np.array([0, 2, 3, 5, 9]), np.array([7, 1, 7, 7, 1]))
    assert pairs.tolist() == [[3, 0], [5, 0], [9, 2]]


def test_equal_bytes_of_another_shape_are_no_duplicates(facts):
    files = [encoded(np.zeros(shape, np.uint8)) for shape in ((16, 32), (32, 16))]
    assert facts(files).exact_duplicates == 0


def jpeg(picture: Image.Image, quality: int) -> bytes:
    return encoded(picture, kind="JPEG", quality=quality)


def test_compressed_resized_and_brightened_copies_are_near_duplicates(facts):
    pictures = [photo(64, seed) for seed in range(12)]
    copies = [
        jpeg(pictures[3], 60),
        encoded(pictures[5].resize((100, 100), Image.Resampling.LANCZOS)),
        encoded(Image.eval(pictures[7], lambda value: min(value + 4, 255))),
    ]
    counts = facts([*map(encoded, pictures), *copies], resolution=64)
    assert counts.near_duplicates == 3
    assert counts.near_first == ["row 12 ~ row 3", "row 13 ~ row 5", "row 14 ~ row 7"]
    assert counts.near_compared == 15
    assert counts.exact_duplicates == 0


def test_different_pictures_are_no_duplicates(facts):
    counts = facts([encoded(photo(64, seed)) for seed in range(100)], resolution=64)
    assert (counts.exact_duplicates, counts.near_duplicates) == (0, 0)


def test_plain_images_of_other_brightness_are_no_duplicates(facts):
    """Their difference hashes are equal; only the thumbnails differ."""
    counts = facts(gray(*range(0, 256, 15), size=16))
    assert (counts.exact_duplicates, counts.near_duplicates) == (0, 0)


def test_large_data_is_compared_in_part(facts, monkeypatch):
    monkeypatch.setattr(report, "MAX_COMPARED", 4)
    counts = facts([encoded(photo(16, seed)) for seed in range(10)])
    assert counts.near_compared == 4  # rows 0, 3, 6 and 9
    assert counts.images == 10


@pytest.mark.parametrize(
    ("seed", "expected"),
    [(0, 0x8A955124A26BB554), (1, 0x4DA5B0A9DA5AD599), (2, 0xB2942881C7555549)],
)
def test_difference_hash_equals_imagehash(seed, expected):
    """The values are those of imagehash.dhash (imagehash 4.3.2)."""
    assert report.difference_hash(Image.fromarray(noise(16, 16, seed=seed))) == expected
    assert report.difference_hash(Image.new("L", (16, 16), 7)) == 0


def test_hashes_are_those_of_the_green_channel_reduced():
    pixels = noise(3, 32, 32)
    hashes = report.hash_image(pixels, is_compared=True)
    thumbnail = pixels[1].reshape(16, 2, 16, 2).mean(axis=(1, 3))
    assert np.abs(hashes.thumbnail - thumbnail).max() <= 1
    assert hashes.difference_hash == report.difference_hash(Image.fromarray(hashes.thumbnail))
    assert report.hash_image(pixels, is_compared=False) == report.ImageHashes(
        hashes.digest, None, None
    )


# Lines


def test_lines_state_the_counts(facts):
    counts = facts(
        [
            encoded(photo(16)),
            encoded(photo(16)),
            encoded(noise(16, 32, 4)),
            b"bad",
            encoded(np.array([[0, 4095]] * 2, np.uint16)),
            tiff(noise(16, 16, 4), photometric=2, extra=(0,)),
            encoded(noise(16, 16), kind="TIFF", save_all=True, append_images=[photo(16)]),
        ]
    )
    text = "\n".join(report.format_report(counts))
    for part in (
        "Data: data.parquet, split train, column image: 7 rows.",
        "Trained as RGB (some images have color). Stored as 3 of RGB, 1 of RGBA, 1 of I;16, "
        "1 of L; 5 of 8, 1 of 16 bits a channel.",
        "Sizes: 4 of 16x16, 1 of 32x16, 1 of 2x2.",
        "Cropping cuts off 8% of an image on average, 50% at most",
        "1 have transparency: the --background shows through.",
        "1 have several frames or pages: the first is used (docs/data.md splits them).",
        "1 have bands after gray or RGB, which are not used (docs/data.md).",
        "Values of mode I;16 run from 0 to 4095 (--value_range scales).",
        "1 unreadable images are skipped: row 3: not a readable image.",
        "1 have the pixels of an earlier one: row 1 = row 0.",
    ):
        assert part in text
    assert "EXIF" not in text


def test_losses_of_a_rectangle_are_those_of_its_aspect(facts):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encoded(noise(8, 16)), encoded(noise(16, 8), exif=exif), encoded(noise(16, 16))]
    counts = facts(files, resolution=(8, 16))
    assert (counts.enlarged, counts.exif_rotated) == (0, 1)
    assert (counts.crop_loses_mean, counts.crop_loses_most) == (0.1667, 0.5)
    assert facts(files, resolution=(16, 8)).crop_loses_most == 0.75
    assert facts(files, resolution=(16, 8)).enlarged == 2


def test_plain_data_has_few_lines(facts):
    assert len(report.format_report(facts(gray(1, 9, size=16)))) == 3


def test_report_of_many_sizes_names_the_most_common(facts):
    files = [encoded(noise(16, width, seed=width)) for width in (16, 17, 18, 19, 20, 21)]
    counts = facts([*files, *[encoded(noise(16, 21, seed=seed)) for seed in (1, 2)]])
    assert counts.distinct_sizes == 6
    assert list(counts.sizes.items())[0] == ("21x16", 3)
    lines = report.format_report(counts)
    assert any("3 of 21x16, 1 of 16x16" in line and "and 1 more." in line for line in lines)
