"""Figures of a report: means over seeds, FLOPs, heat maps, schedules and tuning curves."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.presets import PRESETS
from optim.schedule import Schedule
from scripts.lab.figures import (
    diagnostics,
    flops_of_runs,
    heat_maps,
    known_axes,
    loss_lines,
    mean_curve,
    rounded,
    schedules,
    setting_labels,
    subsample,
    tuning,
)
from scripts.lab.folders import find_runs
from scripts.lab.models import flops_by_step

PARAMETERS = 868_373


def test_a_mean_is_of_the_same_runs_at_every_point_and_ends_with_the_shortest():
    first = {"step": [1, 2, 3], "train_seconds": [1.0, 2.0, 3.0], "y": [4.0, 3.0, 2.0]}
    second = {"step": [2, 3, 4], "train_seconds": [4.0, 6.0, 8.0], "y": [5.0, 1.0, 0.0]}
    assert mean_curve([first, second]) == {"step": [2, 3], "train_seconds": [3.0, 4.5], "y": [4.0, 1.5], "low": [3.0, 1.0],
                                        "high": [5.0, 2.0]}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_the_mean_of_equal_runs_is_the_run(values):
    curve = {"step": list(range(len(values))), "y": values}
    mean = mean_curve([curve, curve, curve])
    assert mean["low"] == mean["high"] == values
    assert mean["y"] == pytest.approx(values)


@given(st.integers(1, 2000), st.integers(2, 400))
def test_a_subsample_is_in_order_and_has_both_ends(count, limit):
    values = list(range(count))
    sample = subsample(values, limit)
    assert len(sample) == min(count, limit)
    assert sample[0] == 0 and sample[-1] == count - 1
    assert sample == sorted(set(sample))


def test_whole_numbers_are_not_shortened():
    assert rounded(123_456_789) == 123_456_789 and rounded(1.23456789) == 1.23457 and rounded(None) is None


def test_seeds_get_a_mean_and_a_single_run_none(laboratory):
    lines = loss_lines(find_runs([str(laboratory)]), flops_of_runs())
    assert [line["mean"] for line in lines] == 4 * [False, False, False, True] + [False]
    assert lines[3]["name"] == "lr0.01, mean of 3" and lines[3]["experiment"] == 0
    assert lines[3]["val"]["y"][-1] == pytest.approx(2.12) and lines[3]["val"]["high"][-1] == pytest.approx(2.13)
    assert lines[3]["val"]["train_seconds"][-1] == 62  # a mean too: seeds 1 to 3 took 61 to 63
    assert known_axes(lines) == ["step", "tokens", "train_seconds", "flops"]


def test_of_many_runs_only_means_are_drawn(fabricate, tmp_path):
    for seed in range(1, 26):
        fabricate(tmp_path / f"a-seed{seed}", seed=seed, experiment="a", records=10)
    fabricate(tmp_path / "alone", experiment="alone", records=10)
    lines = loss_lines(find_runs([str(tmp_path)]), flops_of_runs())
    assert [line["name"] for line in lines] == ["a, mean of 25", "alone"]


def test_a_run_that_has_just_begun_does_not_cut_the_mean(fabricate, tmp_path):
    for seed in (1, 2):
        fabricate(tmp_path / f"a-seed{seed}", seed=seed, experiment="a")
    fabricate(tmp_path / "a-seed3", seed=3, experiment="a", finished=False)
    metrics = tmp_path / "a-seed3" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:1]))
    fabricate(tmp_path / "a-seed4", seed=4, experiment="a", finished=False)
    (tmp_path / "a-seed4" / "metrics.jsonl").unlink()
    lines = loss_lines(find_runs([str(tmp_path)]), flops_of_runs())
    assert [line["name"] for line in lines] == ["a-seed1", "a-seed2", "a-seed3", "a, mean of 2"]
    assert lines[-1]["val"]["step"][-1] == 240


def test_flops_are_those_of_the_model_that_was_trained():
    from model import GPT

    run = PRESETS["bytes"]()
    spent = flops_by_step(run, parameters=PARAMETERS)
    model = GPT(run.model, vocab_size=257, max_tokens=64)
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS
    assert spent[0] == 0 and len(spent) == run.train.steps + 1
    assert spent[-1] == pytest.approx(Schedule(run).tokens_before(run.train.steps) * model.flops_per_token(64))


def test_flops_of_another_model_are_not_known(fabricate, tmp_path):
    assert flops_by_step(PRESETS["bytes"](), parameters=1) is None
    fabricate(tmp_path / "known")
    fabricate(tmp_path / "strange", parameters=1)
    lines = loss_lines(find_runs([str(tmp_path)]), flops_of_runs())
    assert "flops" in lines[0]["val"] and "flops" not in lines[1]["val"]
    assert "flops" in known_axes(lines) and "flops" not in known_axes(lines[1:])


@pytest.mark.parametrize("preset", PRESETS)
def test_flops_of_every_preset_are_computed(preset):
    """The model is built without its data, on any device, whatever kernels its config asks for."""
    run = PRESETS[preset]()
    spent = flops_by_step(replace(run, train=replace(run.train, steps=3)), parameters=None)
    assert len(spent) == 4 and spent[1] > 6 * run.train.batch_tokens * run.model.dim ** 2 / 2


def test_heat_maps_come_from_the_keys():
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
    (entry,) = diagnostics(find_runs([str(tmp_path)]))
    names = [heat_map["name"] for heat_map in entry["maps"]]
    assert entry["name"] == "a" and names == ["lr", "update_rms", "weight_size", "angle"]


def test_runs_of_one_schedule_share_it(fabricate, tmp_path):
    fabricate(tmp_path / "a")
    fabricate(tmp_path / "b", settings={"optim.matrix.lr": 0.5})
    fabricate(tmp_path / "c", settings={"schedule.batch_tokens": "0=0.5 50%=1"})
    (constant, changing), problems = schedules(find_runs([str(tmp_path)]))
    assert constant["experiments"] == [0, 1] and changing["experiments"] == [2] and not problems
    assert set(constant["batch_tokens"]) == {768} and min(changing["batch_tokens"]) == 384
    assert changing["step"][0] == 0 and changing["step"][-1] == 239
    assert constant["window_tokens"][0] is None


def test_a_setting_of_another_version_is_reported_not_fatal(fabricate, tmp_path):
    fabricate(tmp_path / "old", settings={"model.flux": 1})
    columns, problems = schedules(find_runs([str(tmp_path)]))
    assert not columns and "old: " in problems[0] and "'flux'" in problems[0]


def grid(fabricate, folder, losses):
    """Write runs with the given losses by (lr, momentum, seed), and return their tuning figures."""
    for (lr, momentum, seed), loss in losses.items():
        fabricate(folder / f"{lr}-{momentum}-seed{seed}", seed=seed, loss=loss, records=10,
                  settings={"optim.matrix.lr": lr, "optim.matrix.momentum": momentum})
    return tuning(find_runs([str(folder)]))


def test_a_tuning_curve_for_each_choice_of_the_other_settings(fabricate, tmp_path):
    losses = {(lr, momentum, seed): 2 + lr + momentum / 10 + seed / 100
              for lr in (0.04, 0.01, 0.02) for momentum in (0.8, 0.9) for seed in (1, 2)}
    (figure,) = grid(fabricate, tmp_path, losses)  # two momenta are too few for a curve
    assert figure["setting"] == "optim.matrix.lr" and figure["log"] and figure["joined"]
    assert [line["label"] for line in figure["lines"]] == ["optim.matrix.momentum=0.8", "optim.matrix.momentum=0.9"]
    line = figure["lines"][0]
    assert line["x"] == [0.01, 0.02, 0.04] and line["n"] == [2, 2, 2]
    assert line["y"] == pytest.approx([2.105, 2.115, 2.135])
    assert line["low"] == pytest.approx([2.10, 2.11, 2.13]) and line["high"] == pytest.approx([2.11, 2.12, 2.14])


def test_a_random_search_is_a_cloud_over_each_setting(fabricate, tmp_path):
    losses = {(0.01, 0.80, 1): 2.3, (0.03, 0.95, 1): 2.2, (0.02, 0.90, 1): 2.1, (0.05, 0.85, 1): 2.4}
    figures = grid(fabricate, tmp_path, losses)
    assert [(figure["setting"], figure["log"], figure["joined"]) for figure in figures] == [
        ("optim.matrix.lr", True, False), ("optim.matrix.momentum", False, False)]
    assert figures[0]["lines"][0]["x"] == [0.01, 0.02, 0.03, 0.05]
    assert figures[0]["lines"][0]["y"] == [2.3, 2.1, 2.2, 2.4]


def test_labels_name_only_the_settings_that_differ():
    assert setting_labels([{"a": 1, "b": 2}, {"a": 1, "b": 3}]) == ["b=2", "b=3"]
    assert setting_labels([{"a": 1}]) == [""] and setting_labels([]) == []
