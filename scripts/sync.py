"""Offline wandb runs, sent later: `python -m scripts.sync [runs/PATTERN ...] [--dry_run]`."""

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
    """Which runs to send. Those that were sent already are left out."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ("runs",)
    """Run folders, folders of them, or glob patterns."""
    unfinished: bool = False
    """Also runs without a summary.json, cut short or still going; wandb never sends what they log afterwards."""
    dry_run: bool = False
    """List what would be sent, and stop."""


def unsent(folder: Path) -> list[Path]:
    """The wandb folders of a run that were written offline and not sent yet: wandb marks a sent run-ID.wandb by an empty
    run-ID.wandb.synced beside it."""
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    return [file.parent for file in files if not file.with_suffix(".wandb.synced").exists()]


def choose(runs: list[RunFolder], *, unfinished: bool) -> tuple[list[Path], int]:
    """The wandb folders to send, and the number of those held back because their run has not ended."""
    ready = [path for run in runs if unfinished or run.summary is not None for path in unsent(run.path)]
    return ready, sum(len(unsent(run.path)) for run in runs) - len(ready)


def send(folders: list[Path]) -> None:
    """Let wandb upload the folders. Raises ValueError where wandb has no key, and where some did not go."""
    import wandb

    if not has_key(wandb):
        raise ValueError("no wandb key is configured; `wandb login` asks for one, WANDB_API_KEY holds one")
    subprocess.run([sys.executable, "-m", "wandb", "sync", *map(str, folders)])
    left = [str(folder) for folder in folders if unsent(folder.parent.parent).count(folder)]  # its exit status is 0 anyway
    if left:
        raise ValueError(f"wandb did not send {len(left)} of {len(folders)}: {', '.join(left)}; try again")


def main(args: Sync) -> None:
    """Find, list and send. Raises ValueError for a pattern without runs, and as `send` does."""
    folders, held = choose(find_runs(args.runs), unfinished=args.unfinished)
    if held:
        print(f"{held} held back: no summary.json, so the run may still be going; --unfinished sends them too")
    if not folders:
        print("nothing to send")
        return
    print("\n".join([f"{'would send' if args.dry_run else 'sending'} {len(folders)}:", *map(str, folders)]), flush=True)
    if not args.dry_run:
        send(folders)


if __name__ == "__main__":
    command(main, Sync, __doc__)
