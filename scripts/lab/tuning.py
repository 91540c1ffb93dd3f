"""Search spaces, and the leaderboard of optimizers that are tuned in them.

Every entry gets the same number of trials: points drawn from its own search space. An experiment is named
ENTRY-STEPSsteps-trialNN. Its run with TUNING_SEED tunes; its runs with other seeds (fresh seeds) give the published loss.
The best trial of a budget of k is the best of the first k trials, so a small budget is a prefix of a large one.
"""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from configs.entries import ENTRIES, REFERENCE, Entry, find_entry
from configs.notation import nearest, raise_if
from configs.optim import RULES, Optim
from configs.presets import PRESETS
from configs.schema import Run
from configs.serialize import config_to_dict, flatten
from scripts.lab.statistics import Difference, Summary, holm, summarize, welch, z_margin
from scripts.lab.sweep import Trial

# ---- Spaces ---------------------------------------------------------------------------------------------------------


Scale = Literal["linear", "log", "one_minus"]
DIGITS = 4  # significant digits of a drawn value, so that flags stay short


@dataclass(frozen=True, slots=True)
class Range:
    """Interval from which one setting is drawn, and the scale on which the draws are uniform.

    Scale `log` is uniform in log x. Scale `one_minus` is uniform in log(1 - x); it is meant for betas and momenta, which
    average over about 1 / (1 - x) steps.
    """

    name: str
    """Dotted name of the setting."""
    low: float
    high: float
    scale: Scale

    def __post_init__(self) -> None:
        raise_if(not -math.inf < self.low < self.high < math.inf,  # also true for nan
                 f"range of {self.name} must rise from LOW to HIGH, got {self.low:g}:{self.high:g}")
        raise_if(self.scale == "log" and self.low <= 0,
                 f"range of {self.name}: scale log needs LOW above 0, got {self.low:g}")
        raise_if(self.scale == "one_minus" and self.high >= 1,
                 f"range of {self.name}: scale one_minus needs HIGH below 1, got {self.high:g}")

    def at(self, share: float) -> float:
        """Return the value at `share` (0 to 1) of the way from low to high on the scale.

        It is rounded to DIGITS significant digits; on scale one_minus it is 1 - x that is rounded.
        """
        if self.scale == "linear":
            return _rounded(self.low + share * (self.high - self.low))
        if self.scale == "log":
            return _rounded(self.low * (self.high / self.low) ** share)
        distance = (1 - self.low) * ((1 - self.high) / (1 - self.low)) ** share
        return float(f"{1 - _rounded(distance):.12g}")  # 12 digits remove the rounding error of the subtraction


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def parse_range(text: str) -> Range:
    """Parse `NAME=LOW:HIGH[:SCALE]`; the default scale is linear. Raise ValueError with the text that is wrong."""
    name, values = _split_setting(text, "NAME=LOW:HIGH:SCALE")
    parts = values.split(":")
    raise_if(len(parts) not in (2, 3),
             f"cannot read range {text!r}; write NAME=LOW:HIGH:SCALE, as in optim.matrix.lr=0.001:0.1:log")
    low, high, scale = parts if len(parts) == 3 else [*parts, "linear"]
    raise_if(scale not in get_args(Scale), f"unknown scale {scale!r} in {text!r}{nearest(scale, get_args(Scale))}")
    try:
        return Range(name, float(low), float(high), scale)
    except ValueError as error:
        raise ValueError(f"cannot read range {text!r}: {error}") from None


def parse_grid(text: str) -> tuple[str, tuple[str, ...]]:
    """Parse `NAME=V,V,...` into the name and its values, as text. Raise ValueError with the text that is wrong."""
    name, joined = _split_setting(text, "NAME=V,V,...")
    values = tuple(value.strip() for value in joined.split(","))
    raise_if("" in values or len(set(values)) < len(values), f"cannot read grid {text!r}: a value is empty or appears twice")
    return name, values


@cache
def every_setting() -> dict[str, Any]:
    """Return the defaults of all settings, by dotted name, with the fields of every update rule."""
    runs = (Run(optim=Optim(**{role.name: rule() for role in fields(Optim)})) for rule in RULES.values())
    return {name: value for run in runs for name, value in flatten(config_to_dict(run)).items()}


def _split_setting(text: str, form: str) -> tuple[str, str]:
    """Split NAME=VALUES. Raise ValueError if it is not of this form, or if there is no such setting."""
    name, equals, values = text.partition("=")
    settings = list(every_setting())
    raise_if(not equals or not values, f"cannot read {text!r}; write {form}")
    if name not in settings:
        raise ValueError(f"unknown setting {name!r}{nearest(name, settings) if name else ''}")
    return name, values


