"""Publishing while training goes on: in a process of its own, from a snapshot of the run folder.

What the training loop calls, on every process (only the main one sends), and when:

    publisher = open_publisher(config, main=accelerator.is_main_process)
                                        before the first step: asks whether one may write
    publisher.submit(step)              after each export of the pipeline on the way
    publisher.submit_checkpoint(path)   after each checkpoint, the one at the end and at a stop too
    publisher.stop()                    on the way out after a SIGTERM or SIGINT
    publisher.finish()                  last: after the final export, its proof and its record

A step waits for two things alone: hard links of some files, and the start of a process. A Hub that
is down is said once; the next save tries again. Only the last push, when everything is on disk, may
fail the command.
"""

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ddpm import hub, run_folder
from ddpm.config.commands import PushConfig
from ddpm.config.train import TrainConfig
from ddpm.errors import UserError

SNAPSHOTS = ".publish.partial"
LOG = f"{run_folder.LOGS}/publishing.log"
GRACE = 20.0
"""Seconds that a stopped run gives its last checkpoint to reach the Hub."""
LONGEST = 1800.0
"""Seconds that the end of a run waits for a push that is under way."""


@dataclass(frozen=True)
class Job:
    """One push of a snapshot: `work(snapshot, *arguments)` returns what it made, or raises."""

    name: str
    snapshot: Path
    work: Callable[..., str]
    arguments: tuple[Any, ...]


class Slot:
    """Jobs of one kind: one runs, and of those that came meanwhile the newest waits its turn."""

    def __init__(self, log: Path, say: Callable[[str], None]):
        self._log, self._say = log, say
        self._running: tuple[Job, Any, Connection] | None = None
        self._waiting: Job | None = None
        self._has_complained = False
        self.failure: str | None = None
        """Why the last job that ended failed; None when it did not."""

    def submit(self, job: Job) -> None:
        """Start a job, or let it wait in place of the one that waits. Never raises."""
        self.poll()
        if self._waiting is not None:
            shutil.rmtree(self._waiting.snapshot, ignore_errors=True)
        self._waiting = job
        self.poll()

    def poll(self) -> bool:
        """Take note of a job that ended, start the one that waits; whether one is running now."""
        if self._running is not None:
            job, process, receiver = self._running
            if process.is_alive() and not receiver.poll():
                return True
            self._note(job, _receive(receiver, process))
            process.join()
            receiver.close()
            self._running = None
        if self._waiting is not None:
            job, self._waiting = self._waiting, None
            try:
                self._running = _start(job, self._log)
            except OSError as error:
                self._note(job, (False, f"no process could be started ({error.strerror})"))
        return self._running is not None

    def drain(self, seconds: float) -> None:
        """Wait until all jobs have ended, and end those that have not after so many seconds."""
        end = time.monotonic() + seconds
        while self.poll() and time.monotonic() < end:
            self._running[2].poll(min(0.2, max(end - time.monotonic(), 0)))
        self.kill()

    def kill(self) -> None:
        """End the job that runs and forget the one that waits. The Hub keeps what it has whole."""
        if self._running is not None:
            self._running[1].kill()
            self._running[1].join()
            self._running[2].close()
        for job in (self._waiting, self._running[0] if self._running else None):
            if job is not None:
                shutil.rmtree(job.snapshot, ignore_errors=True)
        self._waiting = self._running = None

    def _note(self, job: Job, outcome: tuple[bool, str]) -> None:
        done, words = outcome
        shutil.rmtree(job.snapshot, ignore_errors=True)
        self.failure = None if done else words
        if done:
            self._say(f"{job.name} is on the Hub: {words}")
        elif not self._has_complained:
            self._say(
                f"{job.name} did not reach the Hub: {words} Training goes on; the next save "
                "tries again."
            )
        self._has_complained = not done


