"""Opening a dataset: from what a person names to its rows, the column of images, and facts.

A Hub id, a local folder laid out like one, a folder of image files, and single parquet, arrow, tar
(webdataset) and zip files all take `datasets`' own path, streamed or not.
"""

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import DatasetCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ddpm import hub
from ddpm.config.train import DataConfig
from ddpm.errors import DISK_ERRNOS, UserError

FILE_BUILDERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".zip": "imagefolder",
}
"""Which builder of `datasets` reads a single file, by its ending."""

HELD_OUT_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")
"""Names of splits that were not trained on, the likeliest first."""
SPLIT_WORDS = ("train", "val", "dev", "test", "eval")
"""What `datasets` takes for the name of a split in the name of a file or folder."""


@dataclass(frozen=True)
class Source:
    """A split as `datasets` opened it, with what the record says about where it came from.

    `dataset` has the one column `column`, undecoded: rows of {"bytes": ..., "path": ...} or None.
    `num_rows` is None for a stream that does not say.
    """

    dataset: datasets.Dataset | datasets.IterableDataset
    column: str
    num_rows: int | None
    facts: dict[str, Any]


def open_source(config: DataConfig) -> Source:
    """Find the dataset, pin its revision, open the split and find the image column.

    Raises UserError for one that is missing, not allowed, broken, empty, or without one column of
    images to choose.
    """
    name = config.dataset_name or config.train_data_dir
    assert name, "the config names no data"
    thing = f"The dataset {name}"
    on_hub, revision = False, None
    options: dict[str, Any] = {}
    if config.dataset_name is None:
        if not Path(name).is_dir():
            raise UserError(f"--train_data_dir {name} is not a folder.")
        path, options = "imagefolder", _folder_options(name, config.split)
    elif Path(name).is_file():
        if Path(name).suffix.lower() not in FILE_BUILDERS:
            raise UserError(
                f"--dataset_name {name} is not a {', '.join(FILE_BUILDERS)} file. Image files "
                "belong in a folder: --train_data_dir."
            )
        path, options["data_files"] = FILE_BUILDERS[Path(name).suffix.lower()], name
    elif Path(name).is_dir():
        path, options["name"] = name, config.dataset_config_name
    elif not hub.is_repo_id(name):
        raise UserError(f"--dataset_name {name} is neither a folder here nor an id on the Hub.")
    else:
        on_hub, path = True, name
        with hub.hub_errors(thing, revision=config.dataset_revision):
            revision = _resolve(name, config.dataset_revision)
        options |= {"name": config.dataset_config_name, "revision": revision}
    dataset = _load(path, options, config, thing)
    num_rows = _num_rows(dataset, config.split)
    if num_rows == 0:
        raise _no_rows(thing, config)
    column = find_image_column(dataset, config.image_column, name)
    dataset = dataset.select_columns(column).cast_column(column, datasets.Image(decode=False))
    facts = {
        "name": name if on_hub else Path(name).name,
        "on_hub": on_hub,
        "revision": revision,
        "config_name": config.dataset_config_name,
        "split": config.split,
        "image_column": column,
        "rows": num_rows,
        **_card_facts(name, on_hub, revision),
    }
    return Source(dataset, column, num_rows, facts)


def take_rows(source: Source, count: int) -> Source:
    """The first rows of a stream as a dataset in memory: at most `count`."""
    with hub.hub_errors(f"The dataset {source.facts['name']}"):
        rows = [row[source.column] for row in source.dataset.take(count)]
    features = datasets.Features({source.column: datasets.Image(decode=False)})
    dataset = datasets.Dataset.from_dict({source.column: rows}, features=features)
    return Source(dataset, source.column, len(rows), source.facts)


def find_held_out_split(config: DataConfig) -> str | None:
    """The first of HELD_OUT that the dataset has beside the split of the config; None without one.

    Asks for the names of the splits alone; one that cannot be asked for them has none.
    """
    name = config.dataset_name or config.train_data_dir
    assert name, "the config names no data"
    if (Path(name) / "dataset_dict.json").exists():
        names = list(datasets.load_from_disk(name))
    elif Path(name).is_file() or (Path(name) / "state.json").exists():
        return None
    else:
        folder = config.dataset_name is None
        where = ("imagefolder", {"data_dir": name}) if folder else (name, {})
        with hub.hub_errors(f"The dataset {name}", revision=config.dataset_revision):
            try:
                names = datasets.get_dataset_split_names(
                    where[0],
                    config.dataset_config_name,
                    revision=config.dataset_revision,
                    **where[1],
                )
            except (ValueError, datasets.exceptions.DatasetsError):
                return None
    return next(
        (split for split in HELD_OUT_SPLITS if split in names and split != config.split), None
    )


def find_image_column(
    dataset: datasets.Dataset | datasets.IterableDataset, wanted: str | None, name: str
) -> str:
    """The column of type Image, or the one asked for. UserError lists what there is."""
    columns = {c: _type_name(feature) for c, feature in (dataset.features or {}).items()}
    if not columns:  # a stream of texts knows the types of its columns only from its rows
        first = next(iter(dataset), {})
        columns = {column: type(cell).__name__ for column, cell in first.items()}
    listed = ", ".join(f"{column} ({kind})" for column, kind in columns.items())
    found = [column for column, kind in columns.items() if kind == "Image"]
    if wanted in found:
        return wanted
    if wanted is not None:
        raise UserError(
            f"--image_column {wanted}: the dataset {name} has no column of images of that name. "
            f"Its columns: {listed}.{_how_to_cast(dataset, columns, wanted)}"
        )
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"The dataset {name} has several columns of images: {', '.join(found)}. "
            "Choose one with --image_column."
        )
    raise UserError(
        f"The dataset {name} has no column of type Image. Its columns: {listed}."
        f"{_how_to_cast(dataset, columns, None)}"
    )


