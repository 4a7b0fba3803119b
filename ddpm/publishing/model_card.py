"""Render the model card of a staged folder from its recorded facts. Unknown facts are absent.

Recorded texts may come from others, so each goes through `plain`, `code` or `link`.
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

from ddpm.card import split_card
from ddpm.config.base import as_flag, flatten
from ddpm.config.train import TrainConfig
from ddpm.config.values import size_of
from ddpm.errors import URL_LOGIN, printable
from ddpm.evaluation.results import Evaluation, read_evaluation
from ddpm.file_io import file_sha256, read_json
from ddpm.hub import is_repo_id
from ddpm.run_folder import (
    CONDITIONAL_CONFIG,
    CONDITIONAL_LABELS,
    EMA_LENGTHS,
    EVALUATION_PLOTS,
    GUIDANCE,
    HELD_OUT_LOSS,
    LOSS_BY_BAND,
    NEAREST,
    SCHEDULER_CONFIG,
    TRADE_OFF,
    TRAIN_CONFIG,
    UNET_WEIGHTS,
    has_classes,
)
from ddpm.run_record import BaseModel, DatasetRecord, Record, read_exported_ema, read_record
from ddpm.sampling import preview, sampler_results
from ddpm.sampling.guidance import DEFAULT_GUIDANCE_SCALE
from ddpm.sampling.guidance_results import LABEL_ACCURACY
from ddpm.sampling.pipeline_folder import read_scheduler_config
from ddpm.sampling.unet_files import read_labels, read_unet_config

SAMPLE_GRID, LOSS_PLOT = "samples.png", "loss.png"
BEGIN = "<!-- generated from the run's record: begin (text outside these marks is kept) -->"
END = "<!-- generated from the run's record: end -->"
TASK = "unconditional-image-generation"
TAGS = ["ddpm", "diffusers", "pytorch", TASK]
CLASS_TAG = "class-conditional"
"""Tag of a model with classes."""
TRACKIO_TAG = "trackio"
"""Tag of a run that a Space shows; with `:` and its address, what the Hub shows that Space by."""
SPACE_ADDRESS = re.compile(r"https://huggingface\.co/spaces/[\w.-]+/[\w.-]+", re.ASCII)
MAX_CLASSES = 20
"""Classes in the table; a longer one is cut off."""
OUR_METADATA = (
    *("model-index", "library_name", "pipeline_tag", "datasets"),
    *("base_model", "base_model_revision", "base_model_relation"),
)
"""Metadata that every push sets again; what else a person set is kept."""
PLAIN_WORDS = re.compile(r"[A-Za-z0-9 ,.;:()'/%+=\x80-\U0010ffff-]*")
"""Texts without a character that Markdown gives a meaning within a line."""
CODE_CHARACTERS = str.maketrans({"`": "'", "|": "\u00a6", "<": "\u2039"})
"""Characters that can end a code span, a cell of a table or the block, and what looks like them."""
WEB_ADDRESS = re.compile(r"https?://[A-Za-z0-9._~:/?#=&%+-]+")
PLOT_CAPTIONS = {
    NEAREST: "The generated images that are nearest to training images, each above that image; "
    "then the same for images that were not trained on.",
    LOSS_BY_BAND: "Loss by noise level, of held-out images and of some that were trained on.",
    HELD_OUT_LOSS: "Loss on held-out images over the steps of training, by noise level.",
    TRADE_OFF: "Samplers: distance to the training images against the time for an image.",
    EMA_LENGTHS: "Shorter and longer averages of the weights: distance of each to the data.",
    GUIDANCE: "Guidance scales: distance to the training images against label accuracy.",
}


def render_card(
    folder: Path, repo_id: str, license: str | None = None, revision: str | None = None
) -> str:
    """Return the card of a folder as it is first pushed: metadata, title, the generated block.

    `revision` is the branch that the usage snippet names. The same files give the same text.
    """
    record, evaluation = read_record(folder), read_evaluation(folder)
    name = repo_id.split("/")[-1]
    space = _trackio_space(record)
    tags = [
        *TAGS,
        *([TRACKIO_TAG, f"{TRACKIO_TAG}:{space}"] if space else []),
        *([CLASS_TAG] if has_classes(folder) else []),
    ]
    metadata = _metadata(record, evaluation, name, license, tags)
    if (folder / SAMPLE_GRID).is_file():
        address = f"https://huggingface.co/{repo_id}/resolve/{revision or 'main'}/{SAMPLE_GRID}"
        metadata["thumbnail"] = address
    block = _render_block(folder, repo_id, revision, record, evaluation)
    return f"---\n{_to_yaml(metadata)}---\n\n# {name}\n\n{block}\n"


def merge_card(existing: str, rendered: str, license: str | None) -> str:
    """Return an existing README with the block and the metadata of a rendered card.

    OUR_METADATA is replaced, tags are united, and other metadata is kept, the license too unless
    one was asked for. A README without the marks gets the block at its end.
    """
    metadata, body = split_card(existing.replace("\r\n", "\n"), "The README.md on the Hub")
    new_metadata, new_body = split_card(rendered, "The card")
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

    replaced = {*OUR_METADATA, *(["license"] if license else [])}
    for key, value in new_metadata.items():
        if key in replaced or key not in metadata:
            metadata[key] = value
    tags = metadata.get("tags") or []
    tags, new_tags = tags if isinstance(tags, list) else [tags], new_metadata["tags"]
    replaced_tags = f"{CLASS_TAG}|{TRACKIO_TAG}:.*" if TRACKIO_TAG in new_tags else CLASS_TAG
    kept = [tag for tag in tags if tag in new_tags or not re.fullmatch(replaced_tags, str(tag))]
    metadata["tags"] = [*kept, *(tag for tag in new_tags if tag not in kept)]

    block, old_block = _find_block(new_body), _find_block(body)
    assert block is not None, "a rendered card has its block"
    body = body.replace(old_block, block) if old_block else f"{body.rstrip()}\n\n{block}\n"
    return f"---\n{_to_yaml(metadata)}---\n{body}"


def _metadata(
    record: Record,
    evaluation: Evaluation | None,
    name: str,
    license: str | None,
    tags: list[str],
) -> dict[str, Any]:
    dataset, base = record.dataset, record.base_model
    metadata: dict[str, Any] = {
        **({"license": license} if license or base is None else _license_metadata(base)),
        "library_name": "diffusers",
        "pipeline_tag": TASK,
        "tags": tags,
        "datasets": [dataset.name] if dataset and _is_on_hub(dataset) else None,
        "model-index": _model_index(dataset, evaluation, name) if evaluation else None,
    }
    if base is not None and _is_on_hub(base):
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


def metric_title(name: str) -> str:
    """Return the title of a metric: FID for fid, Precision at 3 for precision_at_3."""
    words = name.replace("_", " ").strip()
    return words.upper() if len(words) <= 4 else words[:1].upper() + words[1:]


class Markdown(str):
    """Text that goes into the card as it is; every other value goes through `plain`."""


def plain(value: Any) -> Markdown:
    """Return a value as Markdown that shows it on one line and does nothing else.

    A text that Markdown could read as more than words, such as a link, an image or HTML, is code.
    """
    if isinstance(value, Markdown):
        return value
    text = printable(value)
    is_address = re.search(r"://|www\.", text, re.IGNORECASE)
    return Markdown(text) if PLAIN_WORDS.fullmatch(text) and not is_address else code(text)


def code(value: Any) -> Markdown:
    """Return a value as a code span, also inside a table; no character ends either."""
    text = printable(value).translate(CODE_CHARACTERS)
    return Markdown(f"`{text}`")


def link(text: str, address: str) -> Markdown:
    """Return a link, without a login in its address; if that is no web address, only show it."""
    address = URL_LOGIN.sub("", address)
    if not WEB_ADDRESS.fullmatch(address):
        return plain(address)
    return Markdown(f"[{plain(text)}]({address})")


def _is_on_hub(source: DatasetRecord | BaseModel) -> bool:
    return source.on_hub and is_repo_id(source.name)


def _data_link(dataset: DatasetRecord) -> Markdown:
    """Return the name of a dataset, with a link if it is on the Hub."""
    if not _is_on_hub(dataset):
        return plain(dataset.title or dataset.name)
    return link(dataset.name, f"https://huggingface.co/datasets/{dataset.name}")


def _base_link(base: BaseModel) -> Markdown:
    """Return the name of the model that was fine-tuned, with a link if it is on the Hub."""
    if not _is_on_hub(base):
        return plain(base.name)
    return link(base.name, f"https://huggingface.co/{base.name}")


def _tracker_link(address: str) -> Markdown:
    """Return a link that shows where it leads, so that it cannot pass for another place."""
    return link(printable(address).partition("://")[2], address)


def _trackio_space(record: Record) -> str | None:
    """Return the address of the Space that shows the run, None if there is none."""
    return record.trackio if SPACE_ADDRESS.fullmatch(record.trackio or "") else None


def _demo_link(record: Record) -> Markdown | None:
    """Return a link to the Space that draws with the model, None if there is none."""
    address = f"https://huggingface.co/spaces/{record.demo}"
    return link(record.demo, address) if SPACE_ADDRESS.fullmatch(address) else None


def _methods(folder: Path, settings: dict[str, Any]) -> Markdown:
    """Return links to the papers of what the model and the snippet use."""
    scheduler = _scheduler_config(folder)
    papers = {
        "denoising diffusion": ("2006.11239", True),
        "cosine schedule": ("2102.09672", scheduler.get("beta_schedule") == "squaredcos_cap_v2"),
        "zero terminal SNR": ("2305.08891", scheduler.get("rescale_betas_zero_snr")),
        "v-prediction": ("2202.00512", scheduler.get("prediction_type") == "v_prediction"),
        "min-SNR weighting": ("2303.09556", settings.get("snr_gamma")),
        "classifier-free guidance": ("2207.12598", has_classes(folder)),
        "DDIM sampling": ("2010.02502", True),
    }
    links = [
        link(name, f"https://arxiv.org/abs/{paper}")
        for name, (paper, is_used) in papers.items()
        if is_used
    ]
    return Markdown(", ".join(links))


def _year(record: Record) -> str | None:
    """Return the year in which training ended, None if that is not known."""
    date = (record.training and record.training.finished_at) or ""
    return date[:4] if re.match("[0-9]{4}-", date) else None


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
        finalize=plain,
    )
    environment.filters |= {
        "code": code,
        "data_link": _data_link,
        "base_link": _base_link,
        "tracker_link": _tracker_link,
    }
    settings = read_json(folder / TRAIN_CONFIG) if (folder / TRAIN_CONFIG).is_file() else {}
    defaults = flatten(TrainConfig())
    weights = folder / UNET_WEIGHTS
    text = environment.get_template("model_card.md.jinja").render(
        repo_id=Markdown(repo_id),
        revision=Markdown(json.dumps(revision)) if revision else None,
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
        classes=_class_facts(folder, record, evaluation),
        steps=_num_inference_steps(folder),
        samplers=sampler_results.read_sampler_table(folder),
        metric_title=metric_title,
        methods=_methods(folder, settings),
        space=Markdown(space) if (space := _trackio_space(record)) else None,
        demo=_demo_link(record),
        owner=Markdown(repo_id.rpartition("/")[0]),
        name=Markdown(repo_id.rpartition("/")[2]),
        year=_year(record),
        settings=Markdown(json.dumps(settings, indent=2)) if settings else None,
        changed={
            name: as_flag(value)
            for name, value in settings.items()
            if name in defaults and value != defaults[name]
        },
        reproduce=Markdown(_reproduce(settings, record, repo_id)) if settings else None,
    )
    text = text.strip().replace("<!--", "<! --")  # no recorded text is one of the two marks
    return f"{BEGIN}\n{text}\n{END}"


def _num_inference_steps(folder: Path) -> int:
    """Return the steps of the snippets, no more than the model has timesteps."""
    return min(50, int(_scheduler_config(folder).get("num_train_timesteps", 1000)))


def _scheduler_config(folder: Path) -> dict[str, Any]:
    """Return the settings of the model's scheduler; empty without a file."""
    path = folder / SCHEDULER_CONFIG
    return read_scheduler_config(path, str(folder)) if path.is_file() else {}


