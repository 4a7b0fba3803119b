"""The notebooks: alike in both languages, clean in git, and run from top to bottom.

`pytest -m slow tests/docs/test_notebooks.py` begins in an empty folder, as Colab does: the notebook
clones this working tree, checks its packages, trains, publishes to the tests' Hub, loads, samples,
and draws from words with a tiny Stable Diffusion. Settings are put in after the cell tagged
`parameters`. A cell that cannot run here carries a tag `not-in-tests: REASON`; at present every
cell runs. What no test sees is a GPU, Colab's restart after the install, and the real Hub.
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
SKIP = "not-in-tests: "
SHORT = """
TRAIN_FLAGS = "--max_train_steps 20 --train_batch_size 16 --lr_warmup_steps 5"
STEPS = 10
"""


def cells(name: str, kind: str) -> list:
    return [cell for cell in NOTEBOOKS[name].cells if cell.cell_type == kind]


def meaning(source: str) -> str:
    """A cell's code as Python sees it, with `!` and `%` lines: without comments and layout."""
    return ast.dump(ast.parse(TransformerManager().transform_cell(source)))


def commands(name: str) -> list[str]:
    """The `!` lines of a notebook, continuation lines joined."""
    code = "\n".join(cell.source for cell in cells(name, "code")).replace("\\\n", " ")
    return re.findall(r"^\s*!(.+)$", code, re.M)


# Alike and clean


def test_both_languages_run_the_same_code():
    """Only comments differ, and there are some in each language."""
    english, chinese = (cells(name, "code") for name in LANGUAGES)
    assert len(english) == len(chinese) > 10
    for ours, theirs in zip(english, chinese, strict=True):
        assert meaning(ours.source) == meaning(theirs.source), ours.id
        assert ours.metadata == theirs.metadata
    assert any(ours.source != theirs.source for ours, theirs in zip(english, chinese, strict=True))


def test_both_languages_have_the_same_text():
    """The same cells in the same order, with the same formulas, commands and settings in them."""
    ids = [[cell.id for cell in NOTEBOOKS[name].cells] for name in LANGUAGES]
    assert ids[0] == ids[1]
    for ours, theirs in zip(*(cells(name, "markdown") for name in LANGUAGES), strict=True):
        for pattern in (r"\$[^$]+\$", r"`--[^`]+`", r"^#+ (?:\d+\.)?"):
            found = [re.findall(pattern, cell.source, re.M) for cell in (ours, theirs)]
            assert found[0] == found[1], ours.id


def test_the_chinese_is_that_of_taiwan():
    words = "\n".join(cell.source for cell in NOTEBOOKS["colab.zh-TW.ipynb"].cells)
    assert [word for word in MAINLAND if word in words] == []
    for cell in cells("colab.zh-TW.ipynb", "markdown"):
        assert re.search(r"[\u4e00-\u9fff]", cell.source), cell.id


@pytest.mark.parametrize("name", LANGUAGES)
def test_git_holds_no_output(name):
    nbformat.validate(NOTEBOOKS[name])
    for cell in cells(name, "code"):
        assert cell.outputs == [] and cell.execution_count is None, cell.id
    assert NOTEBOOKS[name].metadata.colab.gpuType == "T4"
    assert (FOLDER / name).stat().st_size < 100_000


@pytest.mark.parametrize("name", LANGUAGES)
def test_the_address_of_the_project_has_one_place(name):
    """And while the project has none, the cell that needs it says what to do."""
    code = "\n".join(cell.source for cell in cells(name, "code"))
    assert len(re.findall(r"^REPOSITORY = ", code, re.M)) == 1
    text = "\n".join(cell.source for cell in NOTEBOOKS[name].cells)
    assert re.findall(r"https?://[^\s)]+", text.replace("https://huggingface.co", "")) == []


