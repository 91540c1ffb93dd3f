"""Train the golden runs with the current code and record their losses: `python -m tests.golden.record`.

Run this only after a change that is meant to change losses. Any other change must leave losses.json as it is.
"""

import contextlib
import json
import tempfile
from pathlib import Path

import torch

from tests.golden.runs import HERE, RUNS, STEPS, losses, machine, train, train_here, write_text

FILE = HERE / "losses.json"


def golden_losses(folder: Path, *, ranks: int) -> dict[str, list[float]]:
    """Train all golden runs; return by run its training losses, then the final validation loss, in nats.

    One rank is trained in this process, several by torchrun.
    """
    write_text(folder)
    commands = [run.command("--train.steps", str(STEPS), "--train.val_every_steps", "0", "--run.name", f"{run.name}-{ranks}")
                for run in RUNS]
    if ranks == 1:
        train_here(commands, folder=folder)
    else:
        train(commands, folder=folder, ranks=ranks)
    return {run.name: losses(folder / "runs" / f"{run.name}-{ranks}") for run in RUNS}


def main() -> None:
    """Overwrite losses.json."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        recorded = {str(ranks): golden_losses(Path(folder), ranks=ranks) for ranks in (1, 2)}
    FILE.write_text(json.dumps({
        "made_by": "python -m tests.golden.record", "machine": machine(),
        "losses_nats_by_ranks": recorded}, indent=1) + "\n")


if __name__ == "__main__":
    with contextlib.redirect_stdout(None):  # the progress lines of the runs
        main()
