"""Record -> model card: what a reader of the Hub page needs, from recorded facts alone.

The text between the two markers is ours and is replaced at the next push; everything a person
writes outside them stays. What is unknown is left out.

What was measured comes from evaluation.json: `{"metrics": {"fid": 3.2, ...}, "num_images": 10000,
"dataset": "owner/name"}`, of which only "metrics" must be there; the data of the run stands in for
a missing "dataset". Other entries are no business of the card.
"""

import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from ddpm.config.train import TrainConfig, flatten
from ddpm.errors import UserError
from ddpm.run_folder import (
    EMA_LENGTHS,
    EVALUATION,
    HELD_OUT_LOSS,
    LOSS_BY_BAND,
    NEAREST,
    TRADE_OFF,
    TRAIN_CONFIG,
    UNET_WEIGHTS,
    DatasetRecord,
    Record,
    read_exported_ema,
    read_json,
    read_record,
)
from ddpm.sampling import sampler_table
from ddpm.sampling.pipeline import file_sha256

BEGIN = "<!-- generated from the run's record: begin (text outside these marks is kept) -->"
END = "<!-- generated from the run's record: end -->"
TASK = "unconditional-image-generation"
TAGS = ["ddpm", "diffusers", TASK]
PLOT_CAPTIONS = {
    NEAREST: "The drawn images that are nearest to training images, below each that image; then "
    "the same for images that were not trained on.",
    LOSS_BY_BAND: "Loss by noise level, of images that were held out and of some trained on.",
    HELD_OUT_LOSS: "Loss on held-out images over the steps of training, by noise level.",
    TRADE_OFF: "Samplers: how far from the training images, against the time for an image.",
    EMA_LENGTHS: "Shorter and longer averages of the weights: how far each draws from the data.",
}
"""What the pictures of an evaluation show, in a line each."""
LOCAL = ("output_dir", "overwrite_output_dir", "cache_dir", "resume_from_checkpoint")
"""Settings that say something about a machine and nothing about a model: they are not published."""


def render_card(
    folder: Path,
    repo_id: str,
    license: str | None,
    grid: str | None,
    *,
    curve: str | None = None,
    pictures: Sequence[str] = (),
    revision: str | None = None,
) -> str:
    """The card of a run as it is first pushed: metadata, title, the generated block.

    `grid` and `curve` are the names of the sample grid and the loss curve among the published
    files, `pictures` those of the evaluation, `revision` the branch that the snippet must name. The
    same record gives the same text.
    """
    record, measured = read_record(folder), read_evaluation(folder)
    metadata = _metadata(record, measured, repo_id, license)
    facts = {
        "repo_id": repo_id,
        "grid": grid,
        "curve": curve,
        "revision": revision,
        "pictures": {name: PLOT_CAPTIONS[Path(name).name] for name in pictures},
    }
    block = _block(folder, facts, record, measured)
    return f"---\n{_yaml(metadata)}---\n\n# {repo_id.split('/')[-1]}\n\n{block}\n"


def merge_card(existing: str, rendered: str, license: str | None) -> str:
    """An existing README with our block renewed and its metadata completed; the rest untouched.

    Of the metadata, library, task and datasets are ours, tags are united, and what else a person
    set stays, the licence too unless one was asked for. A README without our marks gets the block
    at its end.
    """
    theirs, body = _split(existing.replace("\r\n", "\n"))
    ours, rendered_body = _split(rendered)
    title = re.search(r"^# (.*)$", rendered_body, flags=re.MULTILINE)[1]
    tags = theirs.get("tags") or []
    tags = [*([tags] if isinstance(tags, str) else tags), *ours["tags"]]
    index = theirs.pop("model-index", None)  # results that people add under other names stay
    others = [m for m in index if isinstance(m, dict)] if isinstance(index, list) else []
    index = [*ours.get("model-index", []), *(m for m in others if m.get("name") != title)]
    if index:
        ours["model-index"] = index
    renewed = (
        "model-index",
        "library_name",
        "pipeline_tag",
        "datasets",
        *(["license"] if license else []),
    )
    merged = {**theirs, **{k: v for k, v in ours.items() if k in renewed or k not in theirs}}
    merged["tags"] = list(dict.fromkeys(tags))
    block, found = _between(rendered_body), _between(body)
    assert block is not None, "a rendered card has its block"
    body = body.replace(found, block) if found else f"{body.rstrip()}\n\n{block}\n"
    return f"---\n{_yaml(merged)}---\n{body}"


def published_config(folder: Path) -> dict[str, Any] | None:
    """train_config.json without what belongs to one machine; None for a folder without one."""
    path = folder / TRAIN_CONFIG
    if not path.exists():
        return None
    settings = {name: v for name, v in read_json(path).items() if name not in LOCAL}
    for name in ("dataset_name", "train_data_dir", "model_config_name_or_path"):
        if settings.get(name) and Path(settings[name]).expanduser().is_absolute():
            settings[name] = Path(settings[name]).name
    return settings


