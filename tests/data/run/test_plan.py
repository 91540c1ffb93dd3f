"""The plan and the schedule's table, from given numbers."""

from types import SimpleNamespace
from typing import NamedTuple

import torch

from configs.schema import Run
from data.run.plan import format_plan, format_schedule


class Values(NamedTuple):
    lr: float
    window: int | None


def test_a_plan_names_its_numbers():
    source = SimpleNamespace(name="random tokens", data_hash="beef", train=[range(1000), range(500)], validation=range(101),
                             vocab_size=2000, notes=("read {this}",))
    text = format_plan(Run(), source, notes=["and this"], dtype=torch.bfloat16, kernel="sdpa", compiled=False,
                       flops_per_token=2.5e6, state_bytes=3 * 2**20, activation_bytes=2**20, world_size=2, device="cpu",
                       parameters=12345, total_tokens=6789)
    first, data, *notes, last = text.splitlines()
    assert first == "preset tiny on 2 x cpu, seed 1, activations bfloat16, attention sdpa, compile off"
    assert data.endswith("hash beef, 1,500 training tokens, 100 validation tokens, vocabulary 2,000")
    assert notes == ["read {this}", "and this"]
    assert last.startswith("12,345 parameters, 2.5 MFLOP a token; ") and " 6,789 tokens; " in last and "3 MiB" in last


def test_a_schedule_is_read_at_eleven_steps():
    header, *rows = format_schedule(lambda step: Values(step / 2, None), 101).splitlines()
    assert header.split() == ["step", "lr", "window"]
    assert [row.split() for row in rows] == [[str(step), f"{step / 2:g}", "-"] for step in range(0, 101, 10)]
    assert len(format_schedule(lambda step: Values(1.0, 2), 1).splitlines()) == 2
