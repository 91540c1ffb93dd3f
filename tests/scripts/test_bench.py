"""The parts' operations, and that each is timed."""

import pytest
import torch

from configs.presets import PRESETS
from model import GPT
from scripts.bench import Arguments, bench, parts, table


def test_every_part_is_timed_beside_its_bound():
    found = bench(Arguments(preset="bytes", tokens=128, repeats=1), [])
    assert [part["name"] for part in found["parts"]] == ["attention", "MLP", "head and loss", "model", "update"]
    assert all(part["ms"] > 0 and part["bound_ms"] > 0 for part in found["parts"])
    assert "head and loss" in table(found)


def test_operations_are_those_of_the_weights():
    run = PRESETS["bytes"]()
    model = GPT(run.model, vocab_size=257, max_tokens=64)
    tokens = torch.randint(257, (2, 64))
    flops = {part.name: part.flops for part in parts(run, model, tokens, torch.device("cpu"))}
    assert flops["MLP"] == 6 * 128 * 2 * 128 * 512
    assert flops["attention"] == 6 * 128 * 4 * 128**2 + 12 * 128 * 32 * 128
    assert flops["model"] == 128 * model.flops_per_token(64)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="--device is cpu, or cuda where there is one; got 'tpu'"):
        bench(Arguments(device="tpu"), [])
