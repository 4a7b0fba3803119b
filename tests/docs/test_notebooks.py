"""The notebooks: the same in both languages, without outputs in git, and run from top to bottom.

The slow test starts in an empty folder, as Colab does: the notebook clones this working tree,
checks its packages, trains, publishes to the Hub of the tests, loads, samples, and generates images
from a prompt with a tiny Stable Diffusion. The test adds settings after the cell `settings`.
Not tested: a GPU, the restart that Colab needs after the installation, and the real Hub.
"""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

from ddpm.config.parser import parse_push, parse_sample, parse_train
from tests.conftest import ROOT
from tests.docs.test_notes import MAINLAND
from tests.sampling.tiny_stable import files_of, make_stable

FOLDER = ROOT / "notebooks"
LANGUAGES = ("colab.ipynb", "colab.zh-TW.ipynb")
NOTEBOOKS = {name: nbformat.read(FOLDER / name, as_version=4) for name in LANGUAGES}
SHORT = """
TRAIN_FLAGS = "--max_train_steps 20 --train_batch_size 16 --lr_warmup_steps 5"
STEPS = 10
"""


def cells(name: str, kind: str) -> list:
    return [cell for cell in NOTEBOOKS[name].cells if cell.cell_type == kind]


def syntax_tree(source: str) -> str:
    """Return the syntax tree of a cell, `!` and `%` lines included: no comments, no layout."""
    return ast.dump(ast.parse(TransformerManager().transform_cell(source)))


def commands(name: str) -> list[str]:
    """Return the `!` lines of a notebook, continuation lines joined."""
    code = "\n".join(cell.source for cell in cells(name, "code")).replace("\\\n", " ")
    return re.findall(r"^\s*!(.+)$", code, re.M)


# Both languages, and what git holds


def test_both_languages_run_the_same_code():
    """Only comments differ, and they do."""
    english, chinese = (cells(name, "code") for name in LANGUAGES)
    assert len(english) == len(chinese) > 10
    for ours, theirs in zip(english, chinese, strict=True):
        assert syntax_tree(ours.source) == syntax_tree(theirs.source), ours.id
        assert ours.metadata == theirs.metadata
    assert any(ours.source != theirs.source for ours, theirs in zip(english, chinese, strict=True))


def test_both_languages_have_the_same_cells():
    """In the same order, with the same formulas, commands and settings."""
    ids = [[cell.id for cell in NOTEBOOKS[name].cells] for name in LANGUAGES]
    assert ids[0] == ids[1]
    for ours, theirs in zip(*(cells(name, "markdown") for name in LANGUAGES), strict=True):
        for pattern in (r"\$[^$]+\$", r"`--[^`]+`", r"^#+ (?:\d+\.)?"):
            english, chinese = (re.findall(pattern, c.source, re.M) for c in (ours, theirs))
            assert english == chinese, ours.id


def test_chinese_uses_the_terms_of_taiwan():
    text = "\n".join(cell.source for cell in NOTEBOOKS["colab.zh-TW.ipynb"].cells)
    assert [word for word in MAINLAND if word in text] == []
    for cell in cells("colab.zh-TW.ipynb", "markdown"):
        assert re.search(r"[\u4e00-\u9fff]", cell.source), cell.id


@pytest.mark.parametrize("name", LANGUAGES)
def test_cells_have_no_output(name):
    nbformat.validate(NOTEBOOKS[name])
    for cell in cells(name, "code"):
        assert cell.outputs == [] and cell.execution_count is None, cell.id
    assert NOTEBOOKS[name].metadata.colab.gpuType == "T4"
    assert (FOLDER / name).stat().st_size < 100_000


@pytest.mark.parametrize("name", LANGUAGES)
def test_the_url_of_the_project_is_set_in_one_place(name):
    code = "\n".join(cell.source for cell in cells(name, "code"))
    assert len(re.findall(r"^REPOSITORY = ", code, re.M)) == 1
    text = "\n".join(cell.source for cell in NOTEBOOKS[name].cells)
    assert re.findall(r"https?://[^\s)]+", text.replace("https://huggingface.co", "")) == []


@pytest.mark.parametrize("name", LANGUAGES)
def test_no_token_is_written_or_printed(name):
    code = "\n".join(cell.source for cell in cells(name, "code"))
    assert not re.search(r"hf_\w|print\([^)]*token", code)


