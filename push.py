"""Publish a run folder to the Hub as one commit, and verify that another machine can use it.

    python push.py OUTPUT_DIR [you/name] [--private] [--tag v1] [--dry_run]
    python push.py --help

Tokens come from HF_TOKEN or `hf auth login`. The same content again makes no new commit; the same
command after a failure continues where it stopped.
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

    # Heavy imports wait until the command line has been checked.
    from ddpm.device import import_diffusers_for_unets

    import_diffusers_for_unets()
    from ddpm import hub, run_folder
    from ddpm.publishing import access, publish, stage

    run_folder.require_pipeline(folder)
    default_name = run_folder.default_repo_name(folder)
    if config.dry_run:
        repo_id = config.repo_id or f"you/{default_name}"
        with tempfile.TemporaryDirectory() as scratch:
            files = stage.stage_files(folder, Path(scratch), repo_id, config)
            print_dry_run(files, repo_id, config)
        return

    # Check the right to write before anything is created or sent
    repo_id = access.require_write_access(
        config.repo_id, default_name, private=config.private, create_pr=config.create_pr
    )
    from ddpm.cpu_threads import limit_threads, set_wait_policy

    limit_threads()  # those that draw the proof images
    set_wait_policy("auto")
    print(f"Publishing {folder} as {repo_id} ...")
    try:
        result = publish.publish(folder, repo_id, config)
    except UserError as error:
        message = f"{error} To go on: {command(config, repo_id)}"
        raise UserError(message, error.exit_code) from error

    # Say what is there now, and how to use it
    if result.pull_request:
        print(f"Proposed {result.num_files} files in one commit: {result.pull_request}")
    elif result.is_new:
        print(f"Published {result.num_files} files in one commit: {hub.endpoint()}/{repo_id}")
    else:
        print(f"{hub.endpoint()}/{repo_id} holds the same content already: no new commit.")
    print(
        "Proved: downloaded again, hashes compared, loaded with diffusers, proof images drawn; "
        f"largest difference of a pixel {result.difference} of 255."
    )
    print(f"Next: python sample.py {repo_id} --revision {result.commit}")


def print_dry_run(files: dict[str, Path], repo_id: str, config: PushConfig) -> None:
    """Print the files that would be sent, their sizes, and the card."""
    sizes = [path.stat().st_size for path in files.values()]
    print(
        f"Would send {sum(sizes):,} bytes to {repo_id} "
        f"({'private' if config.private else 'public'}):"
    )
    for path_in_repo, size in zip(files, sizes, strict=True):
        print(f"  {size:>12,} bytes  {path_in_repo}")
    print(f"\nREADME.md:\n\n{files['README.md'].read_text(encoding='utf-8')}")


def command(config: PushConfig, repo_id: str) -> str:
    """Return the command line for `config`."""
    arguments = ["python", "push.py", config.output_dir, repo_id]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in ("output_dir", "repo_id") and value != field.default:
            arguments += [f"--{field.name}"] if value is True else [f"--{field.name}", str(value)]
    return shlex.join(arguments)


if __name__ == "__main__":
    errors.run(main)
