"""The number of CPU threads, and how they wait for each other."""

import importlib
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from ddpm import accelerator, cpu_threads, device
from tests.conftest import ROOT

ADDITIONAL_THREADS = """
import os, time, torch
from ddpm import cpu_threads
def count(expected):
    for _ in range(500):
        if len(os.listdir("/proc/self/task")) != expected:
            time.sleep(0.01)
    return len(os.listdir("/proc/self/task"))
def product():
    return torch.randn(300, 300, generator=torch.Generator().manual_seed(0)).softmax(1).tolist()
torch.set_num_threads(2)
bits = product()
before = len(os.listdir("/proc/self/task"))
sleeping, cores = cpu_threads.SleepingThreads(), cpu_threads.affine_cores()
assert count(before + cores) == before + cores
assert (torch.get_num_threads(), product()) == (2, bits)
sleeping.end()
assert count(before) == before
"""


@pytest.fixture
def cores(monkeypatch):
    """Eight cores, no quota, and the calls of torch.set_num_threads."""
    calls = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(cpu_threads, "cgroup_quota", lambda: math.inf)
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return calls


@pytest.mark.parametrize(
    ("own_groups", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/user.slice/job\n", {"user.slice/cpu.max": "400000 100000\n"}, 4),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "50000 100000\n"}, 0.5),
        (
            "5:cpuset:/\n4:cpu,cpuacct:/docker/1\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        (
            "4:cpu,cpuacct:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            math.inf,
        ),
        ("0::/\n", {}, math.inf),
        ("0::/\n", {"cpu.max": "\n"}, math.inf),
        (None, {}, math.inf),
    ],
)
def test_quota_is_the_smallest_of_all_groups_around(
    tmp_path, monkeypatch, own_groups, files, cores
):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    if own_groups is not None:
        (tmp_path / "own").write_text(own_groups)
    monkeypatch.setattr(cpu_threads, "CGROUPS", tmp_path)
    monkeypatch.setattr(cpu_threads, "OWN_CGROUPS", tmp_path / "own")
    assert cpu_threads.cgroup_quota() == cores


@pytest.mark.parametrize(
    ("quota", "usable"), [(math.inf, 8), (1.5, 2), (0.5, 1), (2, 2), (64, 8), (0, 1)]
)
def test_a_part_of_a_core_is_a_core(cores, monkeypatch, quota, usable):
    monkeypatch.setattr(cpu_threads, "cgroup_quota", lambda: quota)
    assert cpu_threads.usable_cores() == usable


@pytest.mark.parametrize(
    ("omp_num_threads", "processes", "threads"),
    [(None, 1, [8]), ("1", 1, [8]), ("1", 3, [2]), ("1", 20, [1]), ("3", 1, []), ("16", 2, [])],
)
def test_cores_are_divided_unless_a_number_of_threads_is_set(
    cores, monkeypatch, omp_num_threads, processes, threads
):
    if omp_num_threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp_num_threads)
    cpu_threads.use_all_cores(processes)
    assert cores == threads


@pytest.mark.parametrize(("omp_num_threads", "threads"), [(None, [2]), ("1", []), ("16", [])])
def test_sampling_uses_no_more_threads_than_a_quota(
    cores, monkeypatch, capsys, omp_num_threads, threads
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(cpu_threads, "cgroup_quota", lambda: 1.5)
    if omp_num_threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp_num_threads)
    cpu_threads.limit_threads()
    assert cores == threads
    note = "Note: this container may use 1.5 cores: 2 threads.\n"
    assert capsys.readouterr().err == (note if threads else "")
    if not threads:
        return
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cpu_threads.limit_threads()
    cpu_threads.use_all_cores(1)
    assert cores == [2, 2, 2] and capsys.readouterr().err == note  # once, for the eight cores


