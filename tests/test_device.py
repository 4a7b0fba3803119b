"""The device by name, and the allocator on a CPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ddpm import device
from ddpm.errors import UsageError
from tests.conftest import ROOT

PAGE_FAULTS = """
import json, resource, torch
from ddpm import device
def step():
    tensors = [torch.ones(2**20) for _ in range(24)] + [torch.ones(12 * 2**20)]
def faults_of_a_step():
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 5
print(json.dumps([faults_of_a_step(), device.keep_freed_memory(), faults_of_a_step()]))
"""


def test_device_by_name():
    assert device.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="--device nonsense cannot be used here"):
        device.choose_device("nonsense")
    assert isinstance(device.choose_device("auto"), torch.device)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt")
def test_freed_memory_is_kept_for_the_next_step():
    process = subprocess.run(
        [sys.executable, "-c", PAGE_FAULTS], text=True, capture_output=True, check=True, cwd=ROOT
    )
    before, is_kept, after = json.loads(process.stdout)
    if not is_kept:
        pytest.skip("not glibc")
    assert before > 10_000  # 144 MiB in pages of 4 KiB, or less where pages are larger
    assert after < 500


@pytest.mark.parametrize(("name", "calls"), [("cpu", [True]), ("meta", [])])
def test_only_a_cpu_keeps_freed_memory(monkeypatch, name, calls):
    actual = []
    monkeypatch.setattr(device, "keep_freed_memory", lambda: actual.append(True))
    assert device.prepare_device(name) == torch.device(name)
    assert actual == calls


def test_other_c_libraries_are_not_changed(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(device.ctypes, "CDLL", None)
    assert device.keep_freed_memory() is False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="CXX and the cache work so on Linux")
@pytest.mark.parametrize("compiler", ["g++", "/nowhere/g++"])
def test_failure_of_compile_is_found_by_compiling(tmp_path, compiler):
    """In a process of its own, because torch keeps what a process has compiled."""
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            "from ddpm import device; print(device.compile_failure_reason('cpu'))",
        ],
        text=True,
        capture_output=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
    )
    reason = process.stdout.strip()
    assert ("torch cannot compile on this machine" in reason) == (compiler != "g++"), reason
    assert bool(reason) == (compiler != "g++")
