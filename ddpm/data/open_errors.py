"""What `datasets` raises about data of others, as errors that say what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub.errors import OfflineModeIsEnabled

from ddpm import hub
from ddpm.config.data import DataConfig
from ddpm.data.image_column import TAR_ADVICE
from ddpm.errors import DISK_ERRNOS, UserError, first_line

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
MAX_CONFIGS = 20
"""Most configurations that an error lists."""


def root_cause(error: BaseException) -> BaseException:
    """Return an error, or its cause where `datasets` wrapped it in another."""
    while isinstance(error, datasets.exceptions.DatasetsError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    return first_line(root_cause(error)).rstrip(".!")


@contextmanager
def data_errors(
    description: str | hub.Repository, failure: str = "cannot be read", advice: str = ""
) -> Iterator[None]:
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
            root = root_cause(error)
            if isinstance(root, OSError) and root.errno in DISK_ERRNOS:
                raise root from error
            raise UserError(f"{description} {failure}: {_reason(error)}.{advice}") from error


@contextmanager
def what_to_do(
    config: DataConfig, description: str | hub.Repository, on_hub: bool
) -> Iterator[None]:
    """Turn errors of `datasets` that have a way out into UserErrors that name it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the builders of datasets raise many types
        text = str(error)
        wanted, configs = config.dataset_config_name, re.search(r"\['.*'\]", text)
        if hub.is_offline() and "find cache for" in text:  # another configuration is there
            raise OfflineModeIsEnabled(text) from error
        if configs and ("Config name is missing" in text or "BuilderConfig" in text):
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
            what = f" cannot be opened: {_reason(error)}.{TAR_ADVICE}"
        else:
            raise
        raise UserError(f"{description}{what}") from error