def is_evaluation_stale(folder: Path) -> bool:
    """Whether evaluation.json says that it measured other weights than those of the pipeline."""
    path, weights = folder / EVALUATION, folder / UNET_WEIGHTS
    values = read_json(path) if path.is_file() and weights.is_file() else None
    model = values.get("model") if isinstance(values, dict) else None
    return isinstance(model, dict) and model.get("version") != file_sha256(weights)


def read_evaluation(folder: Path) -> dict[str, Any]:
    """evaluation.json with its finite numbers as `metrics`; empty where nothing was measured, or
    only other weights were."""
    path = folder / EVALUATION
    if not path.exists() or is_evaluation_stale(folder):
        return {}
    values = read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("metrics"), dict):
        raise UserError(
            f'{path} has no "metrics" as evaluate.py writes them. Run evaluate.py again, or move '
            "the file away to publish without it."
        )
    numbers = {
        name: value
        for name, value in values["metrics"].items()
        if type(value) in (int, float) and math.isfinite(value)
    }
    return {**values, "metrics": numbers}


def _metadata(
    record: Record, measured: dict[str, Any], repo_id: str, license: str | None
) -> dict[str, Any]:
    dataset = record.dataset
    metadata: dict[str, Any] = {
        "license": license,
        "library_name": "diffusers",
        "pipeline_tag": TASK,
        "tags": TAGS,
        "datasets": [dataset.name] if dataset and dataset.on_hub else None,
        "model-index": _model_index(dataset, measured, repo_id) or None,
    }
    return {name: value for name, value in metadata.items() if value is not None}


def _model_index(
    dataset: DatasetRecord | None, measured: dict[str, Any], repo_id: str
) -> list[dict[str, Any]]:
    """What was measured, in the form that the Hub shows beside a model; the data must be known."""
    named = measured.get("dataset")
    data = DatasetRecord(name=named) if isinstance(named, str) else dataset
    if not measured.get("metrics") or data is None:
        return []
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=data.name,
            dataset_name=data.title or data.name,
            dataset_config=data.config_name,
            dataset_split=data.split,
            dataset_revision=data.revision,
            metric_type=name,
            metric_name=metric_title(name),
            metric_value=value,
        )
        for name, value in measured["metrics"].items()
    ]
    # Through JSON: what the client returns holds ordered mappings that plain YAML cannot say.
    index = eval_results_to_model_index(repo_id.split("/")[-1], results)
    return json.loads(json.dumps(index))


def metric_title(name: str) -> str:
    """fid -> FID, precision_at_3 -> Precision at 3."""
    words = name.replace("_", " ").strip()
    return words.upper() if len(words) <= 4 else words[:1].upper() + words[1:]


class _Raw(str):
    """Text that goes into the card as it is; all other text is made harmless by `_plain`."""


def _plain(value: Any) -> Any:
    """A recorded text on one line, unable to end a table, a comment or the generated block."""
    if not isinstance(value, str) or isinstance(value, _Raw):
        return value
    return re.sub(r"\s+", " ", value).replace("<", "&lt;").replace("|", "\\|")


def _block(folder: Path, facts: dict[str, Any], record: Record, measured: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_plain,
    )
    settings = published_config(folder)
    defaults = flatten(TrainConfig())
    weights = folder / UNET_WEIGHTS
    text = environment.get_template("model_card.md.jinja").render(
        **facts,
        record=record,
        ema=read_exported_ema(folder, file_sha256(weights)) if weights.is_file() else None,
        results={metric_title(name): value for name, value in measured.get("metrics", {}).items()},
        num_measured=measured.get("num_images"),
        how_drawn=_how_drawn(measured),
        samplers=sampler_table.read_sampler_table(folder),
        metric_title=metric_title,
        reproduce=_Raw(_reproduce(settings, record, facts["repo_id"])) if settings else None,
        settings=_Raw(json.dumps(settings, indent=2)) if settings else None,
        changed={
            name: value
            for name, value in (settings or {}).items()
            if name in defaults and value != defaults[name]
        },
    )
    return f"{BEGIN}\n{text.strip()}\n{END}"


def _how_drawn(measured: dict[str, Any]) -> str:
    """Sampler, steps and seeds of the measured images, as far as evaluation.json names them."""
    sampler, seeds = measured.get("sampler"), measured.get("seeds")
    parts = []
    if isinstance(sampler, dict):
        steps = sampler.get("num_inference_steps")
        parts += [f"`{sampler.get('scheduler')}` in {steps} step{'' if steps == 1 else 's'}"]
    if isinstance(seeds, list) and len(seeds) == 2:
        parts += [f"seeds {seeds[0]} to {seeds[1]}"]
    return ", ".join(parts)


def _reproduce(settings: dict[str, Any], record: Record, repo_id: str) -> str:
    """The commands that do the run again, with what the settings alone leave open."""
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