@pytest.mark.parametrize("name", LANGUAGES)
def test_sections_of_the_notes_that_are_named_exist(name):
    notes = (ROOT / "docs" / name.replace("colab", "diffusion").replace("ipynb", "md")).read_text()
    sections = set(re.findall(r"^## (\d+)\.", notes, re.M))
    text = "\n".join(cell.source for cell in cells(name, "markdown"))
    groups = re.findall(r"sections? ([\d, and]+)|第 ([\d、]+) 節", text)
    named = {number for group in groups for number in re.findall(r"\d+", "".join(group))}
    assert len(named) > 7 and named <= sections


def test_every_command_parses(monkeypatch):
    """With the settings of the notebook, by the parser of its script."""
    monkeypatch.chdir(ROOT)
    [settings] = [
        cell
        for cell in cells("colab.ipynb", "code")
        if "parameters" in cell.metadata.get("tags", [])
    ]
    names: dict = {"repo_id": "alice/digits", "commit": "0" * 40, "DTYPE": "fp16"}
    exec(settings.source, names)
    parsers = {"train.py": parse_train, "push.py": parse_push, "sample.py": parse_sample}
    parsed = []
    for command in commands("colab.ipynb"):
        words = [word.format(**names) for word in shlex.split(command)]
        script = next((word for word in words if word in parsers), None)
        if script is None:
            assert words[:2] == ["git", "clone"]
            continue
        argv = [word for word in words[words.index(script) + 1 :] if word]
        parsed.append(parsers[script](argv))
    assert len(parsed) == 5
    from_prompt, from_image = parsed[-2:]
    assert (from_prompt.num_inference_steps, from_prompt.guidance_scale) == (100, 7.5)
    assert from_prompt.dtype == "fp16" and from_prompt.prompt == names["PROMPT"]
    assert from_prompt.image is None and from_image.strength == 0.6
    assert from_image.image.startswith(from_prompt.output_dir)


# From top to bottom


@pytest.fixture
def repository(tmp_path) -> Path:
    """A git repository to clone, with this working tree as its only commit."""
    folder = tmp_path / "origin"
    caches = shutil.ignore_patterns(".*", "__pycache__", "ddpm-*", "samples", "wandb", "benchmarks")
    shutil.copytree(ROOT, folder, ignore=caches, symlinks=True)
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    for words in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(hub, alice, repository, tmp_path, monkeypatch):
    stable = make_stable(tmp_path)
    hub.create_repo("model", "someone/tiny-stable").write(files_of(stable), "tiny")
    for name, value in {
        "PATH": f"{Path(sys.executable).parent}:{Path('/usr/bin')}:/bin",
        "PIP_NO_INDEX": "1",  # a missing package is an error
        "PIP_CONFIG_FILE": "/dev/null",
        "OMP_NUM_THREADS": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    notebook = nbformat.from_dict(NOTEBOOKS["colab.ipynb"])
    place = next(index for index, cell in enumerate(notebook.cells) if cell.id == "settings")
    settings = f'REPOSITORY = "file://{repository}"\nSTABLE_DIFFUSION = "someone/tiny-stable"'
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(SHORT + settings))
    empty = tmp_path / "content"
    empty.mkdir()
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(empty)}})
    client.execute()

    outputs = {cell.id: text_of(cell) for cell in notebook.cells if cell.cell_type == "code"}
    images = {cell.id: count_images(cell) for cell in notebook.cells if cell.cell_type == "code"}
    project = empty / "diffusion-project"
    assert (project / "ddpm-digits" / "record.json").is_file()
    assert "Trained 20 steps" in outputs["train"] and "final_loss" in outputs["trained"]
    assert "Proved: downloaded again" in outputs["publish"]
    assert hub.repo("model", "alice/ddpm-digits").is_private
    assert outputs["reload"].rstrip().endswith("to the bit: True")
    assert "Drew 16 images" in outputs["sample"]
    assert re.search(r"someone/tiny-stable at \w+, PNDMScheduler, 100 steps", outputs["prompt"])
    assert (project / "from-words" / "seed-00000.png").read_bytes() != (
        project / "from-picture" / "seed-00000.png"
    ).read_bytes()
    expected = {
        "trained": 2,
        "forward": 1,
        "reverse": 1,
        "restore": 1,
        "sample": 1,
        "prompt": 1,
        "again": 1,
    }
    assert {name: number for name, number in images.items() if number} == expected
    assert alice not in nbformat.writes(notebook)


def text_of(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def count_images(cell) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)
