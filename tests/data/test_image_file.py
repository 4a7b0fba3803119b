"""The file of a row: its bytes or a file of the same dataset, and nothing else on this machine."""

import os
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from datasets import Features
from huggingface_hub import HfApi, constants, hf_hub_download

from ddpm.config.data import DataConfig
from ddpm.data import dataset, image_file
from tests.files import gray

OUTSIDE = "points outside the dataset"


def read(path: str | None, hub_id: str | None = None) -> bytes:
    return image_file.read_image_file({"bytes": None, "path": path}, hub_id).read()


def upload(repo_id: str, **files: bytes | Path) -> str:
    """Add files to a dataset, made if it is missing, and return the commit. `__` stands for a /."""
    HfApi().create_repo(repo_id, repo_type="dataset", private=True, exist_ok=True)
    for name, content in files.items():
        name = name.replace("__", "/").replace("_", ".")
        info = HfApi().upload_file(
            path_or_fileobj=content, path_in_repo=name, repo_id=repo_id, repo_type="dataset"
        )
    return info.oid


def zip_of(folder: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("_", "."), content)
    return folder / "a.zip"


def parquet_of_paths(folder: Path, paths: list[str]) -> Path:
    """A parquet file with rows that have a path and no bytes."""
    schema = Features({"image": datasets.Image()}).arrow_schema
    rows = {"image": [{"bytes": None, "path": path} for path in paths]}
    pyarrow.parquet.write_table(pyarrow.table(rows, schema), folder / "train.parquet")
    return folder / "train.parquet"


# The user's own data


def test_own_data_may_name_local_files(tmp_path, monkeypatch):
    """Absolute, relative, behind a link, in a zip file, and with a name like a chain."""
    for name in ("a.png", "b::c.png"):
        (tmp_path / name).write_bytes(b"image")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    archive = zip_of(tmp_path, a_png=b"image")
    monkeypatch.chdir(tmp_path)
    for path in ("a.png", "link.png", "b::c.png", f"{tmp_path}/a.png", f"zip://a.png::{archive}"):
        assert read(path) == b"image"


@pytest.mark.parametrize(
    "path",
    [
        "http://127.0.0.1:1/a.png",
        "https://example.org/a.png",
        "ftp://example.org/a.png",
        "hf://datasets/alice/private/a.png",
        "file:///etc/hostname",
        "local:///etc/hostname",
        "reference://a::file:///etc/hostname",
        "filecache::file:///etc/hostname",
        "simplecache::http://127.0.0.1:1/a.png",
        "zip://a.png::hf://datasets/alice/private/a.zip",
        "zip://a.png::zip://a.zip::hf://datasets/alice/private/a.zip",
        "memory://a.png",
        "data://text/plain,a",
        "github://owner:name@main/a.png",
    ],
)
@pytest.mark.parametrize("hub_id", [None, "bob/pictures"])
def test_no_other_place_is_opened(path, hub_id, monkeypatch):
    monkeypatch.setattr(image_file, "_open", lambda path: pytest.fail(f"opened {path}"))
    with pytest.raises(ValueError, match=OUTSIDE):
        read(path, hub_id)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "pipe.png", tmp_path / "link.png", "/dev/zero", "/dev/stdin"):
        for form in (str(path), f"zip://a.png::{path}"):
            with pytest.raises(ValueError, match="not a regular file"):
                read(form)
    for path in ("n" * 300, "d/" * 3000, "a\0b", ""):
        with pytest.raises((OSError, ValueError)):
            read(path)
    for row in (None, {"bytes": None, "path": None}, {}):
        with pytest.raises(ValueError, match="no image in this row"):
            image_file.read_image_file(row, None)


