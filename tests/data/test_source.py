"""Opening a dataset: every kind of source, and errors."""

import contextlib
import errno
import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import datasets
import fsspec
import huggingface_hub
import pytest
from datasets import Dataset, Features
from huggingface_hub import HfApi

from ddpm import download
from ddpm.config.data import DataConfig
from ddpm.data import dataset
from ddpm.data.source import Source, find_held_out_split, open_source
from ddpm.errors import UserError
from tests.data.opened import VALUES, opened
from tests.files import encoded, gray, noise, with_path, write_parquet
from tests.hub import Fault

# Kinds of sources: each gives (settings, name of the column)


def parquet_folder(folder: Path):
    write_parquet(folder / "train-00000-of-00001.parquet", gray(*VALUES), column="scan")
    return {"dataset_name": str(folder)}, "scan"


def parquet_file(folder: Path):
    return {"dataset_name": str(write_parquet(folder / "a.parquet", gray(*VALUES)))}, "image"


def image_folder(folder: Path):
    for value, file in zip(VALUES, gray(*VALUES), strict=True):
        (folder / f"{value}.png").write_bytes(file)
    return {"train_data_dir": str(folder)}, "image"


def folder_of_classes(folder: Path):
    for value, file in zip(VALUES, gray(*VALUES), strict=True):
        (folder / f"class-{value}").mkdir()
        (folder / f"class-{value}" / "a.png").write_bytes(file)
    return {"train_data_dir": str(folder)}, "image"


def webdataset(folder: Path):
    with tarfile.open(folder / "shard-000.tar", "w") as archive:
        for value, file in zip(VALUES, gray(*VALUES), strict=True):
            member = tarfile.TarInfo(f"{value}.png")
            member.size = len(file)
            archive.addfile(member, io.BytesIO(file))
    return {"dataset_name": str(folder / "shard-000.tar")}, "png"


def webdataset_folder(folder: Path):
    webdataset(folder)
    return {"dataset_name": str(folder)}, "png"


def compressed_webdataset(folder: Path):
    path = webdataset(folder)[0]["dataset_name"]
    with gzip.open(folder / "a.tgz", "wb") as file:
        file.write(Path(path).read_bytes())
    return {"dataset_name": str(folder / "a.tgz")}, "png"


def zip_file(folder: Path):
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        for value, file in zip(VALUES, gray(*VALUES), strict=True):
            archive.writestr(f"some where/{value}.png", file)
    return {"dataset_name": str(folder / "a.zip")}, "image"


def zip_in_a_folder(folder: Path):
    zip_file(folder)
    return {"train_data_dir": str(folder)}, "image"


def three_images() -> Dataset:
    rows = {"image": [with_path(file) for file in gray(*VALUES)]}
    return Dataset.from_dict(rows, features=Features({"image": datasets.Image()}))


def saved_to_disk(folder: Path):
    three_images().save_to_disk(folder / "saved")
    return {"dataset_name": str(folder / "saved")}, "image"


def saved_with_splits(folder: Path):
    datasets.DatasetDict(train=three_images(), test=three_images().select([0])).save_to_disk(
        folder / "saved"
    )
    return {"dataset_name": str(folder / "saved")}, "image"


