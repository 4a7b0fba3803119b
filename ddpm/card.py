"""Record -> model card: what a reader of the Hub page needs, from recorded facts alone.

The text between the two markers is ours and is replaced at the next push; everything a person
writes outside them stays. What is unknown is left out.
"""

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import yaml

from ddpm.config import TrainConfig, flatten
from ddpm.errors import UserError
from ddpm.runfolder import TRAIN_CONFIG, read_json, read_record

BEGIN = "<!-- generated from the run's record: begin (text outside these marks is kept) -->"
END = "<!-- generated from the run's record: end -->"
TAGS = ["ddpm", "diffusers", "unconditional-image-generation"]
LOCAL = ("output_dir", "overwrite_output_dir", "cache_dir", "resume_from_checkpoint")
"""Settings that say something about a machine and nothing about a model: they are not published."""


def render(folder: Path, repo_id: str, license: str | None, grid: str | None) -> str:
    """The card of a run as it is first pushed: metadata, title, the generated block.

    `grid` is the name of the sample grid among the published files. The same record gives the same
    text.
    """
    record = read_record(folder)
    title, block = repo_id.split("/")[-1], _block(folder, record, repo_id, grid)
    return f"---\n{_yaml(_metadata(record, license))}---\n\n# {title}\n\n{block}\n"


def merge(existing: str, rendered: str, license: str | None) -> str:
    """An existing README with our block renewed and its metadata completed; the rest untouched.

    Of the metadata, library, task and datasets are ours, tags are united, and what else a person
    set stays, the licence too unless one was asked for. A README without our marks gets the block
    at its end.
    """
    theirs, body = _split(existing.replace("\r\n", "\n"))
    ours, rendered_body = _split(rendered)
    tags = theirs.get("tags") or []
    tags = [*([tags] if isinstance(tags, str) else tags), *ours["tags"]]
    renewed = ("library_name", "pipeline_tag", "datasets", *(["license"] if license else []))
    merged = {**theirs, **{k: v for k, v in ours.items() if k in renewed or k not in theirs}}
    merged["tags"] = list(dict.fromkeys(tags))
    block, found = _between(rendered_body), _between(body)
    assert block is not None, "a rendered card has its block"
    body = body.replace(found, block) if found else f"{body.rstrip()}\n\n{block}\n"
    return f"---\n{_yaml(merged)}---\n{body}"


def published_settings(folder: Path) -> dict[str, Any] | None:
    """train_config.json without what belongs to one machine; None for a folder without one."""
    path = folder / TRAIN_CONFIG
    if not path.exists():
        return None
    settings = {name: v for name, v in read_json(path).items() if name not in LOCAL}
    for name in ("dataset_name", "train_data_dir", "model_config_name_or_path"):
        if settings.get(name) and Path(settings[name]).expanduser().is_absolute():
            settings[name] = Path(settings[name]).name
    return settings


def _metadata(record: dict[str, Any], license: str | None) -> dict[str, Any]:
    dataset = record.get("dataset", {})
    metadata: dict[str, Any] = {
        "license": license,
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": TAGS,
        "datasets": [dataset["name"]] if dataset.get("on_hub") else None,
    }
    return {name: value for name, value in metadata.items() if value is not None}


def _block(folder: Path, record: dict[str, Any], repo_id: str, grid: str | None) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    settings = published_settings(folder)
    defaults = flatten(TrainConfig())
    text = environment.get_template("card.md.jinja").render(
        repo_id=repo_id,
        grid=grid,
        record=record,
        settings=json.dumps(settings, indent=2) if settings else None,
        changed={
            name: value
            for name, value in (settings or {}).items()
            if name in defaults and value != defaults[name]
        },
    )
    return f"{BEGIN}\n{text.strip()}\n{END}"


def _split(card: str) -> tuple[dict[str, Any], str]:
    """The metadata of a card, in its order, and the text after it."""
    match = re.match(r"---\n(.*?)^---\n", card, flags=re.DOTALL | re.MULTILINE)
    if match is None:
        return {}, card
    try:
        metadata = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        metadata = error
    if not isinstance(metadata, dict):
        raise UserError(
            "The README.md on the Hub has metadata that cannot be read. Mend the lines between the "
            "two --- at its top, on the model's page, then push again."
        )
    return metadata, card[match.end() :]


def _between(content: str) -> str | None:
    match = re.search(f"{re.escape(BEGIN)}.*?{re.escape(END)}", content, flags=re.DOTALL)
    return match[0] if match else None


def _yaml(metadata: dict[str, Any]) -> str:
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
