"""scripts.compare on fabricated run folders whose right answers are known."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

from configs.presets import PRESETS
from configs.serialize import config_to_dict
from data.run.folder import write_json
from data.run.metrics import SUMMARY_KEYS
from scripts.compare import Compare, compare_runs, loss_per_step, main
from scripts.lab.folders import find_runs
from scripts.lab.statistics import welch

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"cpu": "a processor", "gpus": [], "torch_threads": 1, "python": "3.11.7"}
BATCH_TOKENS = {"good": 1024, "poor": 2048}  # the setting in which the experiments differ
GOOD, POOR = [2.50, 2.51, 2.52, 2.50], [2.60, 2.62, 2.61, 2.60]


def fabricate(folder, loss, *, seed=1, slope=0.01, config=(), environment=(), **summary):
    """A run of 80 steps, validated every 10, whose loss falls by `slope` per step to `loss`; None: it diverged."""
    nested = config_to_dict(PRESETS["bytes"]())
    for name, value in {"run.seed": seed, "train.steps": 80, **dict(config)}.items():
        group, field = name.split(".")
        nested[group][field] = value
    write_json(folder / "config.json", nested)
    write_json(folder / "env.json", ENVIRONMENT | dict(environment))
    entries = {"val_loss_nats": loss, "val_bits_per_byte": loss and loss / math.log(2), "seed": seed, "steps": 80,
             "code_hash": "c", "data_hash": "d", "device": "cpu", "world_size": 1}
    write_json(folder / "summary.json", dict.fromkeys(SUMMARY_KEYS) | entries | summary)
    losses = [] if loss is None else [(step, loss + slope * (80 - step)) for step in range(10, 81, 10)]
    records = [{"step": step, "tokens": 8 * step, "train_seconds": step / 4, "val/loss_nats": value,
                "val/bits_per_byte": value / math.log(2)} for step, value in losses]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def lab(tmp_path):
    """Return a function that fabricates runs of an experiment, one per loss, and returns the pattern that matches them."""
    def seeds(name, losses, **kwargs):
        config = {"train.batch_tokens": BATCH_TOKENS.get(name, 3072)} | kwargs.pop("config", {})
        for seed, loss in enumerate(losses, start=1):
            fabricate(tmp_path / f"{name}-seed{seed}", loss, seed=seed, config=config, **kwargs)
        return str(tmp_path / f"{name}-seed*")
    return seeds


def compare(a, b=None, **kwargs):
    return compare_runs(Compare(runs=(a,), vs=(b,) if b else (), **kwargs))


def test_a_significant_difference(lab, tmp_path):
    report = compare(lab("good", GOOD), lab("poor", POOR))
    loss = report.comparisons[0]
    assert loss.difference == welch(GOOD, POOR)
    assert loss.rank_p == pytest.approx(stats.mannwhitneyu([1, 2, 3, 4], [5, 6, 7, 8]).pvalue)
    p = stats.ttest_ind(GOOD, POOR, equal_var=False).pvalue
    assert report.verdict == (
        f"Significant difference (Welch p = {p:.2g} < 0.05): the mean final loss of good is lower than that of poor by "
        "0.1000 nats (95 % confidence interval 0.0834 to 0.1166). It is worth 10 steps at 0.01 nats per step (the last "
        "quarter of poor's validations). No more seeds are needed.")
    assert report.notes == []
    swapped = compare(str(tmp_path / "poor-seed*"), str(tmp_path / "good-seed*"))
    assert "good is lower than that of poor by 0.1000 nats (95 % confidence interval 0.0834 to 0.1166)" in swapped.verdict


def test_the_loss_per_step_may_be_given(lab):
    report = compare(lab("good", GOOD), lab("poor", POOR), nats_per_step=0.002)
    assert "worth 50 steps at 0.002 nats per step (--nats_per_step)" in report.verdict


def test_the_loss_per_step_is_that_of_the_last_quarter(tmp_path):
    fabricate(tmp_path / "a", 2.0, slope=0.03)
    records = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    records[0]["val/loss_nats"] += 5  # a steep beginning has no influence
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert loss_per_step(find_runs([str(tmp_path)]), "val_loss_nats") == pytest.approx(0.03)


def test_a_rising_loss_is_worth_no_steps(lab):
    report = compare(lab("good", GOOD), lab("poor", POOR, slope=-0.01))
    assert "worth in steps is unknown" in report.verdict


def test_how_many_more_seeds(lab):
    report = compare(lab("good", [2.5, 2.6, 2.7]), lab("poor", [2.55, 2.65, 2.75]))
    # an effect of 0.05 / 0.1 = 1/2 standard deviation needs 64 seeds per group by the usual power tables
    assert report.verdict.startswith("No significant difference")
    assert "good is lower than that of poor by 0.0500 nats" in report.verdict
    assert "64 seeds per group" in report.verdict and "61 more of good and 61 more of poor" in report.verdict


def test_no_difference_needs_no_seeds(lab):
    report = compare(lab("good", [2.5, 2.6]), lab("poor", [2.6, 2.5]))
    assert report.verdict.endswith("The observed difference is 0, so no number of seeds can be computed.")


def test_one_seed_allows_no_test(lab):
    report = compare(lab("good", [2.5]), lab("poor", [2.6, 2.7]))
    assert report.comparisons[0].p is None
    assert "No test, because a group has one run only" in report.verdict


def test_steps_and_seconds_are_those_of_the_first_validation_at_the_target(lab):
    # at 10, 20, ... 80 steps the loss is 2.5 + .01 (80 - step): 2.75 first at 60, since 2.8 at 50 and 2.7 at 60
    report = compare(lab("good", [2.5] * 2), lab("poor", [2.55] * 2), target=2.75)
    assert [sample.values for sample in report.samples["steps to 2.75"]] == [[60.0] * 2, [60.0] * 2]
    assert [sample.values for sample in report.samples["seconds to 2.75"]] == [[15.0] * 2, [15.0] * 2]


def test_the_target_of_all_runs_is_the_default(lab):
    report = compare(lab("good", GOOD, target_loss_nats=2.7), lab("poor", POOR, target_loss_nats=2.7))
    assert report.target == 2.7 and [comparison.name for comparison in report.comparisons] == [
        "final loss", "steps to 2.7", "seconds to 2.7"]
    assert compare(lab("good", GOOD, target_loss_nats=2.7), lab("poor", POOR, target_loss_nats=2.8)).target is None


def test_runs_that_do_not_reach_the_target(lab):
    report = compare(lab("good", GOOD), lab("poor", [2.55, 2.61, 2.62, 2.63]), target=2.56)
    steps = report.comparisons[1]
    assert steps.b.values == [80.0, math.inf, math.inf, math.inf] and steps.b.infinite_count == 3
    assert steps.p == steps.rank_p != steps.difference.p
    assert any("3 of 4 runs of poor did not reach the target" in note for note in report.notes)


def test_runs_that_diverged(lab):
    report = compare(lab("good", GOOD), lab("poor", [2.4, None, None, None]))
    assert report.verdict.startswith("No significant difference (rank test p = 0.23)")
    assert "poor is lower than that of good by 0.1075 nats among the runs that did not diverge" in report.verdict
    assert "3 of 4 runs of poor diverged" in report.notes[-1]
    assert "all runs of poor diverged" in compare(lab("good", GOOD), lab("poor", [None] * 4)).verdict


def test_the_speedruns_rules(lab):
    """A published record with p = 0.006 that misses track 3's margin of 0.004: (3.28 - 3.2785) sqrt(4) = 0.003."""
    good = lab("good", [3.2791, 3.2778, 3.2787, 3.2784])
    report = compare(good, target=3.28)
    test = report.target_tests[0]
    assert round(test.t_p, 3) == 0.006 and round(test.z_margin, 4) == 0.0030
    assert "passes the one-sided t-test (p = 0.006" in report.verdict and "fails the rule" in report.verdict
    narrow = compare(good, target=3.28, sigma=0.00065)
    assert narrow.target_tests[0].margin_needed == pytest.approx(0.002) and "passes the rule" in narrow.verdict


