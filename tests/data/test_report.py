"""The report: what is counted, duplicates found and not imagined, the lines that are printed."""

import json

import numpy as np
import pytest
from PIL import Image, ImageCms

from ddpm.config.train import DataConfig
from ddpm.data import dataset
from ddpm.data import report as report_module
from ddpm.data.decode import DecodeConfig
from tests.files import encoded, gray, noise, photo, write_parquet


@pytest.fixture
def facts(tmp_path):
    """facts(files, settings...) of a dataset with these images."""

    def load(files: list[bytes | None], **settings) -> dict:
        data = write_parquet(tmp_path / "data.parquet", files)
        config = {"dataset_name": str(data), "resolution": 16, "max_bad_images": 0.9, **settings}
        return dataset.load_images(DataConfig(**config), show_progress=False)[1]

    return load


def test_everything_is_counted(facts):
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    found = facts(
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
    assert found["modes"] == {"RGB": 2, "RGBA": 1, "I;16": 1, "P": 1}
    assert found["sizes"] == {"32x16": 1, "16x16": 1, "8x8": 1, "2x2": 1, "20x20": 1}
    assert found["bit_depths"] == {"8": 4, "16": 1}
    assert found["value_ranges"] == {"I;16": [0, 4095]}
    assert (found["rows"], found["images"], found["unreadable"]) == (7, 5, 2)
    named = {name: found[name] for name in ("alpha", "exif_rotated", "icc_profiles", "animated")}
    assert named == {"alpha": 1, "exif_rotated": 1, "icc_profiles": 1, "animated": 1}
    assert found["enlarged"] == 2
    assert (found["crop_loses_mean"], found["crop_loses_most"]) == (0.1, 0.5)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("mode", ["pad", "stretch"])
def test_only_cropping_loses(facts, mode):
    assert facts([encoded(noise(16, 32))], resize_mode=mode)["crop_loses_most"] == 0


def test_channels_are_explained(facts):
    assert facts(gray(1))["channels_why"] == "no image has any colour"
    assert facts([encoded(photo(16))])["channels_why"] == "some images have colour"
    assert facts(gray(1), channels=3)["channels_why"] == "--channels"


# Duplicates


def test_same_pixels_are_exact_duplicates_whatever_the_file(facts):
    picture = photo(16)
    files = [
        encoded(picture),
        *gray(7),
        encoded(picture, kind="BMP"),
        encoded(photo(16, 1)),
        encoded(picture, kind="TIFF"),
    ]
    found = facts(files)
    assert found["exact_duplicates"] == 2
    assert found["exact_first"] == ["row 2 = row 0", "row 4 = row 0"]
    assert found["near_duplicates"] == 0


def test_same_bytes_in_another_shape_are_no_duplicates(facts):
    assert (
        facts([encoded(np.zeros(shape, np.uint8)) for shape in ((16, 32), (32, 16))])[
            "exact_duplicates"
        ]
        == 0
    )


def jpeg(picture: Image.Image, quality: int) -> bytes:
    return encoded(picture, kind="JPEG", quality=quality)


def test_compressed_resized_and_brightened_copies_are_near_duplicates(facts):
    pictures = [photo(64, seed) for seed in range(12)]
    copies = [
        jpeg(pictures[3], 60),
        encoded(pictures[5].resize((100, 100), Image.Resampling.LANCZOS)),
        encoded(Image.eval(pictures[7], lambda value: min(value + 4, 255))),
    ]
    found = facts([*map(encoded, pictures), *copies], resolution=64)
    assert found["near_duplicates"] == 3
    assert found["near_first"] == ["row 12 ~ row 3", "row 13 ~ row 5", "row 14 ~ row 7"]
    assert found["near_compared"] == 15
    assert found["exact_duplicates"] == 0


def test_different_pictures_are_no_duplicates(facts):
    found = facts([encoded(photo(64, seed)) for seed in range(300)], resolution=64)
    assert (found["exact_duplicates"], found["near_duplicates"]) == (0, 0)


def test_plain_images_of_other_brightness_are_no_duplicates(facts):
    """Their hashes are equal: nothing in them rises or falls."""
    found = facts(gray(*range(0, 256, 15), size=16))
    assert (found["exact_duplicates"], found["near_duplicates"]) == (0, 0)


def test_large_data_is_compared_in_part(facts, monkeypatch):
    monkeypatch.setattr(report_module, "MAX_COMPARED", 4)
    found = facts([encoded(photo(16, seed)) for seed in range(10)])
    assert found["near_compared"] == 4  # rows 0, 3, 6 and 9
    assert found["images"] == 10


def test_hash_is_the_library_s():
    import imagehash

    pixels = noise(3, 16, 16)
    number, thumb = report_module.perceptual_hash(pixels)
    expected = imagehash.dhash(Image.fromarray(thumb))
    assert f"{number:016x}" == str(expected)


# Lines


def test_lines_tell_what_was_found(facts):
    found = facts(
        [
            encoded(photo(16)),
            encoded(photo(16)),
            encoded(noise(16, 32, 4)),
            b"bad",
            encoded(np.array([[0, 4095]] * 2, np.uint16)),
        ]
    )
    told = "\n".join(report_module.format_report(found))
    for part in (
        "Data: data.parquet, split train, column image: 5 rows.",
        "Trained as RGB (some images have colour). Stored as 2 of RGB, 1 of RGBA, 1 of I;16; "
        "3 of 8, 1 of 16 bits a channel.",
        "Sizes: 2 of 16x16, 1 of 32x16, 1 of 2x2.",
        "Cropping to squares leaves out 12% of an image on average, 50% at most",
        "1 have transparency: the --background shows through.",
        "Values of mode I;16 run from 0 to 4095 (--value_range scales).",
        "1 unreadable images are skipped: row 3: not a readable image.",
        "1 have the pixels of an earlier one: row 1 = row 0.",
    ):
        assert part in told
    assert "animated" not in told


def test_plain_data_has_few_lines(facts):
    assert len(report_module.format_report(facts(gray(1, 9, size=16)))) == 3


def test_report_of_many_sizes_names_the_commonest():
    look = DecodeConfig.of(DataConfig(resolution=4))
    report = report_module.DataReport(look, 8)
    for row, width in enumerate((4, 5, 6, 7, 8, 9, 9, 9)):
        pixels, *notes = report.read(row, {"bytes": encoded(noise(4, width, seed=row))})
        report.add(row, *notes)
    found = report.facts(1)
    assert found["distinct_sizes"] == 6
    assert list(found["sizes"].items())[0] == ("9x4", 3)
    said = report_module.format_report(
        {**found, "rows": 8, "name": "d", "split": "s", "image_column": "c"}
    )
    assert any("3 of 9x4, 1 of 4x4" in line and "and 1 more." in line for line in said)


def test_reading_changes_nothing():
    report = report_module.DataReport(DecodeConfig.of(DataConfig(resolution=4)), 2)
    report.read(0, {"bytes": gray(1)[0]})
    assert report.read(1, {"bytes": b""}) == "not a readable image"
    assert report.facts(1)["images"] == 0
