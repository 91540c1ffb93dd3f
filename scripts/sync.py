"""Upload offline wandb runs later: `python -m scripts.sync [runs/PATTERN ...] [--dry_run]`."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data.run.wandb import has_key
from scripts import command
from scripts.lab.folders import RunFolder, find_runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """The runs to upload. Runs that were uploaded already are skipped."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ("runs",)
    """Run folders, folders of run folders, or glob patterns."""
    unfinished: bool = False
    """Also upload runs without a summary.json: interrupted, or still training. Metrics logged later never reach wandb."""
    dry_run: bool = False
    """List the folders that would be uploaded, and stop."""


def unsent_folders(run_folder: Path) -> list[Path]:
    """Return a run's offline wandb folders that were not uploaded yet.

    `wandb sync` marks an uploaded run-ID.wandb by an empty file run-ID.wandb.synced beside it.
    """
    files = sorted(run_folder.glob("wandb/offline-run-*/run-*.wandb"))
    return [file.parent for file in files if not file.with_suffix(".wandb.synced").exists()]


def select_folders(runs: list[RunFolder], *, unfinished: bool) -> tuple[list[Path], int]:
    """Return the wandb folders to upload, and the number of folders skipped because their run has not finished."""
    ready = [path for run in runs if unfinished or run.summary is not None for path in unsent_folders(run.path)]
    return ready, sum(len(unsent_folders(run.path)) for run in runs) - len(ready)


def send(folders: list[Path]) -> None:
    """Upload the wandb folders with `wandb sync`. Raises ValueError if wandb has no key, or if a folder was not uploaded."""
    import wandb

    if not has_key(wandb):
        raise ValueError("no wandb key is configured: run `wandb login`, or set WANDB_API_KEY")
    subprocess.run([sys.executable, "-m", "wandb", "sync", *map(str, folders)])
    # `wandb sync` exits with status 0 even if an upload failed; only its marker files say what was uploaded.
    failed = [str(folder) for folder in folders if folder in unsent_folders(folder.parent.parent)]
    if failed:
        raise ValueError(f"wandb did not upload {len(failed)} of {len(folders)} folders: {', '.join(failed)}; try again")


def main(args: Sync) -> None:
    """Find, list and upload the folders. Raises ValueError for a pattern without runs, and if `send` does."""
    folders, num_skipped = select_folders(find_runs(args.runs), unfinished=args.unfinished)
    if num_skipped:
        print(f"{num_skipped} skipped: no summary.json, so the run may still be training; --unfinished uploads it too")
    if not folders:
        print("nothing to upload")
        return
    print("\n".join([f"{'would upload' if args.dry_run else 'uploading'} {len(folders)}:", *map(str, folders)]), flush=True)
    if not args.dry_run:
        send(folders)


if __name__ == "__main__":
    command(main, Sync, __doc__)
