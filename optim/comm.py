"""The only file that knows the process group. At world size 1 every verb is the identity.

Started by torchrun: NCCL between GPUs, gloo between CPUs; ranks and addresses come from its environment variables.
"""

import os
from dataclasses import dataclass
from functools import partialmethod

import torch
import torch.distributed as dist
from torch import Tensor


class Work:
    """A collective in flight, with the one verb of PyTorch's own; this one has ended."""

    def wait(self) -> object:
        """Block (or order the stream) until the result is there: here not at all."""


DONE = Work()


@dataclass(frozen=True, slots=True)
class _Rows(Work):
    """Rows on their way to be added to `result`, by the rank that they come from: that order is the sum's on every run."""

    works: list[Work]
    result: Tensor
    parts: list[tuple[Tensor, Tensor]]

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        for numbers, rows in self.parts:  # each rank's numbers are distinct
            self.result[numbers] += rows


def local_rank() -> int:
    """This process's number on its machine, as torchrun says."""
    return int(os.environ.get("LOCAL_RANK", "0"))


class Comm:
    """Rank and world size, and the collectives that training needs."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Join the process group that torchrun announces in the environment, if it does."""
        self.device = torch.device(device)
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self._in_place = self.device.type == "cuda"  # NCCL lets a collective's input be a slice of its output
        if self.world_size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def slice_of(self, length: int) -> slice:
        """This rank's equal share of a first dimension that the world size divides."""
        assert length % self.world_size == 0
        share = length // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def reduce_scatter(self, bank: Tensor) -> tuple[Tensor, Work]:
        """This rank's slice of the sum of `bank` over all ranks, once the work is waited for; `bank` may be clobbered."""
        own = bank[self.slice_of(bank.size(0))]
        if self.world_size == 1:
            return own, DONE
        result = own if self._in_place else torch.empty_like(own)
        collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return result, collective(result, bank, op=dist.ReduceOp.SUM, async_op=True)

    def reduce_scatter_rows(self, bank: Tensor) -> tuple[Tensor, Work]:
        """As `reduce_scatter`, for a bank most of whose rows are zero on every rank: each sends the others their rows of it
        that are not, with their numbers, and nothing else. Waits for the device, to know how many there are.
        """
        own = bank[self.slice_of(bank.size(0))]
        if self.world_size == 1:
            return own, DONE
        touched = bank.flatten(1).any(1).nonzero().flatten()
        sent = torch.bincount(touched // own.size(0), minlength=self.world_size)
        arriving = torch.empty_like(sent)
        dist.all_to_all_single(arriving, sent)
        sizes = arriving.tolist(), sent.tolist()
        rows, numbers = bank.new_empty(sum(sizes[0]), *bank.shape[1:]), touched.new_empty(sum(sizes[0]))
        works = [dist.all_to_all_single(box, mine, *sizes, async_op=True)
                 for box, mine in ((rows, bank[touched]), (numbers, touched % own.size(0)))]
        result = torch.zeros_like(own)
        return result, _Rows(works, result, list(zip(numbers.split(sizes[0]), rows.split(sizes[0]), strict=True)))

    def all_gather(self, bank: Tensor) -> Work:
        """Every rank's slice of `bank` reaches all ranks, in place."""
        if self.world_size == 1:
            return DONE
        bank = bank.view(torch.uint8) if bank.dtype == torch.int16 else bank  # which neither NCCL nor gloo knows
        own = bank[self.slice_of(bank.size(0))]
        collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return collective(bank, own if self._in_place else own.clone(), async_op=True)

    def all_reduce(self, tensor: Tensor) -> Work:
        """Sum over ranks, in place."""
        if self.world_size == 1:
            return DONE
        return dist.all_reduce(tensor, op=dist.ReduceOp.SUM, async_op=True)

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's values reach all ranks, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)

    def share(self, value: object) -> object:
        """Rank 0's small Python value (text, number, None) on all ranks."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def _combine(self, op: dist.ReduceOp, *values: float) -> list[float]:
        """Sums or maxima of float64 numbers over ranks."""
        if self.world_size == 1:
            return list(values)
        box = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(box, op=op)
        return box.tolist()

    sum = partialmethod(_combine, dist.ReduceOp.SUM)
    max = partialmethod(_combine, dist.ReduceOp.MAX)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1:
            dist.destroy_process_group()
