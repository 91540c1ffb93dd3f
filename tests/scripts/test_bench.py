"""scripts.bench: every part is timed, and its FLOPs are right."""

import json
import subprocess
import sys

import pytest
import torch

from configs.presets import PRESETS
from model import GPT
from optim.comm import Comm
from scripts.bench import Arguments, bench, model_parts, optimizer_parts, table_lines
from scripts.lab.workload import measure_sizes


def test_every_part_is_timed_beside_its_bound():
    result = bench(Arguments(preset="bytes", tokens=128, repeats=1), [])
    assert [part["name"] for part in result["parts"]] == ["attention", "MLP", "head and loss", "model", "update", "data"]
    assert all(part["ms"] > 0 and part["bound_ms"] > 0 for part in result["parts"])
    lines = table_lines(result)
    assert lines[0] == "bytes on 1 x cpu: 128 tokens in sequences of 64" and max(map(len, lines)) <= 80
    assert any("head and loss" in line for line in lines)


def test_missing_data_are_noted(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.bench.measure_roofline", lambda device, dtype: (1e9, 1e9))
    result = bench(Arguments(preset="bytes", tokens=64, repeats=1), [
        "--data.source", "text", "--data.train_files", str(tmp_path / "none.txt")])
    assert [part["name"] for part in result["parts"]][-1] == "update"
    assert "data loading is not timed" in table_lines(result)[-1] and "none.txt" in table_lines(result)[-1]


def test_several_ranks_time_their_communication():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "scripts.bench",
               "bytes", "--tokens", "64", "--repeats", "1", "--json"]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    parts = {part["name"]: part for part in result["parts"]}
    parameters = sum(p.numel() for p in GPT(PRESETS["bytes"]().model, vocab_size=257, max_tokens=64).parameters())
    assert result["ranks"] == 2 and parts["communication"]["ms"] > 0
    # Half of the gradients and of the weights, and a little padding.
    assert 4 * parameters <= parts["communication"]["traffic"] < 4.001 * parameters


def test_flops_of_the_parts():
    run = PRESETS["bytes"]()
    model = GPT(run.model, vocab_size=257, max_tokens=64)
    tokens = torch.randint(257, (2, 64))
    flops = {part.name: part.flops for part in (*model_parts(run, model, tokens), *optimizer_parts(run, model, Comm()))}
    assert flops["MLP"] == 6 * 128 * 2 * 128 * 512
    assert flops["attention"] == 6 * 128 * 4 * 128**2 + 12 * 128 * 32.5 * 128  # a token attends to 32.5 of 64 on average
    assert flops["update"] == measure_sizes(run)[0].newton_schulz_flops()
    assert flops["model"] == 128 * model.flops_per_token(64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available")
def test_an_unavailable_device_is_refused():
    with pytest.raises(ValueError, match="cuda"):
        bench(Arguments(device="cuda"), [])
