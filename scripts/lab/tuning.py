"""Search spaces, and what tuning in them came to: trials drawn alike for every entry, their winners, and the leaderboard.

An experiment is named ENTRY-STEPSsteps-trialNN, its run with TUNING_SEED is the trial, its runs with other seeds are the
judgement. The winner of a budget of k trials is the best of the first k, so a small budget is a prefix of a large one.
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
from configs.notation import nearest
from configs.optim import RULES, Optim
from configs.presets import PRESETS
from configs.schema import Run
from configs.serialize import config_to_dict, flatten
from scripts.lab.statistics import Difference, Summary, holm, summarize, welch, z_margin
from scripts.lab.sweep import Trial

# ---- Spaces ---------------------------------------------------------------------------------------------------------


Scale = Literal["linear", "log", "one_minus"]
DIGITS = 4  # significant ones, so that flags stay short


@dataclass(frozen=True, slots=True)
class Range:
    """Where one setting may lie, and how evenly.

    `log` is uniform in the logarithm of x, `one_minus` in that of 1 - x: for averages, whose memory is 1 / (1 - x) steps.
    """

    name: str
    low: float
    high: float
    scale: Scale

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"range of {self.name} must rise from LOW to HIGH, got {self.low:g}:{self.high:g}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"range of {self.name}: scale log needs LOW above 0, got {self.low:g}")
        if self.scale == "one_minus" and self.high >= 1:
            raise ValueError(f"range of {self.name}: scale one_minus needs HIGH below 1, got {self.high:g}")

    def at(self, share: float) -> float:
        """The value `share` (0 to 1) of the way from low to high, rounded to DIGITS (of 1 - x, for one_minus)."""
        if self.scale == "linear":
            return _rounded(self.low + share * (self.high - self.low))
        if self.scale == "log":
            return _rounded(self.low * (self.high / self.low) ** share)
        left = (1 - self.low) * ((1 - self.high) / (1 - self.low)) ** share
        return float(f"{1 - _rounded(left):.12g}")


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def parse_range(text: str) -> Range:
    """`NAME=LOW:HIGH[:SCALE]`, linear if no scale is named. Raises ValueError quoting what is wrong."""
    name, values = _named(text, "NAME=LOW:HIGH:SCALE")
    low, high, scale, *rest = [*values.split(":"), "linear"] if values.count(":") == 1 else [*values.split(":"), "", ""]
    if values.count(":") not in (1, 2):
        raise ValueError(f"cannot read range {text!r}; write NAME=LOW:HIGH:SCALE, say optim.matrix.lr=0.001:0.1:log")
    if scale not in get_args(Scale):
        raise ValueError(f"unknown scale {scale!r} in {text!r}{nearest(scale, get_args(Scale))}")
    try:
        return Range(name, float(low), float(high), scale)
    except ValueError as error:
        raise ValueError(f"cannot read range {text!r}: {error}") from None


def parse_grid(text: str) -> tuple[str, tuple[str, ...]]:
    """`NAME=V,V,...` as the name and its values, as they stand. Raises ValueError quoting what is wrong."""
    name, values = _named(text, "NAME=V,V,...")
    words = tuple(word.strip() for word in values.split(","))
    if "" in words or len(set(words)) < len(words):
        raise ValueError(f"cannot read grid {text!r}: its values must be there, and each once")
    return name, words


@cache
def every_setting() -> dict[str, Any]:
    """Defaults by dotted name, whichever rule has them."""
    runs = (Run(optim=Optim(**{role.name: rule() for role in fields(Optim)})) for rule in RULES.values())
    return {name: value for run in runs for name, value in flatten(config_to_dict(run)).items()}


def _named(text: str, form: str) -> tuple[str, str]:
    name, equals, values = text.partition("=")
    known = list(every_setting())
    if not equals or not values:
        raise ValueError(f"cannot read {text!r}; write {form}")
    if name not in known:
        raise ValueError(f"unknown setting {name!r}{nearest(name, known) if name else ''}")
    return name, values


def draw(ranges: Sequence[Range], count: int, *, seed: int, quasi: bool) -> list[dict[str, float]]:
    """`count` points of the box that the ranges span; the first k of them are the k that a smaller count draws.

    quasi: a scrambled Halton sequence (Owen 2017, arXiv 1706.02808), more even than chance; else uniform.
    """
    if count < 1:
        raise ValueError(f"the number of draws must be at least 1, got {count}")
    if quasi:
        from scipy.stats import qmc
        shares = qmc.Halton(len(ranges), scramble=True, rng=np.random.default_rng(seed)).random(count)
    else:
        shares = np.random.default_rng(seed).random((count, len(ranges)))
    return [{one.name: one.at(share) for one, share in zip(ranges, row, strict=True)} for row in shares.tolist()]


def flags_of(values: Mapping[str, object]) -> tuple[str, ...]:
    """The command line's flags for these settings: `--name value`, and `--name` or `--no_name` for switches."""
    return tuple(word for name, value in values.items() for word in _flag(name, value))


