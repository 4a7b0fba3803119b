"""Publish a run folder to the Hub as one commit, and prove that another machine can use it.

    python push.py OUTPUT_DIR [you/name] [--private] [--dry_run]
    python push.py --help

Tokens come from HF_TOKEN or `hf auth login`. The same content again makes no new commit.
"""

import sys
import tempfile
from pathlib import Path

from ddpm import errors
from ddpm.config import PushConfig, parse_with_target
from ddpm.errors import UsageError

USAGE = """python push.py OUTPUT_DIR [REPO_ID] [flags]

  OUTPUT_DIR  the run folder of train.py
  REPO_ID     you/name; without it, your name and the folder's"""


def main() -> None:
    words, config = parse_with_target(PushConfig, sys.argv[1:], ("OUTPUT_DIR", "REPO_ID"), USAGE)
    if not words:
        raise UsageError("Which run folder? Usage: python push.py OUTPUT_DIR [REPO_ID]")
    folder, name = Path(words[0]), words[1] if len(words) > 1 else None

    # Heavy imports wait until the command line is known to be good.
    from ddpm import hub, publishing, runfolder

    runfolder.require_pipeline(folder)
    default_name = folder.resolve().name
    if config.dry_run:
        show(publishing.stage, folder, name or f"you/{default_name}", config)
        return
    repo_id = hub.require_write(name, default_name)
    print(f"Publishing {folder} as {repo_id} ...")
    done = publishing.publish(folder, repo_id, config)
    if done.is_new:
        print(f"Published {done.num_files} files in one commit: {hub.endpoint()}/{repo_id}")
    else:
        print(f"{hub.endpoint()}/{repo_id} holds the same content already: no new commit.")
    print("Proved: downloaded again, hashes compared, loaded with diffusers, same pixels drawn.")
    print(f"Next: python sample.py {repo_id} --revision {done.commit}")


def show(stage, folder: Path, repo_id: str, config: PushConfig) -> None:  # noqa: ANN001
    """--dry_run: the files that would be sent, with sizes, and the card."""
    with tempfile.TemporaryDirectory() as scratch:
        files = stage(folder, Path(scratch), repo_id, config)
        print(f"Would send to {repo_id} ({'private' if config.private else 'public'}):")
        for path_in_repo, path in files.items():
            print(f"  {path.stat().st_size:>12,} bytes  {path_in_repo}")
        print(f"\nREADME.md:\n\n{files['README.md'].read_text(encoding='utf-8')}")


if __name__ == "__main__":
    errors.run(main)
