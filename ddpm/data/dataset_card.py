"""The metadata of a dataset: what it consists of, its title and its license."""

import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from datasets.utils.file_utils import is_local_path, is_relative_path
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ddpm import card, hub
from ddpm.errors import UserError

CARD_FILES = ("README.md", ".huggingface.yaml")
"""Files from which `datasets` reads what a dataset consists of; the later one prevails."""


def read_metadata(name: str, on_hub: bool, revision: str | None) -> dict[str, Any]:
    """Return the metadata of a dataset, as `datasets` reads them before it opens the dataset.

    UserError for metadata that cannot be read, or that take data files from elsewhere.
    """
    metadata: dict[str, Any] = {}
    for file in CARD_FILES:
        source = f"The {file} of the dataset {name}"
        path = _download(name, file, revision) if on_hub else Path(name) / file
        if path is None or not path.is_file():
            continue
        try:
            metadata |= _parse_metadata(path, source)
        except UserError:
            if not on_hub or hub.is_offline():
                raise
            path = _download(name, file, revision, force_download=True)  # perhaps it is damaged
            metadata |= _parse_metadata(path, source)
    _require_own_files(metadata, name, on_hub)
    return metadata


def _download(name: str, file: str, revision: str | None, **options: bool) -> Path | None:
    """Download a file of a Hub dataset; None if the dataset, or offline the cache, lacks it."""
    arguments = {"repo_type": "dataset", "revision": revision}
    if try_to_load_from_cache(name, file, **arguments) is _CACHED_NO_EXIST:
        return None  # asked before: a commit does not change
    try:
        return Path(hub.call(hf_hub_download, name, file, **arguments, **options))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError) and not hub.is_offline():
            raise
        return None


def _parse_metadata(path: Path, source: str) -> dict[str, Any]:
    text = card.read_card(path, source, errors="replace")  # of a folder it may be any text
    if path.suffix == ".yaml":
        return card.parse_yaml(text, source)
    return card.split_card(text, source)[0]


def _require_own_files(metadata: dict[str, Any], name: str, on_hub: bool) -> None:
    """Raise UserError for metadata that take data files from elsewhere.

    On the Hub that is any place outside of the repository, for a folder any other machine.
    """
    is_own = is_relative_path if on_hub else is_local_path
    configs = metadata.get("configs")
    for entry in configs if isinstance(configs, list) else []:
        for pattern in _data_file_patterns(entry) if isinstance(entry, dict) else []:
            goes_up = on_hub and ".." in re.split(r"[/\\]", pattern)
            if not is_own(pattern) or "::" in pattern or goes_up:
                raise UserError(
                    f"The dataset {name} takes data files from elsewhere: {pattern!r:.200}. "
                    "Download them into a folder, and give it as --dataset_name."
                )


def _data_file_patterns(entry: dict[str, Any]) -> Iterator[str]:
    """Yield the texts of data_files and data_dir in one configuration of the metadata."""
    files = entry.get("data_files")
    for item in [*(files if isinstance(files, list) else [files]), entry.get("data_dir")]:
        paths = item.get("path") if isinstance(item, dict) else item
        for path in paths if isinstance(paths, list) else [paths]:
            if isinstance(path, str):
                yield path


def title_and_license(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return title and license of a dataset as texts, without those that are no plain values."""
    title, licenses = metadata.get("pretty_name"), metadata.get("license")
    is_list = isinstance(licenses, list)
    texts = [str(text) for text in (licenses if is_list else [licenses]) if _is_scalar(text)]
    return {
        "title": str(title) if _is_scalar(title) else None,
        "license": (texts if is_list else texts[0]) if texts else None,
    }


def _is_scalar(value: Any) -> bool:
    if isinstance(value, int) and abs(value) >= 2**63:
        return False  # Python refuses to write more than 4,300 digits
    return bool(value) and isinstance(value, str | int | float | date)