def _flag(name: str, value: object) -> tuple[str, ...]:
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    if isinstance(every_setting().get(name), bool) and text.lower() in ("true", "false"):
        group, _, field = name.rpartition(".")
        return (f"--{name}" if text.lower() == "true" else f"--{group}.no_{field}",)
    return f"--{name}", text


# ---- The leaderboard ------------------------------------------------------------------------------------------------


TUNING_SEED = 1000
DRAW_SEED = 1
RULE_MARGIN = 3.09  # of sigma: (target - mean) sqrt(n) must reach it, p < .001 under the normal law, as track 3's rule
NAME = re.compile(r"(?P<entry>\w+)-(?P<steps>\d+)steps-trial(?P<trial>\d+)$")


class Place(NamedTuple):
    """One line of a task's leaderboard: an entry, tuned with a budget, judged on fresh seeds."""

    entry: str
    trial: int
    settings: dict[str, float]
    loss: Summary
    """Final validation loss in nats over the fresh seeds."""
    seconds: float
    versus: Difference | None
    """Loss minus the reference's; None for the reference itself."""
    p_holm: float | None
    """Corrected over all comparisons of the table."""
    factor: float | None
    """Steps in which the reference reaches this loss, over the steps taken: above 1 is faster than the reference."""


def settings_of(entry: Entry, trial: int) -> dict[str, float]:
    """The values that the entry's trial number `trial` (from 0) draws from its space."""
    return draw([parse_range(text) for text in entry.space], trial + 1, seed=DRAW_SEED, quasi=True)[trial]


def make_trial(entry: Entry, preset: str, *, steps: int, trial: int, seed: int) -> Trial:
    """The run of an entry's trial at a number of steps and a seed."""
    experiment = experiment_name(entry.name, steps, trial)
    flags = (*shlex.split(entry.flags), *flags_of(settings_of(entry, trial)), "--train.steps", str(steps))
    return Trial(f"{experiment}-seed{seed}", experiment, preset, flags, seed)


def experiment_name(entry: str, steps: int, trial: int) -> str:
    """What the runs of an entry's trial have in common; `parse_name` reads it."""
    return f"{entry}-{steps}steps-trial{trial:02}"


def parse_name(experiment: str) -> tuple[str, int, int] | None:
    """(entry, steps, trial) of an experiment's name; None where it is no entry's."""
    found = NAME.match(experiment)
    return (found["entry"], int(found["steps"]), int(found["trial"])) if found else None


def lengths(records: Sequence[dict]) -> list[int]:
    """The numbers of steps at which anything was run."""
    return sorted({name[1] for r in records if (name := parse_name(r["experiment"]))})


def loss_of(record: dict[str, Any]) -> float:
    """The final validation loss in nats; infinite where the run broke down."""
    loss = record["summary"]["val_loss_nats"]
    return math.inf if loss is None else loss


def winner(records: Sequence[dict], entry: str, *, steps: int, budget: int) -> int | None:
    """The number of the best of the first `budget` trials; None while not all of them have been run."""
    losses = {}
    for record in records:
        if (name := parse_name(record["experiment"])) and name[:2] == (entry, steps):
            if record["summary"]["seed"] == TUNING_SEED and name[2] < budget:
                losses[name[2]] = loss_of(record)
    return min(losses, key=losses.__getitem__) if len(losses) == budget else None


def judged(records: Sequence[dict], experiment: str) -> list[dict]:
    """The records of an experiment's fresh seeds."""
    return [r for r in records if r["experiment"] == experiment and r["summary"]["seed"] != TUNING_SEED]


