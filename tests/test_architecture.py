"""Which module may import which: packages in one order, no circles, and what stays light."""

import ast
import functools
import json
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from ddpm.sampling import pipeline

ROOT = Path(__file__).parent.parent
BASE = [
    "errors",
    "cpu_threads",
    "device",
    "accelerator",
    "rank_failure",
    "typed_json",
    "file_io",
    "card",
    "run_folder",
    "run_record",
    "hub",
    "download",
]
PACKAGES = ["config", "data", "diffusion", "sampling", "evaluation", "publishing", "training"]
"""Base modules and packages, each importing only what stands before it."""
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for path in (ROOT / "ddpm").rglob("*.py")
    if path.name != "__init__.py"
}
SCRIPTS = ("train", "push", "sample", "evaluate")
NOT_FOR_SAMPLING = {
    f"ddpm.data.{name}"
    for name in ("dataset", "order", "pixel_cache", "report", "source", "stream")
}


@functools.cache
def imports_of(path: Path) -> set[str]:
    """Return the modules of ddpm that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & set(MODULES)


def reachable(path: Path) -> set[str]:
    """Return the modules that a file imports, directly and indirectly."""
    seen: set[str] = set()
    pending = imports_of(path)
    while pending:
        module = pending.pop()
        seen.add(module)
        pending |= imports_of(MODULES[module]) - seen
    return seen


def layer(module: str) -> int:
    """Return the position of a module's package in the order."""
    return [*BASE, *PACKAGES].index(module.split(".")[1])


def python(script: str, *argv: str) -> str:
    """Run a script in a new process at the top of the repository, and return its output."""
    done = subprocess.run(
        [sys.executable, "-c", script, *argv], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_is_in_a_package_of_the_order():
    assert {module.split(".")[1] for module in MODULES} == {*BASE, *PACKAGES}
    assert not {"utils", "helpers", "common", "misc"} & {name.split(".")[-1] for name in MODULES}


def test_modules_import_only_packages_above_them():
    wrong = [
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        for imported in imports_of(path)
        if layer(imported) > layer(module)
    ]
    assert not wrong


def test_no_imports_go_in_a_circle():
    TopologicalSorter({name: imports_of(path) for name, path in MODULES.items()}).prepare()


def test_package_docstrings_hold_no_code():
    for package in PACKAGES:
        tree = ast.parse((ROOT / "ddpm" / package / "__init__.py").read_text(encoding="utf-8"))
        assert len(tree.body) == 1 and ast.get_docstring(tree), package


def test_only_train_imports_training():
    outside = [path for name, path in MODULES.items() if not name.startswith("ddpm.training.")]
    importers = [
        path.name
        for path in (*ROOT.glob("*.py"), *outside)
        if any(name.startswith("ddpm.training.") for name in imports_of(path))
    ]
    assert importers == ["train.py"]


@pytest.mark.parametrize("script", ["push", "sample"])
def test_push_and_sample_import_no_training_code(script):
    modules = reachable(ROOT / f"{script}.py")
    assert not modules & NOT_FOR_SAMPLING
    assert not any(name.startswith("ddpm.training.") for name in modules)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy(script):
    heavy = [
        "torch",
        "torchvision",
        "diffusers",
        "datasets",
        "accelerate",
        "wandb",
        "transformers",
        "huggingface_hub",
        "PIL",
        "numpy",
    ]
    report = python(
        "import contextlib, io, json, runpy, sys\n"
        "script, heavy = sys.argv[1], json.loads(sys.argv[2])\n"
        "sys.argv = [script, '--help']\n"
        "with contextlib.redirect_stdout(io.StringIO()) as output:\n"
        "    try:\n"
        "        runpy.run_path(script, run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        code = end.code\n"
        "imported = [name for name in heavy if name in sys.modules]\n"
        "print(json.dumps([code, len(output.getvalue()), imported]))\n",
        f"{script}.py",
        json.dumps(heavy),
    )
    code, length, imported = json.loads(report)
    assert not code
    assert length > 200
    assert imported == []


@pytest.mark.slow
def test_sampling_imports_nothing_that_it_does_not_use(tmp_path, make_unet, chain):
    pipeline.export_pipeline(make_unet(), chain, tmp_path / "model")
    unused = "transformers peft scipy datasets pandas pyarrow wandb tensorboard matplotlib jinja2"
    report = python(
        "import runpy, sys\n"
        "unused, *sys.argv = sys.argv[1:]\n"
        "sys.path.insert(0, '.')\n"
        "runpy.run_path('sample.py', run_name='__main__')\n"
        "print('Imported:', [name for name in unused.split() if name in sys.modules])\n",
        *(unused, "sample.py", str(tmp_path / "model")),
        *("--num_images", "1", "--num_inference_steps", "1"),
        *("--output_dir", str(tmp_path / "samples")),
    )
    assert report.endswith("Imported: []\n")


@pytest.mark.slow
def test_sample_needs_no_datasets_wandb_or_accelerate(tmp_path, make_unet, chain):
    """It samples with these packages hidden (None in sys.modules is a missing module).

    diffusers imports accelerate itself if it is installed, so counting imports would not do.
    """
    pipeline.export_pipeline(make_unet(), chain, tmp_path / "model")
    python(
        "import runpy, sys\n"
        "hidden = 'datasets wandb accelerate psutil transformers pyarrow pandas jinja2'\n"
        "sys.modules |= dict.fromkeys(hidden.split())\n"
        "sys.argv = ['sample.py', *sys.argv[1:]]\n"
        "sys.path.insert(0, '.')\n"
        "runpy.run_path('sample.py', run_name='__main__')\n",
        str(tmp_path / "model"),
        *("--num_images", "1", "--num_inference_steps", "2"),
        *("--output_dir", str(tmp_path / "samples")),
    )
    assert sorted(os.listdir(tmp_path / "samples")) == ["grid.png", "seed-00000.png"]
