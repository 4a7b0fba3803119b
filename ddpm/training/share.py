"""Checkpoints for machines without a shared disk: the main process sends its own to the others."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from ddpm import file_io, run_folder
from ddpm.accelerator import from_main
from ddpm.errors import UserError
from ddpm.training.checkpoint import install_checkpoint

CHUNK_BYTES = 2**26
"""Bytes of a file that are sent at once, and kept in memory by each process."""


def share_checkpoint(
    accelerator: Accelerator, folder: Path | None, output_dir: Path
) -> Path | None:
    """Return the main process's checkpoint `folder` as this machine has it, None if there is none.

    Call on every process; only the main one's `folder` counts. A machine without it, which is one
    where no state.json has the same content, receives it in its own `output_dir`, with the run's
    unet/config.json. On a shared disk nothing is sent. Raise UserError for a file that was changed
    on the way.
    """
    if accelerator.num_processes == 1:
        return folder
    main = accelerator.is_main_process
    facts = None
    if main and folder is not None:
        files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        facts = folder, (folder / run_folder.CHECKPOINT_STATE).read_bytes(), files
    facts = from_main(accelerator, facts)
    if facts is None:
        return None
    folder, state, files = facts
    own = next((f for f in (folder, output_dir / folder.name) if _has_state(f, state)), None)
    if not any(gather_object([own is None])):
        return own
    accelerator.print(f"Sending {folder} to the machines that do not have it.")
    receives = own is None and accelerator.is_local_main_process
    partial = output_dir / f".{folder.name}.partial"
    if receives:
        shutil.rmtree(partial, ignore_errors=True)
    for name in files:
        _send_file(accelerator, folder / name, partial / name if receives else None)
    architecture = output_dir / run_folder.UNET_CONFIG
    content = architecture.read_bytes() if main and architecture.is_file() else None
    content = from_main(accelerator, content)
    if receives:
        install_checkpoint(partial, output_dir / folder.name)
        if content is not None:
            file_io.write_bytes(architecture, content)
    accelerator.wait_for_everyone()
    return own or output_dir / folder.name


def _has_state(folder: Path, state: bytes) -> bool:
    """Return whether a folder is a checkpoint with this state.json, which no other one has."""
    path = folder / run_folder.CHECKPOINT_STATE
    return path.is_file() and path.read_bytes() == state


def _send_file(accelerator: Accelerator, source: Path, target: Path | None) -> None:
    """Send a file of the main process; write it to `target` where that is given, and compare."""
    main, digest = accelerator.is_main_process, hashlib.sha256()
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
    with open(*((source, "rb") if main else (target or os.devnull, "wb"))) as file:
        while True:
            chunk = from_main(accelerator, _next_chunk(file, digest) if main else None)
            if isinstance(chunk, str):
                break
            if not main:
                file.write(chunk)
    if target is not None and file_io.file_sha256(target) != chunk:
        raise UserError(
            f"{target} is not what the main process sent: its disk or the network changed it. Run "
            "the same command again."
        )


def _next_chunk(file: Any, digest: Any) -> bytes | str:
    """Return the next bytes of a file, and after its end the hash of all of them."""
    chunk = file.read(CHUNK_BYTES)
    digest.update(chunk)
    return chunk or digest.hexdigest()