def open_publisher(config: TrainConfig, main: bool) -> "Publisher | NoPublisher":
    """What sends what this run's settings ask for; something that does nothing if that is nothing.

    Call on every process. UserError when one may not write there.
    """
    if not (config.hub.push_to_hub or config.hub.hub_checkpoints):
        return NoPublisher()
    return Publisher(
        Path(config.output_dir),
        config.hub.hub_model_id,
        private=config.hub.hub_private_repo,
        pipelines=config.hub.push_to_hub,
        checkpoints=config.hub.hub_checkpoints,
        main=main,
    )


class NoPublisher:
    """In the place of a Publisher when nothing is published."""

    def submit(self, step: int) -> None: ...

    def submit_checkpoint(self, checkpoint: Path) -> None: ...

    def stop(self) -> None: ...

    def finish(self) -> None: ...


class Publisher:
    """The pushes of one run: its pipeline, its checkpoints, or both."""

    def __init__(
        self,
        output_dir: Path,
        hub_model_id: str | None = None,
        *,
        private: bool = False,
        pipelines: bool = True,
        checkpoints: bool = False,
        main: bool = True,
        say: Callable[[str], None] = print,
    ):
        """Asks, on every process, whether one may write there: UserError before any step is done.

        `hub_model_id` None is the account's name and the folder's. Nothing is made on the Hub yet.
        """
        from ddpm.publishing import checkpoint_repo

        default = run_folder.default_repo_name(output_dir)
        self.repo_id = hub.require_write_access(
            hub_model_id, default, private=private and pipelines
        )
        self.state_repo = checkpoint_repo.checkpoint_repo_id(self.repo_id)
        if checkpoints:
            checkpoint_repo.require_private(self.state_repo)
        self._folder, self._private, self._say = output_dir, private, say
        self._sends_pipelines, self._sends_checkpoints = pipelines and main, checkpoints and main
        log = output_dir / LOG
        self._pipelines, self._checkpoints = Slot(log, say), Slot(log, say)
        if main:
            shutil.rmtree(output_dir / SNAPSHOTS, ignore_errors=True)

    def submit(self, step: int) -> None:
        """Publish the pipeline that was just exported, as of `step`, while training goes on."""
        if self._sends_pipelines:
            names = [*run_folder.PIPELINE_FILES, run_folder.RECORD, run_folder.TRAIN_CONFIG]
            grids = sorted((self._folder / run_folder.SAMPLES).glob("step-*.png"))
            names += [grid.relative_to(self._folder).as_posix() for grid in grids[-1:]]
            self._send(
                self._pipelines,
                f"step-{step}",
                f"Step {step:,}",
                self._folder,
                names,
                publish_snapshot,
                (step, self.repo_id, self._private),
            )

    def submit_checkpoint(self, checkpoint: Path) -> None:
        """Send a complete checkpoint to the private repository, in place of the one before."""
        if self._sends_checkpoints:
            names = [path.name for path in checkpoint.iterdir() if path.is_file()]
            self._send(
                self._checkpoints,
                checkpoint.name,
                f"The state of {checkpoint.name}",
                checkpoint,
                names,
                send_snapshot,
                (self.state_repo,),
            )

    def stop(self) -> None:
        """The run was asked to end: give the last checkpoint some seconds, and drop the rest."""
        self._pipelines.kill()
        self._checkpoints.drain(GRACE)
        shutil.rmtree(self._folder / SNAPSHOTS, ignore_errors=True)

    def finish(self) -> None:
        """Publish the finished pipeline with its proof, here and now, and end the last jobs.

        Everything is on disk by then, so a failure is a UserError that names the command to go on.
        """
        self._pipelines.drain(LONGEST)
        try:
            if self._sends_pipelines:
                self._publish_finished()
        finally:
            self._checkpoints.drain(LONGEST)
            shutil.rmtree(self._folder / SNAPSHOTS, ignore_errors=True)
        if self._sends_checkpoints and self._checkpoints.failure:
            raise UserError(
                f"The last checkpoint did not reach the Hub: {self._checkpoints.failure} It is in "
                f"{self._folder}."
            )

    def _publish_finished(self) -> None:
        import shlex

        from ddpm import hub
        from ddpm.publishing import publish

        config = PushConfig(
            output_dir=str(self._folder), repo_id=self.repo_id, private=self._private
        )
        try:
            done = publish.publish(self._folder, self.repo_id, config)
        except UserError as error:
            words = ["python", "push.py", str(self._folder), self.repo_id]
            words += ["--private"] * self._private
            message = f"The model is in {self._folder}, but: {error} To go on: {shlex.join(words)}"
            raise UserError(message, error.exit_code) from error
        self._say(
            f"Published and proved: {hub.endpoint()}/{self.repo_id}\n"
            f"Next: python sample.py {self.repo_id} --revision {done.commit}"
        )

    def _send(
        self,
        slot: Slot,
        folder_name: str,
        title: str,
        source: Path,
        names: list[str],
        work: Callable[..., str],
        arguments: tuple[Any, ...],
    ) -> None:
        """Take a snapshot and hand it to `slot`; a disk that cannot take it is said, not raised."""
        snapshot = self._folder / SNAPSHOTS / folder_name
        try:
            shutil.rmtree(snapshot, ignore_errors=True)
            for name in names:
                if (source / name).is_file():
                    _link(source / name, snapshot / name)
            # The log is written to in place, so it is copied.
            if (self._folder / run_folder.METRICS).is_file():
                shutil.copyfile(self._folder / run_folder.METRICS, snapshot / run_folder.METRICS)
        except OSError as error:
            shutil.rmtree(snapshot, ignore_errors=True)
            self._say(
                f"{title} is not sent to the Hub: no snapshot could be made "
                f"({error.strerror}). Training goes on."
            )
            return
        slot.submit(Job(title, snapshot, work, arguments))


