"""Render the model card of a staged folder from its recorded facts. Unknown facts are absent.

The text between the two markers is generated and is replaced by the next push. Text that people
write outside them, and metadata that they set, is kept.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from ddpm.config.base import flatten
from ddpm.config.train import TrainConfig
from ddpm.errors import UserError
from ddpm.evaluation.results import Evaluation, read_evaluation
from ddpm.file_io import file_sha256, read_json
from ddpm.run_folder import (
    EMA_LENGTHS,
    EVALUATION_PLOTS,
    HELD_OUT_LOSS,
    LOSS_BY_BAND,
    NEAREST,
    TRADE_OFF,
    TRAIN_CONFIG,
    UNET_WEIGHTS,
)
from ddpm.run_record import DatasetRecord, Record, read_exported_ema, read_record
from ddpm.sampling import sampler_results

SAMPLE_GRID, LOSS_PLOT = "samples.png", "loss.png"
BEGIN = "<!-- generated from the run's record: begin (text outside these marks is kept) -->"
END = "<!-- generated from the run's record: end -->"
TASK = "unconditional-image-generation"
TAGS = ["ddpm", "diffusers", TASK]
OUR_METADATA = ("model-index", "library_name", "pipeline_tag", "datasets")
"""Metadata that every push sets again; what else a person set is kept."""
PLOT_CAPTIONS = {
    NEAREST: "The generated images that are nearest to training images, each above that image; "
    "then the same for images that were not trained on.",
    LOSS_BY_BAND: "Loss by noise level, of held-out images and of some that were trained on.",
    HELD_OUT_LOSS: "Loss on held-out images over the steps of training, by noise level.",
    TRADE_OFF: "Samplers: distance to the training images against the time for an image.",
    EMA_LENGTHS: "Shorter and longer averages of the weights: distance of each to the data.",
}


def render_card(
    folder: Path, repo_id: str, license: str | None = None, revision: str | None = None
) -> str:
    """Return the card of a folder as it is first pushed: metadata, title, the generated block.

    `revision` is the branch that the usage snippet names. The same files give the same text.
    """
    record, evaluation = read_record(folder), read_evaluation(folder)
    name = repo_id.split("/")[-1]
    metadata = _metadata(record, evaluation, name, license)
    block = _render_block(folder, repo_id, revision, record, evaluation)
    return f"---\n{_to_yaml(metadata)}---\n\n# {name}\n\n{block}\n"


def merge_card(existing: str, rendered: str, license: str | None) -> str:
    """Return an existing README with the block and the metadata of a rendered card.

    OUR_METADATA is replaced, tags are united, and other metadata is kept, the license too unless
    one was asked for. A README without the marks gets the block at its end.
    """
    metadata, body = _split(existing.replace("\r\n", "\n"))
    new_metadata, new_body = _split(rendered)
    title = re.search(r"^# (.*)$", new_body, flags=re.MULTILINE)[1]

    # Results that people added under other names
    index = metadata.pop("model-index", None)
    others = [m for m in index if isinstance(m, dict)] if isinstance(index, list) else []
    index = [
        *new_metadata.get("model-index", []),
        *(model for model in others if model.get("name") != title),
    ]
    if index:
        new_metadata["model-index"] = index

    tags = metadata.get("tags") or []
    tags = [*([tags] if isinstance(tags, str) else tags), *new_metadata["tags"]]
    replaced = {*OUR_METADATA, *(["license"] if license else [])}
    for key, value in new_metadata.items():
        if key in replaced or key not in metadata:
            metadata[key] = value
    metadata["tags"] = list(dict.fromkeys(tags))

    block, old_block = _find_block(new_body), _find_block(body)
    assert block is not None, "a rendered card has its block"
    body = body.replace(old_block, block) if old_block else f"{body.rstrip()}\n\n{block}\n"
    return f"---\n{_to_yaml(metadata)}---\n{body}"


def _metadata(
    record: Record, evaluation: Evaluation | None, name: str, license: str | None
) -> dict[str, Any]:
    dataset = record.dataset
    metadata: dict[str, Any] = {
        "license": license,
        "library_name": "diffusers",
        "pipeline_tag": TASK,
        "tags": TAGS,
        "datasets": [dataset.name] if dataset and dataset.on_hub else None,
        "model-index": _model_index(dataset, evaluation, name) if evaluation else None,
    }
    return {key: value for key, value in metadata.items() if value}


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
            dataset_type=dataset.name,
            dataset_name=dataset.title or dataset.name,
            dataset_config=dataset.config_name,
            dataset_split=dataset.split,
            dataset_revision=dataset.revision,
            metric_type=metric,
            metric_name=metric_title(metric),
            metric_value=value,
        )
        for metric, value in evaluation.metrics.items()
    ]
    # Through JSON, because the client returns ordered mappings, which plain YAML cannot express.
    return json.loads(json.dumps(eval_results_to_model_index(name, results)))


def metric_title(name: str) -> str:
    """Return the title of a metric: FID for fid, Precision at 3 for precision_at_3."""
    words = name.replace("_", " ").strip()
    return words.upper() if len(words) <= 4 else words[:1].upper() + words[1:]


class _Raw(str):
    """Text that goes into the card as it is; all other text goes through `_escape`."""


def _escape(value: Any) -> Any:
    """Put a recorded text on one line that cannot end a table, a comment or the generated block."""
    if not isinstance(value, str) or isinstance(value, _Raw):
        return value
    return re.sub(r"\s+", " ", value).replace("<", "&lt;").replace("|", "\\|")


def _render_block(
    folder: Path,
    repo_id: str,
    revision: str | None,
    record: Record,
    evaluation: Evaluation | None,
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_escape,
    )
    settings = read_json(folder / TRAIN_CONFIG) if (folder / TRAIN_CONFIG).is_file() else {}
    defaults = flatten(TrainConfig())
    weights = folder / UNET_WEIGHTS
    text = environment.get_template("model_card.md.jinja").render(
        repo_id=repo_id,
        revision=revision,
        grid=SAMPLE_GRID if (folder / SAMPLE_GRID).is_file() else None,
        loss_plot=LOSS_PLOT if (folder / LOSS_PLOT).is_file() else None,
        plots={
            name: PLOT_CAPTIONS[Path(name).name]
            for name in EVALUATION_PLOTS
            if (folder / name).is_file()
        },
        record=record,
        ema=read_exported_ema(folder, file_sha256(weights)) if weights.is_file() else None,
        evaluation=evaluation,
        samplers=sampler_results.read_sampler_table(folder),
        metric_title=metric_title,
        settings=_Raw(json.dumps(settings, indent=2)) if settings else None,
        changed={
            name: value
            for name, value in settings.items()
            if name in defaults and value != defaults[name]
        },
        reproduce=_Raw(_reproduce(settings, record, repo_id)) if settings else None,
    )
    return f"{BEGIN}\n{text.strip()}\n{END}"


def _reproduce(settings: dict[str, Any], record: Record, repo_id: str) -> str:
    """Return the commands that repeat the run, with flags for what the settings leave open."""
    name, machine = repo_id.split("/")[-1], record.environment
    launch = ["accelerate launch"]
    if machine:
        launch.append(f"--num_processes {machine.num_processes}")
    launch.append(f"train.py --config {name}/train_config.json --output_dir {name}-again")
    revision = record.dataset.revision if record.dataset else None
    if revision and not settings.get("dataset_revision"):
        launch.append(f"--dataset_revision {shlex.quote(revision)}")
    if machine and not settings.get("mixed_precision"):
        launch.append(f"--mixed_precision {shlex.quote(machine.mixed_precision)}")
    return f"hf download {repo_id} train_config.json --local-dir {name}\n{' '.join(launch)}"


def _split(card: str) -> tuple[dict[str, Any], str]:
    """Return the metadata of a card, in its order, and the text after it."""
    match = re.match(r"---\n(.*?)^---\n", card, flags=re.DOTALL | re.MULTILINE)
    if match is None:
        return {}, card
    try:
        metadata = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        metadata = error
    if not isinstance(metadata, dict):
        raise UserError(
            "The README.md on the Hub has metadata that cannot be read. Fix the lines between the "
            "two --- at its top, on the model's page, then push again."
        )
    return metadata, card[match.end() :]


def _find_block(card: str) -> str | None:
    """Return the generated block of a card with its marks."""
    match = re.search(f"{re.escape(BEGIN)}.*?{re.escape(END)}", card, flags=re.DOTALL)
    return match[0] if match else None


def _to_yaml(metadata: dict[str, Any]) -> str:
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