def _class_facts(
    folder: Path, record: Record, evaluation: Evaluation | None
) -> dict[str, Any] | None:
    """Return the classes of a model that has them, and what its snippet needs; else None.

    `rows` has id, name, number of images, label accuracy and distance of the first MAX_CLASSES.
    """
    if not has_classes(folder):
        return None
    names = read_labels(folder / CONDITIONAL_LABELS, str(folder))
    config = read_unet_config(folder / CONDITIONAL_CONFIG, str(folder), len(names))
    shape = [config.get("in_channels", 3), *size_of(config["sample_size"])]
    # Of a stream the record counts its first images alone.
    counts = record.dataset.classes if record.dataset and not record.dataset.probed else {}
    results = {result.name: result.metrics for result in (evaluation and evaluation.classes) or ()}
    measured = {metric for values in results.values() for metric in values}
    distance = next((metric for metric in sampler_results.DISTANCES if metric in measured), None)
    rows = []
    for index, name in enumerate(names[:MAX_CLASSES]):
        values = results.get(name, {})
        accuracy, count = values.get(LABEL_ACCURACY), counts.get(name)
        numbers = ("" if v is None else f"{v:.3g}" for v in (accuracy, values.get(distance)))
        rows.append((index, name, "" if count is None else f"{count:,}", *numbers))
    curve = evaluation and evaluation.guidance
    return {
        "count": len(names),
        "rows": rows,
        "left_out": len(names) - len(rows),
        "distance_title": metric_title(distance or "frechet_distance") if measured else None,
        "shape": Markdown(", ".join(map(str, shape))),
        "scale": curve.best_scale if curve else DEFAULT_GUIDANCE_SCALE,
        "grid_rows": min(len(names), preview.MAX_ROWS),
        "grid_scale": f"{preview.GUIDANCE_SCALES[1]:g}",
    }


