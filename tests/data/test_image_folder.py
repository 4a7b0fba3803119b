"""Which files of a folder are trained on, and which are named as left out."""

import io
import json
import os
import sys
import zipfile
from pathlib import Path

import datasets
import pytest

from ddpm.config.data import DataConfig
from ddpm.data import dataset, report
from ddpm.data.image_folder import list_images
from ddpm.data.source import find_held_out_split, open_source
from ddpm.errors import UserError
from tests.files import encoded, gray, photo

PNG = gray(1)[0]
AVIF = encoded(photo(8), kind="AVIF")
NO_IMAGE = "no image that Pillow reads"
CONVERT = "to be converted first (docs/data.md)"
OUTSIDE = "outside of the splits train, test"


def archive(members: dict[str, bytes]) -> bytes:
    """The bytes of a zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def lines(*names: str, key: str = "file_name") -> bytes:
    """A metadata.jsonl that lists these files."""
    return "\n".join(json.dumps({key: name, "text": "a"}) for name in names).encode()


def write(folder: Path, files: dict[str, bytes | str]) -> str:
    """Write files below a folder; a text is the target of a link. Returns the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)
    return str(folder)


def names_of(rows: list[dict[str, str | None]], folder: Path) -> list[str]:
    """The files of rows, as names below the folder; of members after the name of the zip file."""
    names = []
    for row in rows:
        for path in row.values():
            member, _, file = str(path).removeprefix("zip://").rpartition("::")
            name = os.path.relpath(file, folder)
            names.append(f"{name}/{member}" if member else name)
    return names


