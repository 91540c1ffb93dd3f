"""Files that the real wandb writes for an offline run, read back."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from data.run import wandb as wandb_log
from data.run.metrics import read_metrics

ROOT = Path(wandb_log.__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")

WATCHED_RUN = """
import sys
from pathlib import Path
from configs.schema import Log, Run
from data.run.wandb import open_wandb

log = Log(wandb=sys.argv[2], wandb_tags=("x",), experiment="wide")
folder = Path(sys.argv[1])
watched = open_wandb(Run(preset="tiny", log=log), folder=folder, environment={"torch": "9"}, code_hash="c0de",
                         resume=len(sys.argv) > 3)
if watched is None:
    sys.exit()
for step in (1, 2, 2, 1):
    watched.log({"step": step, "tokens": 10 * step, "train_seconds": 0.5, "val/loss_nats": 3.0 - step, "none": None})
watched.add_sample(2, prompt="once", text=" upon")
(folder / "summary.json").write_text("{}")
watched.finish({"val_loss_nats": 1.0, "seed": 1, "target_step": None})
watched.log({})
"""


def run_watched(folder, mode, *more, **variables):
    """Return the output of a process that logs two steps; wandb's variables, key files and home are its own."""
    folder.mkdir(exist_ok=True)
    for name in ("code.txt", "config.json", "metrics.jsonl"):
        (folder / name).write_text(name)
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    private = {"HOME": str(folder.parent), "NETRC": str(folder.parent / "netrc"), "PYTHONPATH": str(ROOT),
               "WANDB_CONFIG_DIR": str(folder.parent / "config"), "WANDB_CACHE_DIR": str(folder.parent / "cache")}
    done = subprocess.run([sys.executable, "-c", WATCHED_RUN, str(folder), mode, *more], cwd=folder.parent, timeout=60,
                          env=inherited | private | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def read_wandb(path):
    """Return the records of a .wandb file: LevelDB's log format (32 KiB blocks of fragments) after seven bytes."""
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


def fields(records, kind):
    """Return the messages of one kind among the records."""
    return [getattr(record, kind) for record in records if record.HasField(kind)]


def own(row):
    """Return a history row without the columns that wandb adds."""
    return {key: value for key, value in row.items() if key[0] != "_"}


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """The folder of an offline run, begun and resumed, and the records of its first part."""
    folder = tmp_path_factory.mktemp("offline") / "run"
    assert run_watched(folder, "auto", WANDB_MODE="offline") == ""
    first, = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert run_watched(folder, "offline", "resume") == ""
    return folder, first, read_wandb(first)


def test_an_offline_run_holds_our_settings(offline):
    folder, first, records = offline
    identity = (folder / "wandb_id.txt").read_text().strip()
    assert {path.stem for path in folder.glob("wandb/offline-run-*/run-*.wandb")} == {f"run-{identity}"}
    run, = fields(records, "run")
    config = items(run.config.update)
    assert (run.run_id, run.project, run.display_name) == (identity, "steepest", "run")
    assert (run.run_group, run.job_type, list(run.tags)) == ("wide", "tiny", ["x"])
    assert config["optim.matrix.lr"] == 0.03 and config["environment.torch"] == "9" and "optim" not in config
    assert {path.name for path in folder.parent.iterdir()} <= {"run", "config", "cache", ".config", ".cache", ".local"}


def test_rows_are_steps_and_never_go_back(offline):
    rows = [items(row.item) for row in fields(offline[2], "history")]
    logged = [{key: value for key, value in own(row).items() if not key.startswith("samples.")} for row in rows]
    assert logged == [{"step": step, "tokens": 10 * step, "train_seconds": 0.5, "val/loss_nats": 3.0 - step,
                       "by_tokens/val_loss_nats": 3.0 - step, "by_seconds/val_loss_nats": 3.0 - step} for step in (1, 2)]
    assert [row["_step"] for row in rows] == [1, 2]


def test_a_resumed_offline_run_is_a_second_file_that_repeats_its_steps(offline):
    folder, first, _ = offline
    second, = set(folder.glob("wandb/offline-run-*/run-*.wandb")) - {first}
    assert [items(row.item)["step"] for row in fields(read_wandb(second), "history")] == [1, 2]


def test_every_metric_has_its_axis(offline):
    metrics = {metric.name or metric.glob_name: metric for metric in fields(offline[2], "metric")}
    assert {name for name, metric in metrics.items() if metric.options.hidden} == {"step", "tokens", "train_seconds"}
    assert {name: metric.step_metric for name, metric in metrics.items() if metric.step_metric} == {
        "*": "step", "by_tokens/val_loss_nats": "tokens", "by_tokens/val_bits_per_byte": "tokens",
        "by_seconds/val_loss_nats": "train_seconds", "by_seconds/val_bits_per_byte": "train_seconds"}


def test_the_summary_is_the_last_value_under_its_own_name(offline):
    summary = {}
    for update in fields(offline[2], "summary"):
        summary |= items(update.update)
    assert summary["val_loss_nats"] == 1.0 and summary["val/loss_nats"] == 1.0
    assert not [key for key in summary if key.startswith("by_")]


def test_code_samples_and_files_come_along(offline):
    folder, first, records = offline
    code, = (artifact for artifact in fields(records, "artifact") if artifact.type == "code")
    content, = code.manifest.contents
    assert code.name == "code-c0de" and content.path == "code.txt" and Path(content.local_path) == folder / "code.txt"
    table, = (json.loads(path.read_text()) for path in first.parent.glob("files/media/table/samples*.table.json"))
    assert table == {"columns": ["step", "prompt", "text"], "data": [[2, "once", " upon"]]}
    attached = {file.path for update in fields(records, "files") for file in update.files}
    assert attached >= {"config.json", "metrics.jsonl", "summary.json"} and not attached & {"code.txt", "wandb_id.txt"}


def test_a_trained_run_is_mirrored_step_by_step(tmp_path):
    command = [sys.executable, str(ROOT / "train_gpt.py"), "bytes", "--train.steps", "4", "--train.val_every_steps", "2",
               "--data.val_bytes", "4096", "--log.wandb", "offline", "--run.dir", str(tmp_path), "--run.name", "a"]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    private = {"HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=inherited | private)
    assert done.returncode == 0 and "wandb: off" not in done.stdout, done.stdout + done.stderr
    records = read_wandb(next(tmp_path.glob("a/wandb/offline-run-*/run-*.wandb")))
    expected = {}
    for line in read_metrics(tmp_path / "a" / "metrics.jsonl"):
        expected.setdefault(line["step"], {}).update(line)
    rows = [items(row.item) for row in fields(records, "history")]
    assert list(expected) == [2, 4] and len(rows) == 2 and all("optim/matrix/angle" in row for row in rows)
    for row in rows:
        logged = {key: value for key, value in own(row).items() if not key.startswith(("by_", "samples."))}
        assert logged == expected[row["_step"]]


def test_without_a_key_one_line_says_so(tmp_path):
    printed = run_watched(tmp_path / "run", "auto")
    assert printed.startswith("wandb: off (no key configured") and printed.count("\n") == 1
    assert not {"wandb", "wandb_id.txt"} & {path.name for path in (tmp_path / "run").iterdir()}
