"""metrics.jsonl and summary.json, as they are written and read."""

import json
import math
from pathlib import Path

import pytest
import torch

from configs.schema import Log as LogConfig
from configs.schema import Run
from data.run.log import Log, Progress
from data.run.metrics import SUMMARY_KEYS, read_metrics

RUN = Run(preset="tiny", log=LogConfig(wandb="disabled"))


def open_log(folder: Path, step: int = 0, metrics_bytes: int = 0, rank: int = 0) -> Log:
    progress = Progress(step=step, tokens=10 * step, train_seconds=0.5 * step, metrics_bytes=metrics_bytes)
    return Log(RUN, folder, progress, device=torch.device("cpu"), rank=rank, world_size=1)


def stamp(step: int) -> dict:
    return {"step": step, "tokens": 10 * step, "train_seconds": 0.5 * step}


def test_metrics_are_read_as_written_at_once(tmp_path):
    log = open_log(tmp_path, step=2)
    log.write({})
    log.write({"train/loss_nats": math.nan, "val/loss_nats": 2.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        stamp(2), stamp(2) | {"train/loss_nats": None, "val/loss_nats": 2.5}]
    assert log.metrics_bytes() == (tmp_path / "metrics.jsonl").stat().st_size


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = open_log(tmp_path, rank=1)
    log.write({"train/loss_nats": 1.0})
    log.training(1.0, flops_per_token=1.0)
    log.info("hello")
    log.bar.update()
    log.write_summary(1.0, 1, data_hash="d")
    log.finish(None)
    assert log.metrics_bytes() == 0 and not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_resuming_drops_what_will_be_repeated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = open_log(tmp_path, step=1)
    log.write({})
    length = log.metrics_bytes()
    log.progress.step = 2
    log.write({"repeated": False})
    path.write_bytes(path.read_bytes() + b'{"step": 3, "tok')
    log = open_log(tmp_path, step=2, metrics_bytes=length)
    assert log.metrics_bytes() == length
    log.write({"repeated": True})
    assert read_metrics(path) == [stamp(1), stamp(2) | {"repeated": True}]
    open_log(tmp_path)
    assert read_metrics(path) == []


def test_a_log_shorter_than_its_checkpoint_says_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl has 3 bytes, but had 50 when the checkpoint was written"):
        open_log(tmp_path, metrics_bytes=50)
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


def test_a_summary_has_exactly_its_keys(tmp_path, capsys):
    log = open_log(tmp_path, step=3)
    log.progress.val_loss_nats, log.progress.best_val_loss_nats = math.inf, 2.0
    log.write_summary(2.0, 5, data_hash="d")
    log.finish(("once\x1b", " upon\n a"))
    written, printed = json.loads((tmp_path / "summary.json").read_text()), capsys.readouterr().out
    assert tuple(written) == SUMMARY_KEYS and written["steps"] == 3 and written["val_loss_nats"] is None
    sample = "prompt from the validation text:\n    once?\n\nthe model continues:\n     upon\n     a\n"
    assert sample in printed and "validation  loss inf nats/token; lowest loss 2.0000\n" in printed
    assert all(len(line) <= 80 or str(tmp_path) in line for line in printed.splitlines())
