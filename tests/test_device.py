"""The device by name, the cores of a process, and the memory that a CPU keeps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddpm import device
from ddpm.errors import UsageError

FAULTS = """
import json, resource, sys, torch
from ddpm import device
kept = device.keep_freed_memory() if sys.argv[1] == "keep" else None
def step():
    held = [torch.ones(2**20) for _ in range(24)] + [torch.ones(12 * 2**20)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(json.dumps([kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 5]))
"""


def test_device_by_name():
    assert device.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="--device nonsense cannot be used here"):
        device.choose_device("nonsense")
    assert isinstance(device.choose_device("auto"), torch.device)


@pytest.mark.parametrize(
    ("wish", "processes", "threads"),
    [(None, 1, [8]), ("1", 1, [8]), ("1", 3, [2]), ("1", 20, [1]), ("3", 1, []), ("16", 2, [])],
)
def test_cores_are_shared_unless_a_number_of_threads_was_asked_for(
    monkeypatch, wish, processes, threads
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if wish is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", wish)
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    device.use_all_cores(processes)
    assert given == threads


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
def test_freed_memory_is_kept_for_the_next_step():
    def count(word):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, word],
            text=True,
            capture_output=True,
            check=True,
            cwd=Path(__file__).parent.parent,
        )
        return json.loads(done.stdout)

    (kept, faults), (_, without) = count("keep"), count("leave")
    if not kept:
        pytest.skip("not glibc")
    assert without > 10_000  # 144 MiB in pages of 4 KiB, or less where pages are larger
    assert faults < 500


@pytest.mark.parametrize(("name", "called"), [("cpu", [True]), ("meta", [])])
def test_only_a_cpu_keeps_its_memory(monkeypatch, name, called):
    asked = []
    monkeypatch.setattr(device, "keep_freed_memory", lambda: asked.append(True))
    assert device.prepare_device(name) == torch.device(name)
    assert asked == called


def test_no_other_c_library_is_asked(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(device.ctypes, "CDLL", None)
    assert device.keep_freed_memory() is False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="CXX and the cache as torch takes them there")
@pytest.mark.parametrize("compiler", ["g++", "/nowhere/g++"])
def test_whether_torch_can_compile_is_found_by_compiling(tmp_path, compiler):
    """In a process of its own: what a process has compiled stays in it."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from ddpm import device; print(device.compile_failure_reason('cpu'))",
        ],
        text=True,
        capture_output=True,
        check=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
    )
    said = done.stdout.strip()
    assert ("torch cannot compile on this machine" in said) == (compiler != "g++"), said
    assert bool(said) == (compiler != "g++")