def test_a_known_sigma_that_is_too_small(lab):
    report = compare(lab("good", GOOD), target=3.28)
    assert report.notes[-1].startswith("the standard deviation of good, 0.0096, is too large for a known sigma of 0.0013")


@pytest.mark.parametrize(("kwargs", "named"), [
    ({"data_hash": "e"}, "data_hash"),
    ({"config": {"data.val_bytes": 4096}}, "data.val_bytes"),
    ({"config": {"data.val_sequence_tokens": 32}}, "data.val_sequence_tokens"),
    ({"config": {"data.sequence_tokens": 32}}, "data.val_sequence_tokens"),
    ({"config": {"data.tokenizer": "bpe"}, "data_hash": "e"}, "compare --metric val_bits_per_byte"),
])
def test_losses_of_different_validations_are_refused(lab, kwargs, named):
    with pytest.raises(ValueError, match=f"not validated on the same tokens.*{named}"):
        compare(lab("good", GOOD), lab("poor", POOR, **kwargs))


def test_bits_per_byte_across_tokenizers(lab):
    other = {"config": {"data.tokenizer": "bpe", "data.sequence_tokens": 32}, "data_hash": "e"}
    report = compare(lab("good", GOOD), lab("poor", POOR, **other), metric="val_bits_per_byte", target=3.8)
    assert report.comparisons[0].difference.difference == pytest.approx(-0.1 / math.log(2))
    assert "bits per byte" in report.verdict and report.target_tests[0].z_margin is None
    smaller = {"config": {"data.tokenizer": "bpe", "data.val_bytes": 4096}}
    for changed in (smaller, {**other, "environment": {"python": "3.12"}}):
        with pytest.raises(ValueError, match="not validated on the same text"):
            compare(lab("good", GOOD), lab("poor", POOR, **changed), metric="val_bits_per_byte")
    with pytest.raises(ValueError, match="not validated on the same tokens: data_hash"):  # one tokenizer, another text
        compare(lab("good", GOOD), lab("poor", POOR, data_hash="e"), metric="val_bits_per_byte")


