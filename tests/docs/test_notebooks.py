"""The notebooks: the same in both languages, without outputs in git, and run from top to bottom.

The slow test starts in an empty folder with numpy loaded, as Colab does: the notebook clones this
working tree, checks its packages, trains, publishes to a Hub of its own, loads, samples, and
generates images from a prompt with a tiny Stable Diffusion; then it publishes with an account. The
test adds settings after the cells `settings` and `check`. Not tested: a GPU, and the real Hub.

It runs with the versions of the tests, or those of another environment, such as one with Colab's
torch, the packages of requirements.txt and requirements-prompt.txt, gradio and ipykernel:

    COLAB_PYTHON=colab/bin/python pytest -m slow tests/docs/test_notebooks.py
"""

import ast
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from ddpm.config.parser import parse_push, parse_sample, parse_train
from docs import set_address
from tests.conftest import ROOT
from tests.docs import note_values
from tests.docs.test_notes import MAINLAND, TRANSLATED
from tests.sampling.tiny_stable import files_of, make_stable

FOLDER = ROOT / "notebooks"
LANGUAGES = ("colab.ipynb", "colab.zh-TW.ipynb")
NOTEBOOKS = {name: nbformat.read(FOLDER / name, as_version=4) for name in LANGUAGES}
WHEEL = {
    "numpy-{}.dist-info/METADATA": "Metadata-Version: 2.1\nName: numpy\nVersion: {}\n",
    "numpy-{}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}
COLAB_PYTHON = os.environ.get("COLAB_PYTHON", sys.executable)
SHORT = """
TRAIN_FLAGS = "--max_train_steps 20 --train_batch_size 16 --lr_warmup_steps 5"
STEPS = 10
"""


def cells(name: str, kind: str) -> list:
    return [cell for cell in NOTEBOOKS[name].cells if cell.cell_type == kind]


def source(name: str) -> str:
    """Return the code of one cell, by its id."""
    [cell] = [cell for cell in cells("colab.ipynb", "code") if cell.id == name]
    return cell.source


# Both languages, and what git holds


def test_both_languages_run_the_same_code():
    """Only comments differ, and they do."""
    english, chinese = (cells(name, "code") for name in LANGUAGES)
    assert len(english) == len(chinese) > 10
    for ours, theirs in zip(english, chinese, strict=True):
        assert ast.dump(ast.parse(ours.source)) == ast.dump(ast.parse(theirs.source)), ours.id
        assert ours.metadata == theirs.metadata
    assert any(ours.source != theirs.source for ours, theirs in zip(english, chinese, strict=True))


def test_both_languages_have_the_same_cells():
    """In the same order, with the same formulas, flags, minutes and pictures."""
    ids = [[cell.id for cell in NOTEBOOKS[name].cells] for name in LANGUAGES]
    assert ids[0] == ids[1]
    for ours, theirs in zip(*(cells(name, "markdown") for name in LANGUAGES), strict=True):
        for pattern in (r"\$[^$]+\$", r"`--[^`]+`", r"^#+ (?:\d+\.)?", r"· ~\d+", r"/docs/.+\)"):
            english, chinese = (re.findall(pattern, c.source, re.M) for c in (ours, theirs))
            assert english == chinese, ours.id


def test_chinese_uses_the_terms_of_taiwan():
    text = "\n".join(cell.source for cell in NOTEBOOKS["colab.zh-TW.ipynb"].cells)
    assert [word for word in (*MAINLAND, *TRANSLATED) if word in text] == []
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
    hosts = ("https://github.com", set_address.RAW)
    allowed = ("https://huggingface.co", *(f"{host}/{set_address.ADDRESS}" for host in hosts))
    addresses = re.findall(r"https?://[^\s)\"]+", text)
    assert [address for address in addresses if not address.startswith(allowed)] == []


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_part_says_how_long_it_takes(name):
    """In its heading, as an estimate in minutes; the settings take none."""
    text = "\n".join(cell.source for cell in cells(name, "markdown"))
    headings = re.findall(r"^## \d+\. .+", text, re.M)
    assert len(headings) > 10
    assert all(re.search(r" · ~\d+ (min|分鐘)$", heading) for heading in headings[1:]), headings


@pytest.mark.parametrize("name", LANGUAGES)
def test_pictures_are_those_of_the_docs(name):
    text = "\n".join(cell.source for cell in cells(name, "markdown"))
    pictures = re.findall(r"!\[.+\]\(.+/(docs/images/.+)\)", text)
    assert len(pictures) == text.count("![") > 5
    assert all((ROOT / picture).is_file() for picture in pictures)


@pytest.mark.parametrize("name", LANGUAGES)
def test_settings_are_a_form(name):
    [settings] = [cell.source for cell in cells(name, "code") if cell.id == "settings"]
    fields = [line for line in settings.splitlines() if not line.startswith("#")]
    for field in fields:
        assert json.loads(field.partition("# @param ")[2])["type"] in ("string", "slider"), field
    assert len(fields) == len(settings.splitlines()) - settings.count("# @markdown") > 5


@pytest.mark.parametrize("name", LANGUAGES)
def test_numbers_in_answers_are_computed(name):
    [text] = [cell.source for cell in cells(name, "markdown") if cell.id == "exercises"]
    assert str(note_values.below_one("squaredcos_cap_v2")) in text
    assert str(note_values.below_one("linear")) in text
    names: dict = {"TEXT_TO_IMAGE": False}
    exec(source("scales"), names)
    scales, steps = names["guidance_scales"], sum(names["step_counts"])
    predictions = [steps * (1 if scale == 1 else 2) for scale in scales]
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    assert {sum(predictions), *predictions} <= set(numbers), predictions


@pytest.mark.parametrize("name", LANGUAGES)
def test_no_token_is_written_or_printed(name):
    code = "\n".join(cell.source for cell in cells(name, "code"))
    assert not re.search(r"hf_\w|print\([^)]*(token|variables)", code)


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
    commands: list[str] = []
    names: dict = {
        "run": lambda command, _=None: commands.append(command),
        **{"repo_id": "alice/digits", "commit": "0" * 40, "variables": {}},
        **{"display": str, "Image": SimpleNamespace(open=str)},
    }
    for name in ("settings", "train", "publish", "sample"):
        exec(source(name), names)
    parsers = {"train.py": parse_train, "push.py": parse_push, "sample.py": parse_sample}
    parsed = []
    for words in map(shlex.split, commands):
        script = next(word for word in words if word in parsers)
        parsed.append(parsers[script](words[words.index(script) + 1 :]))
    train, push, sample = parsed
    assert train.data.class_conditional and train.output_dir == push.output_dir == names["RUN"]
    assert push.private and sample.model == push.repo_id and sample.class_label == "all"


# The first cells: bad input, and packages that Colab has loaded


@pytest.fixture
def find_project(monkeypatch):
    """find_project(folder, address) -> the names of the cell `clone`, run in that folder."""

    def execute(folder: Path, address: str = "") -> dict:
        names = {"REPOSITORY": address}
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.chdir(folder)
        exec(source("clone"), names)
        return names

    return execute


@pytest.mark.parametrize("folder", [ROOT, FOLDER])
def test_the_project_is_found_where_jupyter_starts(find_project, folder):
    find_project(folder)
    assert Path.cwd() == ROOT and sys.path[0] == str(ROOT)


def test_a_command_that_fails_stops_the_notebook(find_project, capsys):
    """After its output; a variable is for that command alone."""
    run = find_project(ROOT)["run"]
    run("echo $COLOR", {"COLOR": "blue"})
    with pytest.raises(SystemExit, match=r"^Failed, for the reason above: echo \$COLOR; exit 3$"):
        run("echo $COLOR; exit 3")
    assert capsys.readouterr().out.splitlines()[-2:] == ["blue", ""]


def test_a_wrong_address_is_one_sentence(find_project, make_repository, tmp_path, capfd):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("Another project.")
    address = make_repository(tmp_path / "other").as_uri()
    for wrong, message in {
        "": "^REPOSITORY is empty",
        f"{address}/none": "^Failed, for the reason above: git clone",
        address: "is another project.*Delete the folder diffusion-project",
        f"{address}/": "^Failed, for the reason above: git clone",  # the folder is still there
    }.items():
        with pytest.raises(SystemExit, match=message):
            find_project(tmp_path, wrong)


@pytest.fixture
def install(monkeypatch, tmp_path):
    """install(before, replaced) -> (kept versions, restarts): run the cell `install`.

    `before` has versions of installed packages, `replaced` those that pip installs instead.
    """
    for file in ("requirements.txt", "requirements-prompt.txt"):
        shutil.copy(ROOT / file, tmp_path)
    monkeypatch.chdir(tmp_path)

    def execute(before: dict[str, str], replaced: dict[str, str]) -> list[bool]:
        versions, restarts = dict(before), []
        kernel = SimpleNamespace(do_shutdown=restarts.append)
        monkeypatch.setattr(
            importlib.metadata,
            "distributions",
            lambda: [
                *(SimpleNamespace(name=name, version=versions[name]) for name in versions),
                SimpleNamespace(name="numpy", version="1.21.5"),  # of the system, never imported
            ],
        )
        monkeypatch.setattr(
            importlib.metadata, "packages_distributions", lambda: {name: [name] for name in before}
        )
        names = {
            "run": lambda command: versions.update(replaced),
            "get_ipython": lambda: SimpleNamespace(kernel=kernel),
            **{"Path": Path, "sys": sys},
        }
        try:
            exec(source("install"), names)
        except SystemExit as exit:
            print(exit)
        return restarts

    return execute


def test_a_torch_that_is_too_old_is_kept_and_named(install, capsys):
    assert install({"torch": "2.5.1+cu121", "torchvision": "0.21.0", "numpy": "2.2.0"}, {}) == []
    assert "torch 2.5.1+cu121 is not torch<3,>=2.6, with which" in capsys.readouterr().out
    wanted = Path("requirements-notebook.txt").read_text().splitlines()
    assert "diffusers<1,>=0.36" in wanted and "transformers<6,>=5.0" in wanted
    assert [line for line in wanted if line.startswith(("torch", "-"))] == []


def test_torch_is_installed_where_it_is_missing(install):
    install({"numpy": "2.2.0"}, {})
    assert "torch<3,>=2.6" in Path("requirements-notebook.txt").read_text().splitlines()


def test_only_a_package_that_is_loaded_restarts_the_session(install, capsys):
    """numpy is loaded here, as on Colab before the first cell. Of two copies the first counts."""
    before = {"numpy": "2.0.2", "never_loaded": "1"}
    assert install(before, {"never_loaded": "2", "new": "1"}) == []
    assert capsys.readouterr().out == ""
    assert install(before, {"numpy": "2.2.0"}) == [True]
    assert capsys.readouterr().out == "Restarting for numpy: now Run all again.\n"


# From top to bottom


@pytest.fixture
def make_repository(monkeypatch):
    """make_repository(folder) -> the folder, as a git repository with one commit."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)

    def make(folder: Path) -> Path:
        identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
        for words in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "all"]):
            subprocess.run(["git", *words], cwd=folder, check=True)
        return folder

    return make


@pytest.fixture
def repository(make_repository, tmp_path) -> Path:
    """A git repository to clone, with this working tree as its only commit."""
    folder = tmp_path / "origin"
    caches = shutil.ignore_patterns(".*", "__pycache__", "ddpm-*", "samples", "wandb", "benchmarks")
    shutil.copytree(ROOT, folder, ignore=caches, symlinks=True)
    return make_repository(folder)


@pytest.mark.slow
def test_the_session_restarts_once(tmp_path, monkeypatch):
    """numpy is loaded before the first cell, too old, and pip replaces it: a real kernel and pip.

    Both numpys are stubs in an environment of their own; all else is that of the tests.
    """
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    [packages] = environment.glob("lib/*/site-packages")
    (packages / "tests.pth").write_text(sysconfig.get_path("purelib"))
    numpy_files = {"numpy/__init__.py": "", "numpy-{}.dist-info/RECORD": "", **WHEEL}
    for name, text in numpy_files.items():
        path = packages / name.format("1.26.4")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.format("1.26.4"))
    record = "".join(f"{name.format('1.26.4')},,\n" for name in numpy_files)
    (packages / "numpy-1.26.4.dist-info" / "RECORD").write_text(record)
    with zipfile.ZipFile(tmp_path / "numpy-2.9.9-py3-none-any.whl", "w") as wheel:
        for name, text in numpy_files.items():
            wheel.writestr(name.format("2.9.9"), text.format("2.9.9"))
    add_kernel(tmp_path, python, monkeypatch)
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    until = [source(name) for name in ("settings", "clone", "install")]
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(text) for text in ("import numpy", *until)]
    )
    project = tmp_path / "project"
    (project / "ddpm").mkdir(parents=True)
    for file in ("requirements.txt", "requirements-prompt.txt", "ddpm/run_folder.py"):
        shutil.copy(ROOT / file, project / file)
    resources = {"metadata": {"path": str(project)}}
    client = NotebookClient(notebook, timeout=300, kernel_name="colab", resources=resources)
    with pytest.raises(CellExecutionError, match="Restarting for numpy: now Run all again"):
        client.execute()
    assert (packages / "numpy-2.9.9.dist-info").is_dir()
    client.execute()


def add_kernel(folder: Path, python: str | Path, monkeypatch) -> None:
    """Add the kernel `colab`, which runs cells by that interpreter."""
    spec = folder / "kernels" / "colab" / "kernel.json"
    spec.parent.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": argv, "display_name": "colab", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(folder))


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(hub, alice, repository, tmp_path, monkeypatch):
    """Without an account, and then the cells that publish with one."""
    stable = files_of(make_stable(tmp_path))
    half = {name.replace(".safetensors", ".fp16.safetensors"): stable[name] for name in stable}
    hub.create_repo("model", "someone/tiny-stable").write({**stable, **half}, "tiny")
    monkeypatch.setenv("ALICE", alice)
    monkeypatch.delenv("HF_TOKEN")
    for name, value in {
        "PATH": f"{Path(COLAB_PYTHON).parent}:/usr/bin:/bin",
        "PIP_NO_INDEX": "1",  # a missing package is an error
        "PIP_CONFIG_FILE": os.devnull,
        "OMP_NUM_THREADS": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    add_kernel(tmp_path, COLAB_PYTHON, monkeypatch)
    notebook = nbformat.from_dict(NOTEBOOKS["colab.ipynb"])
    address = f'REPOSITORY = "{repository.as_uri()}"\nSTABLE_DIFFUSION = "someone/tiny-stable"'
    insert_after(notebook, "settings", SHORT + address)
    insert_after(notebook, "check", "TEXT_TO_IMAGE = True")
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import numpy"))
    with_account = "import os; os.environ['HF_TOKEN'] = os.environ['ALICE']\n" + source(
        "login"
    ).replace("ACCOUNT = False", "ACCOUNT = True")
    again = [source(name) for name in ("publish", "reload", "sample")]
    notebook.cells += [nbformat.v4.new_code_cell(text) for text in (with_account, *again)]
    (tmp_path / "content").mkdir()
    resources = {"metadata": {"path": str(tmp_path / "content")}}
    NotebookClient(notebook, timeout=600, kernel_name="colab", resources=resources).execute()

    outputs = {cell.id: text_of(cell) for cell in notebook.cells if cell.cell_type == "code"}
    images = {cell.id: count_images(cell) for cell in notebook.cells if cell.cell_type == "code"}
    project = tmp_path / "content" / "diffusion-project"
    assert (project / "ddpm-digits-classes" / "record.json").is_file()
    assert "Trained 20 steps" in outputs["train"] and "final_loss" in outputs["trained"]
    assert "The model will be me/ddpm-digits-classes on http://127.0.0.1" in outputs["login"]
    published = [text for text in outputs.values() if "Proved: downloaded again" in text]
    loaded = [text for text in outputs.values() if text.rstrip().endswith("to the bit: True")]
    sampled = [text for text in outputs.values() if "Drew 80 images" in text]
    assert len(published) == len(loaded) == len(sampled) == 2, outputs
    assert hub.repo("model", "alice/ddpm-digits-classes").is_private
    assert hub.count(path=r"tiny-stable/.*(?<!fp16)\.safetensors$") == 0
    assert "this model: from timestep 496 on" in outputs["answers"]
    assert "linear: from timestep 259 on" in outputs["answers"]
    for name in ("trained", "forward", "reverse", "restore", "classes", "digit", "sample"):
        assert images[name] == (2 if name == "trained" else 1), name
    for name in ("stable", "scales", "again", "answers"):
        assert images[name] == 1, name
    assert alice not in nbformat.writes(notebook)


def insert_after(notebook, name: str, code: str) -> None:
    """Insert a cell after the cell with the id `name`."""
    place = next(index for index, cell in enumerate(notebook.cells) if cell.id == name)
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(code))


def text_of(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def count_images(cell) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)
