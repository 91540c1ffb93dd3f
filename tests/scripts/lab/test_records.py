"""Records: the record of a run folder, and an error for every way to tamper with it."""

import copy
import json
import math
from dataclasses import replace

import pytest

from configs.cli import parse_row
from configs.presets import PRESETS
from configs.serialize import config_from_dict, config_hash, config_to_dict, flatten, unflatten
from data.run.metrics import SUMMARY_KEYS
from scripts.lab.folders import read_run
from scripts.lab.models import count_parameters
from scripts.lab.records import (
    append_records,
    changed_settings,
    cross_record_errors,
    read_records,
    record_errors,
    record_of,
    record_of_failure,
)
from scripts.lab.sweep import Trial
from scripts.lab.tuning import final_loss
from scripts.verify_record import runs_table

STEPS = 240


def make_folder(folder, *, seed=1, preset="bench_cpu", losses=(2.0, 1.6, 1.5)):
    """A finished run folder with three validations."""
    run = PRESETS[preset]()
    run = replace(run, run=replace(run.run, seed=seed, name=folder.name), log=replace(run.log, experiment="muon"))
    lines = [{"step": step, "tokens": step * 768, "train_seconds": step / 20, "val/loss_nats": loss,
              "val/bits_per_byte": loss} for step, loss in zip((80, 160, STEPS), losses, strict=True)]
    summary = dict.fromkeys(SUMMARY_KEYS) | {
        "val_loss_nats": losses[-1], "val_bits_per_byte": losses[-1], "best_val_loss_nats": min(losses), "seed": seed,
        "steps": STEPS, "tokens": STEPS * 768,
        "train_seconds": 12.0, "parameters": count_parameters(run), "config_hash": config_hash(run), "code_hash": "c",
        "data_hash": "d", "device": "cpu", "world_size": 1}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_to_dict(run)))
    (folder / "env.json").write_text(json.dumps({"python": "3.11", "cpu": "x", "variables": {"SECRET": "1"}}))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"step": 10}, *lines]))
    return folder


@pytest.fixture
def record(tmp_path):
    return record_of(read_run(make_folder(tmp_path / "muon-seed1")))


def test_a_record_has_no_errors_and_is_json(record):
    assert record_errors(record) == [] and json.loads(json.dumps(record)) == record
    assert [line["loss_nats"] for line in record["validations"]] == [2.0, 1.6, 1.5]
    assert "run.dir" not in record["config"] and "SECRET" not in json.dumps(record)
    assert record["experiment"] == "muon" and tuple(record["summary"]) == SUMMARY_KEYS


def test_a_run_that_has_not_ended_is_no_record(tmp_path):
    folder = make_folder(tmp_path / "a")
    (folder / "summary.json").unlink()
    with pytest.raises(ValueError, match="has not ended"):
        record_of(read_run(folder))


def tampered(record: dict, *path: object, value: object) -> dict:
    changed = copy.deepcopy(record)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@pytest.mark.parametrize(("path", "value", "message"), [
    (("config", "model.layers"), 5, "model.layers is 5, fixed at 4"),
    (("config", "model.smear"), False, "model.smear is False"),
    (("config", "data.val_bytes"), 1000, "data.val_bytes is 1000"),
    (("config", "train.batch_tokens"), 1536, "train.batch_tokens is 1536"),
    (("config", "schedule.batch_tokens"), "2", "schedule.batch_tokens"),
    (("config", "schedule.sequence_tokens"), "0=0.5 100%=1", "schedule.sequence_tokens"),
    (("config", "train.loss_reduction"), "sum", "loss_reduction"),
    (("config", "optim.matrix.lr"), 0.04, "config_hash"),
    (("config", "run.seed"), 9, "seed"),
    (("config", "optim.matrix.rate"), 1, "has no field 'rate'"),
    (("preset",), "bytes", "preset"),
    (("summary", "val_loss_nats"), 1.4, "val_loss_nats is 1.4"),
    (("summary", "val_bits_per_byte"), 1.4, "val_bits_per_byte is 1.4"),
    (("summary", "best_val_loss_nats"), 1.4, "best_val_loss_nats is 1.4"),
    (("summary", "train_seconds"), 5.0, "train_seconds is 5.0"),
    (("summary", "train_seconds"), 50.0, "train_seconds is 50.0"),
    (("summary", "train_seconds"), None, "no number train_seconds"),
    (("summary", "data_hash"), None, "summary has no data_hash"),
    (("summary", "steps"), 239, "not at the last step"),
    (("summary", "tokens"), 2 * STEPS * 768, "steps of 768"),
    (("summary", "parameters"), 10**6, "the model has"),
    (("validations", 1, "loss_nats"), float("inf"), "not finite"),
    (("validations", 1, "loss_nats"), None, "validation 1 has no number loss_nats"),
    (("validations", 1), {}, "validation 1 has no number step"),
    (("validations",), [], "no validations"),
    (("validations", 2, "tokens"), 10**9, "the last validation has 1000000000"),
    (("validations", 1, "step"), 80, "step does not rise"),
    (("validations", 1, "train_seconds"), 99.0, "train_seconds does not rise"),
])
def test_tampering_is_reported(record, path, value, message):
    assert any(message in error for error in record_errors(tampered(record, *path, value=value)))


