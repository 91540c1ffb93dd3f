"""Check that this tree trains like an earlier commit, bit for bit: losses, weights and optimizer state.

    python -m tests.golden.same_losses COMMIT [--runs tiny bytes] [--ranks 1]

Both trees train the golden runs of tests/golden/runs.py on this machine, with one thread per rank; `--runs all` adds runs of
every update rule and of other techniques. Each run is trained in three ways: without interruption; stopped in the middle and
resumed; begun by the commit and resumed by this tree. All losses and all tensors of the final checkpoints are compared.
Prints a table; exit status 1 if anything differs. If the commit spells a flag differently, add it to the run's
`old_spellings`.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor

from tests.golden.runs import OTHER_RUNS, ROOT, RUNS, GoldenRun, losses, train, write_text

SCHEDULE = ("--train.steps", "8", "--train.val_every_steps", "4")
# The first validation loss is below this target, so the run stops there.
STOP = ("--run.stop_at_target", "--run.target_loss_nats", "1000")
CASES = (("whole", "whole", "whole"), ("resumed", "resumed", "resumed"), ("begun by the commit", "crossed", "resumed"))
"""Name of each comparison, suffix of this tree's run folder, suffix of the commit's run folder."""

GOLDEN = tuple(run.name for run in RUNS)
Name = tyro.extras.literal_type_from_choices(["all", *GOLDEN, *(run.name for run in OTHER_RUNS)])


class Difference(NamedTuple):
    """Differences between two run folders."""

    first_loss: str
    """The first loss that differs, described in words; empty if none."""
    tensors: list[str]
    """Names of the checkpoint tensors that differ."""


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Check out a commit into a temporary folder, and remove it at the end of the `with` block."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", tree, commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)


def begin(runs: Sequence[GoldenRun], folder: Path, *, tree: Path, ranks: int) -> None:
    """Train every run once without interruption, and once up to the middle."""
    folder.mkdir(parents=True)
    write_text(folder)
    old = tree != ROOT
    whole = [run.command(*SCHEDULE, "--run.name", f"{run.name}-whole", old=old) for run in runs]
    half = [run.command(*SCHEDULE, *STOP, "--run.name", f"{run.name}-resumed", old=old) for run in runs]
    train(whole + half, folder=folder, ranks=ranks, tree=tree)


def resume(runs: Sequence[GoldenRun], folder: Path, *, tree: Path, ranks: int, suffixes: Sequence[str]) -> None:
    """Train the second half of the runs that were stopped in the middle."""
    train([run.command(*SCHEDULE, "--run.name", f"{run.name}-{suffix}", "--run.resume", old=tree != ROOT)
           for run in runs for suffix in suffixes], folder=folder, ranks=ranks, tree=tree)


def train_both(runs: Sequence[GoldenRun], ours: Path, theirs: Path, *, commit_tree: Path, ranks: int) -> None:
    """Train all runs with both trees; `ours` also gets copies of the runs that the commit began, resumed by this tree."""
    begin(runs, theirs, tree=commit_tree, ranks=ranks)
    begin(runs, ours, tree=ROOT, ranks=ranks)
    for run in runs:
        shutil.copytree(theirs / "runs" / f"{run.name}-resumed", ours / "runs" / f"{run.name}-crossed")
    resume(runs, theirs, tree=commit_tree, ranks=ranks, suffixes=["resumed"])
    resume(runs, ours, tree=ROOT, ranks=ranks, suffixes=["resumed", "crossed"])


def is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """True if both tensors exist and have the same dtype, shape and bits."""
    if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def compare(ours: Path, theirs: Path) -> Difference:
    """Compare the losses and the final checkpoints of two run folders."""
    our_losses, their_losses = losses(ours), losses(theirs)
    differing = [f"loss {i + 1}: {a}, was {b}"
                 for i, (a, b) in enumerate(zip(our_losses, their_losses, strict=False)) if a != b]
    if len(our_losses) != len(their_losses):
        differing.append(f"{len(our_losses)} losses, were {len(their_losses)}")
    a, b = (load_file(folder / "checkpoint.safetensors") for folder in (ours, theirs))
    tensors = [name for name in sorted(a | b) if not is_same(a.get(name), b.get(name))]
    return Difference(differing[0] if differing else "", tensors)


def report(runs: Sequence[GoldenRun], ours: Path, theirs: Path, *, ranks: int) -> bool:
    """Print one line per run and comparison. Return True if anything differs."""
    differences = []
    for run, (case, our_suffix, their_suffix) in product(runs, CASES):
        loss, tensors = compare(ours / "runs" / f"{run.name}-{our_suffix}", theirs / "runs" / f"{run.name}-{their_suffix}")
        tensor_text = f"{len(tensors)} differ: {', '.join(tensors[:3])}" if tensors else "same"
        print(f"{run.name:14}{ranks:6}  {case:21}{loss or 'same':52}{tensor_text}", flush=True)
        differences.append(bool(loss or tensors))
    return any(differences)


def main(commit: tyro.conf.Positional[str], runs: tuple[Name, ...] = GOLDEN, ranks: tuple[int, ...] = (1, 2)) -> None:
    """Compare this tree with a commit and exit with status 1 if anything differs."""
    selected = [run for run in (*RUNS, *OTHER_RUNS) if run.name in runs or "all" in runs]
    differs = False
    print(f"{'run':14}{'ranks':>6}  {'case':21}{'losses':52}tensors", flush=True)
    with worktree(commit) as tree, tempfile.TemporaryDirectory() as temporary:
        for number in ranks:
            ours, theirs = (Path(temporary) / f"{side}{number}" for side in ("ours", "theirs"))
            train_both(selected, ours, theirs, commit_tree=tree, ranks=number)
            differs |= report(selected, ours, theirs, ranks=number)
    sys.exit(int(differs))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
