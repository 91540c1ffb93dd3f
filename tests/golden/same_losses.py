"""Whether this tree trains as an earlier commit does, to the last bit: losses, weights and optimizer state.

    python -m tests.golden.same_losses COMMIT [--runs tiny bytes] [--ranks 1]

Both trees train the golden runs of tests/golden/runs.py on this machine, on one thread a rank; `--runs all` adds every
update rule, and what the golden runs leave out. Each run is trained whole; stopped in the middle and resumed; and begun by
the commit, then resumed by this tree. Losses of training and validation are compared, and every tensor of the final
checkpoints. Prints a table; exit status 1 where anything differs. A flag that the commit spells otherwise goes into the
run's `old_spellings`.
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
STOP = ("--run.stop_at_target", "--run.target_loss_nats", "1000")  # the first validation is below: the run ends there
CASES = (("whole", "whole", "whole"), ("resumed", "resumed", "resumed"), ("begun by the commit", "crossed", "resumed"))
"""What is compared, the suffix of this tree's run folder, and that of the commit's."""


GOLDEN = tuple(run.name for run in RUNS)
Name = tyro.extras.literal_type_from_choices(["all", *GOLDEN, *(run.name for run in OTHER_RUNS)])


class Difference(NamedTuple):
    """What two run folders do not have in common."""

    first_loss: str
    tensors: list[str]


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """The files of a commit, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", tree, commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)


def begin(runs: Sequence[GoldenRun], folder: Path, *, tree: Path, ranks: int) -> None:
    """Train every run whole, and once more up to the middle."""
    folder.mkdir(parents=True)
    write_text(folder)
    old = tree != ROOT
    whole = [run.command(*SCHEDULE, "--run.name", f"{run.name}-whole", old=old) for run in runs]
    half = [run.command(*SCHEDULE, *STOP, "--run.name", f"{run.name}-resumed", old=old) for run in runs]
    train(whole + half, folder=folder, ranks=ranks, tree=tree)


def resume(runs: Sequence[GoldenRun], folder: Path, *, tree: Path, ranks: int, suffixes: Sequence[str]) -> None:
    """Train the second half of what was stopped."""
    train([run.command(*SCHEDULE, "--run.name", f"{run.name}-{suffix}", "--run.resume", old=tree != ROOT)
           for run in runs for suffix in suffixes], folder=folder, ranks=ranks, tree=tree)


def train_both(runs: Sequence[GoldenRun], ours: Path, theirs: Path, *, commit_tree: Path, ranks: int) -> None:
    """Fill both folders with runs; ours also with those that the commit began."""
    begin(runs, theirs, tree=commit_tree, ranks=ranks)
    begin(runs, ours, tree=ROOT, ranks=ranks)
    for run in runs:
        shutil.copytree(theirs / "runs" / f"{run.name}-resumed", ours / "runs" / f"{run.name}-crossed")
    resume(runs, theirs, tree=commit_tree, ranks=ranks, suffixes=["resumed"])
    resume(runs, ours, tree=ROOT, ranks=ranks, suffixes=["resumed", "crossed"])


def is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are there, with the same type, shape and bits."""
    if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def compare(ours: Path, theirs: Path) -> Difference:
    """The first loss that differs, and the names of all tensors that do."""
    one, other = losses(ours), losses(theirs)
    pairs = [f"loss {i + 1}: {a} for {b}" for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b]
    if len(one) != len(other):
        pairs.append(f"{len(one)} losses for {len(other)}")
    a, b = (load_file(folder / "checkpoint.safetensors") for folder in (ours, theirs))
    return Difference(pairs[0] if pairs else "", [name for name in sorted(a | b) if not is_same(a.get(name), b.get(name))])


def report(runs: Sequence[GoldenRun], ours: Path, theirs: Path, *, ranks: int) -> bool:
    """Print a line for every run and case; whether anything differs."""
    differences = []
    for run, (case, our_suffix, their_suffix) in product(runs, CASES):
        loss, tensors = compare(ours / "runs" / f"{run.name}-{our_suffix}", theirs / "runs" / f"{run.name}-{their_suffix}")
        named = f"{len(tensors)} differ: {', '.join(tensors[:3])}" if tensors else "same"
        print(f"{run.name:14}{ranks:6}  {case:21}{loss or 'same':52}{named}", flush=True)
        differences.append(bool(loss or tensors))
    return any(differences)


def main(commit: tyro.conf.Positional[str], runs: tuple[Name, ...] = GOLDEN, ranks: tuple[int, ...] = (1, 2)) -> None:
    """Compare this tree with a commit."""
    chosen = [run for run in (*RUNS, *OTHER_RUNS) if run.name in runs or "all" in runs]
    differs = False
    print(f"{'run':14}{'ranks':>6}  {'case':21}{'losses':52}tensors", flush=True)
    with worktree(commit) as tree, tempfile.TemporaryDirectory() as temporary:
        for number in ranks:
            ours, theirs = (Path(temporary) / f"{side}{number}" for side in ("ours", "theirs"))
            train_both(chosen, ours, theirs, commit_tree=tree, ranks=number)
            differs |= report(chosen, ours, theirs, ranks=number)
    sys.exit(int(differs))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__, use_underscores=True)
