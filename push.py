"""Publish a run folder to the Hub as one commit, and verify that another machine can use it.

    python push.py OUTPUT_DIR [you/name] [--private] [--tag v1] [--space] [--dry_run]
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
from ddpm.config.parser import parse_push
from ddpm.config.push import PushConfig
from ddpm.errors import UserError


def main() -> None:
    config = parse_push(sys.argv[1:])
    folder = Path(config.output_dir)

    # Heavy imports wait until the command line has been checked.
    from ddpm.device import import_diffusers_for_unets

    import_diffusers_for_unets()
    from ddpm import run_folder, run_record
    from ddpm.publishing import access, demo_space, publish, stage

    run_folder.require_pipeline(folder)
    default_name = run_folder.default_repo_name(folder)
    if config.dry_run:
        repo_id = config.repo_id or f"you/{default_name}"
        with tempfile.TemporaryDirectory() as scratch:
            files = stage.stage_files(folder, Path(scratch, "model"), repo_id, config)
            private = "private" if config.private else "public"
            print_dry_run(files, f"{repo_id} ({private})")
            if config.space is not None:
                space_id = config.space_id(repo_id)
                files = demo_space.stage_space(Path(scratch, "space"), space_id, repo_id, "0" * 40)
                print_dry_run(files, f"the Space {space_id}")
                app = demo_space.APP_FOLDER / demo_space.APP
                print(f"To run it here: {shlex.join(['python', str(app), config.output_dir])}")
        return

    # Check the right to write before anything is created or sent
    repo_id = access.require_write_access(
        config.repo_id, default_name, private=config.private, create_pr=config.create_pr
    )
    if config.space is not None:
        space_id = access.require_write_access(config.space_id(repo_id), "", repo_type="space")
        config = dataclasses.replace(config, space=(space_id,))
    from ddpm.cpu_threads import limit_threads, set_wait_policy

    limit_threads()  # those that draw the proof images
    set_wait_policy("auto")
    print(f"Publishing {folder} as {repo_id} ...")
    try:
        result = publish.publish(folder, repo_id, config)
        print(result)
        if config.space is not None:
            print(demo_space.publish_space(space_id, repo_id, result.commit))
            run_record.write_record(folder, demo=space_id)
    except UserError as error:
        message = f"{error} To go on: {command(config, repo_id)}"
        raise UserError(message, error.exit_code) from error
    print(f"Next: python sample.py {repo_id} --revision {result.commit}")


def print_dry_run(files: dict[str, Path], target: str) -> None:
    """Print the files that would be sent, their sizes, and the README."""
    sizes = [path.stat().st_size for path in files.values()]
    print(f"Would send {sum(sizes):,} bytes to {target}:")
    for path_in_repo, size in zip(files, sizes, strict=True):
        print(f"  {size:>12,} bytes  {path_in_repo}")
    print(f"\nREADME.md:\n\n{files['README.md'].read_text(encoding='utf-8')}")


def command(config: PushConfig, repo_id: str) -> str:
    """Return the command line for `config`."""
    arguments = ["python", "push.py", config.output_dir, repo_id]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in ("output_dir", "repo_id") and value != field.default:
            values = value if isinstance(value, tuple) else () if value is True else (str(value),)
            arguments += [f"--{field.name}", *values]
    return shlex.join(arguments)


if __name__ == "__main__":
    errors.run(main)