def root_cause(error: BaseException) -> str:
    """What went wrong, in one line: `datasets` wraps the cause that says it in emptier errors."""
    while isinstance(error, datasets.exceptions.DatasetsError) and error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().split("\n")[0].rstrip(".!")
    return text or type(error).__name__


def _load(
    path: str, options: dict[str, Any], config: DataConfig, thing: str
) -> datasets.Dataset | datasets.IterableDataset:
    with hub.hub_errors(thing, revision=config.dataset_revision):
        try:
            if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
                return _load_saved(path, config)
            return datasets.load_dataset(
                path,
                split=config.split,
                cache_dir=config.cache_dir,
                streaming=config.streaming,
                **options,
            )
        except Exception as error:  # the builders raise many kinds; every one means: not readable
            if hub.describe_error(error, thing):
                raise
            if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
                raise
            if "corresponds to no data" in str(error):
                raise _no_rows(thing, config) from error
            raise UserError(f"{thing} cannot be opened: {root_cause(error)}.") from error


def _folder_options(folder: str, split: str) -> dict[str, Any]:
    """How `datasets` finds the files of a folder of images.

    Looking for splits by their names, it walks the folder some seventy times: seconds for thousands
    of files. One walk here finds out whether any name can mean a split.
    """
    if split == "train":
        names = (name for _, *both in os.walk(folder) for names in both for name in names)
        if not any(word in name.lower() for name in names for word in SPLIT_WORDS):
            return {"data_files": {"train": os.path.join(glob.escape(folder), "**")}}
    return {"data_dir": folder}


def _load_saved(path: str, config: DataConfig) -> datasets.Dataset | datasets.IterableDataset:
    """A folder made by save_to_disk, of one split or several."""
    found = datasets.load_from_disk(path)
    if isinstance(found, datasets.DatasetDict):
        if config.split not in found:
            raise ValueError(f'Unknown split "{config.split}". Should be one of {list(found)}')
        found = found[config.split]
    if not config.streaming:
        return found
    stream = found.to_iterable_dataset(num_shards=max(1, min(len(found), 16)))
    stream.info.splits = datasets.SplitDict()
    stream.info.splits[config.split] = datasets.SplitInfo(config.split, num_examples=len(found))
    return stream


def _num_rows(dataset: datasets.Dataset | datasets.IterableDataset, split: str) -> int | None:
    """How many rows; None for a stream whose dataset does not say, if it has any."""
    if isinstance(dataset, datasets.Dataset):
        return len(dataset)
    said = (dataset.info.splits or {}).get(split)
    if said is not None and said.num_examples:
        return said.num_examples
    return None


def _no_rows(thing: str, config: DataConfig) -> UserError:
    if config.dataset_name is None and config.split == "train":
        return UserError(
            f"The folder {config.train_data_dir} holds no image files. For parquet or tar files in "
            "it, give it as --dataset_name."
        )
    return UserError(f"{thing} has no rows in its split {config.split!r}. Choose another --split.")


def _how_to_cast(
    dataset: datasets.Dataset | datasets.IterableDataset,
    columns: dict[str, str],
    wanted: str | None,
) -> str:
    """What to do about a column of bytes, paths or addresses, if there is one."""
    kinds = ("string", "large_string", "binary", "large_binary", "str", "bytes")
    likely = [c for c, kind in columns.items() if kind in kinds and wanted in (None, c)]
    if not likely:
        return ""
    first = next(iter(dataset), {})
    for column in likely:
        if str(first.get(column)).startswith(("http://", "https://")):
            return (
                f" {column} holds addresses, not images: download them into a folder first, and "
                "give it as --train_data_dir."
            )
    return (
        f" Where a column holds the bytes or the paths of image files, cast it and save: "
        f"dataset.cast_column({likely[0]!r}, datasets.Image()).save_to_disk(FOLDER), then "
        "--dataset_name FOLDER."
    )


def _type_name(feature: Any) -> str:
    if isinstance(feature, datasets.Image):
        return "Image"
    return getattr(feature, "dtype", None) or type(feature).__name__


def _resolve(repo_id: str, revision: str | None) -> str | None:
    """The commit that a dataset's revision stands for; what was asked for when off the network."""
    if hub.is_offline():
        return revision or "main"
    return hub.call(hub.HfApi().dataset_info, repo_id, revision=revision).sha


def _card_facts(name: str, on_hub: bool, revision: str | None) -> dict[str, Any]:
    """Title and licence as the dataset's own card gives them; nothing where there is no card."""
    try:
        if on_hub:
            path = hf_hub_download(name, "README.md", repo_type="dataset", revision=revision)
        else:
            path = Path(name) / "README.md"
        data = DatasetCard.load(path).data
    except (OSError, ValueError, EntryNotFoundError):
        return {}
    return {
        key: value if isinstance(value, list) and key == "license" else str(value)
        for key, value in (("title", data.get("pretty_name")), ("license", data.get("license")))
        if value
    }
