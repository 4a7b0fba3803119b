"""Two machines without a shared disk: folders, homes and launchers of their own, on loopback."""

import os
import socket
import sys
import time

import psutil
import pytest

from ddpm import run_folder
from tests import tiny
from tests.conftest import ROOT
from tests.training.bits import assert_same_bits, final_state

STEPS = 24
FLAGS = [
    f"--max_train_steps={STEPS}",
    "--checkpointing_steps=2",
    "--save_images_epochs=0",
    "--save_model_epochs=0",
]


def command(*launcher_flags):
    """The launch of two processes, which compute with as many threads as on one machine."""
    return [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        f"--config_file={ROOT / 'accelerate_config.yaml'}",
        "--num_processes=2",
        "--num_cpu_threads_per_process=2",
        *launcher_flags,
        str(ROOT / "tests" / "training" / "failing_rank.py"),
        "--train_data_dir=pictures",
        "--model_config_name_or_path=unet",
        "--output_dir=run",
        *tiny.FLAGS,
        *FLAGS,
    ]


@pytest.fixture
def make_machine(hub, start, tmp_path):
    """make_machine(name) -> (its folder, start(*launcher_flags) -> the launcher there)."""

    def make(name):
        folder = tmp_path / name
        for part, fill in (("pictures", tiny.write_pictures), ("unet", tiny.write_unet_config)):
            (folder / part).mkdir(parents=True)
            fill(folder / part)
        env = {**os.environ, **hub.env(None, folder / "home"), "GLOO_SOCKET_IFNAME": "lo"}
        env |= {"FAULT": "kill", "MARKER": str(folder / "marker")}

        def launch(*launcher_flags):
            with open(folder / "log", "a") as log:
                return start(command(*launcher_flags), cwd=folder, env=env, stdout=log, stderr=log)

        return folder, launch

    return make


@pytest.mark.slow
def test_two_machines_without_a_shared_disk_are_one_run(make_machine):
    """A process is killed, and both launchers start again by themselves; then machine 0 is lost,
    and the same commands go on: the bits of two processes on one machine."""
    straight, launch = make_machine("straight")
    (straight / "marker").touch()
    assert launch("--main_process_port=0").wait(900) == 0, (straight / "log").read_text()
    machines = [make_machine("machine-0"), make_machine("machine-1")]
    folders = [folder for folder, _ in machines]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = [
        "--num_machines=2",
        "--max_restarts=1",
        "--main_process_ip=127.0.0.1",
        f"--main_process_port={port}",
    ]

    def start_both():
        return [
            launch(*address, f"--machine_rank={rank}") for rank, (_, launch) in enumerate(machines)
        ]

    def logs():
        return "\n".join((folder / "log").read_text() for folder in folders)

    # Rank 1 fails after checkpoint-2; machine 0 is lost later, and the other one ends by itself
    launchers, deadline = start_both(), time.monotonic() + 900
    while not (folders[0] / "run" / "checkpoint-6").exists():
        assert time.monotonic() < deadline, logs()
        time.sleep(0.02)
    for process in [*psutil.Process(launchers[0].pid).children(), launchers[0]]:
        process.kill()
    assert launchers[1].wait(300) == 1, logs()
    assert (folders[1] / "marker").exists()
    assert "Resuming from run/checkpoint-2" in (folders[0] / "log").read_text()
    assert "error: " in (folders[1] / "log").read_text()
    assert not (folders[0] / "run" / f"checkpoint-{STEPS}").exists()
    assert [*run_folder.checkpoints(folders[1] / "run")] == [2]  # machine 0 keeps the run

    # The same commands again: machine 1 receives the checkpoint
    assert [launcher.wait(900) for launcher in start_both()] == [0, 0], logs()
    assert "to the machines that do not have it" in logs()
    first, second = run_folder.checkpoints(folders[1] / "run").values()
    for file in (*first.iterdir(), *second.iterdir()):
        kept = folders[0] / file.relative_to(folders[1])
        assert file.read_bytes() == kept.read_bytes()
    assert_same_bits(final_state(folders[0] / "run", STEPS), final_state(straight / "run", STEPS))
