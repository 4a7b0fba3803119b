"""Where one process of a launch fails all end, its rank is named, and the same command goes on."""

import os
import shutil
import signal
import socket
import sys
import time

import psutil
import pytest

from ddpm.rank_failure import describe_failure, is_lost_connection
from tests import tiny
from tests.training.bits import assert_same_bits, final_state

FLAGS = ("--save_images_epochs=0", "--save_model_epochs=0")
HOSTS = ["a", "b", "c"]


@pytest.mark.parametrize(
    ("answers", "beginning"),
    [
        (["", None, ""], "Rank 1 of 3 on b was killed or hangs. "),
        ([None, None, ""], "Rank 0 of 3 on a, rank 1 of 3 on b was killed or hangs. "),
        (["", "", "No space."], "Rank 2 of 3 on c: No space."),
        (["", "No space.", None], "Rank 1 of 3 on b: No space."),
        (["Wrong.", "Wrong.", "Wrong."], "Wrong."),
        (["", "", ""], "The processes lost the connection to each other. "),
    ],
)
def test_a_failure_is_one_sentence(answers, beginning):
    assert describe_failure(answers, HOSTS).startswith(beginning)


def test_errors_of_a_collective_are_those_of_other_processes():
    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection ...")
    assert is_lost_connection(gloo)
    assert not is_lost_connection(RuntimeError("CUDA out of memory"))
    assert not is_lost_connection(OSError(28, "No space left on device"))


@pytest.fixture
def launch(script, shared_folder):
    """launch(folder, script, *launcher_flags, **env) -> a finished run of two processes."""
    pictures = shared_folder("pictures", tiny.write_pictures)
    unet = shared_folder("tiny-unet", tiny.write_unet_config)

    def run(folder, program, *launcher_flags, **env):
        config = ["--config_file", "accelerate_config.yaml", "--num_processes=2"]
        data = [f"--train_data_dir={pictures}", f"--model_config_name_or_path={unet}"]
        return script(
            *config,
            "--main_process_port=0",
            *launcher_flags,
            program,
            *data,
            f"--output_dir={folder}",
            *tiny.FLAGS,
            *FLAGS,
            "--ddp_timeout=45",
            launch=True,
            env=env,
            timeout=900,
        )

    return run


@pytest.fixture
def straight(launch, shared_folder):
    """The final state of a run of two processes of which none fails."""

    def make(folder):
        done = launch(folder, "train.py")
        assert done.returncode == 0, done.stderr

    return final_state(shared_folder("two-processes", make))


def assert_named_once(done, text):
    """One sentence names the rank, and no process of the launch is left."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and text in errors[0], done.stderr
    test = os.environ["PYTEST_CURRENT_TEST"]
    environments = {p.pid: p.info["environ"] or {} for p in psutil.process_iter(["environ"])}
    environments.pop(os.getpid())
    assert not [pid for pid, env in environments.items() if env.get("PYTEST_CURRENT_TEST") == test]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("kill", "Rank 1 of 2 on {host} was killed or hangs."),
        ("stop", "Rank 1 of 2 on {host} was killed or hangs."),
        ("raise", "Rank 1 of 2 on {host}: ValueError: a bug."),
    ],
)
def test_the_same_command_goes_on_after_a_rank_failed(launch, straight, tmp_path, fault, text):
    folder, env = tmp_path / "run", {"FAULT": fault, "MARKER": str(tmp_path / "marker")}
    done = launch(folder, "tests/training/failing_rank.py", **env)
    seconds = time.time() - (tmp_path / "marker").stat().st_mtime  # --ddp_timeout included
    print(f"\n{fault}: all processes had ended {seconds:.0f} s later")
    assert done.returncode == 1
    assert_named_once(done, text.format(host=os.uname().nodename))
    again = launch(folder, "tests/training/failing_rank.py", **env)
    assert again.returncode == 0 and f"Resuming from {folder}/checkpoint-2" in again.stdout
    assert_same_bits(final_state(folder), straight)


@pytest.mark.slow
def test_a_killed_rank_starts_again_by_itself(launch, straight, tmp_path):
    folder, env = tmp_path / "run", {"FAULT": "kill", "MARKER": str(tmp_path / "marker")}
    done = launch(folder, "tests/training/failing_rank.py", "--max_restarts=1", **env)
    assert done.returncode == 0, done.stderr
    assert_named_once(done, "Rank 1 of 2")
    assert f"Resuming from {folder}/checkpoint-2" in done.stdout
    assert_same_bits(final_state(folder), straight)


@pytest.mark.slow
def test_a_full_disk_names_the_rank_and_the_same_command_goes_on(
    launch, straight, make_disk, tmp_path
):
    disk = make_disk(4096)
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - 200 * 1024))
    done = launch(disk, "train.py")
    assert done.returncode == 1
    assert_named_once(done, "checkpoint-2 could not be written")
    assert "error: Rank 0 of 2" in done.stderr and "No space left on device" in done.stderr
    filler.unlink()
    again = launch(disk, "train.py")
    assert again.returncode == 0, again.stderr
    assert_same_bits(final_state(disk), straight)


@pytest.mark.slow
def test_torchrun_goes_on_with_one_machine_less(straight, start, shared_folder, tmp_path):
    """Two launchers of one process each; the one that is left trains on alone: the same batches,
    and so the same weights up to the order of sums."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, logs = tmp_path / "run", [tmp_path / "log-0", tmp_path / "log-1"]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1"),
        *("--max_restarts=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"),
        *("--local_addr=127.0.0.1", "--rdzv_id=run"),
    ]
    flags = [
        "tests/training/failing_rank.py",
        f"--train_data_dir={shared_folder('pictures', tiny.write_pictures)}",
        f"--model_config_name_or_path={shared_folder('tiny-unet', tiny.write_unet_config)}",
        f"--output_dir={folder}",
        *tiny.FLAGS,
        *FLAGS,
    ]
    launchers = []
    for machine, is_host in enumerate(("true", "false")):
        env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        env |= {"MARKER": str(tmp_path / f"marker-{machine}"), "FAULT": "machine"}
        if not machine:
            (tmp_path / "marker-0").touch()
        rendezvous = f"--rdzv_conf=is_host={is_host},last_call_timeout=5"
        with logs[machine].open("w") as log:
            launcher = start([*command, rendezvous, *flags], env=env, stdout=log, stderr=log)
        launchers.append(launcher)
    assert launchers[1].wait(600) == -signal.SIGKILL
    assert launchers[0].wait(600) == 0, logs[0].read_text()
    output = logs[0].read_text()
    assert "--gradient_accumulation_steps is 2 instead of 1 with 1 process" in output
    assert f"Resuming from {folder}/checkpoint-2" in output
    state = final_state(folder)
    assert state.keys() == straight.keys()
    weights = [name for name in state if name.startswith(("raw ", "ema "))]
    assert max((state[name] - straight[name]).abs().max().item() for name in weights) < 1e-3
