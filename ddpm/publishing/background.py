"""Publish while training goes on, from snapshots of the run folder.

The training loop calls, on every process (only the main one uploads):

    publisher = Publisher(output_dir, config.hub, main=accelerator.is_main_process)
                                        before the first step: checks the right to write
    publisher.submit(step)              after each export of the pipeline during training
    publisher.submit_checkpoint(path)   after each checkpoint, also at the end and at a stop
    publisher.stop()                    after a SIGTERM or SIGINT, before the process exits
    publisher.finish()                  last: after the final export, its proof and its record

A step waits for hard links of some files, never for the Hub. The start (the right to write), a stop
(at most GRACE) and the end (at most TIMEOUT for each upload in progress) do wait for the Hub. A
failure is reported once, and the next save tries again. Only the final push and the last
checkpoint, when everything is on disk, may fail the command.

Uploads run in daemon threads, so they end with the process, however it ends, and never replace a
model or a checkpoint of a later step. Such a thread uses files and the network only: no torch,
whose random state, default threads and loading of models (diffusers replaces functions of torch.nn
while it loads) belong to the training loop.
"""

import os
import shlex
import shutil
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from ddpm import hub, run_folder, run_record
from ddpm.config.push import PushConfig
from ddpm.config.train import HubConfig
from ddpm.errors import PrintableStream, UserError, printable
from ddpm.publishing import access, checkpoint_repo, publish, stage
from ddpm.run_record import TrainingRecord

SNAPSHOTS = ".publish.partial"
LOG = f"{run_folder.LOGS}/publishing.log"
GRACE = 20.0
"""Seconds that a stopped run gives its last checkpoint to reach the Hub."""
TIMEOUT = 1800.0
"""Seconds that the end of a run waits for an upload in progress."""


@dataclass(frozen=True)
class Upload:
    """`send()` uploads the files of the folder `snapshot` and returns where they are."""

    title: str
    snapshot: Path
    send: Callable[[], str]