@pytest.mark.parametrize("name", LANGUAGES)
def test_no_token_is_written_or_printed(name):
    code = "\n".join(cell.source for cell in cells(name, "code"))
    assert not re.search(r"hf_\w|print\([^)]*token", code)


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_section_of_the_notes_that_is_named_exists(name):
    notes = (ROOT / "docs" / name.replace("colab", "diffusion").replace("ipynb", "md")).read_text()
    sections = set(re.findall(r"^## (\d+)\.", notes, re.M))
    text = "\n".join(cell.source for cell in cells(name, "markdown"))
    groups = re.findall(r"sections? ([\d, and]+)|第 ([\d、]+) 節", text)
    named = {number for group in groups for number in re.findall(r"\d+", "".join(group))}
    assert len(named) > 7 and named <= sections


def test_every_command_is_understood_by_its_parser(monkeypatch):
    """Flags and their values, by the real command lines, with the settings of the notebook."""
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
    words, picture = parsed[-2:]
    assert (words.num_inference_steps, words.guidance_scale) == (100, 7.5)
    assert words.dtype == "fp16" and words.prompt == names["PROMPT"] and words.image is None
    assert picture.image.startswith(words.output_dir) and picture.strength == 0.6


# From top to bottom


@pytest.fixture
def repository(tmp_path) -> Path:
    """A git repository with this working tree as its only commit, to be cloned."""
    folder = tmp_path / "origin"
    caches = shutil.ignore_patterns(".*", "__pycache__", "ddpm-*", "samples", "wandb", "benchmarks")
    shutil.copytree(ROOT, folder, ignore=caches, symlinks=True)
    who = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(hub, alice, repository, tmp_path, monkeypatch):
    stable = make_stable(tmp_path)
    hub.create_repo("model", "someone/tiny-stable").write(files_of(stable), "tiny")
    for name, value in {
        "PATH": f"{Path(sys.executable).parent}:{Path('/usr/bin')}:/bin",
        "PIP_NO_INDEX": "1",  # what is missing must not be fetched behind a test's back
        "PIP_CONFIG_FILE": "/dev/null",
        "OMP_NUM_THREADS": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    notebook = nbformat.from_dict(NOTEBOOKS["colab.ipynb"])
    place = next(index for index, cell in enumerate(notebook.cells) if cell.id == "settings")
    where = f'REPOSITORY = "file://{repository}"\nSTABLE_DIFFUSION = "someone/tiny-stable"'
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(SHORT + where))
    notebook.cells = [cell for cell in notebook.cells if not reason(cell)]
    empty = tmp_path / "content"
    empty.mkdir()
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(empty)}})
    client.execute()

    said = {cell.id: text_of(cell) for cell in notebook.cells if cell.cell_type == "code"}
    shown = {cell.id: pictures_of(cell) for cell in notebook.cells if cell.cell_type == "code"}
    project = empty / "diffusion-project"
    assert (project / "ddpm-digits" / "record.json").is_file()
    assert "Trained 20 steps" in said["train"] and "final_loss" in said["trained"]
    assert "Proved: downloaded again" in said["publish"]
    assert hub.repo("model", "alice/ddpm-digits").is_private
    assert said["reload"].rstrip().endswith("to the bit: True")
    assert "Drew 16 images" in said["sample"]
    assert re.search(r"someone/tiny-stable at \w+, PNDMScheduler, 100 steps", said["prompt"])
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
    assert {name: number for name, number in shown.items() if number} == expected
    assert alice not in nbformat.writes(notebook)


def reason(cell) -> str | None:
    """Why a cell is left out here, if it is."""
    tags = cell.metadata.get("tags", [])
    return next((tag.removeprefix(SKIP) for tag in tags if tag.startswith(SKIP)), None)


def text_of(cell) -> str:
    return "".join(each.get("text", "") for each in cell.outputs)


def pictures_of(cell) -> int:
    return sum("image/png" in each.get("data", {}) for each in cell.outputs)
