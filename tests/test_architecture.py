"""The list of rooms in ddpm/__init__.py, held: who may import whom, and what stays light."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ddpm
from ddpm import pipeline

ROOT = Path(__file__).parent.parent
LISTED = ddpm.__doc__.partition("\n\n")[2].strip().rstrip(".").replace("\n", " ").split(", ")
ROOMS = sorted(path.stem for path in (ROOT / "ddpm").glob("*.py") if path.stem != "__init__")
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
LIGHT = [name for name in ("train", "push", "sample", "evaluate") if name in SCRIPTS]
TRAINING_ROOMS = {"training", "plan", "checkpoint", "stopping", "tracking", "ema", "diffusion"}
TRAINING_ROOMS |= {"order", "images", "stepping", "budget", "rehearsal"}
TRAINING_ROOMS |= {"cutting", "sources", "datareport", "blocks"}
TRAINING_ROOMS |= {"streaming", "memory"}


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "ddpm":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            found |= {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("ddpm.") for name in found} & set(ROOMS)


def reachable(path: Path) -> set[str]:
    """Rooms that a file imports, with all that those import."""
    found, open_ends = set(), imported_rooms(path)
    while open_ends:
        room = open_ends.pop()
        found.add(room)
        open_ends |= imported_rooms(ROOT / "ddpm" / f"{room}.py") - found
    return found


def python(script: str, *argv: str) -> str:
    """Run a script in a process of its own, at the top of the repository: its output."""
    ended = subprocess.run([sys.executable, "-c", script, *argv], cwd=ROOT, text=True,
                           capture_output=True)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_every_room_is_on_the_list_and_every_name_is_a_room():
    assert sorted(LISTED) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_rooms_above_it(room):
    above = LISTED[: LISTED.index(room)]
    below = imported_rooms(ROOT / "ddpm" / f"{room}.py") - set(above)
    assert not below, f"{room} imports {sorted(below)}, which are not above it"


def test_only_train_imports_the_loop():
    files = [*ROOT.glob("*.py"), *(ROOT / "ddpm").glob("*.py")]
    assert [path.name for path in files if "training" in imported_rooms(path)] == ["train.py"]


@pytest.mark.parametrize("script", ["push", "sample"])
def test_push_and_sample_import_no_training_code(script):
    assert not reachable(ROOT / f"{script}.py") & TRAINING_ROOMS


@pytest.mark.parametrize("script", LIGHT)
def test_help_imports_nothing_heavy(script):
    heavy = ["torch", "torchvision", "diffusers", "datasets", "accelerate", "wandb", "transformers",
             "huggingface_hub", "PIL", "numpy"]  # fmt: skip
    report = python(
        "import contextlib, io, json, runpy, sys\n"
        "script, heavy = sys.argv[1], json.loads(sys.argv[2])\n"
        "sys.argv = [script, '--help']\n"
        "with contextlib.redirect_stdout(io.StringIO()) as said:\n"
        "    try:\n"
        "        runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        code = end.code\n"
        "print(json.dumps([code, len(said.getvalue()), [n for n in heavy if n in sys.modules]]))\n",
        f"{script}.py",
        json.dumps(heavy),
    )
    code, length, imported = json.loads(report)
    assert not code
    assert length > 200
    assert imported == []


@pytest.mark.slow
def test_sample_needs_no_datasets_wandb_or_accelerate(tmp_path, make_unet, chain):
    """With these packages gone (None in sys.modules is how Python says that), it still draws.

    diffusers asks whether accelerate is there and does without it, so a missing package is the only
    honest check: an installed one would be imported by diffusers itself.
    """
    pipeline.export(make_unet(), chain, tmp_path / "model")
    python(
        "import runpy, sys\n"
        "gone = 'datasets wandb accelerate torchvision transformers pyarrow pandas jinja2'\n"
        "sys.modules |= dict.fromkeys(gone.split())\n"
        "sys.argv = ['sample.py', *sys.argv[1:]]\n"
        "sys.path.insert(0, '.')\n"
        "runpy.run_path('sample.py', run_name='__main__')\n",
        str(tmp_path / "model"),
        *("--num_images", "1", "--num_inference_steps", "2"),
        *("--output_dir", str(tmp_path / "samples")),
    )
    assert sorted(os.listdir(tmp_path / "samples")) == ["grid.png", "seed-00000.png"]


def test_no_room_is_called_utils():
    assert not {"utils", "helpers", "common", "misc"} & set(ROOMS)
