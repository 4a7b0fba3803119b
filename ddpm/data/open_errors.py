"""What `datasets` raises about data of others, as errors that say what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub import snapshot_download

from ddpm import hub
from ddpm.config.train import DataConfig
from ddpm.data.image_column import TAR_ADVICE
from ddpm.errors import DISK_ERRNOS, UserError, first_line

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
MAX_CONFIGS = 20
"""Most configurations that an error lists."""


def root_cause(error: BaseException) -> str:
    """Return one line about an error, of its cause where `datasets` wrapped it in another."""
    while isinstance(error, datasets.exceptions.DatasetsError) and error.__cause__ is not None:
        error = error.__cause__
    return first_line(error).rstrip(".!")


@contextmanager
def data_errors(description: str, failure: str = "cannot be read: {}.") -> Iterator[None]:
    """Turn what `datasets` raises about files of others into one UserError.

    Failures of the Hub keep their own message; those of the disk pass, for errors.run reports them.
    """
    with hub.hub_errors(description):
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # the builders of datasets raise many types
            if hub.describe_error(error, description):
                raise
            if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
                raise
            raise UserError(f"{description} {failure.format(root_cause(error))}") from error


@contextmanager
def what_to_do(config: DataConfig, description: str, on_hub: bool) -> Iterator[None]:
    """Turn errors of `datasets` that have a way out into UserErrors that name it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the builders of datasets raise many types
        text = str(error)
        wanted, configs = config.dataset_config_name, re.search(r"\['.*'\]", text)
        if hub.is_offline() and (isinstance(error, ConnectionError) or "find cache for" in text):
            what = (
                f"{f', configuration {wanted},' if wanted else ''} is not in the cache, and "
                "HF_HUB_OFFLINE keeps this command off the network: unset it and run again"
                f"{_downloaded_folder(config)}."
            )
        elif configs and ("Config name is missing" in text or "BuilderConfig" in text):
            names = re.findall(r"'([^']+)'", configs[0])
            more = f" and {len(names) - MAX_CONFIGS:,} more" if len(names) > MAX_CONFIGS else ""
            what = f" has no configuration {wanted}" if wanted else " has several configurations"
            what += f". Give --dataset_config_name one of {', '.join(names[:MAX_CONFIGS])}{more}."
        elif "scripts are no longer supported" in text and on_hub:
            what = (
                " is made by a script, which is not run. Of many such datasets the Hub has parquet "
                "files: --dataset_revision refs/convert/parquet."
            )
        elif "scripts are no longer supported" in text:
            what = (
                " has a script of its own, which is not run. If it also has the data, move away "
                f"{text.rpartition(' ')[2]}."
            )
        elif "WebDataset" in text or (config.dataset_name or "").lower().endswith(TAR_ENDINGS):
            what = f" cannot be opened: {root_cause(error)}.{TAR_ADVICE}"
        else:
            raise
        raise UserError(f"{description}{what}") from error


def _downloaded_folder(config: DataConfig) -> str:
    """Return how to name the files of a Hub dataset in the cache; "" if there are none."""
    arguments = {"repo_type": "dataset", "revision": config.dataset_revision}
    try:
        folder = snapshot_download(config.dataset_name, **arguments, local_files_only=True)
    except (OSError, ValueError):
        return ""
    return f", or give what was downloaded of it: --dataset_name {folder}"
