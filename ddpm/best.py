"""The best pipeline so far, in a folder that is whole at every moment at which it is there.

    best/
      model_index.json  unet/  scheduler/    a DDPMPipeline, as in the run folder
      best.json                              step, measure and value that it was chosen by
      train_config.json  record.json         for evaluate.py and push.py: where it comes from

A better one is written beside and synced; then the old one is renamed away and the new one put in
its place. A kill between these two renames leaves no best/ until the same command runs again.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from ddpm import runfolder
from ddpm.errors import UserError
from ddpm.stepping import Parts, export

PARTIAL, BEFORE = ".best.partial", ".best-before.partial"


def settle(output_dir: Path) -> None:
    """Finish what a kill cut short, and tidy up: on the main process, before the first step."""
    best, partial, before = (output_dir / n for n in (runfolder.BEST, PARTIAL, BEFORE))
    if before.is_dir() and not best.exists():  # moved away only for a new one that was whole
        os.replace(partial if (partial / runfolder.BEST_FACTS).is_file() else before, best)
        runfolder.sync_folder(output_dir)
    for leftover in (partial, before):
        shutil.rmtree(leftover, ignore_errors=True)


def read(output_dir: Path) -> dict[str, Any] | None:
    """best.json of a run; None where nothing was kept yet. UserError for a folder without one."""
    folder = output_dir / runfolder.BEST
    if not folder.exists():
        return None
    if not (folder / runfolder.BEST_FACTS).is_file():
        raise UserError(f"{folder} is not a pipeline that --keep_best kept: move it away first.")
    return runfolder.read_json(folder / runfolder.BEST_FACTS)


def require_same_measure(output_dir: Path, ruler: dict[str, Any], step: int) -> str:
    """What to say of a best pipeline that an earlier part of the run kept, if anything.

    `ruler` is what values are measured by now, `step` where the run goes on. UserError for one that
    was chosen by something else: their values cannot be compared.
    """
    found = read(output_dir)
    if found is None:
        return ""
    if {name: found.get(name) for name in ruler} != ruler:
        was, now = (", ".join(f"{k} {v}" for k, v in d.items())
                    for d in ({k: found.get(k) for k in ruler}, ruler))  # fmt: skip
        raise UserError(
            f"{output_dir / runfolder.BEST} was chosen by {was}; now it would be by {now}. Move it "
            "away to begin anew, or give the settings that it was chosen with."
        )
    if found["step"] > step:
        return (
            f"Note: {output_dir / runfolder.BEST} is of step {found['step']:,}, after the one that "
            "this run goes on from; it stays until a better one comes."
        )
    return ""


def is_better(output_dir: Path, value: float) -> bool:
    """Whether a value, the smaller the better, is below that of the pipeline that is kept."""
    found = read(output_dir)
    return found is None or value < found["value"]


def keep(parts: Parts, facts: dict[str, Any], training: dict[str, Any]) -> None:
    """Put the weights as they would be exported now into best/. Call on every process.

    `facts` go to best.json, `training` into its record. UserError for a disk that is full: the one
    that was kept before is then untouched.
    """
    output_dir = Path(parts.config.output_dir)
    main = parts.accelerator.is_main_process
    best, partial, before = (output_dir / n for n in (runfolder.BEST, PARTIAL, BEFORE))
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    export(parts, partial)
    if not main:
        return
    record = {**runfolder.read_record(output_dir), "training": training, "finished": True}
    runfolder.write_record(partial, **record)
    settings = runfolder.read_json(output_dir / runfolder.TRAIN_CONFIG)
    runfolder.write_json(partial / runfolder.TRAIN_CONFIG, settings)
    runfolder.write_json(partial / runfolder.BEST_FACTS, facts)
    runfolder.sync_tree(partial)
    if best.exists():
        os.replace(best, before)
    os.replace(partial, best)
    runfolder.sync_folder(output_dir)
    shutil.rmtree(before, ignore_errors=True)