def test_size_and_time_have_limits(tmp_path, monkeypatch):
    """For bytes, files, members of a zip file, and a file that states another size."""
    (tmp_path / "a.png").write_bytes(bytes(1000))
    archive = zip_of(tmp_path, a_png=bytes(1000))
    monkeypatch.setattr(image_file, "MAX_FILE_BYTES", 999)
    with pytest.raises(ValueError, match="larger than the limit of 999 bytes"):
        image_file.read_image_file({"bytes": bytes(1000), "path": None}, None)
    for path in (f"{tmp_path}/a.png", f"zip://a.png::{archive}", "/proc/self/smaps"):
        with pytest.raises(ValueError, match="larger than the limit of 999 bytes"):
            read(path)
    monkeypatch.undo()
    monkeypatch.setattr(image_file, "MAX_SECONDS", -1)
    for path in (f"{tmp_path}/a.png", f"zip://a.png::{archive}"):
        with pytest.raises(ValueError, match="not read after -1 seconds"):
            read(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_without_a_bound_is_refused(tmp_path, compression):
    """A megabyte of bzip2 unpacks to twenty gigabytes at once, whatever size the archive states."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", compression) as archive:
        archive.writestr("a.png", bytes(1000))
    with pytest.raises(ValueError, match="compressed in another way"):
        read(f"zip://a.png::{tmp_path}/a.zip")


# A dataset of the Hub


def test_rows_of_the_hub_that_point_elsewhere_are_unreadable(alice, hub, tmp_path, monkeypatch):
    """Streamed or not: nothing is opened, asked for or waited for, and the good row is read.

    The rows name the user's own files, other repositories and caches, devices and addresses.
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)

        do_HEAD = do_GET

    private = upload("alice/private", a_png=gray(66)[0])
    cached = hf_hub_download("alice/private", "a.png", repo_type="dataset")
    (tmp_path / "own.png").write_bytes(gray(66)[0])
    archive = zip_of(tmp_path, a_png=gray(66)[0])
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.chdir(tmp_path)
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    own = upload("alice/pictures", good_png=gray(9)[0])
    snapshot = f"{constants.HF_HUB_CACHE}/datasets--alice--pictures/snapshots/{own}"
    address = f"hf://datasets/alice/pictures@{own}"
    paths = [
        "own.png",
        f"{tmp_path}/own.png",
        f"file://{tmp_path}/own.png",
        f"zip://a.png::{archive}",
        f"zip://a.png::file://{archive}",
        f"reference://a::{tmp_path}/own.png",
        "/dev/zero",
        "file:///dev/zero",
        f"{tmp_path}/pipe.png",
        cached,
        os.path.realpath(cached),
        f"{snapshot}/../../../datasets--alice--private/snapshots/{private}/a.png",
        f"hf://datasets/alice/private@{private}/a.png",
        "hf://datasets/alice/private/a.png",
        f"{address}/../../alice/private/a.png",
        f"{address}::file://{tmp_path}/own.png",
        f"simplecache::{address}/good.png",
        f"http://127.0.0.1:{port}/a.png",
        f"~/../{tmp_path}/own.png",
    ]
    table = parquet_of_paths(tmp_path, [*paths, f"{address}/good.png"])
    upload("alice/pictures", data__train_parquet=table)
    hub.clear_requests()
    config = DataConfig(dataset_name="alice/pictures", resolution=4, max_bad_images=1.0)
    images = dataset.load_images(config, show_progress=False)
    assert (len(images), images.pixels(0).unique().tolist()) == (1, [9])
    assert images.facts.unreadable == len(paths)
    assert all(reason.endswith(OUTSIDE) for reason in images.facts.unreadable_first)
    stream = dataset.load_images(
        DataConfig(
            dataset_name="alice/pictures",
            resolution=4,
            streaming=True,
            rows_per_epoch=21,
            max_bad_images=1.0,
        ),
        show_progress=False,
    )
    assert stream.facts.unreadable == len(paths)
    assert all(reason.endswith(OUTSIDE) for reason in stream.facts.unreadable_first)
    assert not requests
    assert not [r for r in hub.requests if "alice/private" in r.path]
    server.shutdown()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_files_of_the_dataset_itself_are_read(alice, tmp_path, kind, streaming):
    """The paths that `datasets` finds itself: links of a snapshot, addresses, members of a zip."""
    repo_id = f"alice/{kind}-{streaming}"
    if kind == "zip":
        upload(repo_id, a_zip=zip_of(tmp_path, a_png=gray(1)[0], b_png=gray(2)[0]))
    else:
        upload(repo_id, a_png=gray(1)[0], deep__b_png=gray(2)[0])
    config = DataConfig(
        dataset_name=repo_id,
        resolution=4,
        streaming=streaming,
        rows_per_epoch=2 if streaming else None,
    )
    facts = dataset.load_images(config, show_progress=False).facts
    assert (facts.unreadable, facts.sizes, facts.exact_duplicates) == (0, {"4x4": 2}, 0)


def test_links_in_a_snapshot_lead_only_to_blobs(alice, tmp_path):
    """Whatever placed them there: the cache itself links only to its blobs."""
    commit = upload("alice/links", a_png=b"image")
    own = hf_hub_download("alice/links", "a.png", repo_type="dataset")
    assert Path(own).parent.name == commit
    assert read(own, "alice/links") == b"image"
    upload("alice/other", a_png=b"secret")
    other = hf_hub_download("alice/other", "a.png", repo_type="dataset")
    (tmp_path / "a.png").write_bytes(b"secret")
    snapshot = Path(own).parent
    (snapshot / "out.png").symlink_to(tmp_path / "a.png")
    (snapshot / "zero.png").symlink_to("/dev/zero")
    (snapshot / "other.png").symlink_to(other)
    (snapshot / "folder").symlink_to(tmp_path)
    for name in ("out.png", "zero.png", "folder/a.png", "../../refs/main"):
        with pytest.raises(ValueError, match=OUTSIDE):
            read(str(snapshot / name), "alice/links")
    (snapshot / "plain.png").write_bytes(b"image")  # as on a system without links
    assert read(str(snapshot / "plain.png"), "alice/links") == b"image"
    with pytest.raises(ValueError, match=OUTSIDE):
        read(own, "alice/other")
