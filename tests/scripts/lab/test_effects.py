"""The ablation's table: signs, corrections and verdicts."""

import pytest

from scripts.lab.effects import best_first, choose_metric, effects, effects_json, effects_table, settings_table
from scripts.lab.folders import RunFolder
from scripts.lab.statistics import holm, welch
from scripts.lab.sweep import Outcome, Trial

LOSSES = {"tiny": [1.0, 1.01, 0.99], "better": [0.8, 0.81, 0.79], "worse": [1.2, 1.21, 1.19], "same": [1.0, 1.02, 0.99],
          "slightly": [1.025, 1.035, 1.015]}


def outcomes(path, losses, metric="val_bits_per_byte"):
    return [Outcome(Trial(f"{name}-seed{i}", name, "tiny", (name,), i), "finished",
                    RunFolder(path, {}, {}, {metric: value, "train_seconds": 10 * value}), "")
            for name, values in losses.items() for i, value in enumerate(values)]


def failure(name):
    return Outcome(Trial(f"{name}-seed9", name, "tiny", (), 9), "failed", None, "loss is nan")


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


def test_the_json_has_the_tables_numbers(rows):
    found = effects_json(list(rows.values()), "val_bits_per_byte", "tiny")
    assert {"base", "metric", "rows"} == set(found)
    assert {"name", "flags", "n", "mean", "sd", "difference", "low", "high", "p", "p_holm", "seconds_difference",
            "verdict"} <= set(found["rows"][0])
    assert effects_table(list(rows.values()), "val_bits_per_byte").row_count == 6


def test_spaces_are_sorted_by_loss(rows):
    assert [row.name for row in best_first(list(rows.values()))] == ["better", "same", "slightly", "worse", "once", "broken"]
    table = settings_table(list(rows.values()), {name: {"x": name} for name in rows}, "val_bits_per_byte")
    assert list(table.columns[0].cells)[0] == "better"