def test_no_bits_per_byte(lab):
    with pytest.raises(ValueError, match="has no val_bits_per_byte"):
        compare(lab("good", GOOD, val_bits_per_byte=None), lab("poor", POOR), metric="val_bits_per_byte")


@pytest.mark.parametrize("kwargs", [{"device": "cuda"}, {"world_size": 8}, {"environment": {"torch_threads": 2}},
                                    {"environment": {"cpu": "another"}}, {"environment": {"gpus": ["H100"]}}])
def test_seconds_of_other_machines_are_left_out(lab, kwargs):
    report = compare(lab("good", GOOD), lab("poor", POOR, **kwargs), target=2.7)
    assert list(report.samples) == ["final loss", "steps to 2.7"]
    named = next(iter(kwargs.get("environment", kwargs)))
    assert any(note.startswith("seconds are not compared") and named in note for note in report.notes)


def test_notes_on_runs_that_are_not_independent_seeds(lab, tmp_path):
    good = lab("good", GOOD[:2], code_hash="other")
    fabricate(tmp_path / "good-seed9", 2.5, seed=1, steps=40, config={"train.batch_tokens": 1024})
    fabricate(tmp_path / "good-seed8", 2.5, seed=8, config={"data.order": "contiguous", "train.batch_tokens": 1024})
    notes = "\n".join(compare(good, lab("poor", POOR)).notes)
    assert "good differ in more than their seed: data.order" in notes
    assert "good-seed1 and good-seed9 of good are not independent: same seed and settings" in notes
    assert "ended before the last step, so the final loss is not that of the whole schedule: good-seed9" in notes
    assert "2 versions of the code" in notes
    assert "poor" not in notes


def test_the_same_settings_in_both_groups(lab):
    report = compare(lab("one", GOOD), lab("two", POOR))
    assert report.notes == ["one and two share runs of equal settings; only seeds or code can differ"]
    with pytest.raises(ValueError, match="one-seed1 is among the compared runs and among those of --vs"):
        compare(lab("one", GOOD), lab("one", GOOD))


def test_without_vs_each_experiment_is_a_group(lab, tmp_path):
    lab("good", GOOD), lab("poor", POOR, data_hash="e")
    report = compare(str(tmp_path))
    assert [(sample.label, sample.summary.n) for sample in report.samples["final loss"]] == [("good", 4), ("poor", 4)]
    assert report.comparisons == [] and report.verdict == ""
    assert report.notes[0].startswith("do not compare the experiments with each other") and "data_hash" in report.notes[0]


def test_a_run_that_has_not_ended(lab, tmp_path):
    good = lab("good", GOOD)
    (tmp_path / "good-seed2" / "summary.json").unlink()
    with pytest.raises(ValueError, match="good-seed2 has no summary.json"):
        compare(good)


@pytest.mark.parametrize("kwargs", [{"alpha": 0.0}, {"power": 1.0}, {"sigma": -1.0}, {"target": math.nan}])
def test_numbers_out_of_range(kwargs):
    with pytest.raises(ValueError, match=f"--{next(iter(kwargs))} must"):
        compare("nowhere", **kwargs)


def test_table_and_file(lab, tmp_path, capsys):
    main(Compare(runs=(lab("good", GOOD),), vs=(lab("poor", [*POOR, None]),), target=2.55, json=tmp_path / "results.json"))
    printed = capsys.readouterr().out
    assert "2.50750" in printed and "4 of 5" in printed and "-0.10000" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["samples"]["final loss"][1]["values"] == [*POOR, None]
    assert results["comparisons"][0]["difference"]["difference"] == pytest.approx(-0.1)
    assert results["samples"]["steps to 2.55"][1] == {"label": "poor", "values": [None] * 5, "infinite_count": 5,
                                                      "summary": None}
    assert results["verdict"].split() == printed[printed.index(results["verdict"][:20]):].split()  # up to wrapping


def test_the_command_line(lab, tmp_path):
    def run(*words):
        return subprocess.run([sys.executable, "-m", "scripts.compare", *words], cwd=ROOT, capture_output=True, text=True)

    good, poor = lab("good", GOOD), lab("poor", POOR)
    done = run(good, "--vs", poor, "--nats_per_step", "0.01")
    assert done.returncode == 0 and "good is lower than that of poor by 0.1000 nats" in " ".join(done.stdout.split())
    wrong = run(good, "--vs", str(tmp_path / "por-seed1"))
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: no run at") and "poor-seed1" in wrong.stderr
    assert wrong.stdout == "" and len(wrong.stderr.splitlines()) == 1
