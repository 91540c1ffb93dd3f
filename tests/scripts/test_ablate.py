"""scripts.ablate: the runs that a command line names and their order; signs, corrections and verdicts of the table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs.ablations import leave_one_out_rows
from configs.presets import PRESETS
from scripts import ablate, split_flags
from scripts.ablate import (
    Ablate,
    choose_metric,
    default_dir,
    effects_table,
    main,
    make_experiments,
    make_trials,
    measure_effects,
    point_name,
    settings_table,
)
from scripts.lab.folders import RunFolder
from scripts.lab.statistics import holm, welch
from scripts.lab.sweep import Trial, TrialResult

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def fake_sweep(monkeypatch, tmp_path):
    """Replace the sweep by one that trains nothing: the final loss is the length of the experiment's name."""
    def run_sweep(trials, **_):
        return [TrialResult(trial, "finished", RunFolder(tmp_path, {}, {}, {
            "val_loss_nats": len(trial.experiment) + trial.seed / 100, "train_seconds": 1.0}), "") for trial in trials]

    monkeypatch.setattr(ablate, "run_sweep", run_sweep)


def test_rows_bring_their_baselines_once():
    experiments = make_experiments(Ablate(rows=("no_smear", "no_bigram", "svd")), ["--train.steps", "2"])
    assert [(experiment.name, experiment.preset, experiment.base) for experiment in experiments] == [
        ("tiny", "tiny", None), ("bytes", "bytes", None), ("no_smear", "tiny", "tiny"), ("no_bigram", "tiny", "tiny"),
        ("svd", "bytes", "bytes")]
    assert experiments[2].flags == ("--train.steps", "2", "--model.no_smear")


def test_each_off_is_every_technique_of_the_base():
    experiments = make_experiments(Ablate(each_off="bytes"), [])
    names = [experiment.name for experiment in experiments]
    assert names == ["bytes"] + [row.name for row in leave_one_out_rows(PRESETS["bytes"]())]


def test_each_off_does_not_leave_out_what_the_flags_leave_out():
    experiments = make_experiments(Ablate(each_off="tiny"), ["--model.no_smear"])
    assert "no_smear" not in [experiment.name for experiment in experiments]


def test_grids_are_crossed():
    experiments = make_experiments(Ablate(grid=("optim.matrix.lr=0.01,0.02", "model.layers=1,2"), base="bytes"), [])
    assert [experiment.settings for experiment in experiments] == [
        {"optim.matrix.lr": lr, "model.layers": layers} for lr in ("0.01", "0.02") for layers in "12"]
    assert experiments[1].flags == ("--optim.matrix.lr", "0.01", "--model.layers", "2")
    assert experiments[1].name == "matrix.lr=0.01_layers=2"


def test_draws_depend_on_the_sweeps_seed():
    def draw(seed, count):
        args = Ablate(random=count, range=("optim.matrix.lr=0.01:0.1:log",), sweep_seed=seed)
        return [experiment.settings for experiment in make_experiments(args, [])]

    assert draw(1, 3) == draw(1, 5)[:3] != draw(2, 3)


def test_names_of_points_are_folder_names():
    assert point_name({"schedule.lr": "0=1 100%=0", "data.train_files": "a/b"}) == "lr=0=1_100_=0_train_files=a_b"


def test_seeds_come_in_turn_over_all_rows():
    experiments = make_experiments(Ablate(rows=("no_smear",)), [])
    assert [trial.name for trial in make_trials(experiments, first_seed=4, seeds=2)] == [
        "tiny-seed4", "no_smear-seed4", "tiny-seed5", "no_smear-seed5"]


@pytest.mark.parametrize("args, reason", [
    (Ablate(), "choose exactly one of .* got none"),
    (Ablate(rows=("svd",), each_off="tiny"), "got ROW and --each-off"),
    (Ablate(rows=("svdd",)), "did you mean 'svd'"),
    (Ablate(each_off="tinny"), "did you mean 'tiny'"),
    (Ablate(random=3), "--random needs --range"),
    (Ablate(rows=("svd",), range=("optim.matrix.lr=1:2",)), "--range needs --random"),
    (Ablate(rows=("svd",), seeds=0), "--seeds must be at least 1, got 0"),
])
def test_mistakes_are_named(args, reason):
    with pytest.raises(ValueError, match=reason):
        make_experiments(args, [])


def test_folders_are_named_after_what_is_varied():
    commands = Ablate(rows=("svd",)), Ablate(each_off="tiny"), Ablate(grid=("a=1",)), Ablate(random=1, base="bytes")
    assert [str(default_dir(args)) for args in commands] == [
        "runs/ablate-rows", "runs/ablate-tiny", "runs/ablate-tiny-grid", "runs/ablate-bytes-random"]


