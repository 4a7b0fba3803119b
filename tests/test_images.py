"""From files to uint8 pixels: every mode by hand, crops and flips, bad rows, the cache."""

import importlib.util
import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from PIL import Image

from ddpm import images
from ddpm.config import DataConfig
from ddpm.errors import UsageError, UserError

WHITE = (255, 255, 255)
DIGITS = Path(__file__).parent.parent / "data" / "digits"


def encoded(array, mode: str | None = None, kind: str = "PNG", **options) -> bytes:
    """The bytes of an image file with these pixels."""
    image = array if isinstance(array, Image.Image) else Image.fromarray(np.asarray(array))
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def gray(*values: int, size: int = 4) -> list[bytes]:
    """Square gray images, one of each value."""
    return [encoded(np.full((size, size), value, np.uint8)) for value in values]


@pytest.fixture
def parquet(tmp_path):
    """Write a folder that load_dataset opens, from bytes of images: parquet(files, column=...)."""

    def write(files: list[bytes | None], column: str = "image", split: str = "train") -> str:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        rows = [None if file is None else {"bytes": file, "path": None} for file in files]
        features = Features({"id": Value("int64"), column: datasets.Image()})
        columns = {"id": list(range(len(rows))), column: rows}
        made = Dataset.from_dict(columns, features=features)
        made.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        return str(folder)

    return write


def config(name: str, **settings) -> DataConfig:
    return DataConfig(**{"dataset_name": name, "resolution": 4, **settings})


def load(name: str, **settings) -> tuple[images.ImageSet, dict]:
    return images.load(config(name, **settings), show_progress=False)


# One file


def test_gray_and_colour_are_taken_as_they_are():
    values = np.array([[0, 7], [128, 255]], np.uint8)
    assert images.decode(encoded(values), 1, WHITE)[:, :, 0].tolist() == values.tolist()
    colours = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    assert images.decode(encoded(colours), 3, WHITE).tolist() == colours.tolist()


def test_gray_among_colours_is_repeated():
    values = np.array([[0, 200]], np.uint8)
    assert images.decode(encoded(values), 3, WHITE).tolist() == [[[0] * 3, [200] * 3]]


def test_path_is_as_good_as_bytes(tmp_path):
    (tmp_path / "a.png").write_bytes(gray(9)[0])
    assert images.decode(str(tmp_path / "a.png"), 1, WHITE).tolist() == [[[9]] * 4] * 4


def test_one_bit_is_black_and_white():
    file = encoded(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"))
    assert Image.open(io.BytesIO(file)).mode == "1"
    assert images.decode(file, 1, WHITE).flatten().tolist() == [0, 255]


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (255, 0, 0)])
def test_transparent_pixels_show_the_background(background):
    """Opaque, half and wholly transparent: colour x alpha + background x (1 - alpha)."""
    rgba = np.array([[[10, 20, 30, 255], [100, 100, 100, 51], [77, 77, 77, 0]]], np.uint8)
    found = images.decode(encoded(rgba), 3, background)[0]
    assert found[0].tolist() == [10, 20, 30]
    assert found[1].tolist() == [round(100 * 0.2 + part * 0.8) for part in background]
    assert found[2].tolist() == list(background)


def test_gray_with_alpha_shows_the_background():
    la = Image.fromarray(np.array([[[60, 255], [60, 0]]], np.uint8), "LA")
    assert Image.open(io.BytesIO(encoded(la))).mode == "LA"
    assert images.decode(encoded(la), 1, WHITE).flatten().tolist() == [60, 255]
    assert images.decode(encoded(la), 1, (0, 0, 0)).flatten().tolist() == [60, 0]


def test_palette_is_looked_up_and_its_transparent_entry_shows_the_background():
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    plain = encoded(image)
    assert Image.open(io.BytesIO(plain)).mode == "P"
    assert images.decode(plain, 3, WHITE).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    see_through = encoded(image, transparency=1)
    expected = [[[255, 0, 0], [9, 8, 7], [0, 0, 255]]]
    assert images.decode(see_through, 3, (9, 8, 7)).tolist() == expected


def test_colour_key_of_an_rgb_file_shows_the_background():
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    file = encoded(rgb, transparency=(4, 5, 6))
    assert images.decode(file, 3, (0, 9, 0)).tolist() == [[[1, 2, 3], [0, 9, 0]]]


