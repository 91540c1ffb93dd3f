"""What a report draws beside the losses: heat maps, schedules, tuning curves."""

import pytest

from scripts.lab.figures import diagnostics, heat_maps, rest_labels, schedules, tuning
from scripts.lab.folders import find_runs


def test_heat_maps_are_found_by_their_keys():
    records = [{"step": 1, "train/loss_nats": 3.0},
               {"step": 2, "optim/matrix/angle": 0.1, "diag/blocks.0/attn/entropy": 1.5, "diag/rank": 7},
               {"step": 4, "optim/embed/angle": 0.3, "optim/matrix/angle": 0.2, "diag/blocks.0/attn/entropy": None}]
    assert heat_maps(records) == [
        {"name": "angle", "rows": ["matrix", "embed"], "steps": [2, 4], "z": [[0.1, 0.2], [None, 0.3]]},
        {"name": "diag entropy", "rows": ["blocks.0/attn"], "steps": [2], "z": [[1.5]]},
        {"name": "diag rank", "rows": ["rank"], "steps": [2], "z": [[7]]}]


def test_runs_without_diagnostics_are_not_offered(fabricate, tmp_path):
    fabricate(tmp_path / "a")
    fabricate(tmp_path / "b")
    metrics = tmp_path / "b" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    (one,) = diagnostics(find_runs([str(tmp_path)]))
    assert one["name"] == "a" and [found["name"] for found in one["maps"]] == ["lr", "update_rms", "weight_size", "angle"]


def test_runs_of_one_schedule_share_it(fabricate, tmp_path):
    fabricate(tmp_path / "a")
    fabricate(tmp_path / "b", settings={"optim.matrix.lr": 0.5})
    fabricate(tmp_path / "c", settings={"schedule.batch_tokens": "0=0.5 50%=1"})
    found, problems = schedules(find_runs([str(tmp_path)]))
    assert [one["experiments"] for one in found] == [[0, 1], [2]] and not problems
    assert set(found[0]["batch_tokens"]) == {768} and min(found[1]["batch_tokens"]) == 384
    assert found[1]["step"][0] == 0 and found[1]["step"][-1] == 239
    assert found[0]["window_tokens"][0] is None


def test_a_setting_of_another_version_is_reported_not_fatal(fabricate, tmp_path):
    fabricate(tmp_path / "old", settings={"model.flux": 1})
    found, problems = schedules(find_runs([str(tmp_path)]))
    assert not found and "old: " in problems[0] and "'flux'" in problems[0]


def grid(fabricate, folder, losses):
    """Runs by (lr, momentum, seed)."""
    for (lr, momentum, seed), loss in losses.items():
        fabricate(folder / f"{lr}-{momentum}-seed{seed}", seed=seed, loss=loss, records=10,
                  settings={"optim.matrix.lr": lr, "optim.matrix.momentum": momentum})
    return tuning(find_runs([str(folder)]))


def test_a_tuning_curve_for_each_rest_of_the_settings(fabricate, tmp_path):
    losses = {(lr, momentum, seed): 2 + lr + momentum / 10 + seed / 100
              for lr in (0.04, 0.01, 0.02) for momentum in (0.8, 0.9) for seed in (1, 2)}
    (figure,) = grid(fabricate, tmp_path, losses)  # two momenta are no curve
    assert figure["setting"] == "optim.matrix.lr" and figure["log"] and figure["joined"]
    assert [line["label"] for line in figure["lines"]] == ["optim.matrix.momentum=0.8", "optim.matrix.momentum=0.9"]
    line = figure["lines"][0]
    assert line["x"] == [0.01, 0.02, 0.04] and line["n"] == [2, 2, 2]
    assert line["y"] == pytest.approx([2.105, 2.115, 2.135])
    assert line["low"] == pytest.approx([2.10, 2.11, 2.13]) and line["high"] == pytest.approx([2.11, 2.12, 2.14])


def test_a_random_search_is_a_cloud_over_each_setting(fabricate, tmp_path):
    losses = {(0.01, 0.80, 1): 2.3, (0.03, 0.95, 1): 2.2, (0.02, 0.90, 1): 2.1, (0.05, 0.85, 1): 2.4}
    figures = grid(fabricate, tmp_path, losses)
    assert [(one["setting"], one["log"], one["joined"]) for one in figures] == [
        ("optim.matrix.lr", True, False), ("optim.matrix.momentum", False, False)]
    assert figures[0]["lines"][0]["x"] == [0.01, 0.02, 0.03, 0.05]
    assert figures[0]["lines"][0]["y"] == [2.3, 2.1, 2.2, 2.4]


def test_labels_tell_only_what_differs():
    assert rest_labels([{"a": 1, "b": 2}, {"a": 1, "b": 3}]) == ["b=2", "b=3"]
    assert rest_labels([{"a": 1}]) == [""] and rest_labels([]) == []