@pytest.mark.usefixtures("fake_sweep")
def test_rows_are_tested_and_written(tmp_path, capsys):
    main(Ablate(rows=("no_smear",), dir=tmp_path), [])
    ablation = json.loads((tmp_path / "ablation.json").read_text())
    [row] = ablation["rows"]
    assert (ablation["base"], ablation["metric"]) == ("tiny", "val_loss_nats")
    assert row["name"] == "no_smear" and row["verdict"] == "hurts" and row["n"] == 3
    assert row["difference"] == pytest.approx(4)
    assert {"flags", "mean", "sd", "low", "high", "p", "p_holm", "seconds_difference"} <= set(row)
    printed = " ".join(capsys.readouterr().out.split())
    assert "+4.0000" in printed and "Holm's correction (rows tested: 1)" in printed


@pytest.mark.usefixtures("fake_sweep")
def test_a_grid_is_a_table_best_first(tmp_path, capsys):
    main(Ablate(grid=("model.layers=10,2",), base="bytes", dir=tmp_path, seeds=1), [])
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines.index("2") < lines.index("10")


def test_flags_after_two_dashes_go_to_every_run():
    assert split_flags(["svd", "--seeds", "2", "--", "--train.steps", "3"]) == (["svd", "--seeds", "2"],
                                                                               ["--train.steps", "3"])
    assert split_flags(["svd"]) == (["svd"], [])


@pytest.mark.parametrize("spelling", ["--each-off", "--each_off"])
def test_the_command_line_takes_both_spellings_and_refuses_in_a_line(spelling, tmp_path):
    done = subprocess.run([sys.executable, "-m", "scripts.ablate", spelling, "tinny", "--dir", str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: unknown preset 'tinny'; did you mean 'tiny'?\n"


# ---- The table ------------------------------------------------------------------------------------------------------


LOSSES = {"tiny": [1.0, 1.01, 0.99], "better": [0.8, 0.81, 0.79], "worse": [1.2, 1.21, 1.19], "same": [1.0, 1.02, 0.99],
          "slightly": [1.025, 1.035, 1.015]}


def make_outcomes(path, losses, metric="val_bits_per_byte"):
    return [TrialResult(Trial(f"{name}-seed{i}", name, "tiny", (name,), i), "finished",
                    RunFolder(path, {}, {}, {metric: value, "train_seconds": 10 * value}), "")
            for name, values in losses.items() for i, value in enumerate(values)]


def failure(name):
    return TrialResult(Trial(f"{name}-seed9", name, "tiny", (), 9), "failed", None, "loss is nan")


@pytest.fixture
def rows(tmp_path):
    """Return the effects by experiment."""
    outcomes = [*make_outcomes(tmp_path, LOSSES | {"one_seed": [1.3]}), failure("worse"), failure("broken")]
    baselines = dict.fromkeys(["better", "worse", "same", "slightly", "one_seed", "broken"], "tiny")
    return {row.name: row for row in measure_effects(outcomes, baselines, "val_bits_per_byte")}


def test_verdicts(rows):
    assert {name: row.verdict for name, row in rows.items()} == {
        "better": "helps", "worse": "hurts; 1 failed: loss is nan", "same": "no difference seen",
        "slightly": "perhaps hurts", "one_seed": "too few runs to test", "broken": "failed: loss is nan"}


def test_numbers_are_those_of_the_statistics(rows):
    for name in ("better", "worse", "same", "slightly"):
        assert (rows[name].difference, rows[name].low, rows[name].high, rows[name].p) == welch(LOSSES[name], LOSSES["tiny"])
    assert [rows[name].p_holm for name in ("better", "worse", "same", "slightly")] == holm(
        [rows[name].p for name in ("better", "worse", "same", "slightly")])
    assert rows["better"].seconds_difference == pytest.approx(-2)
    assert rows["one_seed"].difference == pytest.approx(0.3) and rows["one_seed"].p is None
    assert rows["broken"].n == 0 and rows["broken"].mean is None


def test_nats_for_runs_without_bits_per_byte(tmp_path):
    assert choose_metric(make_outcomes(tmp_path, LOSSES)) == "val_bits_per_byte"
    assert choose_metric(make_outcomes(tmp_path, LOSSES, metric="val_loss_nats")) == "val_loss_nats"
    assert choose_metric([failure("a")]) == "val_loss_nats"


def test_points_are_sorted_by_loss(rows):
    assert effects_table(list(rows.values())).row_count == 6
    table = settings_table(list(rows.values()), {name: {"x": name} for name in rows}, "val_bits_per_byte")
    assert list(table.columns[0].cells) == ["better", "same", "slightly", "worse", "one_seed", "broken"]
