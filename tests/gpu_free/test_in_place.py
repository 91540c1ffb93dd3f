"""Collectives in place, as NCCL allows them and gloo does not: two ranks as threads train like one."""

import threading

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import optim.comm
from configs.cli import parse
from model import GPT
from optim.comm import DONE, Comm
from optim.groups import build_groups
from optim.schedule import Schedule
from optim.sharded import ShardedOptimizer

WORLD = 2


class InPlaceComm(Comm):
    """The Comm of one thread, told that it may use memory as on CUDA."""

    def __init__(self, rank: int) -> None:
        self.device, self.world_size, self.rank, self._in_place = torch.device("cpu"), WORLD, rank, True


class Threads:
    """Stands for torch.distributed: ranks are threads, which meet at each collective and must call the same one.

    Inputs and outputs may share memory as NCCL defines it: one is this rank's slice of the other. So all ranks read before
    any of them writes.
    """

    ReduceOp = dist.ReduceOp

    def __init__(self) -> None:
        self.barrier_, self.slots = threading.Barrier(WORLD, timeout=30), [None] * WORLD
        self.local, self.order = threading.local(), [[] for _ in range(WORLD)]

    def meet(self, name: str, sent: Tensor) -> list[Tensor]:
        """Return copies of what every rank sends."""
        self.slots[self.local.rank] = (name, sent.clone())
        self.order[self.local.rank].append((name, tuple(sent.shape), sent.dtype))
        self.barrier_.wait()
        everyone = list(self.slots)
        self.barrier_.wait()
        assert {(other, tensor.shape, tensor.dtype) for other, tensor in everyone} == {(name, sent.shape, sent.dtype)}
        return [tensor for _, tensor in everyone]

    def check_slice(self, part: Tensor, whole: Tensor) -> None:
        """Check that `part` lies in `whole`'s memory where NCCL expects it."""
        assert part.numel() * WORLD == whole.numel() and part.is_contiguous() and whole.is_contiguous()
        assert part.data_ptr() == whole.data_ptr() + self.local.rank * part.numel() * part.element_size()

    def reduce_scatter_single(self, result: Tensor, bank: Tensor, *, op: object, async_op: bool) -> object:
        """Sum, and keep this rank's slice."""
        assert op == dist.ReduceOp.SUM and async_op
        self.check_slice(result, bank)
        result.copy_(sum(self.meet("reduce_scatter", bank)).flatten().chunk(WORLD)[self.local.rank].view_as(result))
        return DONE

    def all_gather_single(self, bank: Tensor, shard: Tensor, *, async_op: bool) -> object:
        """Write the slices of all ranks."""
        assert async_op
        self.check_slice(shard, bank)
        bank.copy_(torch.cat(self.meet("all_gather", shard)))
        return DONE

    def all_reduce(self, tensor: Tensor, *, op: object, async_op: bool = False) -> object:
        """Sum, or take the maximum, in place."""
        stacked = torch.stack(self.meet("all_reduce", tensor))
        tensor.copy_(stacked.sum(0) if op == dist.ReduceOp.SUM else stacked.amax(0))
        return DONE

    def broadcast(self, tensor: Tensor, src: int) -> None:
        """Copy the source's values."""
        tensor.copy_(self.meet("broadcast", tensor)[src])


RUN = parse(["bytes", "--optim.matrix.rounding", "remainder", "--model.matrix_dtype", "bfloat16"])


def new_model() -> GPT:
    torch.manual_seed(0)
    return GPT(RUN.model, vocab_size=257, max_tokens=64)


def train(model: GPT, comm: Comm, gradients: list[Tensor]) -> None:
    """Take one step for each of the gradients, which are flat."""
    optimizer = ShardedOptimizer(build_groups(dict(model.named_parameters()), model.roles(), RUN.optim, model.axes()), comm)
    sizes = [param.numel() for param in model.parameters()]
    for count, gradient in enumerate(gradients, start=1):
        for param, part in zip(model.parameters(), gradient.split(sizes), strict=True):
            param.grad.add_(part.view_as(param))
        optimizer.step(Schedule(RUN).values(10), count)
        optimizer.zero_grad()


@pytest.fixture
def group(monkeypatch) -> Threads:
    threads = Threads()
    monkeypatch.setattr(optim.comm, "dist", threads)
    return threads


def test_two_ranks_in_place_train_like_one(group):
    single, models = new_model(), [new_model() for _ in range(WORLD)]
    generator, size = torch.Generator().manual_seed(1), sum(param.numel() for param in single.parameters())
    # Of few bits, so that sums over ranks are exact, in bfloat16 too.
    parts = [[torch.randint(-8, 8, (size,), generator=generator) / 64 for _ in range(2)] for _ in range(WORLD)]
    train(single, Comm(), [first + second for first, second in zip(*parts, strict=True)])
    errors = []

    def work(rank: int) -> None:
        group.local.rank = rank
        try:
            train(models[rank], InPlaceComm(rank), parts[rank])
        except Exception as error:
            group.barrier_.abort()  # the other rank would wait for ever
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    for model in models:
        for weight, twin in zip(model.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(weight, twin)
    assert group.order[0] == group.order[1]
    assert {name for name, *_ in group.order[0]} >= {"reduce_scatter", "all_gather", "all_reduce", "broadcast"}