LAYOUTS = {
    # name: (files, names of the rows of train in order, {reason: names left out})
    "flat": (
        {"b.png": PNG, "a.JPG": PNG, "c.txt": b"a caption", "labels.csv": b"a,b"},
        ["a.JPG", "b.png"],
        {},
    ),
    "words of splits in names": (
        {"a train.png": PNG, "beach.png": PNG, "test.png": PNG, "eval-3.png": PNG, "dev.png": PNG},
        ["a train.png", "beach.png", "dev.png", "eval-3.png", "test.png"],
        {},
    ),
    "classes, one named like a split": (
        {f"{name}/{n}.png": PNG for name in ("car", "boat", "train", "bus") for n in range(3)},
        [f"{name}/{n}.png" for name in ("boat", "bus", "car", "train") for n in range(3)],
        {},
    ),
    "splits": (
        {"train/a.png": PNG, "test/b.png": PNG, "README.md": b"# Photos"},
        ["train/a.png"],
        {},
    ),
    "splits of classes": (
        {"train-1/car/a.png": PNG, "train-1/test/b.png": PNG, "val/car/c.png": PNG},
        ["train-1/car/a.png", "train-1/test/b.png"],
        {},
    ),
    "splits below one folder": (
        {"photos/images/train2017/a.png": PNG, "photos/images/val2017/b.png": PNG},
        ["photos/images/train2017/a.png"],
        {},
    ),
    "splits and other folders": (
        {"Train/a.png": PNG, "Test/b.png": PNG, "extra/c.png": PNG, "d.png": PNG},
        ["Train/a.png"],
        {OUTSIDE: ["d.png", "extra/c.png"]},
    ),
    "files named for splits": (
        {"train-1.png": PNG, "train-2.png": PNG, "test-1.png": PNG},
        ["train-1.png", "train-2.png"],
        {},
    ),
    "zip files named for splits": (
        {"train.zip": archive({"a.png": PNG}), "test.zip": archive({"b.png": PNG})},
        ["train.zip/a.png"],
        {},
    ),
    "links to folders, with loops": (
        {
            "a/1.png": PNG,
            "a/up": "..",
            "a/self": ".",
            "b/2.png": PNG,
            "b/to-a": "../a",
            "c": "../elsewhere",
            "../elsewhere/3.png": PNG,
            "../elsewhere/back": "../photos",
            "out": "../..",
        },
        ["a/1.png", "b/2.png", "c/3.png"],
        {},
    ),
    "links to files": (
        {"a.png": "../elsewhere.png", "../elsewhere.png": PNG, "b.png": "gone.png"},
        ["a.png", "b.png"],  # the second is unreadable, and counted
        {},
    ),
    "other endings and none": (
        {
            "a.avif": AVIF,
            "b": PNG,
            "c.jpg_large": PNG,
            "d.png~": PNG,
            "e.heic": b"\0\0\0\x18ftypheic",
            "f.jxl": b"\xff\n",
            "g.svg": b"<svg/>",
            "h.nef": encoded(photo(8), kind="TIFF"),
            "i.mp4": b"\0\0\0\x18ftypisom",
            "j.h5": b"\x89HDF\r\n\x1a\n",
            "k.parquet": b"PAR1",
        },
        ["a.avif", "b", "c.jpg_large", "d.png~"],
        {
            f"{NO_IMAGE}: HEIC, {CONVERT}": ["e.heic"],
            f"{NO_IMAGE}: JPEG XL, {CONVERT}": ["f.jxl"],
            f"{NO_IMAGE}: SVG, {CONVERT}": ["g.svg"],
            f"{NO_IMAGE}: a video, {CONVERT}": ["i.mp4"],
            f"{NO_IMAGE}: HDF5, {CONVERT}": ["j.h5"],
            f"{NO_IMAGE}: a table, to be given as --dataset_name": ["k.parquet"],
            "raw camera files, to be developed first": ["h.nef"],
        },
    ),
    "junk and hidden files": (
        {
            "a.png": PNG,
            "._a.png": PNG,
            ".DS_Store": PNG,
            "Thumbs.db": PNG,
            "__MACOSX/._a.png": PNG,
            "__MACOSX/b.png": PNG,
            "@eaDir/a.png/SYNOPHOTO_THUMB.jpg": PNG,
            ".ipynb_checkpoints/a-checkpoint.png": PNG,
            ".trash/c.png": PNG,
            ".trash/c.txt": b"",
            ".d.png": PNG,
            "__kept__/e.png": PNG,
            "$RECYCLE.BIN/f.png": PNG,
            "#recycle/g.png": PNG,
            "a.png:Zone.Identifier": b"[ZoneTransfer]",
        },
        ["__kept__/e.png", "a.png"],
        {"hidden": [".d.png", ".trash/c.png"]},
    ),
    "same names in each folder, as IIIF servers have them": (
        {f"{n}%2Fa/full/!90,90/0/default.jpg": PNG for n in range(3)} | {"0/info.json": b"{}"},
        [f"{n}%2Fa/full/!90,90/0/default.jpg" for n in range(3)],
        {},
    ),
    "archives of archives": (
        {
            "a.zip": archive({"train.zip": archive({"a.png": PNG}), "b.png": PNG}),
            "c.tar": bytes(257) + b"ustar",
            "d.tar.gz": b"\x1f\x8b",
        },
        ["a.zip/b.png"],
        {
            f"{NO_IMAGE}: compressed, to be unpacked first": ["d.tar.gz"],
            f"{NO_IMAGE}: tar, to be unpacked first or to be given as --dataset_name": ["c.tar"],
            f"{NO_IMAGE}: zip, to be unpacked first": ["a.zip/train.zip"],
        },
    ),
    "competitions, each folder in one of its name": (
        {"train/train/cat.0.jpg": PNG, "test1/test1/1.jpg": PNG, "sampleSubmission.csv": b"a"},
        ["train/train/cat.0.jpg"],
        {},
    ),
    "labels in files": (
        {"images/train/0.jpg": PNG, "images/val/1.jpg": PNG, "labels/train/0.txt": b"0 0"}
        | {"annotations/instances.json": b"{}", "data.yaml": b""},
        ["images/train/0.jpg"],
        {},
    ),
    "masks next to images, and pairs": (
        {f"{folder}/0.png": PNG for folder in ("images", "masks", "trainA", "testB")},
        ["images/0.png", "masks/0.png", "testB/0.png", "trainA/0.png"],
        {},
    ),
    "zip files": (
        {
            "z.png": PNG,
            "a.zip": archive(
                {"b/c.png": PNG, "d.png": PNG, "n.txt": b"", "x.bin": b"?", "__MACOSX/b/._c": b""}
            ),
            "sub/broken.zip": b"PK, but nothing more",
        },
        ["z.png", "a.zip/d.png", "a.zip/b/c.png", "sub/broken.zip/broken.zip"],
        {NO_IMAGE: ["a.zip/x.bin"]},
    ),
    "metadata of all images, which give the order": (
        {"metadata.jsonl": lines("b.png", "sub/c.png", "a.png"), "a.png": PNG, "b.png": PNG}
        | {"sub/c.png": PNG},
        ["b.png", "sub/c.png", "a.png"],
        {},
    ),
    "metadata of some images": (
        {"metadata.csv": b'file_name,text\nd.png,x\nb.png,"a\nb"\n'}
        | {f"{n}.png": PNG for n in "abcd"},
        ["d.png", "b.png", "a.png", "c.png"],
        {},
    ),
    "metadata next to a zip file": (
        {
            "metadata.jsonl": lines("b.png", "a.png"),
            "images.zip": archive({f"{n}.png": PNG for n in "abc"}),
        },
        ["images.zip/b.png", "images.zip/a.png", "images.zip/c.png"],
        {},
    ),
    "metadata of no image": (
        {"metadata.jsonl": lines("x.png"), "a.png": PNG},
        ["a.png"],
        {"metadata of none of the images": ["metadata.jsonl"]},
    ),
    "metadata that lead outside": (
        {"metadata.jsonl": lines("a.png", "../b.png"), "a.png": PNG, "../b.png": PNG},
        ["a.png"],
        {"metadata of files outside of the folder": ["metadata.jsonl"]},
    ),
    "metadata for other splits": (
        {"metadata.jsonl": lines("train/b.png", "train/a.png"), "test/metadata.jsonl": b""}
        | {"train/a.png": PNG, "train/b.png": PNG, "test/a.png": PNG},
        ["train/a.png", "train/b.png"],
        {OUTSIDE: ["metadata.jsonl"], "metadata of none of the images": ["test/metadata.jsonl"]},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_image_is_a_row_or_is_named(layout, tmp_path):
    files, rows, left_out = LAYOUTS[layout]
    folder = tmp_path / "around" / "photos"
    write(folder, files)
    listing = list_images(str(folder))
    assert names_of(listing.splits["train"], folder) == rows
    assert listing.left_out == left_out


def test_broken_metadata_are_named(tmp_path):
    write(tmp_path, {"a/metadata.jsonl": b"{", "a/a.png": PNG, "b/metadata.parquet": b"no"})
    listing = list_images(str(tmp_path))
    assert names_of(listing.splits["train"], tmp_path) == ["a/a.png"]
    assert list(listing.left_out.values()) == [["a/metadata.jsonl"], ["b/metadata.parquet"]]
    assert all(reason.startswith("metadata that cannot be read: ") for reason in listing.left_out)


@pytest.mark.parametrize("flag", ["train_data_dir", "dataset_name"])
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_left_out_is_reported_and_recorded(flag, streaming, tmp_path):
    files = {f"{n}.raw": b"?" for n in range(7)} | {".a.png": PNG, "a train.png": PNG}
    rows = {"rows_per_epoch": 2} if streaming else {}
    config = DataConfig(**{flag: write(tmp_path, files)}, resolution=4, streaming=streaming, **rows)
    facts = dataset.load_images(config, show_progress=False).facts
    assert facts.left_out == {"hidden": 1, NO_IMAGE: 7}
    assert facts.left_out_first[NO_IMAGE] == [f"{n}.raw" for n in range(5)]
    text = report.format_report(facts)
    assert "1 left out (hidden): .a.png." in text
    assert f"7 left out ({NO_IMAGE}): 0.raw, 1.raw, 2.raw, 3.raw, 4.raw, ...." in text


def test_odd_files_count_as_unreadable_images(tmp_path):
    """A broken zip file and a name that is not UTF-8 do not keep the others from being read."""
    files = {f"{n}.png": PNG for n in range(4)} | {"photos.zip": b"PK"}
    folder = write(tmp_path, files)
    if sys.platform == "linux":
        Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_bytes(PNG)
    config = DataConfig(train_data_dir=folder, resolution=4, max_bad_images=0.5)
    images = dataset.load_images(config, show_progress=False)
    assert len(images) == 4
    reasons = " ".join(images.facts.unreadable_first)
    assert "photos.zip: File is not a zip file" in reasons
    assert sys.platform != "linux" or "(the name is not UTF-8)" in reasons
    with pytest.raises(UserError, match="photos.zip: File is not a zip file"):
        dataset.load_images(DataConfig(train_data_dir=folder, resolution=4), show_progress=False)


@pytest.mark.parametrize("streaming", [False, True])
def test_data_without_images_name_what_they_have(streaming, tmp_path):
    """MNIST, LFS pointers, zip files in a zip file: the sentence says what to do with them."""
    idx = b"\0\0\x08\x03\0\0\xea\x60"
    folder = write(tmp_path / "raw", {"train-images": idx, "test-images": idx, "a.heic": b"?"})
    left_out = (
        r" Left out: a.heic \(no image that Pillow reads\); test-images and 1 more \(no image that "
        rf"Pillow reads: MNIST's IDX, {CONVERT[:21]} \(docs/data.md\)\)\."
    )
    for flag in ("train_data_dir", "dataset_name"):
        with pytest.raises(UserError, match=f"{folder} contains no image files.*{left_out}"):
            open_source(DataConfig(**{flag: folder}, streaming=streaming))
    write(tmp_path, {"a.zip": archive({"train.zip": archive({"a.png": PNG})}), "b.npy": idx})
    with pytest.raises(UserError, match="contains no image files. Left out: train.zip .*unpacked"):
        open_source(DataConfig(dataset_name=str(tmp_path / "a.zip"), streaming=streaming))
    with pytest.raises(UserError, match=r"b.npy is not a .parquet, .* or .zip file but MNIST's"):
        open_source(DataConfig(dataset_name=str(tmp_path / "b.npy"), streaming=streaming))


def test_parts_of_splits_are_read(tmp_path):
    write(tmp_path, {f"train/{n}.png": PNG for n in range(4)} | {"test/4.png": PNG})

    def rows(split: str, **settings) -> list[str]:
        source = open_source(DataConfig(train_data_dir=str(tmp_path), split=split, **settings))
        return [Path(row["image"]["path"]).name for row in source.dataset]

    for streaming in (False, True):
        assert rows("train[1:3]", streaming=streaming) == ["1.png", "2.png"]
        assert rows("test+train[:1]", streaming=streaming) == ["4.png", "0.png"]
        with pytest.raises(
            UserError, match=r"Unknown split .val.\. Should be one of .*train.*test"
        ):
            rows("val", streaming=streaming)
    assert find_held_out_split(DataConfig(train_data_dir=str(tmp_path))) == "test"


def test_folder_with_tables_or_a_card_is_read_by_datasets(tmp_path):
    write(tmp_path, {"preview.png": PNG})
    datasets.Dataset.from_dict({"n": [1]}).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(UserError, match="no column of type Image"):
        open_source(DataConfig(dataset_name=str(tmp_path)))
    assert open_source(DataConfig(train_data_dir=str(tmp_path))).facts.rows == 1


def test_changed_image_is_decoded_again(tmp_path):
    config = DataConfig(train_data_dir=write(tmp_path, {"a.png": PNG}), resolution=4)
    assert dataset.load_images(config, False).pixels(0).unique().tolist() == [1]
    (tmp_path / "a.png").write_bytes(gray(2)[0])
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert dataset.load_images(config, False).pixels(0).unique().tolist() == [2]


def test_several_columns_of_metadata_need_a_choice(tmp_path):
    row = {"file_name": "a.png", "mask_file_name": "b.png"}
    files = {"metadata.jsonl": json.dumps(row).encode(), "a.png": PNG, "b.png": PNG, "c.png": PNG}
    config = {"train_data_dir": write(tmp_path, files)}
    with pytest.raises(UserError, match="several image columns: image, mask"):
        open_source(DataConfig(**config))
    source = open_source(DataConfig(**config, image_column="mask"))
    assert [Path(row["mask"]["path"]).name for row in source.dataset] == ["b.png"]
    assert list(source.facts.left_out_first.values()) == [["c.png"]]


def test_moved_folder_has_the_same_pixels(tmp_path):
    """By which a checkpoint knows its data, wherever these are."""
    files = {f"{n}/{n}.png": gray(n)[0] for n in range(3)} | {"3": gray(3)[0]}
    hashes = {
        dataset.load_images(
            DataConfig(train_data_dir=write(tmp_path / place, files), resolution=4), False
        ).facts.pixels_sha256
        for place in ("job 1/photos", "job-2/train")
    }
    assert len(hashes) == 1