def draw(ranges: Sequence[Range], count: int, *, seed: int, quasi: bool) -> list[dict[str, float]]:
    """Draw `count` points {setting: value} from the box that the ranges span.

    The first k of them are the points that count = k draws, so that a search can be extended.
    quasi: True for a scrambled Halton sequence (Owen 2017, arXiv 1706.02808), which covers the box more evenly than
    independent uniform draws.
    """
    raise_if(count < 1, f"the number of draws must be at least 1, got {count}")
    if quasi:
        from scipy.stats import qmc
        shares = qmc.Halton(len(ranges), scramble=True, rng=np.random.default_rng(seed)).random(count)
    else:
        shares = np.random.default_rng(seed).random((count, len(ranges)))
    return [{range_.name: range_.at(share) for range_, share in zip(ranges, row, strict=True)} for row in shares.tolist()]


def flags_of(values: Mapping[str, object]) -> tuple[str, ...]:
    """Return the flags of these settings: `--name value`, or `--name` and `--group.no_name` for booleans."""
    return tuple(part for name, value in values.items() for part in _flag(name, value))


def _flag(name: str, value: object) -> tuple[str, ...]:
    # The short form 0.1 instead of 0.10000000000000001, if it gives the same float.
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    if isinstance(every_setting().get(name), bool) and text.lower() in ("true", "false"):
        group, _, field = name.rpartition(".")
        return (f"--{name}" if text.lower() == "true" else f"--{group}.no_{field}",)
    return f"--{name}", text


# ---- The leaderboard ------------------------------------------------------------------------------------------------


TUNING_SEED = 1000
"""Seed of every trial. All trials start from the same weights and see the same batches, so they differ in their settings
only; the published losses use other seeds, since the best of k noisy losses is too good."""
DRAW_SEED = 1
RULE_MARGIN = 3.09  # in units of sigma: (target - mean) sqrt(n) must reach it. Normal p < .001, as in the rule of track 3
NAME = re.compile(r"(?P<entry>\w+)-(?P<steps>\d+)steps-trial(?P<trial>\d+)$")


class ExperimentName(NamedTuple):
    """Parts of an experiment's name ENTRY-STEPSsteps-trialNN."""

    entry: str
    steps: int
    trial: int


class LeaderboardRow(NamedTuple):
    """Row of a leaderboard: an entry, tuned with a budget of trials, and its result over fresh seeds."""

    entry: str
    trial: int
    """Number of its best trial."""
    settings: dict[str, float]
    """Tuned values by dotted name."""
    loss: Summary
    """Final validation loss in nats, over the fresh seeds."""
    seconds: float
    """Mean training time of a run."""
    versus: Difference | None
    """Loss minus the loss of the reference; None for the reference itself."""
    p_holm: float | None
    """p of that difference, corrected over all comparisons of the table: with many entries some beat Muon by chance."""
    factor: float | None
    """Steps that the reference needs for this loss, over the steps taken; above 1 is faster than the reference."""


def settings_of(entry: Entry, trial: int) -> dict[str, float]:
    """Return the values that trial number `trial` (from 0) of an entry draws from its search space."""
    return draw([parse_range(text) for text in entry.space], trial + 1, seed=DRAW_SEED, quasi=True)[trial]


def make_trial(entry: Entry, preset: str, *, steps: int, trial: int, seed: int) -> Trial:
    """Return the run of one trial of an entry, with this number of steps and this seed."""
    experiment = experiment_name(entry.name, steps, trial)
    flags = (*shlex.split(entry.flags), *flags_of(settings_of(entry, trial)), "--train.steps", str(steps))
    return Trial(f"{experiment}-seed{seed}", experiment, preset, flags, seed)


def experiment_name(entry: str, steps: int, trial: int) -> str:
    """Return the experiment's name, which all seeds of a trial share; `parse_name` is the inverse."""
    return f"{entry}-{steps}steps-trial{trial:02}"


def parse_name(experiment: str) -> ExperimentName | None:
    """Parse an experiment's name; None if it has another form."""
    match = NAME.match(experiment)
    return ExperimentName(match["entry"], int(match["steps"]), int(match["trial"])) if match else None


def step_counts(records: Sequence[dict]) -> list[int]:
    """Return the different run lengths in steps among the records, in rising order."""
    return sorted({name.steps for r in records if (name := parse_name(r["experiment"]))})


def final_loss(record: dict[str, Any]) -> float:
    """Return the final validation loss in nats; infinity for a failed run, so that it ranks last."""
    loss = record["summary"]["val_loss_nats"]
    return math.inf if loss is None else loss


def best_trial(records: Sequence[dict], entry: str, *, steps: int, budget: int) -> int | None:
    """Return the number of the best among the first `budget` trials; None until all of them have run."""
    trials = {experiment_name(entry, steps, trial): trial for trial in range(budget)}
    losses = {trials[r["experiment"]]: final_loss(r) for r in records
              if r["experiment"] in trials and r["summary"]["seed"] == TUNING_SEED}
    return min(losses, key=losses.__getitem__) if len(losses) == budget else None


def fresh_seed_records(records: Sequence[dict], experiment: str) -> list[dict]:
    """Return the records of an experiment with other seeds than TUNING_SEED."""
    return [r for r in records if r["experiment"] == experiment and r["summary"]["seed"] != TUNING_SEED]


