"""The dashboard mirrors the run on wandb, and whatever wandb does, the run goes on."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.schema import Log, Run
from data import dashboard
from data.dashboard import Dashboard, open_dashboard

ROOT = Path(dashboard.__file__).resolve().parent.parent
RECORD = {"step": 3, "tokens": 30, "train_seconds": 1.5, "train/loss_nats": 2.5, "val/loss_nats": None}
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")

WATCHED_RUN = """
import sys
from pathlib import Path
from configs.schema import Log, Run
from data.dashboard import open_dashboard

log = Log(wandb=sys.argv[2], wandb_tags=("x",))
watched = open_dashboard(log, run=Run(preset="tiny", log=log), folder=Path(sys.argv[1]), environment={"torch": "9"},
                         resume=len(sys.argv) > 3)
for step in (1, 2):
    watched.log({"step": step, "tokens": 10 * step, "train_seconds": 0.5, "val/loss_nats": 3.0 - step, "none": None})
watched.add_sample("once upon")
watched.finish({"val_loss_nats": 1.0, "seed": 1, "target_step": None})
watched.log({})
"""


def run_watched(folder, mode, *more, **variables):
    """What a process that logs two records prints; wandb's variables, key files and home are its own."""
    folder.mkdir(exist_ok=True)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    private = {"HOME": str(folder.parent), "NETRC": str(folder.parent / "netrc"), "PYTHONPATH": str(ROOT),
               "WANDB_CONFIG_DIR": str(folder.parent / "config"), "WANDB_CACHE_DIR": str(folder.parent / "cache")}
    done = subprocess.run([sys.executable, "-c", WATCHED_RUN, str(folder), mode, *more], cwd=folder.parent, timeout=60,
                          env=inherited | private | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def read_wandb(path):
    """The records of a .wandb file: LevelDB's log format (32 KiB blocks of fragments) after seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, payload, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        length, kind = struct.unpack_from("<HB", data, position + 4)
        payload += data[position + 7:position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            records.append(Record.FromString(payload))
            payload = b""
    return records


def items(updates):
    """Key (or dotted path) and value of wandb's JSON items."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in updates}


@needs_wandb
def test_an_offline_run_holds_our_keys(tmp_path):
    folder = tmp_path / "run"
    assert run_watched(folder, "auto", WANDB_MODE="offline") == ""
    assert run_watched(folder, "offline", "resume") == ""
    files = list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    identity = (folder / "wandb_id.txt").read_text().strip()
    assert {path.stem for path in files} == {f"run-{identity}"}
    records = read_wandb(files[0])
    run = next(record.run for record in records if record.HasField("run"))
    config = items(run.config.update)
    assert (run.run_id, run.run_group, run.project, run.display_name) == (identity, "tiny", "steepest", "run")
    assert list(run.tags) == ["x"] and config["optim.matrix.lr"] == 0.03 and config["environment.torch"] == "9"
    history = [items(record.history.item) for record in records if record.HasField("history")]
    assert [{key: line[key] for key in line if key[0] != "_"} for line in history] == [
        {"step": 1, "tokens": 10, "train_seconds": 0.5, "val/loss_nats": 2.0},
        {"step": 2, "tokens": 20, "train_seconds": 0.5, "val/loss_nats": 1.0}]
    metrics = {record.metric.name or record.metric.glob_name: record.metric.step_metric
               for record in records if record.HasField("metric")}
    assert metrics.keys() >= {"step", "tokens", "train_seconds", "*"} and metrics["*"] == "step"
    summary = {}
    for record in records:
        summary |= items(record.summary.update)
    assert summary["val_loss_nats"] == 1.0 and summary["sample"] == "once upon"
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "config", "cache", ".config", ".cache", ".local"}


@needs_wandb
def test_without_a_key_one_line_says_so(tmp_path):
    printed = run_watched(tmp_path / "run", "auto")
    assert printed.startswith("wandb: off (no key configured") and printed.count("\n") == 1
    assert not list((tmp_path / "run").iterdir())


