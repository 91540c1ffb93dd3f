"""The leaderboard script: entries get equal trials, the best ones run fresh seeds, and every run is recorded once."""

import json

import pytest

from configs.cli import parse_row
from configs.serialize import config_hash, config_to_dict
from data.run.metrics import SUMMARY_KEYS
from scripts import leaderboard
from scripts.lab.folders import read_run
from scripts.lab.records import read_records
from scripts.lab.sweep import TrialResult
from scripts.lab.tuning import TUNING_SEED


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Fake runs that take no time, with loss 1 + the lr of the matrices. Return the list of their names, in order."""
    names = []

    def fake_sweep(trials, *, dir, jobs):
        results = []
        for trial in trials:
            names.append(trial.name)
            flags = [*trial.flags, "--run.seed", str(trial.seed), "--log.experiment", trial.experiment]
            run = parse_row(trial.preset, flags)
            folder = tmp_path / "runs" / trial.name
            folder.mkdir(parents=True, exist_ok=True)
            loss = 1 + run.optim.matrix.lr
            summary = dict.fromkeys(SUMMARY_KEYS) | {"val_loss_nats": loss, "seed": trial.seed, "train_seconds": 1.0,
                                                     "steps": run.train.steps, "config_hash": config_hash(run)}
            (folder / "config.json").write_text(json.dumps(config_to_dict(run)))
            (folder / "summary.json").write_text(json.dumps(summary))
            (folder / "metrics.jsonl").write_text(json.dumps({"step": run.train.steps, "val/loss_nats": loss}) + "\n")
            results.append(TrialResult(trial, "finished", read_run(folder), ""))
        return results

    monkeypatch.setattr(leaderboard, "run_sweep", fake_sweep)
    monkeypatch.setattr(leaderboard, "RECORDS", tmp_path / "records")
    return names


def test_tune_then_run_fresh_seeds_then_record(ran, tmp_path):
    args = leaderboard.Arguments("bench_cpu", entries=("adamw", "muon"), trials=3, budgets=(2, 3, 9), seeds=2)
    leaderboard.main(args)
    tuning = [name for name in ran if name.endswith(f"seed{TUNING_SEED}")]
    assert [name.split("-")[0] for name in tuning] == ["adamw", "muon"] * 3
    records = read_records(tmp_path / "records" / "bench_cpu.jsonl")
    best = {}
    for record in records:
        entry, trial = record["experiment"].split("-240steps-")
        if record["summary"]["seed"] == TUNING_SEED:
            best.setdefault(entry, {})[trial] = record["summary"]["val_loss_nats"]
    winners = {f"{entry}-240steps-{min(list(losses)[:k], key=losses.get)}" for entry, losses in best.items() for k in (2, 3)}
    fresh = {record["experiment"] for record in records if record["summary"]["seed"] != TUNING_SEED}
    assert fresh == winners and {record["summary"]["seed"] for record in records} == {1, 2, TUNING_SEED}
    leaderboard.main(args)
    assert read_records(tmp_path / "records" / "bench_cpu.jsonl") == records


def test_a_failed_trial_ranks_last(ran, tmp_path, monkeypatch):
    """It is recorded without a loss, and the others of its budget go on."""
    run_sweep = leaderboard.run_sweep

    def failing_sweep(trials, *, dir, jobs):
        return [result._replace(status="failed", run=None, error="loss is nan") if "trial00" in result.trial.name
                else result for result in run_sweep(trials, dir=dir, jobs=jobs)]

    monkeypatch.setattr(leaderboard, "run_sweep", failing_sweep)
    leaderboard.main(leaderboard.Arguments("bench_cpu", entries=("muon",), trials=2, budgets=(2,), seeds=2))
    records = read_records(tmp_path / "records" / "bench_cpu.jsonl")
    assert [record.get("failed") for record in records] == ["loss is nan", None, None, None]
    assert {record["experiment"] for record in records[1:]} == {"muon-240steps-trial01"}


def test_horizons_are_longer_schedules(ran):
    leaderboard.main(leaderboard.Arguments("bench_cpu", entries=("muon",), horizons=(0.5, 4), trials=1, budgets=(1,),
                                           seeds=1))
    assert [name.split("-")[1] for name in ran] == ["120steps"] * 2 + ["960steps"] * 2


@pytest.mark.parametrize(("args", "message"), [
    (leaderboard.Arguments("bytes"), "'bytes' is not a benchmark"),
    (leaderboard.Arguments("bench_cpu", entries=("moun",)), "did you mean 'muon'"),
])
def test_mistakes_are_reported(args, message):
    with pytest.raises(ValueError, match=message):
        leaderboard.main(args)
