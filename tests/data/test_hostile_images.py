"""Inputs that break loaders: each is read, skipped with a reason, or refused in one sentence.

Tables of files and of datasets go through `load_images`, which may raise nothing but UserError and
may not hang.
"""

import io
import os
import signal
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Value
from PIL import Image

from ddpm.config.data import DataConfig
from ddpm.data import dataset, report
from ddpm.errors import UserError
from tests.files import chunk, encoded, gray, header, noise, photo, png, write_parquet

SECONDS = 60


@pytest.fixture(autouse=True)
def no_hang():
    """Fail a test that hangs."""

    def fail(*args):
        raise AssertionError(f"not finished after {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def exif(**tags: int) -> Image.Exif:
    data = Image.Exif()
    for tag, value in tags.items():
        data[int(tag[1:], 16)] = value
    return data


def with_thumbnail() -> bytes:
    """A JPEG with another JPEG inside its EXIF."""
    small = encoded(Image.new("RGB", (16, 16), "red"), kind="JPEG")
    tiff = b"II*\0\x08\0\0\0" + b"\0\0" + struct.pack("<I", 14)
    tiff += struct.pack("<H", 2)
    tiff += struct.pack("<HHII", 0x0201, 4, 1, 44) + struct.pack("<HHII", 0x0202, 4, 1, len(small))
    tiff += struct.pack("<I", 0) + small
    return encoded(photo(32), kind="JPEG", exif=b"Exif\0\0" + tiff, quality=95)


def broken_checksum() -> bytes:
    file = bytearray(encoded(noise(16, 16)))
    file[file.index(b"IDAT") + 8] ^= 0xFF
    return bytes(file)


def bomb() -> bytes:
    """A PNG whose text unpacks to ten megabytes; Pillow stops at one."""
    text = b"Comment\0\0" + zlib.compress(bytes(10**7), 9)
    good = encoded(np.zeros((4, 4), np.uint8))
    return good[:33] + chunk(b"zTXt", text) + good[33:]


def gif_cut_in_second_frame() -> bytes:
    frames = [Image.fromarray(noise(32, 32, seed=seed)) for seed in range(3)]
    file = encoded(frames[0], kind="GIF", save_all=True, append_images=frames[1:])
    return file[: len(file) // 2]


def short_tiff() -> bytes:
    """A TIFF whose directory points behind its end."""
    return b"II*\0" + struct.pack("<I", 10**6)


PHOTO = photo(48)
READ, SKIPPED = "read", "skipped"
FILES = {
    # broken files are skipped, with a reason
    "PNG cut off": (encoded(noise(64, 64))[:-900], SKIPPED),
    "PNG with a header alone": (header(8, 8), SKIPPED),
    "PNG without its end": (encoded(noise(8, 8))[:-12], READ),
    "PNG with a wrong checksum": (broken_checksum(), SKIPPED),
    "PNG of 0 x 0": (header(0, 0) + chunk(b"IDAT", zlib.compress(b"")), SKIPPED),
    "PNG that says 2**31 pixels a side": (
        header(2**31 - 1, 2**31 - 1) + chunk(b"IDAT", b"x"),
        SKIPPED,
    ),
    "PNG that says 60,000 pixels a side": (header(60_000, 60_000) + chunk(b"IDAT", b"x"), SKIPPED),
    "PNG that says 13,000 pixels a side": (header(13_000, 13_000) + chunk(b"IDAT", b"x"), SKIPPED),
    "PNG of an unknown depth": (header(4, 4, bits=5) + chunk(b"IDAT", b"x"), SKIPPED),
    "PNG with a text bomb": (bomb(), SKIPPED),
    "JPEG cut off": (encoded(PHOTO, kind="JPEG")[:-300], SKIPPED),
    "JPEG cut off in its header": (encoded(PHOTO, kind="JPEG")[:100], SKIPPED),
    "WebP cut off": (encoded(photo(64), kind="WEBP")[:-100], SKIPPED),
    "GIF cut off": (encoded(noise(64, 64), kind="GIF")[:-900], SKIPPED),
    "GIF cut off in its second frame": (gif_cut_in_second_frame(), READ),
    "BMP cut off": (encoded(PHOTO, kind="BMP")[:-500], SKIPPED),
    "TIFF cut off": (encoded(noise(64, 64), kind="TIFF")[:2000], SKIPPED),
    "TIFF that points behind its end": (short_tiff(), SKIPPED),
    "no bytes": (b"", SKIPPED),
    "one byte": (b"\x89", SKIPPED),
    "zeros": (bytes(4096), SKIPPED),
    "noise": (noise(64, 64).tobytes(), SKIPPED),
    "text": ("Größe: nicht gefunden".encode(), SKIPPED),
    "an error page": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", SKIPPED),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"/>', SKIPPED),
    "JSON": (b'{"image": null}', SKIPPED),
    "wrong magic before a PNG": (b"\0" + gray(1)[0], SKIPPED),
    "EPS, which is a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", SKIPPED),
    "no image in this row": (None, SKIPPED),
    "floats that are no numbers": (
        encoded(np.full((4, 4), np.nan, np.float32), kind="TIFF"),
        SKIPPED,
    ),
    "floats without end": (encoded(np.full((4, 4), np.inf, np.float32), kind="TIFF"), SKIPPED),
    "floats up to 255": (encoded(np.full((4, 4), 255.0, np.float32), kind="TIFF"), SKIPPED),
    "negative integers": (encoded(np.full((4, 4), -5, np.int32), kind="TIFF"), SKIPPED),
    # unusual files are read
    "PNG whose rows end early": (  # Pillow does not detect it: the rest is black
        header(8, 8) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b""),
        READ,
    ),
    "JPEG named otherwise": (encoded(PHOTO, kind="JPEG"), READ),
    "bytes after the end": (gray(5)[0] + b"and more", READ),
    "progressive JPEG": (encoded(PHOTO, kind="JPEG", progressive=True), READ),
    "JPEG with a thumbnail": (with_thumbnail(), READ),
    "JPEG in CMYK": (encoded(PHOTO.convert("CMYK"), kind="JPEG"), READ),
    "JPEG with broken EXIF": (
        encoded(PHOTO, kind="JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        READ,
    ),
    "JPEG with an orientation of 77": (encoded(PHOTO, kind="JPEG", exif=exif(x0112=77)), READ),
    "interlaced PNG": (png(noise(11, 9, 3), 2, bits=8, interlaced=True), READ),
    "interlaced PNG of 16 bits": (png(noise(11, 9, 4), 6, interlaced=True), READ),
    "PNG of 16-bit RGB": (png(noise(8, 8, 3), 2), READ),
    "PNG of 16-bit gray and alpha": (png(noise(8, 8, 2), 4), READ),
    "PNG of 16-bit gray with a transparent value": (png(noise(8, 8), 0, transparent=(7,)), READ),
    "PNG with a palette of one color": (encoded(Image.new("P", (4, 4))), READ),
    "wholly transparent": (encoded(Image.new("RGBA", (4, 4))), READ),
    "animated WebP": (
        encoded(PHOTO, kind="WEBP", save_all=True, append_images=[photo(48, 1)]),
        READ,
    ),
    "animated PNG": (encoded(PHOTO, save_all=True, append_images=[photo(48, 1)]), READ),
    "TIFF of several pages": (
        encoded(PHOTO, kind="TIFF", save_all=True, append_images=[PHOTO]),
        READ,
    ),
    "JPEG 2000": (encoded(PHOTO, kind="JPEG2000"), READ),
    "icon": (encoded(PHOTO, kind="ICO"), READ),
    "1 x 1": (gray(9, size=1)[0], READ),
    "1 x 20,000": (encoded(noise(1, 20_000)), READ),
    "20,000 x 1": (encoded(noise(20_000, 1)), READ),
    "36 megapixels of nothing": (encoded(Image.new("1", (6000, 6000))), READ),
}


def load_files(folder: Path, files: list[bytes | None]) -> dataset.ImageDataset:
    """Load a dataset with a good image at the beginning and at the end."""
    data = write_parquet(folder / "data.parquet", [*gray(1), *files, *gray(2)])
    config = DataConfig(dataset_name=str(data), resolution=4, max_bad_images=0.9)
    return dataset.load_images(config, show_progress=False)


def test_bad_files_are_read_or_skipped_with_a_reason(tmp_path, monkeypatch):
    """All files of the table in one dataset: each is judged by itself, in order."""
    monkeypatch.setattr(report, "MAX_EXAMPLES", len(FILES))
    images = load_files(tmp_path, [file for file, _ in FILES.values()])
    reasons = {
        int(row.removeprefix("row ")): reason
        for row, _, reason in (entry.partition(": ") for entry in images.facts.unreadable_first)
    }
    skipped = [name for row, name in enumerate(FILES, 1) if row in reasons]
    assert skipped == [name for name, (_, expected) in FILES.items() if expected == SKIPPED]
    assert (images.facts.unreadable, len(images)) == (len(skipped), len(FILES) + 2 - len(skipped))
    for reason in reasons.values():
        assert 3 < len(reason) < 200
        assert "\n" not in reason
        assert "object at 0x" not in reason
    assert images.pixels(0).unique().tolist() == [1]
    assert images.pixels(len(images) - 1).unique().tolist() == [2]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_bad_file_alone_is_read_or_skipped(name, tmp_path):
    """A dataset for each file: whether it is RGB, gray or skipped decides about the others."""
    file, expected = FILES[name]
    images = load_files(tmp_path, [file])
    assert len(images) == images.facts.images == (3 if expected == READ else 2)
    assert images.facts.unreadable == (0 if expected == READ else 1)
    assert images.pixels(0).unique().tolist() == [1]
    assert images.pixels(len(images) - 1).unique().tolist() == [2]


def test_table_has_all_its_files():
    """docs/data.md states these numbers."""
    kinds = [expected for _, expected in FILES.values()]
    assert (kinds.count(READ), kinds.count(SKIPPED)) == (26, 31)


# Names and places


def load_folder(folder: Path, **settings) -> dataset.ImageDataset:
    config = DataConfig(**{"train_data_dir": str(folder), "resolution": 4, **settings})
    return dataset.load_images(config, show_progress=False)


@pytest.mark.parametrize(
    "name",
    [
        "ünïcode-画像.png",
        "with space & 'quotes'.png",
        "-dash.png",
        "x" * 240 + ".png",
        "UPPER.PNG",
        "two.dots.png",
        "100%.png",
        "brackets[1].png",
        "star*.png",
        "a#b.png",
    ],
)
def test_any_file_name_is_read(name, tmp_path):
    (tmp_path / name).write_bytes(gray(7)[0])
    (tmp_path / "b.png").write_bytes(gray(7)[0])
    assert len(load_folder(tmp_path)) == 2


def test_wrong_extension_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(photo(8), kind="JPEG"))
    assert len(load_folder(tmp_path)) == 1