class FakeRun:
    """Stands for a wandb run; `broken` names the method that fails."""

    def __init__(self, broken=None):
        self.broken, self.logged, self.summary, self.metrics, self.finished = broken, [], {}, {}, 0

    def log(self, record):
        self._break("log")
        self.logged.append(record)

    def define_metric(self, name, step_metric=None):
        self._break("define_metric")
        self.metrics[name] = step_metric

    def finish(self):
        self._break("finish")
        self.finished += 1

    def _break(self, method):
        if method == self.broken:
            raise OSError("the network\nis down")


def fake_wandb(monkeypatch, *, key=True, broken=None):
    """A module in the place of wandb; its `runs` are those begun, its `begun` their arguments."""
    def init(**arguments):
        if broken == "init":
            raise RuntimeError("no")
        module.begun.append(arguments)
        module.runs.append(FakeRun(broken))
        return module.runs[-1]

    module = SimpleNamespace(begun=[], runs=[], init=init, setup=lambda settings: None, Settings=lambda **k: k,
                             login=lambda **k: key and k == {"prompt": False, "verify": False})
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def opened(folder, mode, *, resume=False):
    return open_dashboard(Log(wandb=mode), run=Run(), folder=folder, environment={}, resume=resume)


@pytest.mark.parametrize(("configured", "variable", "mode"), [
    ("auto", None, "online"), ("auto", "", "online"), ("auto", "offline", "offline"), ("auto", "dryrun", "offline"),
    ("auto", "run", "online"), ("auto", "disabled", None), ("online", "disabled", "online"),
    ("offline", "online", "offline"), ("disabled", "online", None),
])
def test_the_variable_decides_where_the_configuration_does_not(tmp_path, monkeypatch, capsys, configured, variable, mode):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    wandb = fake_wandb(monkeypatch)
    opened(tmp_path, configured)
    assert [arguments["mode"] for arguments in wandb.begun] == ([] if mode is None else [mode])
    assert capsys.readouterr().out == ""


def test_offline_needs_no_key(tmp_path, monkeypatch, capsys):
    wandb = fake_wandb(monkeypatch, key=False)
    opened(tmp_path, "online")
    assert not wandb.begun and "no key" in capsys.readouterr().out
    opened(tmp_path, "offline")
    assert len(wandb.begun) == 1


def test_a_resumed_run_continues_its_own(tmp_path, monkeypatch):
    wandb = fake_wandb(monkeypatch)
    for folder, resume in ((tmp_path / "a", False), (tmp_path / "a", True), (tmp_path / "b", False)):
        folder.mkdir(exist_ok=True)
        opened(folder, "online", resume=resume)
    first, again, other = wandb.begun
    assert first["id"] == again["id"] != other["id"] and first["dir"] == tmp_path / "a"
    assert (first["resume"], again["resume"]) == (None, "allow")


def test_disabled_does_not_import_wandb(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail, and say so
    silent = opened(tmp_path, "disabled")
    silent.log(RECORD)
    silent.add_sample("x")
    silent.finish({})
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    opened(tmp_path, "online").log(RECORD)
    printed = capsys.readouterr().out
    assert printed.startswith("wandb: off") and printed.count("\n") == 1


@pytest.mark.parametrize("broken", ["init", "define_metric", "log", "finish"])
def test_a_failure_is_one_line_and_the_end_of_it(tmp_path, monkeypatch, capsys, broken):
    fake_wandb(monkeypatch, broken=broken)
    watched = opened(tmp_path, "online")
    watched.log(RECORD)
    watched.log(RECORD)
    watched.finish({"a": 1})
    watched.log(RECORD)
    printed = capsys.readouterr().out
    assert printed.startswith("wandb: off from here on (") and printed.count("\n") == 1


def test_records_and_summary_arrive_and_then_it_is_over():
    run = FakeRun()
    watched = Dashboard(run)
    watched.log(RECORD)
    watched.add_sample("text")
    watched.finish({"val_loss_nats": 1.0})
    watched.log(RECORD)
    assert run.logged == [{key: value for key, value in RECORD.items() if value is not None}]
    assert run.summary == {"sample": "text", "val_loss_nats": 1.0} and run.finished == 1
