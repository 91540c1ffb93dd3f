"""Sparse reduce-scatter sends only nonzero rows, and NCCL is told each rank's GPU. Sums on 2 and 3 ranks are tested in
test_rules_on_ranks.py."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from optim.comm import Comm


class _Done:
    def wait(self) -> None:
        pass


@pytest.fixture
def echo(monkeypatch) -> tuple[Comm, list[Tensor]]:
    """Return the Comm of rank 1 of 2, to which rank 0 sends the same as it sends itself; and the list of sent tensors."""
    sent: list[Tensor] = []

    def exchange(out: Tensor, rows: Tensor, to: list | None = None, fro: list | None = None, **_: object):
        halves = rows.split(fro or [1, 1])
        sent.append(rows)
        out.copy_(torch.cat([halves[1], halves[1]]))
        return _Done()

    monkeypatch.setattr(dist, "all_to_all_single", exchange)
    comm = Comm()
    comm.rank, comm.world_size = 1, 2
    return comm, sent


def test_what_is_sent_is_the_touched_rows_and_their_numbers(echo):
    comm, sent = echo
    bank = torch.zeros(100, 16)
    bank[[3, 70]] = torch.arange(32.0).view(2, 16) + 1
    own, work = comm.reduce_scatter_rows(bank)
    work.wait()
    expected = torch.zeros(50, 16)
    expected[20] = 2 * bank[70]
    assert torch.equal(own, expected)
    assert sorted(tensor.numel() for tensor in sent) == [2, 2, 32]


def test_rows_that_are_not_finite_are_sent(echo):
    comm, _ = echo
    bank = torch.zeros(4, 3)
    bank[1:, 1] = torch.tensor([float("nan"), float("inf"), float("nan")])
    own, work = comm.reduce_scatter_rows(bank)
    work.wait()
    assert own[0].isinf().any() and own[1].isnan().any()


def test_on_one_rank_it_is_the_bank():
    bank = torch.ones(6, 2)
    own, work = Comm().reduce_scatter_rows(bank)
    work.wait()
    assert torch.equal(own, bank)


def test_a_row_may_be_announced_that_is_zero(echo):
    comm, sent = echo
    bank, used = torch.zeros(100, 16), torch.zeros(100, dtype=torch.bool)
    bank[70] = 1.5
    used[[3, 70]] = True
    own, work = comm.reduce_scatter_rows(bank, comm.announce_rows(used))
    work.wait()
    assert own[20].eq(3).all() and own.sum() == 48
    assert sorted(tensor.numel() for tensor in sent) == [2, 2, 32]


def test_ranks_with_gpus_name_them_and_have_a_second_group_for_the_cpu(monkeypatch):
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: calls.append((args, options)))
    monkeypatch.setattr(dist, "new_group", lambda **options: calls.append(options))
    Comm("cuda:3")
    assert calls == [(("nccl",), {"device_id": torch.device("cuda:3")}), {"backend": "gloo"}]
