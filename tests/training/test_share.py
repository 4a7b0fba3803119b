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
    "--checkpointing_steps=4",
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
        str(ROOT / "train.py"),
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

        def launch(*launcher_flags):
            with open(folder / "log", "a") as log:
                return start(command(*launcher_flags), cwd=folder, env=env, stdout=log, stderr=log)

        return folder, launch

    return make


@pytest.mark.slow
def test_two_machines_without_a_shared_disk_are_one_run(make_machine):
    """Killed on one machine and started again on both: the bits of two processes on one machine."""
    straight, launch = make_machine("straight")
    assert launch("--main_process_port=0").wait(900) == 0, (straight / "log").read_text()
    machines = [make_machine("machine-0"), make_machine("machine-1")]
    folders = [folder for folder, _ in machines]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = ["--num_machines=2", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]

    def start_both():
        return [
            launch(*address, f"--machine_rank={rank}") for rank, (_, launch) in enumerate(machines)
        ]

    def logs():
        return "\n".join((folder / "log").read_text() for folder in folders)

    # Machine 0 is lost after its first checkpoint; the other one ends by itself
    launchers, deadline = start_both(), time.monotonic() + 900
    while not (folders[0] / "run" / "checkpoint-4").exists():
        assert time.monotonic() < deadline, logs()
        time.sleep(0.02)
    for process in [*psutil.Process(launchers[0].pid).children(), launchers[0]]:
        process.kill()
    assert launchers[1].wait(300) == 1, logs()
    assert "error: " in (folders[1] / "log").read_text()
    assert not (folders[0] / "run" / f"checkpoint-{STEPS}").exists()
    assert not (folders[1] / "run").exists()  # the machine of rank 0 keeps the run

    # The same commands again: machine 1 receives the checkpoint
    assert [launcher.wait(900) for launcher in start_both()] == [0, 0], logs()
    assert "to the machines that do not have it" in logs()
    (received,) = run_folder.checkpoints(folders[1] / "run").values()
    for file in received.iterdir():
        kept = folders[0] / "run" / received.name / file.name
        assert file.read_bytes() == kept.read_bytes()
    assert_same_bits(final_state(folders[0] / "run", STEPS), final_state(straight / "run", STEPS))