def publish_snapshot(snapshot: Path, step: int, repo_id: str, private: bool) -> str:
    """What the process of a pipeline's push does: the address of the commit that it proved."""
    from ddpm import hub
    from ddpm.publishing import publish

    losses = run_folder.read_losses(snapshot)
    training = {"steps": step, **({"final_loss": losses[-1][1]} if losses else {})}
    run_folder.write_record(snapshot, training=training, finished=False)
    config = PushConfig(output_dir=str(snapshot), commit_message=f"Step {step:,}", private=private)
    done = publish.publish(snapshot, repo_id, config)
    return f"{hub.endpoint()}/{repo_id}/commit/{done.commit}"


def send_snapshot(snapshot: Path, repo_id: str) -> str:
    """What the process of a checkpoint's push does: the repository's address for a resume."""
    from ddpm.publishing import checkpoint_repo

    checkpoint_repo.upload_checkpoint(snapshot, repo_id)
    return f"--resume_from_checkpoint {checkpoint_repo.SCHEME}{repo_id}"


def _link(source: Path, destination: Path) -> None:
    """A second name for a file that is only ever replaced, never written to: takes no time."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, destination)
    except OSError:  # file systems without hard links
        shutil.copyfile(source, destination)


def _start(job: Job, log: Path) -> tuple[Job, Any, Connection]:
    """A fresh interpreter, not a fork: a copy of a process with threads and a GPU cannot go on."""
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(job, log, sender), daemon=True)
    process.start()
    sender.close()
    return job, process, receiver


def _run(job: Job, log: Path, sender: Connection) -> None:
    """In the new process: behind training in rank, off the GPU, and with a voice of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl+C is for the run, which ends us in time
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if hasattr(os, "nice"):
        os.nice(10)
    with open(log, "a", encoding="utf-8") as voice:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(voice.fileno(), stream.fileno())
        try:
            outcome = (True, job.work(job.snapshot, *job.arguments))
        except UserError as error:
            outcome = (False, str(error))
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            outcome = (False, f"{type(error).__name__}: {first} (see {log}).")
            import traceback

            traceback.print_exc()
    sender.send(outcome)
    sender.close()


def _receive(receiver: Connection, process: Any) -> tuple[bool, str]:
    try:
        return receiver.recv()
    except (EOFError, OSError):
        process.join()
        return False, f"its process ended without a word (exit code {process.exitcode})."