@pytest.mark.parametrize(
    ("policy", "threads", "environment", "started"),
    [
        ("auto", 2, {}, "watch"),
        ("passive", 2, {}, "sleep"),
        ("active", 2, {}, None),
        ("auto", 1, {}, None),
        ("passive", 1, {}, None),
        ("auto", 2, {"OMP_WAIT_POLICY": "ACTIVE"}, None),
        ("passive", 2, {"GOMP_SPINCOUNT": "1000"}, None),
    ],
)
def test_policy_unless_the_environment_says_how_threads_wait(
    monkeypatch, policy, threads, environment, started
):
    calls = []
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(cpu_threads, "seconds_waited", lambda: 0.0)
    monkeypatch.setattr(cpu_threads, "SleepingThreads", lambda: calls.append("sleep"))
    watch = SimpleNamespace(start=lambda: calls.append("watch"))
    monkeypatch.setattr(cpu_threads.threading, "Thread", lambda target, daemon: watch)
    cpu_threads.set_wait_policy(policy)
    assert calls == ([started] if started else [])


def test_threads_sleep_while_they_wait_for_cores(monkeypatch, capsys):
    """A neighbour comes, stays, pauses for a moment, goes and comes again: one line."""
    waits = [0.0, 0.0, 0.1, 0.5, 0.4, 0.1, 0.01, 0.1, 0.6]
    events, clock = [], iter(range(len(waits)))
    total = iter([sum(waits[: index + 1]) for index in range(len(waits))])

    class Recorded:
        def __init__(self):
            events.append("sleep")

        def end(self):
            events.append("spin")

    fake = SimpleNamespace(sleep=lambda _: events.append("."), monotonic=lambda: next(clock))
    monkeypatch.setattr(cpu_threads, "time", fake)
    monkeypatch.setattr(cpu_threads, "seconds_waited", lambda: next(total))
    monkeypatch.setattr(cpu_threads, "SleepingThreads", Recorded)
    with pytest.raises(StopIteration):
        cpu_threads._watch_cores()
    assert events == [*"...", "sleep", *"...", "spin", *"..", "sleep", "."]
    assert capsys.readouterr().err == cpu_threads.NOTE + "\n"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_time_without_a_core_is_counted_in_all_threads(monkeypatch, tmp_path):
    assert cpu_threads.seconds_waited() >= 0
    for name, waited in (("1", 1_500_000_000), ("2", 250_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(f"7 {waited} 9\n")
    (tmp_path / "ended").mkdir()
    monkeypatch.setattr(cpu_threads, "TASKS", tmp_path)
    assert cpu_threads.seconds_waited() == 1.75
    monkeypatch.setattr(cpu_threads, "TASKS", tmp_path / "none")
    assert cpu_threads.seconds_waited() is None


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and libgomp")
def test_additional_threads_change_no_bit_and_end():
    process = subprocess.run(
        [sys.executable, "-c", ADDITIONAL_THREADS], text=True, capture_output=True, cwd=ROOT
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    ("script", "door"),
    [
        ("train", "ddpm.accelerator.make_accelerator"),
        ("evaluate", "ddpm.accelerator.make_accelerator"),
        ("sample", "ddpm.sampling.sampler.prepare_device"),
    ],
)
def test_each_command_hands_its_flag_on(monkeypatch, run_folder, script, door):
    def stop(*args, **kwargs):
        given = [*args, *kwargs.values()]
        policies.append([value for value in given if value in ("auto", "passive")][-1])
        raise StopIteration

    policies = []
    module = importlib.import_module(script)
    monkeypatch.setattr(door, stop)
    monkeypatch.setattr("ddpm.evaluation.features.require_torch_fidelity", lambda: None)
    data = ["--train_data_dir=a"] if script == "train" else [str(run_folder)]
    for flags in ([], ["--cpu_wait_policy=passive"]):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *data, *flags])
        with pytest.raises(StopIteration):
            module.main()
    assert policies == ["auto", "passive"]


def test_only_a_cpu_has_a_policy(monkeypatch):
    policies = []
    monkeypatch.setattr(accelerator, "set_wait_policy", policies.append)
    monkeypatch.setattr(device, "set_wait_policy", policies.append)
    accelerator.make_accelerator("no", cpu_wait_policy="auto")
    device.prepare_device("cpu", "passive")
    device.prepare_device("meta", "passive")
    assert policies == ["auto", "passive"]
