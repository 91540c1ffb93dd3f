"""The wandb run is a copy of the log, and no error of wandb stops a training run."""

import sys
from types import SimpleNamespace

import pytest

from configs.schema import Log, Run
from data.run.wandb import WandbRun, open_wandb

RECORD = {"step": 3, "tokens": 30, "train_seconds": 1.5, "train/loss_nats": 2.5, "val/loss_nats": None}


class FakeRun:
    """Stands for a wandb run; `broken` names the method that fails."""

    def __init__(self, broken=None):
        self.broken, self.logged, self.summary, self.finished = broken, [], {}, 0

    def log(self, record, step):
        self._break("log")
        self.logged.append((step, record))

    def define_metric(self, name, **options):
        self._break("define_metric")

    def log_artifact(self, artifact):
        self._break("log_artifact")

    def save(self, pattern, **options):
        self._break("save")

    def finish(self):
        self._break("finish")
        self.finished += 1

    def _break(self, method):
        if method == self.broken:
            raise OSError("the network\nis down")


def fake_wandb(monkeypatch, *, key=True, broken=None):
    """Replace wandb by a fake module; `runs` are the runs that were begun, `begun` their arguments."""
    def init(**arguments):
        if broken == "init":
            raise RuntimeError("no")
        module.begun.append(arguments)
        module.runs.append(FakeRun(broken))
        return module.runs[-1]

    module = SimpleNamespace(begun=[], runs=[], init=init, setup=lambda settings: None, Settings=lambda **k: k,
                             Artifact=lambda *a, **k: SimpleNamespace(add_file=lambda *a, **k: None),
                             Table=lambda **k: k,
                             login=lambda **k: key and k == {"prompt": False, "verify": False})
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def opened(folder, mode, *, resume=False):
    return open_wandb(Run(preset="tiny", log=Log(wandb=mode)), folder=folder, environment={}, code_hash="c0de",
                          resume=resume)


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
    assert opened(tmp_path, "disabled") is None
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert opened(tmp_path, "online") is None
    printed = capsys.readouterr().out
    assert printed.startswith("wandb: off") and printed.count("\n") == 1


@pytest.mark.parametrize("broken", ["init", "define_metric", "log_artifact", "save", "log", "finish"])
def test_a_failure_is_one_line_and_the_end_of_it(tmp_path, monkeypatch, capsys, broken):
    fake_wandb(monkeypatch, broken=broken)
    if watched := opened(tmp_path, "online"):
        watched.log(RECORD)
        watched.log(RECORD)
        watched.finish({"a": 1})
        watched.log(RECORD)
    printed = capsys.readouterr().out
    assert printed.startswith("wandb: off from here on (") and printed.count("\n") == 1


def test_without_an_experiment_runs_are_grouped_by_preset(tmp_path, monkeypatch):
    wandb = fake_wandb(monkeypatch)
    opened(tmp_path, "online")
    assert wandb.begun[0]["group"] == wandb.begun[0]["job_type"] == "tiny"


def test_records_and_summary_arrive_and_then_it_is_over(monkeypatch):
    fake_wandb(monkeypatch)
    run = FakeRun()
    watched = WandbRun(run)
    watched.log(RECORD)
    watched.log(RECORD | {"val/loss_nats": 2.0})
    watched.add_sample(3, prompt="a", text="b")
    watched.finish({"val_loss_nats": 1.0})
    watched.log(RECORD)
    plain = {key: value for key, value in RECORD.items() if value is not None}
    table = {"columns": ["step", "prompt", "text"], "data": [[3, "a", "b"]]}
    assert run.logged == [
        (3, plain),
        (3, plain | {"val/loss_nats": 2.0, "by_tokens/val_loss_nats": 2.0, "by_seconds/val_loss_nats": 2.0}),
        (3, {"step": 3, "samples": table})]
    assert run.summary == {"val_loss_nats": 1.0} and run.finished == 1
