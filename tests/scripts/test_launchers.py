"""The shell scripts, with commands that only write down how they are called; and the record that a race leaves."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import train_gpt
from configs.cli import parse
from scripts.verify_record import Verify, main

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
STUB = """#!/bin/bash
[[ $1 = -c ]] || echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in
  *"device_count()"*) echo 2 ;;
  "show hostnames"*) printf 'node1\\nnode2\\n' ;;
esac
"""


def called(tmp_path: Path, script: str, *words: str, missing: str = "", **variables: str) -> tuple[int, list[str], str]:
    """(exit status, the calls of outside commands, standard error) of a script."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in {"python", "torchrun", "nvidia-smi", "srun", "scontrol"} - {missing}:
        (tools / name).write_text(STUB)
        (tools / name).chmod(0o755)
    for name in ("bash", "env", "dirname", "basename", "date", "head"):
        (tools / name).symlink_to(shutil.which(name))
    calls = tmp_path / "calls"
    done = subprocess.run([SCRIPTS / script, *words], env={"PATH": str(tools), "CALLS": str(calls), **variables},
                          capture_output=True, text=True, timeout=30)
    return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stderr


def test_a_race_checks_fetches_plans_trains_and_reports(tmp_path):
    status, calls, _ = called(tmp_path, "speedrun.sh", "track3", "--train.steps", "9", NAME="first")
    assert status == 0
    assert calls == [
        "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader",
        "python -m scripts.fetch_fineweb --preset track3 -- --train.steps 9",
        "python -m scripts.plan track3 --gpus 2 -- --train.steps 9",
        "torchrun --standalone --nproc_per_node=2 train_gpt.py track3 --train.steps 9 --run.dir runs --run.name first",
        "python -m scripts.verify_record --add runs/first/record.jsonl --runs runs/first"]


@pytest.mark.parametrize("shards", ["0", "18"])
def test_without_a_preset_it_is_the_speedrun_and_shards_may_be_told(tmp_path, shards):
    status, calls, _ = called(tmp_path, "speedrun.sh", "--run.seed", "7", GPUS="1", SHARDS=shards)
    assert status == 0
    assert [call for call in calls if "fetch" in call] == ["python -m scripts.fetch_fineweb --shards 18"] * (shards == "18")
    assert calls[-2].startswith("torchrun --standalone --nproc_per_node=1 train_gpt.py speedrun --run.seed 7 --run.dir runs")


@pytest.mark.parametrize(("variables", "message"), [
    ({"GPUS": "3"}, "error: GPUS=3, but CUDA shows 2"), ({"GPUS": "two"}, "error: GPUS=two"),
    ({"missing": "torchrun"}, "error: torchrun is missing"), ({"missing": "nvidia-smi"}, "error: nvidia-smi is missing")])
def test_what_is_not_there_ends_the_race_before_it_begins(tmp_path, variables, message):
    status, calls, errors = called(tmp_path, "speedrun.sh", **variables)
    assert status == 2 and message in errors
    assert not any("train_gpt" in call for call in calls)


def test_slurm_starts_one_torchrun_a_node_that_meet_at_the_first(tmp_path):
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "42"}
    status, calls, _ = called(tmp_path, "slurm.sh", "track3", "--run.seed", "7", **job)
    assert status == 0
    assert calls[-1] == ("srun torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_id=42 "
                         "--rdzv_endpoint=node1:29500 train_gpt.py track3 --run.seed 7")


def test_the_report_verifies_what_the_run_left(tmp_path, capsys):
    flags = ["--train.steps", "3", "--train.val_every_steps", "1", "--data.val_bytes", "1024", "--log.sample_tokens", "0",
             "--log.wandb", "disabled", "--run.target_loss_nats", "5.6", "--run.dir", str(tmp_path), "--run.name", "run"]
    train_gpt.main(parse(["bytes", *flags]))
    verify = Verify(add=tmp_path / "run" / "record.jsonl", runs=(str(tmp_path / "run"),))
    capsys.readouterr()
    assert main(verify) == 0
    said = capsys.readouterr().out
    assert "1 runs, errors: none" in said and "(n = 1), target 5.6: t-test n = 1" in said
    altered = json.loads((tmp_path / "run" / "record.jsonl").read_text())
    altered["summary"]["val_loss_nats"] -= 1
    (tmp_path / "run" / "record.jsonl").write_text(json.dumps(altered) + "\n")
    assert main(verify) == 1


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", *map(str, SCRIPTS.glob("*.sh"))], check=True, env=os.environ)