def judged_winner(records: Sequence[dict], entry: str, *, steps: int, budget: int) -> tuple[int | None, list[dict]]:
    """The winner of a budget and the records of its fresh seeds; none while there is no winner."""
    trial = winner(records, entry, steps=steps, budget=budget)
    return trial, [] if trial is None else judged(records, experiment_name(entry, steps, trial))


def places(records: Sequence[dict], *, steps: int, budget: int) -> list[Place]:
    """The leaderboard of one task at one length and budget, best first; entries without fresh seeds are left out."""
    curve = reference_curve(records, budget=budget)
    reference = [loss_of(r) for r in judged_winner(records, REFERENCE, steps=steps, budget=budget)[1]]
    rows = []
    for entry in ENTRIES:
        trial, runs = judged_winner(records, entry.name, steps=steps, budget=budget)
        if runs:
            losses = [loss_of(r) for r in runs]
            versus = welch(losses, reference) if reference and entry.name != REFERENCE else None
            rows.append(Place(entry.name, trial, settings_of(entry, trial), summarize(losses),
                              sum(r["summary"]["train_seconds"] or 0.0 for r in runs) / len(runs), versus, None,
                              steps_of_reference(curve, sum(losses) / len(losses), steps)))
    corrected = holm([row.versus and row.versus.p for row in rows])
    rows = [row._replace(p_holm=p) for row, p in zip(rows, corrected, strict=True)]
    return sorted(rows, key=lambda place: place.loss.mean)


def reference_curve(records: Sequence[dict], *, budget: int) -> list[tuple[int, float]]:
    """(steps, mean final loss) of the tuned reference at every length that it was judged at, each its own schedule."""
    judged_at = {steps: judged_winner(records, REFERENCE, steps=steps, budget=budget)[1] for steps in lengths(records)}
    return [(steps, summarize([loss_of(r) for r in runs]).mean) for steps, runs in judged_at.items() if runs]


def steps_of_reference(curve: Sequence[tuple[int, float]], loss: float, steps: int) -> float | None:
    """Steps that the reference needs for `loss`, over `steps`; its loss is linear in log steps between and beyond the
    two measured lengths nearest to `steps`. None with fewer than two lengths, or where its loss does not fall."""
    if len(curve) < 2 or not math.isfinite(loss):
        return None
    (t1, l1), (t2, l2) = sorted(sorted(curve, key=lambda point: abs(math.log(point[0] / steps)))[:2])
    if l1 <= l2:
        return None
    return math.exp(math.log(t1) + (l1 - loss) / (l1 - l2) * math.log(t2 / t1)) / steps


def profile(boards: Sequence[Sequence[Place]], taus: Sequence[float]) -> dict[str, list[float]]:
    """Performance profile (Dolan & More 2002): for each entry the share of tasks where its factor is within tau of the
    best one's; entries missing on a task are not within any tau of it."""
    shares = {}
    for name in dict.fromkeys(place.entry for board in boards for place in board):
        ratios = [best / own for board in boards
                  if (best := max((p.factor or 0.0 for p in board), default=0.0))
                  and (own := next((p.factor for p in board if p.entry == name), None))]
        shares[name] = [sum(ratio <= tau for ratio in ratios) / len(boards) for tau in taus]
    return shares


def steps_to_target(records: Sequence[dict], entry: str, *, target: float, sigma: float) -> int | None:
    """The fewest steps at which one of the entry's experiments passes the rule; None where none does."""
    passed = []
    for experiment in {r["experiment"] for r in records}:
        name = parse_name(experiment)
        if name and name[0] == entry:
            losses = [loss_of(r) for r in judged(records, experiment)]
            if len(losses) > 1 and z_margin(losses, target) >= RULE_MARGIN * sigma:
                passed.append(name[1])
    return min(passed, default=None)


def changed_draws(records: Sequence[dict]) -> list[str]:
    """Experiments whose configuration is not what their entry's trial draws: each is named with the setting."""
    wrong = []
    for record in records:
        if name := parse_name(record["experiment"]):
            for field, value in settings_of(find_entry(name[0]), name[2]).items():
                if not math.isclose(record["config"][field], value, rel_tol=1e-9):
                    wrong.append(f"{record['name']}: {field} is {record['config'][field]}, drawn was {value}")
    return wrong


def base_steps(preset: str) -> int:
    """The task's own number of steps: horizon 1."""
    return PRESETS[preset]().train.steps