def test_cmyk_is_ink_not_light():
    cmyk = np.array([[[0, 0, 0, 0], [255, 255, 0, 0], [0, 0, 0, 255]]], np.uint8)
    file = encoded(Image.fromarray(cmyk, "CMYK"), kind="TIFF")
    assert images.decode(file, 3, WHITE).tolist() == [[[255] * 3, [0, 0, 255], [0] * 3]]


def test_sixteen_bits_are_scaled_by_their_range_not_cut():
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    file = encoded(values)
    assert Image.open(io.BytesIO(file)).mode == "I;16"
    assert images.decode(file, 1, WHITE).flatten().tolist() == [0, 1, 128, 255]


def test_thirty_two_bit_integers_are_taken_as_sixteen_bit_ones():
    file = encoded(np.array([[0, 65535]], np.int32), kind="TIFF")
    assert Image.open(io.BytesIO(file)).mode == "I"
    assert images.decode(file, 1, WHITE).flatten().tolist() == [0, 255]


def test_floats_run_from_0_to_1():
    file = encoded(np.array([[0.0, 0.5, 1.0]], np.float32), kind="TIFF")
    assert Image.open(io.BytesIO(file)).mode == "F"
    assert images.decode(file, 1, WHITE).flatten().tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    "values",
    [np.array([[-0.5, 1.0]], np.float32), np.array([[0.0, 255.0]], np.float32),
     np.array([[np.nan]], np.float32), np.array([[-1, 0]], np.int32),
     np.array([[0, 70_000]], np.int32)],
)  # fmt: skip
def test_values_out_of_range_are_an_error_not_a_guess(values):
    with pytest.raises(ValueError, match="was expected"):
        images.decode(encoded(values, kind="TIFF"), 1, WHITE)


