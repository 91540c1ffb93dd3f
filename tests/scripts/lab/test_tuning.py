"""Ranges, grids and draws; the leaderboard from fabricated records: budgets are prefixes, fresh seeds are compared."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.cli import parse_row
from configs.entries import ENTRIES, REFERENCE, find_entry
from configs.presets import PRESETS
from configs.serialize import config_to_dict, flatten
from scripts.lab.tuning import (
    RULE_MARGIN,
    TUNING_SEED,
    Range,
    best_trial,
    changed_draws,
    draw,
    final_loss,
    flags_of,
    leaderboard_rows,
    make_trial,
    parse_grid,
    parse_name,
    parse_range,
    performance_profile,
    reference_curve,
    settings_of,
    steps_of_reference,
    steps_to_target,
)
from scripts.verify_record import board_page, profile_page, target_of

LR = Range("optim.matrix.lr", 0.001, 0.1, "log")
MOMENTUM = Range("optim.matrix.momentum", 0.8, 0.999, "one_minus")
GAIN = Range("model.init_gain", 0.0, 2.0, "linear")


def test_a_range_is_read():
    assert parse_range("optim.matrix.lr=0.001:0.1:log") == LR
    assert parse_range("model.init_gain=0:2") == GAIN


@pytest.mark.parametrize("text, reason", [
    ("optim.matrix.lr", "NAME=LOW:HIGH:SCALE"),
    ("optim.matrix.lr=1", "NAME=LOW:HIGH:SCALE"),
    ("optim.matrix.lr=1:2:log:3", "NAME=LOW:HIGH:SCALE"),
    ("optim.matrix.lr=a:2:log", "could not convert"),
    ("optim.matrix.lr=2:1:log", "must rise from LOW to HIGH"),
    ("optim.matrix.lr=nan:1:log", "must rise from LOW to HIGH"),
    ("optim.matrix.lr=0:1:log", "LOW above 0"),
    ("optim.matrix.momentum=0:1:one_minus", "HIGH below 1"),
    ("optim.matrix.lr=1:2:logg", "did you mean 'log'"),
    ("optim.matrx.lr=1:2:log", "did you mean 'optim.matrix.lr'"),
])
def test_a_bad_range_says_why(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_range(text)


def test_a_grid_is_read():
    assert parse_grid("optim.matrix.lr=0.01, 0.02") == ("optim.matrix.lr", ("0.01", "0.02"))
    assert parse_grid("schedule.lr=1,0=1 100%=0") == ("schedule.lr", ("1", "0=1 100%=0"))


@pytest.mark.parametrize("text", ["optim.matrix.lr", "optim.matrix.lr=", "optim.matrix.lr=1,,2", "optim.matrix.lr=1,1",
                                  "optim.lr=1"])
def test_a_bad_grid_is_refused(text):
    with pytest.raises(ValueError):
        parse_grid(text)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9), st.booleans())
def test_fewer_draws_are_the_first_of_more(count, more, seed, quasi):
    few = draw([LR, MOMENTUM], count, seed=seed, quasi=quasi)
    assert few == draw([LR, MOMENTUM], count + more, seed=seed, quasi=quasi)[:count]


@pytest.mark.parametrize("quasi", [False, True])
def test_seeds_differ(quasi):
    assert draw([LR], 3, seed=1, quasi=quasi) != draw([LR], 3, seed=2, quasi=quasi)


@given(st.floats(0, 1), st.floats(0, 1))
def test_values_lie_within_and_rise(a, b):
    low, high = sorted((a, b))
    for range_ in (LR, MOMENTUM, GAIN):
        assert range_.low <= range_.at(low) <= range_.at(high) <= range_.high


def test_half_way_is_the_scales_own_mean():
    assert LR.at(0.5) == pytest.approx(0.01)
    assert 1 - MOMENTUM.at(0.5) == pytest.approx(math.sqrt(0.2 * 0.001), rel=1e-3)
    assert GAIN.at(0.5) == 1.0


@pytest.mark.parametrize("quasi", [False, True])
def test_draws_are_uniform_in_the_scale(quasi):
    points = draw([LR, MOMENTUM], 2000, seed=3, quasi=quasi)
    shares = np.array([[math.log(p[LR.name] / LR.low) / math.log(100),
                        math.log((1 - p[MOMENTUM.name]) / 0.2) / math.log(0.001 / 0.2)] for p in points])
    for column in shares.T:
        counts = np.histogram(column, bins=10, range=(0, 1))[0]
        assert (abs(counts - 200) < (15 if quasi else 70)).all()


def test_no_draws_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        draw([LR], 0, seed=1, quasi=False)


@settings(deadline=None)
@given(st.integers(0, 50))
def test_flags_come_back_as_the_values(seed):
    values = draw([LR, MOMENTUM, GAIN], 1, seed=seed, quasi=False)[0]
    config = flatten(config_to_dict(parse_row("bytes", flags_of(values))))
    assert {name: config[name] for name in values} == values


def test_switches_have_no_value():
    flags = flags_of({"model.smear": "false", "model.x0_skip": True, "model.layers": 3})
    assert flags == ("--model.no_smear", "--model.x0_skip", "--model.layers", "3")


# ---- The leaderboard ------------------------------------------------------------------------------------------------


BASE = flatten(config_to_dict(PRESETS["bench_cpu"]()))


def record(entry: str, loss: float | None, *, steps: int = 240, trial: int = 0, seed: int = TUNING_SEED) -> dict:
    experiment = f"{entry}-{steps}steps-trial{trial:02}"
    return {"name": f"{experiment}-seed{seed}", "experiment": experiment, "preset": "bench_cpu",
            "config": BASE | settings_of(find_entry(entry), trial),
            "summary": {"val_loss_nats": loss, "train_seconds": 10.0, "seed": seed}}


def tuned(entry: str, losses: list[float], *, steps: int = 240) -> list[dict]:
    return [record(entry, loss, steps=steps, trial=trial) for trial, loss in enumerate(losses)]


def fresh(entry: str, losses: list[float], *, trial: int, steps: int = 240) -> list[dict]:
    return [record(entry, loss, steps=steps, trial=trial, seed=seed) for seed, loss in enumerate(losses, start=1)]


MUON = (tuned("muon", [1.6, 1.5, 1.7, 1.8, 1.9, 1.4])
        + fresh("muon", [1.50, 1.52], trial=1) + fresh("muon", [1.4, 1.4], trial=5))
ADAM = tuned("adamw", [1.8, 1.7, 1.6, 1.9, 2.0]) + fresh("adamw", [1.61, 1.63, 1.62], trial=2)


def test_every_entry_parses_and_its_settings_take_effect():
    from configs.cli import parse_row
    for entry in ENTRIES:
        trial = make_trial(entry, "bench_cpu", steps=100, trial=3, seed=7)
        run = parse_row(trial.preset, [*trial.flags, "--run.seed", "7"])
        flat = flatten(config_to_dict(run))
        assert {name: flat[name] for name in settings_of(entry, 3)} == pytest.approx(settings_of(entry, 3))
        assert parse_name(trial.experiment) == (entry.name, 100, 3) and run.train.steps == 100


def test_a_small_budget_is_a_prefix_of_a_large_one():
    assert best_trial(MUON, "muon", steps=240, budget=5) == 1
    assert best_trial(MUON, "muon", steps=240, budget=6) == 5
    assert best_trial(MUON, "muon", steps=240, budget=7) is None  # not all of them were run
    assert best_trial(MUON, "muon", steps=480, budget=5) is None


def test_a_failed_run_ranks_last():
    assert best_trial(tuned("muon", [None, 1.9, 2.0]), "muon", steps=240, budget=3) == 1
    assert final_loss(record("muon", None)) == math.inf


def test_rows_rank_fresh_seeds_and_leave_the_tuning_seed_out():
    board = leaderboard_rows(MUON + ADAM, steps=240, budget=5)
    assert [row.entry for row in board] == ["muon", "adamw"]
    assert board[0].loss.mean == pytest.approx(1.51) and board[0].versus is None and board[0].loss.n == 2
    assert board[1].versus.difference == pytest.approx(0.11) and board[1].trial == 2
    assert board[1].p_holm == pytest.approx(board[1].versus.p)  # one comparison needs no correction
    assert board[1].settings == settings_of(find_entry("adamw"), 2)


def test_the_factor_is_the_references_steps_over_own_steps():
    """The reference has 1.5 after 240 steps and 1.3 after 960: half the way in log(steps) is 480."""
    curve = [(240, 1.5), (960, 1.3)]
    assert steps_of_reference(curve, 1.4, 240) == pytest.approx(2)
    assert steps_of_reference(curve, 1.5, 240) == pytest.approx(1)
    assert steps_of_reference(curve, 1.6, 240) == pytest.approx(0.5)
    assert steps_of_reference(curve, 1.3, 960) == pytest.approx(1)
    assert steps_of_reference(curve[:1], 1.4, 240) is None
    assert steps_of_reference([(240, 1.3), (960, 1.5)], 1.4, 240) is None
    assert steps_of_reference(curve, math.inf, 240) is None


def test_the_references_curve_is_made_of_whole_schedules():
    records = MUON + tuned("muon", [1.3] * 5, steps=960) + fresh("muon", [1.2, 1.4], trial=0, steps=960)
    assert reference_curve(records, budget=5) == [(240, pytest.approx(1.51)), (960, pytest.approx(1.3))]


def test_the_profile_counts_tasks_within_tau_of_the_best():
    def board(**factors):
        row = leaderboard_rows(MUON, steps=240, budget=5)[0]
        return [row._replace(entry=name, factor=factor) for name, factor in factors.items()]
    shares = performance_profile([board(muon=1.0, adamw=0.5), board(muon=1.0, adamw=1.25)], (1.0, 1.25, 2.0))
    assert shares == {"muon": [0.5, 1.0, 1.0], "adamw": [0.5, 0.5, 1.0]}


def test_steps_to_target_needs_the_rule_and_two_seeds():
    sigma, target = 0.01, 1.53
    short = fresh("muon", [1.50, 1.52], trial=1, steps=200)
    assert (target - 1.51) * 2**0.5 < RULE_MARGIN * sigma
    assert steps_to_target(short, "muon", target=target, sigma=sigma) is None
    assert steps_to_target(short, "muon", target=target + 0.01, sigma=sigma) == 200
    assert steps_to_target(short[:1], "muon", target=9, sigma=sigma) is None


def test_the_target_is_one_that_the_reference_reaches():
    losses = [1.50, 1.52, 1.51, 1.49]
    target = target_of(losses)
    assert (target - sum(losses) / 4) * 2 >= RULE_MARGIN * 0.0129
    assert target == pytest.approx(round(target / 0.005) * 0.005) and target < 1.535


def test_settings_that_were_not_drawn_are_reported():
    correct, wrong = record("muon", 1.5), record("muon", 1.5, trial=1)
    wrong["config"]["optim.matrix.lr"] *= 1.5
    assert changed_draws([correct]) == [] and "optim.matrix.lr" in changed_draws([correct, wrong])[0]


def test_the_page_holds_every_board():
    records = MUON + ADAM + tuned("muon", [1.3] * 5, steps=960) + fresh("muon", [1.2, 1.21], trial=0, steps=960)
    text = board_page("bench_cpu", records)
    assert "## 240 steps, 5 trials" in text and "## 960 steps, 5 trials" in text and "| adamw | 1.6200 |" in text
    assert f"({len(records)} runs)" in text and "nats per step" in text and "| 16 |" in text
    more = records + tuned("adamw", [1.5] * 5, steps=960) + fresh("adamw", [1.4, 1.41], trial=0, steps=960)
    profile = profile_page({"bench_cpu": more, "bench_cpu_prose": MUON + ADAM})
    assert "bench_cpu at 240 steps; bench_cpu at 960 steps;" in profile and "prose" not in profile and REFERENCE in profile
    assert profile_page({"bench_cpu": records}) == profile_page({"bench_cpu_prose": MUON + ADAM}) == ""
