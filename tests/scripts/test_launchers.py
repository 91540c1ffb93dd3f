"""The shell scripts, run with stubs that record their command lines; and the record that a run leaves."""

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
[[ $(basename "$0") != "${FAILING:-}" ]] || exit 7
"""


def run_script(tmp_path: Path, script: str, *words: str, missing: str = "", **variables: str) -> tuple[int, list[str], str]:
    """Return exit status, command lines of the stubs, and standard error of a script; no stub for the command `missing`."""
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


def test_speedrun_checks_fetches_plans_trains_and_verifies(tmp_path):
    status, calls, _ = run_script(tmp_path, "speedrun.sh", "track3", "--train.steps", "9", NAME="first")
    assert status == 0
    assert calls == [
        "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader",
        "python -m scripts.fetch_fineweb --preset track3 -- --train.steps 9",
        "python -m scripts.plan track3 --gpus 2 -- --train.steps 9",
        "torchrun --standalone --nproc_per_node=2 train_gpt.py track3 --train.steps 9 --run.dir runs --run.name first",
        "python -m scripts.verify_record --add runs/first/record.jsonl --runs runs/first"]


@pytest.mark.parametrize("shards", ["0", "18"])
def test_default_preset_is_speedrun_and_shards_sets_the_number_to_fetch(tmp_path, shards):
    status, calls, _ = run_script(tmp_path, "speedrun.sh", "--run.seed", "7", GPUS="1", SHARDS=shards)
    assert status == 0
    assert [call for call in calls if "fetch" in call] == ["python -m scripts.fetch_fineweb --shards 18"] * (shards == "18")
    assert calls[-2].startswith("torchrun --standalone --nproc_per_node=1 train_gpt.py speedrun --run.seed 7 --run.dir runs")


@pytest.mark.parametrize(("variables", "message"), [
    ({"GPUS": "3"}, "error: GPUS must be a number from 1 to 2, the GPUs that PyTorch sees, got 3"),
    ({"GPUS": "two"}, "error: GPUS must be a number from 1 to 2, the GPUs that PyTorch sees, got two"),
    ({"missing": "torchrun"}, "error: torchrun is missing"), ({"missing": "nvidia-smi"}, "error: nvidia-smi is missing")])
def test_missing_gpus_and_commands_are_refused_before_training(tmp_path, variables, message):
    status, calls, errors = run_script(tmp_path, "speedrun.sh", **variables)
    assert status == 2 and message in errors
    assert not any("train_gpt" in call for call in calls)


def test_a_failed_training_prints_the_command_that_continues_it(tmp_path):
    variables = {"NAME": "first", "FAILING": "torchrun"}
    status, calls, errors = run_script(tmp_path, "speedrun.sh", "track3", "--run.seed", "7", **variables)
    assert status == 7 and calls[-1].startswith("torchrun")
    assert "GPUS=2 NAME=first scripts/speedrun.sh track3 '--run.seed' '7' --run.resume" in errors


def test_slurm_starts_one_torchrun_per_node_with_rendezvous_at_the_first(tmp_path):
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "42"}
    status, calls, _ = run_script(tmp_path, "slurm.sh", "track3", "--run.seed", "7", **job)
    assert status == 0
    assert calls[-1] == ("srun torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_id=42 "
                         "--rdzv_endpoint=node1:29500 train_gpt.py track3 --run.seed 7")


def test_the_record_of_a_run_is_verified_and_a_changed_one_is_refused(tmp_path, capsys):
    flags = ["--train.steps", "3", "--train.val_every_steps", "1", "--data.val_bytes", "1024", "--log.sample_tokens", "0",
             "--log.wandb", "disabled", "--run.target_loss_nats", "5.6", "--run.dir", str(tmp_path), "--run.name", "run"]
    train_gpt.main(parse(["bytes", *flags]))
    verify = Verify(add=tmp_path / "run" / "record.jsonl", runs=(str(tmp_path / "run"),))
    capsys.readouterr()
    assert main(verify) == 0
    output = capsys.readouterr().out
    assert "1 runs, errors: none" in output and "(n = 1), target 5.6: t-test n = 1" in output
    altered = json.loads((tmp_path / "run" / "record.jsonl").read_text())
    altered["summary"]["val_loss_nats"] -= 1
    (tmp_path / "run" / "record.jsonl").write_text(json.dumps(altered) + "\n")
    assert main(verify) == 1


def test_a_run_that_changed_the_benchmark_is_not_added(tmp_path, capsys):
    flags = ["--train.steps", "2", "--train.batch_tokens", "1536", "--data.val_bytes", "1024", "--run.dir", str(tmp_path)]
    train_gpt.main(parse(["bench_cpu", *flags, "--run.name", "run"]))
    verify = Verify(add=tmp_path / "bench_cpu.jsonl", runs=(str(tmp_path / "run"),))
    assert main(verify) == 1 and not (tmp_path / "bench_cpu.jsonl").exists()
    assert "train.batch_tokens is 1536, fixed at 768" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", *map(str, SCRIPTS.glob("*.sh"))], check=True, env=os.environ)
