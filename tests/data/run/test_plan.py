"""The plan and the schedule's table, from given numbers."""

from types import SimpleNamespace
from typing import NamedTuple

import torch

from configs.schema import Run
from data.run.plan import format_plan, format_schedule


class Values(NamedTuple):
    lr: float
    window: int | None
    batch_tokens: int


def test_a_plan_names_its_numbers():
    source = SimpleNamespace(name="random tokens", data_hash="beef", train=[range(1000), range(500)], validation=range(101),
                             vocab_size=2000, notes=("read {this}",))
    text = format_plan(Run(), source, notes=["and this"], dtype=torch.bfloat16, kernel="sdpa", compiled=False,
                       flops_per_token=2.5e6, state_bytes=3 * 2**20, activation_bytes=2**20, world_size=2, device="cpu",
                       parameters=12345, total_tokens=6789)
    assert all(len(line) <= 80 for line in text.splitlines())
    rows = " ".join(text.split())
    assert rows.startswith("run preset tiny, seed 1, on 2 x cpu numerics activations in bfloat16, attention by sdpa, "
                           "torch.compile off data random tokens, hash beef; 1,500 training tokens, 100 validation tokens, "
                           "vocabulary of 2,000 tokens note read {this} note and this model 12,345 parameters, 2.5 million")
    assert " 6,789 tokens memory 3 MiB per rank for weights" in rows and "about 1 MiB for activations" in rows


def test_a_schedule_is_read_at_eleven_steps():
    lines = [line.split() for line in format_schedule(lambda step: Values(step / 2, None, 7), 101).splitlines()]
    assert lines[-12:] == [["step", "lr"], *([str(step), str(step / 2)] for step in range(0, 101, 10))]
    assert ["constant", "batch_tokens", "7"] in lines
    assert format_schedule(lambda step: Values(1.0, 2, 7), 1).endswith("\nstep\n   0")