def test_bad_file_of_a_folder_is_named(tmp_path):
    for number, file in enumerate([*gray(1, 2), b"bad"]):
        (tmp_path / f"photo-{number}.png").write_bytes(file)
    with pytest.raises(UserError, match=r"The first: row 2: photo-2\.png: not a readable image"):
        load_folder(tmp_path)


def test_dangling_link_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(gray(1)[0])
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    try:
        images = load_folder(tmp_path, max_bad_images=0.5)
    except UserError as error:
        assert "b.png" in str(error) or "gone.png" in str(error)
    else:
        assert len(images) == 1
        assert images.facts.unreadable in (0, 1)


def test_links_in_a_circle_do_not_hang(tmp_path):
    (tmp_path / "a.png").write_bytes(gray(1)[0])
    (tmp_path / "b.png").symlink_to(tmp_path / "c.png")
    (tmp_path / "c.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "deep").symlink_to(tmp_path, target_is_directory=True)
    try:
        images = load_folder(tmp_path, max_bad_images=0.9)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert len(images) >= 1


def test_pipe_among_the_files_does_not_hang(tmp_path):
    (tmp_path / "a.png").write_bytes(gray(1)[0])
    os.mkfifo(tmp_path / "b.png")
    try:
        images = load_folder(tmp_path, max_bad_images=0.5)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert len(images) == 1


def test_folder_named_like_an_image_is_ignored(tmp_path):
    (tmp_path / "a.png").write_bytes(gray(1)[0])
    (tmp_path / "b.png").mkdir()
    assert len(load_folder(tmp_path)) == 1


# Datasets


def no_parquet(folder: Path) -> str:
    (folder / "data.parquet").write_bytes(b"PAR1 is not all there is to it")
    return str(folder / "data.parquet")


def cut_parquet(folder: Path) -> str:
    path = write_parquet(folder / "data.parquet", gray(*range(50)))
    path.write_bytes(path.read_bytes()[:-40])
    return str(path)


def no_zip(folder: Path) -> str:
    (folder / "data.zip").write_bytes(b"PK\3\4 and no more")
    return str(folder / "data.zip")


def empty_zip(folder: Path) -> str:
    zipfile.ZipFile(folder / "data.zip", "w").close()
    return str(folder / "data.zip")


def zip_of_text(folder: Path) -> str:
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        archive.writestr("a.txt", "no image")
    return str(folder / "data.zip")


def no_tar(folder: Path) -> str:
    (folder / "data.tar").write_bytes(noise(64, 64).tobytes())
    return str(folder / "data.tar")


def empty_tar(folder: Path) -> str:
    tarfile.open(folder / "data.tar", "w").close()
    return str(folder / "data.tar")


def cut_tar(folder: Path) -> str:
    with tarfile.open(folder / "data.tar", "w") as archive:
        member = tarfile.TarInfo("0.png")
        member.size = 10**5
        archive.addfile(member, io.BytesIO(bytes(10**5)))
    (folder / "data.tar").write_bytes((folder / "data.tar").read_bytes()[:5000])
    return str(folder / "data.tar")


def nothing_but_nulls(folder: Path) -> str:
    return str(write_parquet(folder / "data.parquet", [None, None]))


def bytes_not_images(folder: Path) -> str:
    rows = Dataset.from_dict(
        {"file": [b"\x00", b"\x01"]}, features=Features({"file": Value("binary")})
    )
    rows.to_parquet(folder / "data.parquet")
    return str(folder / "data.parquet")


def images_in_lists(folder: Path) -> str:
    features = Features({"images": datasets.List(datasets.Image())})
    rows = {"images": [[{"bytes": file, "path": None} for file in gray(1, 2)]]}
    Dataset.from_dict(rows, features=features).to_parquet(folder / "data.parquet")
    return str(folder / "data.parquet")


def single_image(folder: Path) -> str:
    (folder / "data.png").write_bytes(gray(1)[0])
    return str(folder / "data.png")


def csv_of_paths(folder: Path) -> str:
    (folder / "data.csv").write_text("path,label\na.png,1\nb.png,2\n")
    return str(folder)


def saved_without_its_data(folder: Path) -> str:
    Dataset.from_dict({"image": [1]}).save_to_disk(folder / "saved")
    next((folder / "saved").glob("*.arrow")).unlink()
    return str(folder / "saved")


DATASETS = [
    no_parquet,
    cut_parquet,
    no_zip,
    empty_zip,
    zip_of_text,
    no_tar,
    empty_tar,
    cut_tar,
    nothing_but_nulls,
    bytes_not_images,
    images_in_lists,
    single_image,
    csv_of_paths,
    saved_without_its_data,
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("make", DATASETS, ids=lambda make: make.__name__)
def test_dataset_is_refused_in_one_sentence(make, streaming, tmp_path):
    config = DataConfig(dataset_name=make(tmp_path), streaming=streaming, rows_per_epoch=None)
    with pytest.raises(UserError) as error:
        dataset.load_images(config, show_progress=False)
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert 20 < len(message) < 600