def best_trial_records(records: Sequence[dict], entry: str, *, steps: int, budget: int) -> tuple[int | None, list[dict]]:
    """Return the best trial of a budget and the records of its fresh seeds; (None, []) until all trials have run."""
    trial = best_trial(records, entry, steps=steps, budget=budget)
    return trial, [] if trial is None else fresh_seed_records(records, experiment_name(entry, steps, trial))


def leaderboard_rows(records: Sequence[dict], *, steps: int, budget: int) -> list[LeaderboardRow]:
    """Return the leaderboard for one number of steps and one budget, best first, without entries that lack fresh seeds."""
    curve = reference_curve(records, budget=budget)
    reference = [final_loss(r) for r in best_trial_records(records, REFERENCE, steps=steps, budget=budget)[1]]
    rows = []
    for entry in ENTRIES:
        trial, runs = best_trial_records(records, entry.name, steps=steps, budget=budget)
        if runs:
            losses = [final_loss(r) for r in runs]
            versus = welch(losses, reference) if reference and entry.name != REFERENCE else None
            rows.append(LeaderboardRow(
                entry.name, trial, settings_of(entry, trial), summarize(losses),
                sum(r["summary"]["train_seconds"] or 0.0 for r in runs) / len(runs), versus, None,
                steps_of_reference(curve, sum(losses) / len(losses), steps)))
    # Holm's correction needs the p of all rows, so it comes last.
    corrected = holm([row.versus and row.versus.p for row in rows])
    rows = [row._replace(p_holm=p) for row, p in zip(rows, corrected, strict=True)]
    return sorted(rows, key=lambda row: row.loss.mean)


def reference_curve(records: Sequence[dict], *, budget: int) -> list[tuple[int, float]]:
    """Return (steps, mean final loss) of the tuned reference for each run length. Each is a schedule of its own length:
    an early loss of a longer schedule is higher, because its learning rate has not decayed."""
    runs = {steps: best_trial_records(records, REFERENCE, steps=steps, budget=budget)[1] for steps in step_counts(records)}
    return [(steps, summarize([final_loss(r) for r in members]).mean) for steps, members in runs.items() if members]


def steps_of_reference(curve: Sequence[tuple[int, float]], loss: float, steps: int) -> float | None:
    """Return (steps that the reference needs for `loss`) / `steps`.

    curve: (steps, loss) of the reference. The loss is taken as linear in log(steps), through the two measured lengths
    nearest to `steps`, also beyond them. None: fewer than two lengths, or a loss that does not fall from one to the other.
    """
    if len(curve) < 2 or not math.isfinite(loss):
        return None
    (t1, l1), (t2, l2) = sorted(sorted(curve, key=lambda point: abs(math.log(point[0] / steps)))[:2])
    if l1 <= l2:
        return None
    return math.exp(math.log(t1) + (l1 - loss) / (l1 - l2) * math.log(t2 / t1)) / steps


def performance_profile(boards: Sequence[Sequence[LeaderboardRow]], taus: Sequence[float]) -> dict[str, list[float]]:
    """Return, for each entry and tau, the share of tasks on which best factor / own factor <= tau (Dolan & More 2002).

    boards: one leaderboard per task. An entry that is missing on a task does not count as within any tau there.
    """
    tasks = [{row.entry: row.factor for row in board if row.factor} for board in boards]
    shares = {}
    for entry in dict.fromkeys(row.entry for board in boards for row in board):
        ratios = [max(factors.values()) / factors[entry] for factors in tasks if entry in factors]
        shares[entry] = [sum(ratio <= tau for ratio in ratios) / len(boards) for tau in taus]
    return shares


def steps_to_target(records: Sequence[dict], entry: str, *, target: float, sigma: float) -> int | None:
    """Return the fewest steps with which an experiment of the entry passes the rule; None if none passes."""
    passed = []
    for experiment in {r["experiment"] for r in records}:
        name = parse_name(experiment)
        if name and name.entry == entry:
            losses = [final_loss(r) for r in fresh_seed_records(records, experiment)]
            if len(losses) > 1 and z_margin(losses, target) >= RULE_MARGIN * sigma:
                passed.append(name.steps)
    return min(passed, default=None)


def changed_draws(records: Sequence[dict]) -> list[str]:
    """Return a message for each setting of a record that is not the value drawn for its entry and trial."""
    errors = []
    for record in records:
        if name := parse_name(record["experiment"]):
            for field, value in settings_of(find_entry(name.entry), name.trial).items():
                if not math.isclose(record["config"][field], value, rel_tol=1e-9):
                    errors.append(f"{record['name']}: {field} is {record['config'][field]}, but {value} was drawn")
    return errors


def base_steps(preset: str) -> int:
    """Return the preset's own number of steps, which is horizon 1."""
    return PRESETS[preset]().train.steps
