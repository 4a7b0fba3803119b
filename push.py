"""Publish a run folder to the Hub as one commit, and prove that another machine can use it.

    python push.py OUTPUT_DIR [you/name] [--private] [--dry_run]
    python push.py --help

Tokens come from HF_TOKEN or `hf auth login`. The same content again makes no new commit.
"""

import sys
import tempfile
from pathlib import Path

from ddpm import errors
from ddpm.commandline import parse_push
from ddpm.config import PushConfig


def main() -> None:
    config = parse_push(sys.argv[1:])
    folder = Path(config.output_dir)

    # Heavy imports wait until the command line is known to be good.
    from ddpm import hub, publishing, runfolder

    runfolder.require_pipeline(folder)
    default_name = runfolder.repo_name(folder)
    if config.dry_run:
        repo_id = config.repo_id or f"you/{default_name}"
        with tempfile.TemporaryDirectory() as scratch:
            show(publishing.stage(folder, Path(scratch), repo_id, config), repo_id, config)
        return
    repo_id = hub.require_write(config.repo_id, default_name)
    print(f"Publishing {folder} as {repo_id} ...")
    print(publishing.summary(publishing.publish(folder, repo_id, config)))


def show(files: dict[str, Path], repo_id: str, config: PushConfig) -> None:
    """--dry_run: the files that would be sent, with sizes, and the card."""
    print(f"Would send to {repo_id} ({'private' if config.private else 'public'}):")
    for path_in_repo, path in files.items():
        print(f"  {path.stat().st_size:>12,} bytes  {path_in_repo}")
    print(f"\nREADME.md:\n\n{files['README.md'].read_text(encoding='utf-8')}")


if __name__ == "__main__":
    errors.run(main)
