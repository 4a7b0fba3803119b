"""The metadata of a model card: those of the run, and what they replace of what people wrote."""

import json
import re
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from ddpm.errors import printable
from ddpm.evaluation.results import Evaluation
from ddpm.hub import is_repo_id
from ddpm.run_record import BaseModel, DatasetRecord, Record

TASK = "unconditional-image-generation"
TAGS = ["ddpm", "diffusers", "pytorch", TASK]
CLASS_TAG = "class-conditional"
"""Tag of a model with classes."""
TRACKIO_TAG = "trackio"
"""Tag of a run that a Space shows; with `:` and its address, what the Hub shows that Space by."""
SPACE_ADDRESS = re.compile(r"https://huggingface\.co/spaces/[\w.-]+/[\w.-]+", re.ASCII)
OUR_METADATA = (
    *("model-index", "library_name", "pipeline_tag", "datasets"),
    *("base_model", "base_model_revision", "base_model_relation"),
)
"""Metadata that every push sets again; what else a person set is kept."""


def render_metadata(
    record: Record,
    evaluation: Evaluation | None,
    name: str,
    license: str | None,
    has_classes: bool,
) -> dict[str, Any]:
    """Return the metadata of the card of a model, as far as they are known."""
    dataset, base = record.dataset, record.base_model
    space = trackio_space(record)
    tags = [
        *TAGS,
        *([TRACKIO_TAG, f"{TRACKIO_TAG}:{space}"] if space else []),
        *([CLASS_TAG] if has_classes else []),
    ]
    metadata: dict[str, Any] = {
        **({"license": license} if license or base is None else _license_metadata(base)),
        "library_name": "diffusers",
        "pipeline_tag": TASK,
        "tags": tags,
        "datasets": [dataset.name] if dataset and is_on_hub(dataset) else None,
        "model-index": _model_index(dataset, evaluation, name) if evaluation else None,
    }
    if base is not None and is_on_hub(base):
        metadata |= {
            "base_model": base.name,
            "base_model_revision": base.version,
            "base_model_relation": "finetune",
        }
    return {key: value for key, value in metadata.items() if value}


def _license_metadata(base: BaseModel) -> dict[str, Any]:
    """Return the license of the model that was fine-tuned, as far as it has an identifier."""
    names = base.license if isinstance(base.license, list) else [base.license or ""]
    names = [name for name in names if re.fullmatch(r"[a-z0-9.+-]{1,60}", name)]
    texts = {"license_name": base.license_name, "license_link": base.license_link}
    texts = {key: printable(text) for key, text in texts.items() if text and "other" in names}
    return {"license": names if isinstance(base.license, list) else "".join(names), **texts}


def _model_index(
    dataset: DatasetRecord | None, evaluation: Evaluation, name: str
) -> list[dict[str, Any]]:
    """Return the metrics in the form that the Hub shows next to a model; empty without a dataset.

    The dataset is that of the evaluation, or that of the run.
    """
    if evaluation.dataset is not None:
        dataset = DatasetRecord(name=evaluation.dataset)
    if not evaluation.metrics or dataset is None:
        return []
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=printable(dataset.name),
            dataset_name=printable(dataset.title or dataset.name),
            dataset_config=dataset.config_name and printable(dataset.config_name),
            dataset_split=dataset.split and printable(dataset.split),
            dataset_revision=dataset.revision and printable(dataset.revision),
            metric_type=printable(metric),
            metric_name=printable(metric_title(metric)),
            metric_value=value,
        )
        for metric, value in evaluation.metrics.items()
    ]
    # Through JSON, because the client returns ordered mappings, which plain YAML cannot express.
    return json.loads(json.dumps(eval_results_to_model_index(name, results)))


def merge_metadata(
    metadata: dict[str, Any], rendered: dict[str, Any], name: str, license: str | None
) -> dict[str, Any]:
    """Return the metadata of an existing README with those of a rendered card of the model `name`.

    OUR_METADATA is replaced, tags are united, and other metadata is kept, the license too unless
    one was asked for.
    """
    metadata, rendered = dict(metadata), dict(rendered)

    # Results that people added under other names
    index = metadata.pop("model-index", None)
    others = [m for m in index if isinstance(m, dict)] if isinstance(index, list) else []
    index = [
        *rendered.get("model-index", []),
        *(model for model in others if model.get("name") != name),
    ]
    if index:
        rendered["model-index"] = index

    replaced = {*OUR_METADATA, *(["license"] if license else [])}
    for key, value in rendered.items():
        if key in replaced or key not in metadata:
            metadata[key] = value
    tags = metadata.get("tags") or []
    tags, new_tags = tags if isinstance(tags, list) else [tags], rendered["tags"]
    replaced_tags = f"{CLASS_TAG}|{TRACKIO_TAG}:.*" if TRACKIO_TAG in new_tags else CLASS_TAG
    kept = [tag for tag in tags if tag in new_tags or not re.fullmatch(replaced_tags, str(tag))]
    metadata["tags"] = [*kept, *(tag for tag in new_tags if tag not in kept)]
    return metadata


def metric_title(name: str) -> str:
    """Return the title of a metric: FID for fid, Precision at 3 for precision_at_3."""
    words = name.replace("_", " ").strip()
    return words.upper() if len(words) <= 4 else words[:1].upper() + words[1:]


def trackio_space(record: Record) -> str | None:
    """Return the address of the Space that shows the run, None if there is none."""
    return record.trackio if SPACE_ADDRESS.fullmatch(record.trackio or "") else None


def is_on_hub(source: DatasetRecord | BaseModel) -> bool:
    """Return whether a dataset or a model has a page on the Hub."""
    return source.on_hub and is_repo_id(source.name)


def to_yaml(metadata: dict[str, Any]) -> str:
    """Return metadata as YAML in their own order."""
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
