"""What people have next to their images, or in place of them, is named with the way out."""

import base64
import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from ddpm.config.data import DataConfig
from ddpm.data import decode
from ddpm.data.dataset import load_images
from ddpm.data.file_kind import KINDS, kind_of
from tests.files import gray, noise


def saved(write) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def zipped(name: str) -> bytes:
    return saved(lambda buffer: zipfile.ZipFile(buffer, "w").writestr(name, "a"))


CONFIG = decode.DecodeConfig.of(DataConfig())
PIXELS = np.zeros((8, 8), np.uint8)
FILES = {
    # first word of the kind: files
    "an empty file": [b""],
    "a pointer of Git LFS": [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"],
    "SVG": [b"<svg/>", b'<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC "">\n<svg>'],
    "a web page": [
        b"\n<!DOCTYPE html><html>",
        b"\xef\xbb\xbf<HTML>",
        b"<!-- x --><html lang='en'>",
    ],
    "XML or JSON": [b"<?xml version='1.0'?><Error>", json.dumps({"error": 1}).encode()],
    "HEIC": [b"\0\0\0\x18ftypheic", b"\0\0\0\x18ftypmif1"],
    "JPEG XL": [b"\xff\x0a\0", b"\0\0\0\x0cJXL \r\n"],
    "a video": [b"\0\0\0\x18ftypisom", b"RIFF\0\0\0\0AVI LIST", b"\x1a\x45\xdf\xa3"],
    "PDF": [b"%PDF-1.7"],
    "NumPy": [saved(lambda b: np.save(b, PIXELS)), saved(lambda b: np.savez(b, a=PIXELS))],
    "MATLAB": [b"MATLAB 5.0 MAT-file Platform: posix"],
    "HDF5": [b"\x89HDF\r\n\x1a\n"],
    "LMDB": [bytes(16) + b"\xde\xc0\xef\xbe"],
    "a Python pickle": [pickle.dumps({"data": b""}, protocol) for protocol in (2, 5)],
    "MNIST's IDX": [b"\0\0\x08\x03\0\0\xea\x60", b"\0\0\x08\x01\0\0\xea\x60"],
    "DICOM": [bytes(128) + b"DICM"],
    "NIfTI": [bytes(344) + b"n+1\0"],
    "zip": [zipped("train/a.png")],
    "compressed": [gzip.compress(b"a"), b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a"],
    "tar": [tarfile.TarInfo("a").tobuf()],
    "a table": [b"PAR1", b"ARROW1\0\0"],
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_images_are_named(kind):
    for content in FILES[kind]:
        assert str(kind_of(io.BytesIO(content))).startswith(kind)
        with pytest.raises(decode.DecodeError, match=f"^a.jpg: not a readable image: {kind}"):
            decode.decode_row({"bytes": content, "path": "a.jpg"}, CONFIG, None)


def test_every_kind_has_a_file():
    assert [kind for _, kind in KINDS if not kind.startswith(tuple(FILES))] == []
    assert len(KINDS) == len(FILES)


@pytest.mark.parametrize("content", [b"text", b"\xff\xd8\xff", b"II*\0", b"MM\0+" + b"\xff" * 40])
def test_other_files_have_no_kind(content):
    assert kind_of(io.BytesIO(content)) is None


def test_conversions_of_the_docs_make_images(tmp_path, monkeypatch):
    """The lines of docs/data.md, on what they are about."""
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    code = page.partition("### Conversions")[2].partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    np.save("cat.npy", noise(3, 784))
    pages = [Image.fromarray(noise(9, 9, seed=seed)) for seed in range(3)]
    pages[0].save("stack.tif", save_all=True, append_images=pages[1:])
    Image.fromarray(noise(64, 100, 3)).save("sheet.png")
    text = [base64.b64encode(file).decode() for file in gray(1, 2)]
    rows = datasets.Dataset.from_dict({"text": text, "pixels": [noise(9, 9, 3).tolist()] * 2})
    rows.to_parquet("table.parquet")
    header = ["label", *(f"pixel{n}" for n in range(784))]
    lines = [header, *([0, *row] for row in noise(2, 784).tolist())]
    Path("train.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))
    exec(compile(code, "docs/data.md", "exec"), {})
    images = load_images(DataConfig(train_data_dir="images", resolution=8), show_progress=False)
    counts = Counter(Path(name).stem.split("-")[0] for name in os.listdir("images"))
    assert counts == {"cat": 3, "page": 3, "sprite": 6, "base64": 2, "list": 2, "csv": 2}
    assert len(images) == 18