SOURCES = [
    parquet_folder,
    parquet_file,
    image_folder,
    folder_of_classes,
    webdataset,
    webdataset_folder,
    compressed_webdataset,
    zip_file,
    zip_in_a_folder,
    saved_to_disk,
    saved_with_splits,
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_source_is_opened(make, streaming, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    settings, column = make(folder)
    source, values = opened(streaming, **settings)
    assert sorted(values) == list(VALUES)
    assert source.column == source.facts.image_column == column
    assert source.facts.on_hub is False
    assert source.facts.revision is None
    if not streaming:
        assert source.facts.rows == 3


def test_dataset_on_the_hub_is_pinned_to_its_commit(alice, tmp_path):
    """Private, at an old revision, streamed or not."""
    api = HfApi()
    api.create_repo("alice/pinned", repo_type="dataset", private=True)
    commits = []
    for values in ((1, 2), (3, 4, 5)):
        file = write_parquet(tmp_path / "a.parquet", gray(*values), column="img")
        commit = api.upload_file(
            path_or_fileobj=file,
            path_in_repo="data/train-00000-of-00001.parquet",
            repo_id="alice/pinned",
            repo_type="dataset",
        )
        commits.append(commit.oid)
    for streaming in (False, True):
        source, values = opened(streaming, dataset_name="alice/pinned")
        assert values == [3, 4, 5]
        assert (source.facts.revision, source.facts.on_hub) == (commits[1], True)
        source, values = opened(streaming, dataset_name="alice/pinned", dataset_revision=commits[0])
        assert values == [1, 2]
        assert source.facts.revision == commits[0]


def damage(path: Path) -> None:
    """Change one byte of a file in the cache; its size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.resolve().write_bytes(content)


def hub_dataset(hub, tmp_path, kind: str) -> tuple[str, list[bytes]]:
    """A dataset on the Hub, as parquet or as a zip: its id and its image files."""
    repo_id = f"alice/{tmp_path.name}"
    files = [encoded(noise(32, 32, seed=seed)) for seed in range(9)]
    path = tmp_path / f"train.{kind}"
    if kind == "parquet":
        write_parquet(path, files)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for number, file in enumerate(files):
                archive.writestr(f"{number}.png", file)
    repo = hub.create_repo("dataset", repo_id)
    repo.write({f"data/{path.name}": path.read_bytes(), "README.md": b"---\nlicense: mit\n---\n"})
    return repo_id, files


def files_of(source: Source) -> list[bytes]:
    """The image files of a source, which a zip keeps and a parquet file contains."""
    contents = []
    for row in source.dataset:
        content, path = row["image"]["bytes"], row["image"]["path"]
        with fsspec.open(path) if content is None else io.BytesIO(content) as file:
            contents.append(file.read())
    return contents


@pytest.mark.parametrize("kind", ["parquet", "zip"])
def test_damaged_files_of_a_hub_dataset_are_downloaded_again(hub, tmp_path, kind):
    """Also the files that other programs left in the cache, and what they made of them."""
    repo_id, files = hub_dataset(hub, tmp_path, kind)
    hub.inject(Fault("corrupt", path="/cdn/"))
    with contextlib.suppress(Exception):
        datasets.load_dataset(repo_id)
    for _ in range(2):
        source = open_source(DataConfig(dataset_name=repo_id))
        assert files_of(source) == files
        assert source.facts.license == "mit"
        folder = download.dataset_folder(repo_id, source.facts.revision)
        for name in (f"data/train.{kind}", "README.md"):
            damage(folder / name)
    hub.inject(Fault("corrupt", path="/cdn/", times=None))
    with pytest.raises(UserError, match=f"differ from the Hub's hashes .data/train.{kind}, twice"):
        open_source(DataConfig(dataset_name=repo_id))


def test_offline_a_hub_dataset_is_checked_too(hub, tmp_path, monkeypatch):
    """Its commit is known, and no other commit takes the place of the one asked for."""
    repo_id, files = hub_dataset(hub, tmp_path, "parquet")
    online = open_source(DataConfig(dataset_name=repo_id))
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    for revision in (None, online.facts.revision):
        source = open_source(DataConfig(dataset_name=repo_id, dataset_revision=revision))
        assert files_of(source) == files and source.facts == online.facts
    with pytest.raises(UserError, match="at revision v2; the cache has its commit"):
        open_source(DataConfig(dataset_name=repo_id, dataset_revision="v2"))
    damage(download.dataset_folder(repo_id, source.facts.revision) / "data/train.parquet")
    with pytest.raises(UserError, match="damaged in the cache .data/train.parquet"):
        open_source(DataConfig(dataset_name=repo_id))


@pytest.mark.parametrize("kind", ["parquet", "zip"])
@pytest.mark.parametrize("streaming", [False, True])
def test_offline_a_dataset_that_hf_download_got_is_opened(
    hub, tmp_path, monkeypatch, kind, streaming
):
    """`datasets` knows only those that it has opened with a network."""
    repo_id, files = hub_dataset(hub, tmp_path, kind)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    folder = Path(huggingface_hub.snapshot_download(repo_id, repo_type="dataset"))
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    config = DataConfig(dataset_name=repo_id, streaming=streaming)
    source = open_source(config)
    assert files_of(source) == files and source.facts.revision == folder.name
    assert find_held_out_split(config) is None
    next(path for path in (folder / "data").iterdir()).unlink()
    command = f"`hf download {repo_id} --repo-type dataset`"
    for open_it in (open_source, find_held_out_split):
        with pytest.raises(UserError, match=f"not all of it, and HF_HUB_OFFLINE .*{command}"):
            open_it(config)


def test_offline_a_dataset_that_cannot_be_opened_is_one_sentence(hub, tmp_path, monkeypatch):
    """Without a revision it is not known which commit in the cache may be damaged."""
    repo_id, _ = hub_dataset(hub, tmp_path, "parquet")
    open_source(DataConfig(dataset_name=repo_id))
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: {}["its cache"])
    with pytest.raises(UserError, match="cannot be opened: .its cache.\\.$"):
        open_source(DataConfig(dataset_name=repo_id))


def test_older_commit_does_not_replace_one_that_cannot_be_read(hub, tmp_path):
    """`datasets` falls back on its cache and only logs that; the record would name that commit."""
    repo_id, _ = hub_dataset(hub, tmp_path, "parquet")
    open_source(DataConfig(dataset_name=repo_id))
    commit = hub.repo("dataset", repo_id).write({"README.md": b"---\nconfigs: 5\n---\n"})
    with pytest.raises(UserError, match=f"cannot be opened at revision {commit}"):
        open_source(DataConfig(dataset_name=repo_id))


def test_private_dataset_without_a_token_is_refused(alice, monkeypatch):
    HfApi().create_repo("alice/secret", repo_type="dataset", private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="The dataset alice/secret does not exist on .*, or is pri"):
        opened(dataset_name="alice/secret")


def test_a_missing_revision_and_a_model_are_named(hub, tmp_path):
    repo_id, _ = hub_dataset(hub, tmp_path, "parquet")
    with pytest.raises(UserError, match=r"v9: give another revision\. It has main"):
        opened(dataset_name=repo_id, dataset_revision="v9")
    hub.create_repo("model", f"{repo_id}-model")
    with pytest.raises(UserError, match=r"There is a model of that name; give a dataset\.$"):
        opened(dataset_name=f"{repo_id}-model")


def test_missing_split_lists_the_existing_ones(tmp_path):
    write_parquet(tmp_path / "train-00000-of-00001.parquet", gray(1, 2))
    write_parquet(tmp_path / "test-00000-of-00001.parquet", gray(9))
    assert opened(dataset_name=str(tmp_path), split="test")[1] == [9]
    for streaming in (False, True):
        with pytest.raises(UserError, match=f"The dataset {tmp_path} cannot be opened") as error:
            opened(streaming, dataset_name=str(tmp_path), split="validation")
        for name in ("validation", "train", "test"):
            assert name in str(error.value)


def test_folders_named_for_splits_are_splits(tmp_path):
    for split, value in (("train", 1), ("test", 2)):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.png").write_bytes(gray(value)[0])
    assert opened(train_data_dir=str(tmp_path))[1] == [1]
    assert opened(train_data_dir=str(tmp_path), split="test")[1] == [2]


@pytest.mark.parametrize("name", ["brackets [1]", "star * and ?", "plain"])
def test_any_folder_name_is_read(name, tmp_path):
    (tmp_path / name / "deep/er").mkdir(parents=True)
    (tmp_path / name / "a.png").write_bytes(gray(1)[0])
    (tmp_path / name / "deep/er/b.png").write_bytes(gray(2)[0])
    assert sorted(opened(train_data_dir=str(tmp_path / name))[1]) == [1, 2]


def test_missing_split_of_a_saved_dataset_lists_the_existing_ones(tmp_path):
    settings, _ = saved_with_splits(tmp_path)
    with pytest.raises(UserError, match=r'split "dev". Should be one of \[.train., .test.\]'):
        opened(**settings, split="dev")


def test_empty_split_is_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", [])
    with pytest.raises(UserError, match="has no rows in its split 'train'. Choose another --split"):
        opened(dataset_name=str(tmp_path))


def test_missing_configuration_lists_the_existing_ones(tmp_path):
    write_parquet(tmp_path / "train.parquet", gray(1))
    for streaming in (False, True):
        with pytest.raises(UserError, match="no configuration other. Give --data.* one of default"):
            opened(streaming, dataset_name=str(tmp_path), dataset_config_name="other")
    configs = "".join(
        f"- config_name: c{number}\n  data_files: train.parquet\n" for number in range(30)
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(UserError, match="has several configurations.* c0, c1, .*c19 and 10 more"):
        opened(dataset_name=str(tmp_path))
    assert opened(dataset_name=str(tmp_path), dataset_config_name="c7")[1] == [1]


TARS = {
    "dots": (["img_0.1.png", "img_0.2.png", "img_0.3.png"], "image columns: 1.png, 2.png, 3.png"),
    "jpg and png": (["0.png", "1.jpg", "2.png"], "don't share the same prefix or the same types"),
    "jpg after png": ([*(f"{n}.png" for n in range(8)), "8.jpg"], "row 8: no image in this row"),
    "image and mask": (["0.jpg", "0.png", "1.jpg", "1.png"], "columns: jpg, png. Choose one with"),
    "image as label": (["0.png", "0.cls", "1.png"], "invalid literal for int.{,400}In a tar"),
    "no endings": (["0", "1"], "cannot be opened"),
}


@pytest.mark.parametrize("kind", TARS)
def test_tar_of_other_names_than_webdatasets_is_to_be_unpacked(kind, tmp_path):
    names, reason = TARS[kind]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, file in zip(names, gray(*range(len(names)), size=99), strict=True):
            member = tarfile.TarInfo(name)
            member.size = len(file)
            archive.addfile(member, io.BytesIO(file))
    config = DataConfig(dataset_name=str(tmp_path / "a.tar"), cache_dir=str(tmp_path), resolution=4)
    with pytest.raises(UserError, match=f"{reason}.*unpack it into a folder, and give that as"):
        dataset.load_images(config, False)


def test_script_of_a_dataset_is_not_run_but_its_parquet_files_are_read(alice, tmp_path):
    api, repo = HfApi(), {"repo_id": "alice/made", "repo_type": "dataset"}
    branch = "refs/convert/parquet"
    parquet = write_parquet(tmp_path / "a.parquet", gray(5))
    api.create_repo(**repo)
    api.create_branch(**repo, branch=branch)
    for path, file, revision in (
        ("made.py", b"raise SystemExit('was run')", "main"),
        ("default/train/0000.parquet", parquet, branch),
    ):
        api.upload_file(path_or_fileobj=file, path_in_repo=path, revision=revision, **repo)
    for streaming in (False, True):
        with pytest.raises(UserError, match=f"a script, which is not run.*revision {branch}"):
            opened(streaming, dataset_name="alice/made")
    for streaming in (False, True):
        values = opened(streaming, dataset_name="alice/made", dataset_revision=branch)[1]
        assert values == [5]
    (tmp_path / f"{tmp_path.name}.py").write_text("")
    with pytest.raises(UserError, match=f"move away {tmp_path.name}.py"):
        opened(dataset_name=str(tmp_path))


def test_offline_what_the_cache_lacks_is_named_with_its_command(hub, tmp_path, monkeypatch):
    repo_id, _ = hub_dataset(hub, tmp_path, "parquet")
    open_source(DataConfig(dataset_name=repo_id))
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    for name, config in (("alice/never", None), ("alice/never", "b"), (repo_id, "b")):
        for streaming in (False, True):
            message = f"{name} is not in the cache.*`hf download {name} --repo-type dataset`[.]$"
            with pytest.raises(UserError, match=message):
                opened(streaming, dataset_name=name, dataset_config_name=config)


def test_folder_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be opened"):
        opened(dataset_name=str(tmp_path))
    for name in ("notes.txt", "train.parquet"):
        with pytest.raises(UserError, match="contains no image files. For parquet or tar files"):
            opened(train_data_dir=str(tmp_path))
        (tmp_path / name).write_bytes(b"")


def test_missing_folder_is_refused():
    with pytest.raises(UserError, match="--train_data_dir /absent/photos is not a folder"):
        opened(train_data_dir="/absent/photos")
    with pytest.raises(UserError, match="/absent/photos is neither a folder here nor an id"):
        opened(dataset_name="/absent/photos")


def test_full_disk_is_not_blamed_on_the_dataset(tmp_path, monkeypatch):
    """errors.run handles it and says what to do about the disk."""

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset_builder", full)
    with pytest.raises(OSError, match="No space left"):
        opened(dataset_name=str(tmp_path))


def test_a_disk_that_fills_while_datasets_writes_is_not_blamed_on_the_dataset(tmp_path, make_disk):
    """`datasets` wraps the error in one of its own."""
    write_parquet(tmp_path / "data/train.parquet", [encoded(noise(64, 64)) for _ in range(20)])
    cache = str(make_disk(64))
    with pytest.raises(OSError) as error:
        opened(dataset_name=str(tmp_path / "data"), cache_dir=cache)
    assert error.value.errno == errno.ENOSPC


def test_a_cache_without_locks_is_not_blamed_on_the_dataset(tmp_path, no_locks):
    write_parquet(tmp_path / "train.parquet", gray(1))
    no_locks()
    with pytest.raises(OSError, match="No locks available"):
        opened(dataset_name=str(tmp_path), cache_dir=str(tmp_path / "cache"))
