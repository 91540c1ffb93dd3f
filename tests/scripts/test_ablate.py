"""The ablation's command line: what it runs and in which order; and its table: signs, corrections and verdicts."""

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
    effects,
    effects_table,
    experiments,
    main,
    point_name,
    settings_table,
    trials,
)
from scripts.lab.folders import RunFolder
from scripts.lab.statistics import holm, welch
from scripts.lab.sweep import Trial, TrialResult

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The trials that a sweep was asked to run; it answers with a loss that the name's length decides."""
    found = []

    def answer(trials, **_):
        found.extend(trials)
        return [TrialResult(one, "finished", RunFolder(tmp_path, {}, {}, {
            "val_loss_nats": len(one.experiment) + one.seed / 100, "train_seconds": 1.0}), "") for one in trials]

    monkeypatch.setattr(ablate, "run_sweep", answer)
    return found


def test_rows_bring_their_baselines_once():
    found = experiments(Ablate(rows=("no_smear", "no_bigram", "svd")), ["--train.steps", "2"])
    assert [(one.name, one.preset, one.base) for one in found] == [
        ("tiny", "tiny", None), ("bytes", "bytes", None), ("no_smear", "tiny", "tiny"), ("no_bigram", "tiny", "tiny"),
        ("svd", "bytes", "bytes")]
    assert found[2].flags == ("--train.steps", "2", "--model.no_smear")


def test_each_off_is_every_technique_of_the_base():
    found = experiments(Ablate(each_off="bytes"), [])
    assert [one.name for one in found] == ["bytes"] + [row.name for row in leave_one_out_rows(PRESETS["bytes"]())]


def test_each_off_heeds_the_flags_for_every_run():
    assert "no_smear" not in [one.name for one in experiments(Ablate(each_off="tiny"), ["--model.no_smear"])]


def test_grids_are_crossed():
    found = experiments(Ablate(grid=("optim.matrix.lr=0.01,0.02", "model.layers=1,2"), base="bytes"), [])
    assert [one.settings for one in found] == [{"optim.matrix.lr": a, "model.layers": b} for a in ("0.01", "0.02")
                                               for b in "12"]
    assert found[1].flags == ("--optim.matrix.lr", "0.01", "--model.layers", "2")
    assert found[1].name == "matrix.lr=0.01_layers=2"


def test_draws_depend_on_the_sweeps_seed():
    def drawn(seed, count):
        return [one.settings for one in experiments(
            Ablate(random=count, range=("optim.matrix.lr=0.01:0.1:log",), sweep_seed=seed), [])]

    assert drawn(1, 3) == drawn(1, 5)[:3] != drawn(2, 3)


def test_names_of_points_are_folder_names():
    assert point_name({"schedule.lr": "0=1 100%=0", "data.train_files": "a/b"}) == "lr=0=1_100_=0_train_files=a_b"


def test_seeds_come_in_turn_over_all_rows():
    found = experiments(Ablate(rows=("no_smear",)), [])
    assert [one.name for one in trials(found, first_seed=4, seeds=2)] == [
        "tiny-seed4", "no_smear-seed4", "tiny-seed5", "no_smear-seed5"]


@pytest.mark.parametrize("args, reason", [
    (Ablate(), "got none"),
    (Ablate(rows=("svd",), each_off="tiny"), "got ROW and --each-off"),
    (Ablate(rows=("svdd",)), "did you mean 'svd'"),
    (Ablate(each_off="tinny"), "did you mean 'tiny'"),
    (Ablate(random=3), "--random needs --range"),
    (Ablate(rows=("svd",), range=("optim.matrix.lr=1:2",)), "--range needs --random"),
    (Ablate(rows=("svd",), seeds=0), "--seeds must be at least 1, got 0"),
])
def test_mistakes_are_named(args, reason):
    with pytest.raises(ValueError, match=reason):
        experiments(args, [])


def test_folders_are_named_after_what_varies():
    assert [str(default_dir(one)) for one in (Ablate(rows=("svd",)), Ablate(each_off="tiny"), Ablate(grid=("a=1",)),
                                              Ablate(random=1, base="bytes"))] == [
        "runs/ablate-rows", "runs/ablate-tiny", "runs/ablate-tiny-grid", "runs/ablate-bytes-random"]


def test_rows_are_judged_and_written(asked, tmp_path, capsys):
    main(Ablate(rows=("no_smear",), dir=tmp_path), [])
    found = json.loads((tmp_path / "ablation.json").read_text())
    [row] = found["rows"]
    assert (found["base"], found["metric"]) == ("tiny", "val_loss_nats")
    assert row["name"] == "no_smear" and row["verdict"] == "hurts" and row["n"] == 3
    assert row["difference"] == pytest.approx(4)
    assert {"flags", "mean", "sd", "low", "high", "p", "p_holm", "seconds_difference"} <= set(row)
    assert "+4.0000" in capsys.readouterr().out


def test_a_grid_is_a_table_best_first(asked, tmp_path, capsys):
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


def outcomes(path, losses, metric="val_bits_per_byte"):
    return [TrialResult(Trial(f"{name}-seed{i}", name, "tiny", (name,), i), "finished",
                    RunFolder(path, {}, {}, {metric: value, "train_seconds": 10 * value}), "")
            for name, values in losses.items() for i, value in enumerate(values)]


def failure(name):
    return TrialResult(Trial(f"{name}-seed9", name, "tiny", (), 9), "failed", None, "loss is nan")


@pytest.fixture
def rows(tmp_path):
    """The effects by name."""
    found = [*outcomes(tmp_path, LOSSES | {"once": [1.3]}), failure("worse"), failure("broken")]
    bases = dict.fromkeys(["better", "worse", "same", "slightly", "once", "broken"], "tiny")
    return {row.name: row for row in effects(found, bases, "val_bits_per_byte")}


def test_verdicts(rows):
    assert {name: row.verdict for name, row in rows.items()} == {
        "better": "helps", "worse": "hurts; 1 failed: loss is nan", "same": "no difference seen",
        "slightly": "perhaps hurts", "once": "too few runs to tell", "broken": "failed: loss is nan"}


def test_numbers_are_the_statistics_own(rows):
    for name in ("better", "worse", "same", "slightly"):
        assert (rows[name].difference, rows[name].low, rows[name].high, rows[name].p) == welch(LOSSES[name], LOSSES["tiny"])
    assert [rows[name].p_holm for name in ("better", "worse", "same", "slightly")] == holm(
        [rows[name].p for name in ("better", "worse", "same", "slightly")])
    assert rows["better"].seconds_difference == pytest.approx(-2)
    assert rows["once"].difference == pytest.approx(0.3) and rows["once"].p is None
    assert rows["broken"].n == 0 and rows["broken"].mean is None


def test_nats_where_there_are_no_bytes(tmp_path):
    assert choose_metric(outcomes(tmp_path, LOSSES)) == "val_bits_per_byte"
    assert choose_metric(outcomes(tmp_path, LOSSES, metric="val_loss_nats")) == "val_loss_nats"
    assert choose_metric([failure("a")]) == "val_loss_nats"


def test_spaces_are_sorted_by_loss(rows):
    assert effects_table(list(rows.values()), "val_bits_per_byte").row_count == 6
    table = settings_table(list(rows.values()), {name: {"x": name} for name in rows}, "val_bits_per_byte")
    assert list(table.columns[0].cells) == ["better", "same", "slightly", "worse", "once", "broken"]
