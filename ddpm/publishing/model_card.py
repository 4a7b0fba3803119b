"""Render the model card of a staged folder from its recorded facts. Unknown facts are absent.

Recorded texts may come from others, so each goes through `plain`, `code` or `link` (markdown.py).
The text between the two markers is generated and is replaced by the next push. Text that people
write outside them, and metadata that they set, is kept.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jinja2

from ddpm.card import split_card
from ddpm.config.base import as_flag, flatten
from ddpm.config.train import TrainConfig
from ddpm.config.values import size_of
from ddpm.errors import printable
from ddpm.evaluation.results import Evaluation, read_evaluation
from ddpm.file_io import file_sha256, read_json
from ddpm.publishing.card_metadata import (
    SPACE_ADDRESS,
    is_on_hub,
    merge_metadata,
    metric_title,
    render_metadata,
    to_yaml,
    trackio_space,
)
from ddpm.publishing.markdown import Markdown, code, link, plain
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
MAX_CLASSES = 20
"""Classes in the table; a longer one is cut off."""
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
    metadata = render_metadata(record, evaluation, name, license, has_classes(folder))
    if (folder / SAMPLE_GRID).is_file():
        address = f"https://huggingface.co/{repo_id}/resolve/{revision or 'main'}/{SAMPLE_GRID}"
        metadata["thumbnail"] = address
    block = _render_block(folder, repo_id, revision, record, evaluation)
    return f"---\n{to_yaml(metadata)}---\n\n# {name}\n\n{block}\n"


def merge_card(existing: str, rendered: str, license: str | None) -> str:
    """Return an existing README with the block and the metadata (`merge_metadata`) of a rendered
    card. A README without the marks gets the block at its end.
    """
    metadata, body = split_card(existing.replace("\r\n", "\n"), "The README.md on the Hub")
    new_metadata, new_body = split_card(rendered, "The card")
    title = re.search(r"^# (.*)$", new_body, flags=re.MULTILINE)[1]
    metadata = merge_metadata(metadata, new_metadata, title, license)
    block, old_block = _find_block(new_body), _find_block(body)
    assert block is not None, "a rendered card has its block"
    body = body.replace(old_block, block) if old_block else f"{body.rstrip()}\n\n{block}\n"
    return f"---\n{to_yaml(metadata)}---\n{body}"


def _data_link(dataset: DatasetRecord) -> Markdown:
    """Return the name of a dataset, with a link if it is on the Hub."""
    if not is_on_hub(dataset):
        return plain(dataset.title or dataset.name)
    return link(dataset.name, f"https://huggingface.co/datasets/{dataset.name}")


def _base_link(base: BaseModel) -> Markdown:
    """Return the name of the model that was fine-tuned, with a link if it is on the Hub."""
    if not is_on_hub(base):
        return plain(base.name)
    return link(base.name, f"https://huggingface.co/{base.name}")


def _tracker_link(address: str) -> Markdown:
    """Return a link that shows where it leads, so that it cannot pass for another place."""
    return link(printable(address).partition("://")[2], address)


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
        "log-normal noise": ("2206.00364", settings.get("timestep_sampling") == "logit_normal"),
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
        space=Markdown(space) if (space := trackio_space(record)) else None,
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