@pytest.mark.parametrize(("name", "value"), [
    ("optim.matrix.lr", 0.04), ("schedule.lr", "1"), ("schedule.momentum", "0.9"),
    ("train.steps", 100), ("train.micro_tokens", 768), ("log.every_steps", 1), ("optim.head.beta1", 0.9),
])
def test_an_entry_may_choose_its_optimizer_and_schedule(record, name, value):
    assert changed_settings(tampered(record, "config", name, value=value)) == []


def test_an_entry_may_choose_another_rule(record):
    run = parse_row(record["preset"], ["--optim.matrix.rule", "adam", "--optim.embed.rule", "sm3"])
    assert changed_settings(record | {"config": flatten(config_to_dict(run))}) == []


def test_a_schedule_that_was_cut_short_is_no_result(record):
    """A prefix of a longer schedule: the last validation agrees with the summary, but the schedule has not ended."""
    longer = tampered(record, "config", "train.steps", value=480)
    longer["summary"]["config_hash"] = config_hash(config_from_dict(unflatten(longer["config"])))
    assert record_errors(longer) == ["ended at step 240, its schedule at 480"]


def test_runs_of_one_preset_need_the_same_data(record):
    other = tampered(tampered(record, "name", value="other"), "summary", "config_hash", value="of another seed")
    assert cross_record_errors([record, other]) == []
    other["summary"] = other["summary"] | {"data_hash": "e"}
    assert "has data e" in cross_record_errors([record, other])[0] and "twice" in cross_record_errors([record, record])[0]


def test_a_run_counts_once_whatever_its_name(record):
    """Runs with equal settings, seed and losses are one sample; with one other loss, as on another machine, two."""
    copied = tampered(record, "name", value="muon-seed2")
    assert cross_record_errors([record, copied]) == [
        "muon-seed2 is muon-seed1 under another name: same settings, seed and losses"]
    assert cross_record_errors([record, tampered(copied, "validations", 0, "loss_nats", value=2.01)]) == []


def test_a_failed_run_is_a_record_without_a_loss():
    trial = Trial("adamw-240steps-trial00-seed1", "adamw-240steps-trial00", "bench_cpu", ("--optim.matrix.lr", "9"), 1)
    failed = record_of_failure(trial, "loss is nan at step 3")
    assert record_errors(failed) == [] and cross_record_errors([failed, failed]) == [] and final_loss(failed) == math.inf
    assert "loss" in record_errors(tampered(failed, "summary", "val_loss_nats", value=1.0))[0]
    assert "model.layers" in record_errors(tampered(failed, "config", "model.layers", value=5))[0]
    assert runs_table([failed]).count("\n") == 1
    with_path = record_of_failure(trial, f"/home/me/runs/{trial.name}/checkpoint.safetensors is cut short")
    assert with_path["failed"] == f"{trial.name}/checkpoint.safetensors is cut short"


def test_unflatten_undoes_flatten():
    config = config_to_dict(PRESETS["track3"]())
    assert unflatten(flatten(config)) == config


def test_files_grow_by_new_runs_only(tmp_path, record):
    file, second = tmp_path / "records" / "x.jsonl", record_of(read_run(make_folder(tmp_path / "muon-seed2", seed=2)))
    assert append_records(file, [record]) == 1 and append_records(file, [record, second]) == 1
    assert read_records(file) == [record, second] and append_records(file, []) == 0
    with pytest.raises(ValueError, match="another run named muon-seed1"):
        append_records(file, [tampered(second, "name", value="muon-seed1")])
    assert read_records(file) == [record, second]


@pytest.mark.parametrize(("text", "message"), [
    ("{}", "line 1, is not a record"), ("5", "line 1, is not a record"), ("{", "line 1, is not JSON")])
def test_damaged_files_are_reported(tmp_path, text, message):
    (tmp_path / "x.jsonl").write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="there is no"):
        read_records(tmp_path / "y.jsonl")


def test_the_table_is_mean_and_deviation(tmp_path, record):
    second = record_of(read_run(make_folder(tmp_path / "muon-seed2", seed=2, losses=(2.0, 1.6, 1.7))))
    assert "| bench_cpu | muon | 240 | 2 | 1.6000 | 0.1414 |" in runs_table([record, second])
    assert "| bench_cpu | muon | 240 | 1 | 1.5000 |  |  |" in runs_table([record])