@pytest.mark.parametrize(("orientation", "expected"), [
    (1, [[1, 2], [3, 4], [5, 6]]),
    (2, [[2, 1], [4, 3], [6, 5]]),
    (3, [[6, 5], [4, 3], [2, 1]]),
    (4, [[5, 6], [3, 4], [1, 2]]),
    (5, [[1, 3, 5], [2, 4, 6]]),
    (6, [[5, 3, 1], [6, 4, 2]]),
    (7, [[6, 4, 2], [5, 3, 1]]),
    (8, [[2, 4, 6], [1, 3, 5]]),
])  # fmt: skip
def test_cameras_note_of_orientation_is_followed(orientation, expected):
    image = Image.fromarray(np.array([[1, 2], [3, 4], [5, 6]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert images.decode(encoded(image, exif=exif), 1, WHITE)[:, :, 0].tolist() == expected


def test_model_sees_minus_one_to_one():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    found = images.to_model(pixels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([-1.0, -0.6, 1.0]))
    assert pixels.tolist() == [0, 51, 255]


# The column


def dataset_of(**kinds) -> Dataset:
    return Dataset.from_dict({name: [] for name in kinds}, features=Features(kinds))


@pytest.mark.parametrize("name", ["image", "img", "picture of it", "label"])
def test_column_is_found_by_its_type_whatever_its_name(name):
    made = dataset_of(**{"image_id": Value("string"), name: datasets.Image()})
    assert images.find_column(made, None, "d") == name
    assert images.find_column(made, name, "d") == name


def test_several_columns_of_images_need_a_choice():
    made = dataset_of(front=datasets.Image(), back=datasets.Image(), id=Value("int64"))
    with pytest.raises(UserError, match="several columns of images: front, back. Choose one with"):
        images.find_column(made, None, "owner/name")
    assert images.find_column(made, "back", "owner/name") == "back"


def test_no_column_of_images_lists_what_there_is():
    made = dataset_of(text=Value("string"), many=Sequence(Value("int64")), c=ClassLabel(2))
    with pytest.raises(UserError, match="owner/name has no column of type Image") as error:
        images.find_column(made, None, "owner/name")
    assert "text (string)" in str(error.value)
    assert "cast_column" in str(error.value)


@pytest.mark.parametrize("wanted", ["absent", "text"])
def test_wrong_column_lists_what_there_is(wanted):
    made = dataset_of(text=Value("string"), image=datasets.Image())
    with pytest.raises(UserError, match=f"--image_column {wanted}: the dataset d has no") as error:
        images.find_column(made, wanted, "d")
    assert "Its columns: text (string), image (Image)." in str(error.value)


# Folders


def test_parquet_folder_is_read_in_order(parquet):
    found, facts = load(parquet(gray(1, 2, 3), column="scan"))
    assert len(found) == 3
    assert found.channels == 1
    assert [int(found.pixels(row)[0, 0, 0]) for row in range(3)] == [1, 2, 3]
    assert (facts["rows"], facts["images"], facts["image_column"]) == (3, 3, "scan")
    assert (facts["name"], facts["revision"], facts["on_hub"]) == ("data", None, False)
    assert json.loads(json.dumps(facts)) == facts


def test_folder_of_files_is_read(tmp_path):
    for name, value in (("a.png", 10), ("b.png", 20)):
        (tmp_path / name).write_bytes(gray(value)[0])
    found, facts = images.load(
        DataConfig(train_data_dir=str(tmp_path), resolution=4), show_progress=False
    )
    assert sorted(int(found.pixels(row)[0, 0, 0]) for row in range(2)) == [10, 20]
    assert facts["name"] == tmp_path.name


def test_split_is_chosen_and_a_missing_one_names_those_there_are(parquet):
    parquet(gray(1, 2))
    name = parquet(gray(9), split="test")
    assert load(name, split="test")[0].pixels(0)[0, 0, 0] == 9
    with pytest.raises(UserError, match=f"The dataset {name} cannot be opened") as error:
        load(name, split="validation")
    assert "validation" in str(error.value)
    assert "train" in str(error.value)
    assert "test" in str(error.value)


def test_empty_split_is_refused(parquet):
    with pytest.raises(UserError, match="has no rows in its split 'train'. Choose another --split"):
        load(parquet([]))


def test_empty_folder_is_refused(tmp_path):
    for settings in ({"dataset_name": str(tmp_path)}, {"train_data_dir": str(tmp_path)}):
        with pytest.raises(UserError, match="cannot be opened"):
            images.load(DataConfig(**settings), show_progress=False)


def test_folder_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="--train_data_dir /absent/photos is not a folder"):
        images.load(DataConfig(train_data_dir="/absent/photos"), show_progress=False)
    with pytest.raises(UserError, match="/absent/photos is neither a folder here nor an id"):
        images.load(DataConfig(dataset_name="/absent/photos"), show_progress=False)


def test_bad_background_is_refused(parquet):
    with pytest.raises(UsageError, match="--background wite is no colour. Give white, black or #"):
        load(parquet(gray(1)), background="wite")


def test_background_reaches_the_pixels(parquet):
    name = parquet([encoded(np.zeros((4, 4, 4), np.uint8))])
    assert load(name)[0].pixels(0)[:, 0, 0].tolist() == [255, 255, 255]
    assert load(name, background="#010203")[0].pixels(0)[:, 0, 0].tolist() == [1, 2, 3]


def test_gray_data_trains_one_channel_and_one_colour_makes_it_three(parquet):
    la = encoded(Image.new("LA", (4, 4), (5, 255)))
    deep = encoded(np.full((4, 4), 257, np.uint16))
    found, facts = load(parquet([*gray(1), la, deep]))
    assert found.channels == facts["channels"] == 1
    assert facts["modes"] == {"L": 1, "LA": 1, "I;16": 1}
    found, facts = load(parquet([*gray(1), encoded(np.zeros((4, 4, 3), np.uint8))]))
    assert found.channels == facts["channels"] == 3
    assert found.pixels(0)[:, 0, 0].tolist() == [1, 1, 1]


# Geometry


def test_short_side_becomes_the_resolution(parquet):
    files = [encoded(np.zeros(shape, np.uint8)) for shape in ((8, 16), (20, 10), (4, 4), (2, 3))]
    found, facts = load(parquet(files))
    assert found.shapes.tolist() == [[4, 8], [8, 4], [4, 4], [4, 6]]
    assert facts["sizes"] == {"16x8": 1, "10x20": 1, "4x4": 1, "3x2": 1}


def test_resizing_is_antialiased(parquet):
    """A fine checkerboard becomes its mean; every third pixel of it would be black or white."""
    board = (np.indices((12, 12)).sum(0) % 2 * 255).astype(np.uint8)
    found, _ = load(parquet([encoded(board)]))
    assert ((found.pixels(0).int() - 127).abs() < 30).all()


def wide() -> bytes:
    """4 rows, 12 columns; the value of a pixel is its column."""
    return encoded(np.tile(np.arange(12, dtype=np.uint8), (4, 1)))


def test_random_crop_stays_inside_and_reaches_both_ends(parquet):
    found, _ = load(parquet([wide(), encoded(np.arange(12, dtype=np.uint8)[:, None].repeat(4, 1))]))
    batch = found.batch([0, 1] * 200, torch.Generator().manual_seed(0), random_flip=False)
    assert batch.shape == (400, 1, 4, 4)
    lefts = batch[::2, 0, 0, 0]
    assert set(lefts.tolist()) == set(range(9))
    assert (batch[::2, 0] == lefts[:, None, None] + torch.arange(4)).all()
    assert set(batch[1::2, 0, 0, 0].tolist()) == set(range(9))


def test_crops_and_flips_depend_only_on_the_generator(parquet):
    found, _ = load(parquet([wide()] * 8))

    def batch(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return found.batch(list(range(8)), generator, random_flip=True)

    first = batch(0)
    torch.rand(3)
    assert torch.equal(batch(0), first)
    assert not torch.equal(batch(1), first)


def test_center_crop_takes_the_middle_every_time(parquet):
    found, _ = load(parquet([wide()]), center_crop=True)
    batch = found.batch([0] * 5, torch.Generator().manual_seed(0), random_flip=False)
    assert (batch[:, 0] == torch.arange(4, 8)).all()


@pytest.mark.parametrize("square", [True, False])
def test_flip_mirrors_about_half_and_nothing_else(parquet, square):
    found, _ = load(parquet([wide()]), center_crop=square)
    rows = [0] * 400
    plain = found.batch(rows, torch.Generator().manual_seed(0), random_flip=False)
    flipped = found.batch(rows, torch.Generator().manual_seed(0), random_flip=True)
    mirrored = (flipped == plain.flip(-1)).flatten(1).all(1)
    same = (flipped == plain).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 150 < mirrored.sum() < 250


def test_square_rows_come_as_asked_and_the_cache_is_not_touched_by_changing_them(parquet):
    found, _ = load(parquet(gray(1, 2, 3)))
    batch = found.batch([2, 0, 2], torch.Generator(), random_flip=False)
    assert batch[:, 0, 0, 0].tolist() == [3, 1, 3]
    batch.fill_(99)
    assert [int(found.pixels(row)[0, 0, 0]) for row in range(3)] == [1, 2, 3]


# Bad rows


def test_unreadable_images_are_counted_named_and_skipped(parquet):
    cut = encoded(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8))[:-500]
    name = parquet([*gray(1), b"no image at all", *gray(2), cut, None, *gray(3)])
    found, facts = load(name, max_bad_images=0.5)
    assert [int(found.pixels(row)[0, 0, 0]) for row in range(len(found))] == [1, 2, 3]
    assert (facts["rows"], facts["images"], facts["unreadable"]) == (6, 3, 3)
    first, second, third = facts["unreadable_first"]
    assert first == "row 1: not a readable image"
    assert second.startswith("row 3: ")
    assert third == "row 4: no image in this row"
    assert load(name, max_bad_images=0.5)[1] == facts  # the same from the cache


def test_more_unreadable_images_than_allowed_are_refused(parquet):
    name = parquet([*gray(*range(8)), b"bad", b"bad"])
    assert len(load(name, max_bad_images=0.2)[0]) == 8
    for limit in (0.19, 0.01, 0.0):
        reason = f"2 of 10 images cannot be read, more than --max_bad_images {limit:g} allows. The"
        with pytest.raises(UserError, match=f"{reason} first: row 8: not a readable image; row 9"):
            load(name, max_bad_images=limit)


@pytest.mark.parametrize("limit", [0.01, 1.0])
def test_nothing_readable_is_refused_whatever_is_allowed(parquet, limit):
    with pytest.raises(UserError, match="None of the 2 images can be read. The first: row 0"):
        load(parquet([b"bad", b"worse"]), max_bad_images=limit)


def test_bad_file_of_a_folder_is_named(tmp_path):
    for number, file in enumerate([*gray(1, 2), b"bad"]):
        (tmp_path / f"photo-{number}.png").write_bytes(file)
    with pytest.raises(UserError, match=r"The first: row 2: photo-2\.png: "):
        images.load(DataConfig(train_data_dir=str(tmp_path), resolution=4), show_progress=False)


def test_sixteen_bit_out_of_range_is_a_bad_row_with_its_reason(parquet):
    wrong = encoded(np.full((4, 4), 300.0, np.float32), kind="TIFF")
    _, facts = load(parquet([*gray(1), wrong]), max_bad_images=0.5)
    assert facts["unreadable_first"] == ["row 1: values from 300 to 300 where 0 to 1 was expected"]


# The cache


def refuse_to_decode(*args):
    raise AssertionError("decoded again")


def test_second_time_reads_the_cache(parquet, monkeypatch):
    name = parquet(gray(1, 2))
    first, _ = load(name)
    monkeypatch.setattr(images, "decode", refuse_to_decode)
    monkeypatch.setattr(images, "_decode_all", refuse_to_decode)
    second, _ = load(name)
    assert all(torch.equal(first.pixels(row), second.pixels(row)) for row in range(2))
    load(name, random_flip=True, max_bad_images=1.0)  # settings that change no stored pixel


@pytest.mark.parametrize(
    "changed", [{"resolution": 8}, {"center_crop": True}, {"background": "black"}]
)
def test_what_changes_the_pixels_decodes_anew(parquet, monkeypatch, changed):
    name = parquet(gray(1))
    load(name)
    monkeypatch.setattr(images, "_decode_all", refuse_to_decode)
    with pytest.raises(AssertionError, match="decoded again"):
        load(name, **changed)


def test_changed_data_decodes_anew(parquet):
    assert load(parquet(gray(1)))[0].pixels(0)[0, 0, 0] == 1
    assert load(parquet(gray(2)))[0].pixels(0)[0, 0, 0] == 2


def test_kill_halfway_is_harmless(parquet, monkeypatch, tmp_path):
    """What was half-written is neither used nor in the way."""
    name = parquet(gray(1, 2, 3))
    cache = str(tmp_path / "cache")
    rename = images.os.replace

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(images.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        load(name, cache_dir=cache)
    assert len(list(Path(cache, "ddpm-pixels").glob("*.partial"))) == 1
    monkeypatch.setattr(images.os, "replace", rename)
    found, _ = load(name, cache_dir=cache)
    assert [int(found.pixels(row)[0, 0, 0]) for row in range(3)] == [1, 2, 3]
    assert not list(Path(cache, "ddpm-pixels").glob("*.partial"))


def test_more_images_than_are_decoded_ahead_stay_in_order(parquet):
    found, _ = load(parquet([encoded(np.full((4, 4), n % 251, np.uint8)) for n in range(600)]))
    assert [int(found.pixels(row)[0, 0, 0]) for row in range(600)] == [n % 251 for n in range(600)]


# The digits


@pytest.fixture(scope="module")
def digits() -> datasets.DatasetDict:
    return datasets.load_dataset(str(DIGITS))


def test_digits_are_what_their_card_says(digits):
    assert {split: len(rows) for split, rows in digits.items()} == {"train": 1437, "test": 360}
    for rows in digits.values():
        assert rows.features["image"] == datasets.Image()
        assert rows.features["label"].names == [str(digit) for digit in range(10)]
        assert set(rows["label"]) == set(range(10))
        assert {(image.mode, image.size) for image in rows["image"]} == {("L", (8, 8))}


def test_held_out_digits_are_not_among_those_trained_on(digits):
    trained, held_out = (
        {np.asarray(image).tobytes() for image in digits[split]["image"]}
        for split in ("train", "test")
    )
    assert len(trained) == 1437
    assert not trained & held_out


def test_every_digit_has_the_same_share_of_both_splits(digits):
    shares = [np.bincount(digits[split]["label"]) / len(digits[split]) for split in digits]
    assert np.abs(shares[0] - shares[1]).max() < 0.003


def test_digits_are_black_paper_and_white_ink(digits):
    pixels = np.stack([np.asarray(image) for image in digits["train"]["image"]])
    assert set(np.unique(pixels)) <= {round(ink * 255 / 16) for ink in range(17)}
    assert pixels[:, :, 0].mean() < 5  # the left edge is paper
    assert pixels.max() == 255


def test_digits_and_their_card_are_what_the_script_makes(digits, monkeypatch, tmp_path):
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("make_digits", DIGITS.parent / "make_digits.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "FOLDER", tmp_path / "digits")
    script.main()
    assert (tmp_path / "digits/README.md").read_text() == (DIGITS / "README.md").read_text()
    made = datasets.load_dataset(str(tmp_path / "digits"))
    for split, rows in digits.items():
        assert made[split]["label"] == rows["label"]
        assert made[split]["image"] == rows["image"]