def _reproduce(settings: dict[str, Any], record: Record, repo_id: str) -> str:
    """Return the commands that repeat the run, with flags for what the settings leave open."""
    name, machine = repo_id.split("/")[-1], record.environment
    launch = ["accelerate launch"]
    if machine:
        launch.append(f"--num_processes {machine.num_processes}")
    launch.append(f"train.py --config {name}/train_config.json --output_dir {name}-again")
    revision = record.dataset.revision if record.dataset else None
    if revision and not settings.get("dataset_revision"):
        launch.append(f"--dataset_revision {shlex.quote(printable(revision))}")
    base = record.base_model
    if base and base.on_hub and not settings.get("pretrained_revision"):
        launch.append(f"--pretrained_revision {shlex.quote(printable(base.version))}")
    if machine and not settings.get("mixed_precision"):
        launch.append(f"--mixed_precision {shlex.quote(printable(machine.mixed_precision))}")
    return f"hf download {repo_id} train_config.json --local-dir {name}\n{' '.join(launch)}"


def _find_block(card: str) -> str | None:
    """Return the generated block of a card with its marks."""
    match = re.search(f"{re.escape(BEGIN)}.*?{re.escape(END)}", card, flags=re.DOTALL)
    return match[0] if match else None


def _to_yaml(metadata: dict[str, Any]) -> str:
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
