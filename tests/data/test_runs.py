"""Run folders, the configuration's way to JSON and back, its hash, metrics.jsonl and summary.json."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

import data.runs
from configs.groups import Group, Optim
from configs.presets import PRESETS
from configs.schema import Data, Identity, Log, Model, Run, Schedule, Train
from data.files import replacing
from data.runs import (
    SUMMARY_KEYS,
    MetricsLog,
    config_from_dict,
    config_hash,
    config_to_dict,
    flatten,
    open_run_folder,
    read_metrics,
    write_json,
    write_summary,
)

RICH = Run(
    preset="rich",
    run=Identity(name="a", target_loss_nats=3.28, stop_at_target=True),
    data=Data(source="shards", tokenizer="gpt2", train_files=("a.bin", "b*.bin"), val_files=("c.bin",)),
    model=Model(mlp_dim=300, window_tokens=64),
    optim=Optim(matrix=Group(rule="steepest", lr=1, norm="spectral", unit="match_adam")),
    schedule=Schedule(momentum="0=0.85 300=0.95"),
    log=Log(wandb_tags=("x", "y")),
)


def record(step, **more):
    return {"step": step, "tokens": 10 * step, "train_seconds": 0.5 * step, **more}


def open_plain(dir, name, *, resume=False):
    return open_run_folder(dir, name, fallback_name="tiny", resume=resume)


def test_a_name_is_taken_as_it_is(tmp_path):
    assert open_plain(tmp_path / "new" / "runs", "a") == tmp_path / "new" / "runs" / "a"
    assert open_plain(tmp_path / "new" / "runs", "a") == tmp_path / "new" / "runs" / "a"  # still empty


def test_a_filled_folder_is_refused_unless_resumed(tmp_path):
    (open_plain(tmp_path, "a") / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a is taken.*--run\.resume.*--run\.name, say a-2$"):
        open_plain(tmp_path, "a")
    assert open_plain(tmp_path, "a", resume=True) == tmp_path / "a"


def test_without_a_name_the_fallback_is_numbered(tmp_path):
    names = [open_plain(tmp_path, "").name for _ in range(3)]
    assert names == ["tiny", "tiny-2", "tiny-3"]
    assert open_plain(tmp_path, "", resume=True).name == "tiny"


def test_runs_that_start_at_once_get_different_folders(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: open_plain(tmp_path, ""), range(16)))
    assert len(set(folders)) == 16


def test_resume_without_a_folder_makes_one(tmp_path):
    assert open_plain(tmp_path, "b", resume=True).is_dir()


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a\\b", "/etc", " a", "a\n", "a\0"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="plain folder name"):
        open_plain(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_an_empty_fallback_is_refused(tmp_path):
    with pytest.raises(ValueError, match="plain folder name"):
        open_run_folder(tmp_path, "", fallback_name="", resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_in_the_way_is_named(tmp_path, resume):
    (tmp_path / "file").write_text("")
    for dir, name in ((tmp_path, "file"), (tmp_path / "file", "a"), (tmp_path / "file", "")):
        with pytest.raises(ValueError, match=f"cannot use {tmp_path}"):
            open_plain(dir, name, resume=resume)


def test_an_unwritable_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="a is not writable"):
        open_plain(tmp_path, "a")


def test_json_is_strict_and_keeps_order(tmp_path):
    write_json(tmp_path / "a.json", {"b": math.nan, "a": [math.inf, (1, 2.5)], "c": {"é": None}})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"b": None, "a": [None, [1, 2.5]], "c": {"é": None}}
    assert list(json.loads(text)) == ["b", "a", "c"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(RuntimeError), replacing(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    with pytest.raises(TypeError):
        write_json(path, object())
    assert json.loads(path.read_text()) == 1 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("run", [Run(), RICH])
def test_a_configuration_survives_json(run):
    config = json.loads(json.dumps(config_to_dict(run)))
    restored = config_from_dict(config)
    assert config == config_to_dict(run)  # so that a checkpoint's settings compare with a run's
    assert restored == run and config_hash(restored) == config_hash(run)
    assert isinstance(restored.data.train_files, tuple) and isinstance(restored.log.wandb_tags, tuple)


def test_a_field_that_the_file_does_not_know_takes_its_default():
    config = config_to_dict(Run(preset="old"))
    del config["model"]["smear"], config["log"], config["optim"]["matrix"]["nesterov"]
    assert config_from_dict(config) == Run(preset="old")


def test_the_hash_outlives_new_fields(monkeypatch):
    """A field that is at its default does not count, so that adding one changes no hash."""
    run = PRESETS["tiny"]()
    known = data.runs.config_to_dict
    before = config_hash(run)
    monkeypatch.setattr(data.runs, "config_to_dict", lambda run: known(run) | {"new": {"technique": False}})
    monkeypatch.setattr(data.runs, "config_from_dict", lambda config: run)
    assert config_hash(run) == before


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c["optim"]["matrix"].update(learning_rate=1.0), "optim.matrix has no field 'learning_rate'"),
    (lambda c: c["train"].update(stepz=1), "train has no field 'stepz'; did you mean 'steps'"),
    (lambda c: c.update(data=3), "data must be an object, got 3"),
    (lambda c: c["model"].update(dim="128"), "model.dim must be int, got '128'"),
    (lambda c: c["model"].update(dim=True), "model.dim must be int, got True"),
    (lambda c: c["model"].update(mlp_dim=1.5), r"model.mlp_dim must be int \| None, got 1.5"),
    (lambda c: c["run"].update(device="tpu"), "run.device must be .*'cuda'.*, got 'tpu'"),
    (lambda c: c["log"].update(wandb_tags=[1]), r"log.wandb_tags must be .*, got \[1\]"),
    (lambda c: c["train"].update(steps=0), "steps must be at least 1"),
])
def test_a_foreign_configuration_is_refused(change, message):
    config = config_to_dict(Run())
    change(config)
    with pytest.raises(ValueError, match=message):
        config_from_dict(config)


def test_flatten():
    assert flatten({"a": 1, "b": {"c": {"d": (2,)}, "e": None}}) == {"a": 1, "b.c.d": (2,), "b.e": None}
    assert flatten(config_to_dict(Run()))["optim.matrix.lr"] == Run().optim.matrix.lr


@pytest.mark.parametrize("other", [
    Run(preset="other", log=Log(every_steps=3, wandb="offline"), train=Train(warmup_steps=0)),
    Run(run=Identity(name="x", dir="y", device="cpu", compile="on", resume=True, checkpoint_every_steps=9)),
    Run(run=Identity(dry_run=True, target_loss_nats=3.0)),
    Run(model=Model(rotary_base=1024)),
])
def test_the_hash_ignores_what_the_losses_ignore(other):
    assert config_hash(other) == config_hash(Run())


@pytest.mark.parametrize("other", [
    Run(run=Identity(seed=2)), Run(model=Model(dim=192)), Run(optim=Optim(head=Group(lr=0.021))),
    Run(run=Identity(target_loss_nats=3.0, stop_at_target=True)), Run(train=Train(steps=281)), RICH,
])
def test_the_hash_tells_experiments_apart(other):
    assert config_hash(other) != config_hash(Run()) and len(config_hash(other)) == 16


def test_the_hash_tells_targets_apart_where_they_end_the_run():
    assert config_hash(RICH) != config_hash(replace(RICH, run=replace(RICH.run, target_loss_nats=3.3)))


def test_metrics_are_read_as_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(record(1))
    log.write(record(2, **{"train/loss_nats": math.nan, "val/loss_nats": 2.5}))
    expected = [record(1), record(2, **{"train/loss_nats": None, "val/loss_nats": 2.5})]
    assert read_metrics(path) == expected  # before it is closed
    assert log.offset() == path.stat().st_size
    log.close()
    assert read_metrics(path) == expected


def test_a_record_without_its_clock_is_a_bug(tmp_path):
    with pytest.raises(AssertionError, match="train_seconds"):
        MetricsLog(tmp_path / "metrics.jsonl").write({"step": 1, "tokens": 2})


def test_resuming_drops_what_will_be_repeated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(record(1))
    offset = log.offset()
    log.write(record(2, kept=False))
    log.close()
    path.write_bytes(path.read_bytes() + b'{"step": 3, "tok')
    log = MetricsLog(path, offset=offset)
    assert log.offset() == offset
    log.write(record(2, kept=True))
    assert read_metrics(path) == [record(1), record(2, kept=True)]
    log.close()
    MetricsLog(path).close()
    assert len(read_metrics(path)) == 2
    MetricsLog(path, offset=0).close()
    assert read_metrics(path) == []


def test_a_log_shorter_than_its_checkpoint_says_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl has 3 bytes but the checkpoint was taken at 50"):
        MetricsLog(path, offset=50)
    assert path.read_text() == "{}\n"


@pytest.mark.parametrize("tail", [b"", b'{"step": 2', b'{"step": "\xc3'])
def test_an_incomplete_last_line_is_left_out(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + tail)
    assert read_metrics(path) == [{"step": 1}]


@pytest.mark.parametrize("text", [b'{"step": 1}\n{"st\n{"step": 2}\n', b'{"step": 1}\n[1]\n', b'{"step": 1}\n\xff\n'])
def test_a_damaged_line_is_named(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2, is not (a )?JSON"):
        read_metrics(path)


def test_missing_metrics_are_named(tmp_path):
    with pytest.raises(ValueError, match="there is no .*metrics.jsonl"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_summary_has_exactly_its_keys(tmp_path):
    path = tmp_path / "summary.json"
    values = {key: None for key in reversed(SUMMARY_KEYS)} | {"steps": 3, "val_loss_nats": math.inf}
    write_summary(path, **values)
    written = json.loads(path.read_text())
    assert tuple(written) == SUMMARY_KEYS and written["steps"] == 3 and written["val_loss_nats"] is None
    with pytest.raises(ValueError, match="no field 'val_los'; did you mean 'val_loss_nats'"):
        write_summary(path, **values, val_los=1)
    values.pop("seed")
    with pytest.raises(ValueError, match="lacks the field 'seed'"):
        write_summary(path, **values)