class UploadThread:
    """Sends uploads of one kind one after another; of those that wait only the newest is kept."""

    def __init__(self, report: Callable[[str], None], log: Path):
        self._report, self._log = report, log
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._waiting: Upload | None = None
        self._is_stopped = False
        self.failure: str | None = None
        """Why the last upload failed; None when it did not."""

    def submit(self, upload: Upload) -> None:
        """Send `upload` as soon as the one in progress has ended, instead of any that waits."""
        with self._lock:
            replaced, self._waiting = self._waiting, upload
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
        if replaced is not None:
            shutil.rmtree(replaced.snapshot, ignore_errors=True)

    def join(self, timeout: float) -> None:
        """Wait until all uploads have ended, at most `timeout` seconds."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)

    def stop(self) -> None:
        """Drop the upload that waits, and report nothing more of the one in progress."""
        with self._lock:
            self._waiting, self._is_stopped = None, True

    def _run(self) -> None:
        while True:
            with self._lock:
                upload, self._waiting = self._waiting, None
                if upload is None:
                    self._thread = None
                    return
            previous, self.failure = self.failure, self._send(upload)
            shutil.rmtree(upload.snapshot, ignore_errors=True)
            if self.failure is not None and previous is None and not self._is_stopped:
                self._report(
                    f"{upload.title} did not reach the Hub: {self.failure} Training goes on; the "
                    "next save tries again."
                )

    def _send(self, upload: Upload) -> str | None:
        """Send and report one upload; return why it failed, None if it did not."""
        try:
            address = upload.send()
        except UserError as error:
            return str(error)
        except (Exception, KeyboardInterrupt) as error:  # hf_xet raises the latter in any thread
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with open(self._log, "a", encoding="utf-8") as log:
                traceback.print_exc(file=PrintableStream(log))
            return printable(f"{type(error).__name__}: {error} (see {self._log}).")
        if not self._is_stopped:
            self._report(f"{upload.title} is on the Hub: {address}")
        return None


class Publisher:
    """The uploads of one run: its pipelines, its checkpoints, both, or none, as `config` says."""

    def __init__(
        self,
        output_dir: Path,
        config: HubConfig,
        *,
        main: bool = True,
        report: Callable[[str], None] = print,
    ):
        """Check, on every process, the right to write. Create nothing on the Hub yet.

        Raise UserError before any step is done when the account may not write there.
        """
        self._folder, self._private, self._report = output_dir, config.hub_private_repo, report
        self.uploads_pipelines = config.push_to_hub and main
        self._uploads_checkpoints = config.hub_checkpoints and main
        log = output_dir / LOG
        self._pipelines, self._checkpoints = UploadThread(report, log), UploadThread(report, log)
        if not (config.push_to_hub or config.hub_checkpoints):
            return
        default_name = run_folder.default_repo_name(output_dir)
        self.repo_id = access.require_write_access(
            config.hub_model_id, default_name, private=self._private and config.push_to_hub
        )
        self.checkpoint_repo_id = checkpoint_repo.checkpoint_repo_id(self.repo_id)
        if config.hub_checkpoints:
            checkpoint_repo.require_private(self.checkpoint_repo_id)
        if main:
            shutil.rmtree(output_dir / SNAPSHOTS, ignore_errors=True)
            disable_progress_bars()  # they would be drawn over the one of training

    def submit(self, step: int) -> None:
        """Publish the pipeline that was exported, with its proof, after `step`."""
        if self.uploads_pipelines:
            grids = sorted((self._folder / run_folder.SAMPLES).glob("step-*.png"))
            images = [*(self._folder / run_folder.PROOF_IMAGES).glob("*.png"), *grids[-1:]]
            names = [
                *run_folder.model_files(self._folder),
                run_folder.PROOF,
                run_folder.RECORD,
                run_folder.TRAIN_CONFIG,
                *(path.relative_to(self._folder).as_posix() for path in images),
            ]
            snapshot = self._folder / SNAPSHOTS / f"step-{step}"
            upload = Upload(f"Step {step:,}", snapshot, lambda: self._send_pipeline(snapshot, step))
            self._submit(self._pipelines, upload, self._folder, names)

    def submit_checkpoint(self, checkpoint: Path) -> None:
        """Send a complete checkpoint to the private repository, instead of the one before."""
        if self._uploads_checkpoints:
            snapshot = self._folder / SNAPSHOTS / checkpoint.name
            upload = Upload(
                f"The state of {checkpoint.name}", snapshot, lambda: self._send_checkpoint(snapshot)
            )
            self._submit(self._checkpoints, upload, checkpoint, os.listdir(checkpoint))

    def stop(self) -> None:
        """Give the last checkpoint GRACE seconds; the process ends whatever is still running."""
        self._pipelines.stop()
        self._checkpoints.join(GRACE)
        self._checkpoints.stop()
        shutil.rmtree(self._folder / SNAPSHOTS, ignore_errors=True)

    def finish(self) -> None:
        """Publish the finished pipeline in this thread, verify it, and wait for the checkpoint.

        Everything is on disk by then. Raise UserError that names the command to go on.
        """
        self._pipelines.join(TIMEOUT)
        self._pipelines.stop()
        try:
            if self.uploads_pipelines:
                self._publish_finished()
        finally:
            self._checkpoints.join(TIMEOUT)
            shutil.rmtree(self._folder / SNAPSHOTS, ignore_errors=True)
        if self._checkpoints.failure is not None:
            raise UserError(
                f"The last checkpoint did not reach the Hub: {self._checkpoints.failure} It is in "
                f"{self._folder}."
            )

    def _publish_finished(self) -> None:
        if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
            enable_progress_bars()
        config = PushConfig(
            output_dir=str(self._folder), repo_id=self.repo_id, private=self._private
        )
        try:
            result = publish.publish(self._folder, self.repo_id, config)
        except UserError as error:
            command = ["python", "push.py", str(self._folder), self.repo_id]
            command += ["--private"] * self._private
            message = (
                f"The model is in {self._folder}, but: {error} To go on: {shlex.join(command)}"
            )
            raise UserError(message, error.exit_code) from error
        self._report(
            f"Published and proved: {hub.endpoint()}/{self.repo_id}\n"
            f"Next: python sample.py {self.repo_id} --revision {result.commit}"
        )

    def _submit(self, thread: UploadThread, upload: Upload, source: Path, names: list[str]) -> None:
        """Take the snapshot of an upload and submit it; report if none can be made."""
        try:
            shutil.rmtree(upload.snapshot, ignore_errors=True)
            for name in names:
                if (source / name).is_file():
                    stage.require_no_link(source / name, source)
                    _link(source / name, upload.snapshot / name)
            metrics = self._folder / run_folder.METRICS
            if metrics.is_file():  # copied, because training appends to it
                stage.require_no_link(metrics, self._folder)
                shutil.copyfile(metrics, upload.snapshot / run_folder.METRICS)
        except (OSError, UserError) as error:
            shutil.rmtree(upload.snapshot, ignore_errors=True)
            self._report(
                f"{upload.title} is not sent to the Hub: no snapshot could be made "
                f"({getattr(error, 'strerror', None) or error}). Training goes on."
            )
            return
        thread.submit(upload)

    def _send_pipeline(self, snapshot: Path, step: int) -> str:
        """Publish a snapshot and compare the hashes; return the address of the commit."""
        losses = run_folder.read_losses(snapshot)
        training = TrainingRecord(steps=step, final_loss=losses[-1][1] if losses else None)
        run_record.write_record(snapshot, training=training, finished=False)
        config = PushConfig(
            output_dir=str(snapshot), commit_message=f"Step {step:,}", private=self._private
        )
        result = publish.publish(snapshot, self.repo_id, config, check_images=False, step=step)
        return f"{hub.endpoint()}/{self.repo_id}/commit/{result.commit}"

    def _send_checkpoint(self, snapshot: Path) -> str:
        """Upload the snapshot of a checkpoint; return the flag that resumes from it."""
        checkpoint_repo.upload_checkpoint(snapshot, self.checkpoint_repo_id)
        return f"--resume_from_checkpoint {checkpoint_repo.SCHEME}{self.checkpoint_repo_id}"


def _link(source: Path, destination: Path) -> None:
    """Make a second name for a file that is replaced, never written to."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, destination)
    except OSError:  # file systems without hard links
        shutil.copyfile(source, destination)
