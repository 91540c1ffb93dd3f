"""The optimization benchmark: every entry tuned with the same number of trials, then judged on fresh seeds.

    python -m scripts.leaderboard bench_cpu --trials 20 --seeds 8 --jobs 2
    python -m scripts.leaderboard bench_cpu_prose --entries adamw muon --horizons 1 4 --trials 5 --seeds 3

One run of each trial with the tuning seed; the best of the first k trials, for every budget k, runs the fresh seeds. Runs
are compared at the end of their own schedule only. Finished runs are never run again. Records go to records/PRESET.jsonl;
`python -m scripts.verify_record` checks them and makes the table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from configs.entries import ENTRIES, Entry, find_entry
from scripts import command
from scripts.lab.records import BENCHMARKS, append_records, read_records, record_of, record_of_failure
from scripts.lab.sweep import Trial, run_sweep
from scripts.lab.tuning import TUNING_SEED, base_steps, make_trial, winner

RECORDS = Path(__file__).resolve().parent.parent / "records"


@dataclass
class Arguments:
    """Arguments of the leaderboard."""

    preset: Annotated[str, tyro.conf.Positional]
    entries: tuple[str, ...] = tuple(entry.name for entry in ENTRIES)
    horizons: tuple[float, ...] = (1.0,)
    """Lengths, in multiples of the preset's steps."""
    trials: int = 5
    """Draws from each entry's search space."""
    budgets: tuple[int, ...] = (5, 20)
    """Budgets whose winners are judged, as far as `trials` goes."""
    seeds: int = 8
    first_seed: int = 1
    """Fresh seeds first_seed, first_seed + 1, ..."""
    jobs: int = 1
    dir: Path = Path("runs") / "leaderboard"


def tune(args: Arguments, entries: Sequence[Entry], steps: int) -> list[Trial]:
    """All trials, in turn over the entries, so that a slow spell of the machine hits all alike."""
    return [make_trial(entry, args.preset, steps=steps, trial=trial, seed=TUNING_SEED)
            for trial in range(args.trials) for entry in entries]


def judge(args: Arguments, entries: Sequence[Entry], steps: int, records: Sequence[dict]) -> list[Trial]:
    """The fresh seeds of every budget's winners, seed by seed."""
    won = {(entry, winner(records, entry.name, steps=steps, budget=budget)): None
           for entry in entries for budget in args.budgets if budget <= args.trials}
    return [make_trial(entry, args.preset, steps=steps, trial=trial, seed=args.first_seed + seed)
            for seed in range(args.seeds) for entry, trial in won if trial is not None]


def run_and_record(trials: list[Trial], args: Arguments) -> list[dict]:
    """Run what is missing and append the records: all records of the file."""
    outcomes = run_sweep(trials, dir=args.dir / args.preset, jobs=args.jobs)
    file = RECORDS / f"{args.preset}.jsonl"
    append_records(file, [record_of(outcome.run) if outcome.run else record_of_failure(outcome.trial, outcome.error)
                          for outcome in outcomes])
    return read_records(file)


def main(args: Arguments) -> None:
    """Tune, judge and record every horizon in turn. Raises ValueError for a preset that is no benchmark."""
    if args.preset not in BENCHMARKS:
        raise ValueError(f"{args.preset!r} is no benchmark; benchmarks: {', '.join(BENCHMARKS)}")
    entries = [find_entry(name) for name in args.entries]
    for horizon in args.horizons:
        steps = round(horizon * base_steps(args.preset))
        records = run_and_record(tune(args, entries, steps), args)
        run_and_record(judge(args, entries, steps, records), args)


if __name__ == "__main__":
    command(main, Arguments, __doc__)
