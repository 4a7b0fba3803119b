"""Publish a run folder to the Hub as one commit, and prove that another machine can use it.

    python push.py OUTPUT_DIR [you/name] [--private] [--tag v1] [--dry_run]
    python push.py --help

Tokens come from HF_TOKEN or `hf auth login`. The same content again makes no new commit; the same
command after a failure goes on where it stopped.
"""

import dataclasses
import shlex
import sys
import tempfile
from pathlib import Path

from ddpm import errors
from ddpm.config.commands import PushConfig
from ddpm.config.parser import parse_push
from ddpm.errors import UserError


def main() -> None:
    config = parse_push(sys.argv[1:])
    folder = Path(config.output_dir)

    # Heavy imports wait until the command line is known to be good.
    from ddpm import hub, run_folder
    from ddpm.publishing import publish, stage

    run_folder.require_pipeline(folder)
    default_name = run_folder.default_repo_name(folder)
    if config.dry_run:
        repo_id = config.repo_id or f"you/{default_name}"
        with tempfile.TemporaryDirectory() as scratch:
            show(stage.stage_files(folder, Path(scratch), repo_id, config), repo_id, config)
        return

    # May I? Nothing is made or sent before that is known
    repo_id = hub.require_write_access(
        config.repo_id, default_name, private=config.private, create_pr=config.create_pr
    )
    print(f"Publishing {folder} as {repo_id} ...")
    try:
        done = publish.publish(folder, repo_id, config)
    except UserError as error:
        message = f"{error} To go on: {command(config, repo_id)}"
        raise UserError(message, error.exit_code) from error

    # What is there now, and how to use it
    if done.pull_request:
        print(f"Proposed {done.num_files} files in one commit: {done.pull_request}")
    elif done.is_new:
        print(f"Published {done.num_files} files in one commit: {hub.endpoint()}/{repo_id}")
    else:
        print(f"{hub.endpoint()}/{repo_id} holds the same content already: no new commit.")
    print(
        "Proved: downloaded again, hashes compared, loaded with diffusers, proof images drawn; "
        f"largest difference of a pixel {done.difference} of 255."
    )
    print(f"Next: python sample.py {repo_id} --revision {done.commit}")


def show(files: dict[str, Path], repo_id: str, config: PushConfig) -> None:
    """--dry_run: the files that would be sent, with sizes, and the card."""
    sizes = [path.stat().st_size for path in files.values()]
    print(
        f"Would send {sum(sizes):,} bytes to {repo_id} "
        f"({'private' if config.private else 'public'}):"
    )
    for path_in_repo, size in zip(files, sizes, strict=True):
        print(f"  {size:>12,} bytes  {path_in_repo}")
    print(f"\nREADME.md:\n\n{files['README.md'].read_text(encoding='utf-8')}")


def command(config: PushConfig, repo_id: str) -> str:
    """The command line that means the same as `config`."""
    words = ["python", "push.py", config.output_dir, repo_id]
    for field in dataclasses.fields(config)[2:]:
        value = getattr(config, field.name)
        if value != field.default:
            words += [f"--{field.name}"] if value is True else [f"--{field.name}", str(value)]
    return shlex.join(words)


if __name__ == "__main__":
    errors.run(main)
