"""Optimization benchmark: tune every entry with the same number of trials, then measure it with fresh seeds.

    python -m scripts.leaderboard bench_cpu --trials 20 --seeds 8 --jobs 2
    python -m scripts.leaderboard bench_cpu_prose --entries adamw muon --horizons 1 4 --trials 5 --seeds 3

Each trial runs once, with the tuning seed. For every budget k, the best of the first k trials runs the fresh seeds. Runs are
compared at the end of their own schedule only. Finished runs are not repeated. Records go to records/PRESET.jsonl;
`python -m scripts.verify_record --write records/PRESET.jsonl` checks them and writes the table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from configs.entries import ENTRIES, Entry, find_entry
from configs.notation import raise_if
from scripts import command
from scripts.lab.records import BENCHMARKS, append_records, read_records, record_of, record_of_failure
from scripts.lab.sweep import Trial, run_sweep
from scripts.lab.tuning import TUNING_SEED, base_steps, best_trial, make_trial

RECORDS = Path(__file__).resolve().parent.parent / "records"


@dataclass
class Arguments:
    """Arguments of the command line."""

    preset: Annotated[str, tyro.conf.Positional]
    """Preset of the benchmark, such as bench_cpu."""
    entries: tuple[str, ...] = tuple(entry.name for entry in ENTRIES)
    """Optimizers to run, by name (configs/entries.py)."""
    horizons: tuple[float, ...] = (1.0,)
    """Run lengths, in multiples of the preset's steps."""
    trials: int = 5
    """Number of draws from each entry's search space."""
    budgets: tuple[int, ...] = (5, 20)
    """Numbers of trials whose best one runs the fresh seeds; a budget above `trials` is ignored."""
    seeds: int = 8
    """Number of fresh seeds."""
    first_seed: int = 1
    """First fresh seed; the next ones follow it."""
    jobs: int = 1
    """Runs at once."""
    dir: Path = Path("runs") / "leaderboard"
    """Folder of the run folders."""


def tuning_trials(args: Arguments, entries: Sequence[Entry], steps: int) -> list[Trial]:
    """Return all trials. Entries alternate, so that a slow period of the machine affects the times of all entries."""
    return [make_trial(entry, args.preset, steps=steps, trial=trial, seed=TUNING_SEED)
            for trial in range(args.trials) for entry in entries]


def fresh_trials(args: Arguments, entries: Sequence[Entry], steps: int, records: Sequence[dict]) -> list[Trial]:
    """Return the runs of every budget's best trials with the fresh seeds, seed by seed.

    All entries run the same seeds, and so see the same batches. Welch's test ignores this pairing: if the losses of a seed
    are positively correlated, its p is too large rather than too small.
    """
    # A dict instead of a set keeps the order; two budgets often have the same best trial.
    best = {(entry, best_trial(records, entry.name, steps=steps, budget=budget)): None
            for entry in entries for budget in args.budgets if budget <= args.trials}
    return [make_trial(entry, args.preset, steps=steps, trial=trial, seed=args.first_seed + seed)
            for seed in range(args.seeds) for entry, trial in best if trial is not None]


def run_and_record(trials: list[Trial], args: Arguments) -> list[dict]:
    """Run the trials that are not finished, append their records to the preset's file, and return all its records."""
    results = run_sweep(trials, dir=args.dir / args.preset, jobs=args.jobs)
    file = RECORDS / f"{args.preset}.jsonl"
    append_records(file, [record_of(result.run) if result.run else record_of_failure(result.trial, result.error)
                          for result in results])
    return read_records(file)


def main(args: Arguments) -> None:
    """Tune, run the fresh seeds and record them, for each horizon. Raise ValueError if the preset is no benchmark."""
    raise_if(args.preset not in BENCHMARKS, f"{args.preset!r} is not a benchmark; choose one of {', '.join(BENCHMARKS)}")
    entries = [find_entry(name) for name in args.entries]
    for horizon in args.horizons:
        steps = round(horizon * base_steps(args.preset))
        records = run_and_record(tuning_trials(args, entries, steps), args)
        run_and_record(fresh_trials(args, entries, steps, records), args)


if __name__ == "__main__":
    command(main, Arguments, __doc__)
