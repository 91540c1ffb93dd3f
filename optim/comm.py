"""Communication between ranks; the only file that knows the process group. At world size 1 every method is the identity.

torchrun starts the ranks; rank, world size and addresses come from its environment variables. The backend is NCCL between
GPUs and gloo between CPUs.

The methods that return a `Work` are asynchronous: they start a collective, and its result may be used after `wait()`. With
NCCL `wait` makes the current CUDA stream wait, not the Python thread; with gloo it blocks.
"""

import os
from dataclasses import dataclass
from functools import partialmethod

import torch
import torch.distributed as dist
from torch import Tensor


class Work:
    """Handle of a collective, with the `wait` of torch.distributed.Work; this one has already ended."""

    def wait(self) -> object:
        """Return when the result may be used: here at once."""


DONE = Work()


@dataclass(frozen=True, slots=True)
class _RowsWork(Work):
    """Rows in flight from every rank, to be added to `result`."""

    works: list[Work]
    result: Tensor
    parts: list[tuple[Tensor, Tensor]]
    """(row indices into `result`, rows) from rank 0, 1, ..."""

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        # Added in the order of the ranks, so that rounding is the same in every run; one rank sends each row at most once.
        for indices, rows in self.parts:
            self.result.index_add_(0, indices, rows)


@dataclass(frozen=True, slots=True)
class SparseRows:
    """Rows of a bank that this rank will send to their owners, and their numbers, which the ranks exchange meanwhile."""

    indices: Tensor
    """Rows that this rank sends, in order; on the device."""
    send_counts: Tensor
    """Number of them that each rank gets; on the CPU."""
    receive_counts: Tensor
    """Number of rows that each rank sends here; on the CPU, valid once `work` was waited for."""
    work: Work


def local_rank() -> int:
    """Return this process's number on its machine, from torchrun; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


class Comm:
    """Rank, world size and the collectives that training needs."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Join the process group that torchrun's environment variables describe; without them be the only rank."""
        self.device = torch.device(device)
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        # NCCL allows the input of a collective to be a slice of its output, or the output one of the input, and then copies
        # nothing. gloo needs separate memory: one buffer more for each collective below.
        self._in_place = self.device.type == "cuda"
        self._cpu_group: dist.ProcessGroup | None = None  # None: the default group
        if self.world_size > 1 and self.device.type == "cuda":
            # With device_id NCCL connects at once and knows each rank's GPU, which it would otherwise guess.
            dist.init_process_group("nccl", device_id=self.device)
            # A second group, for CPU tensors: what the host alone decides need not wait for the GPU.
            self._cpu_group = dist.new_group(backend="gloo")
        elif self.world_size > 1:
            dist.init_process_group("gloo")

    def slice_of(self, length: int) -> slice:
        """Return this rank's shard of a dimension of `length`, which the world size divides."""
        assert length % self.world_size == 0
        share = length // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def reduce_scatter(self, bank: Tensor) -> tuple[Tensor, Work]:
        """Start to sum `bank` over ranks; return this rank's shard of the sum. May overwrite `bank`."""
        shard = bank[self.slice_of(bank.size(0))]
        if self.world_size == 1:
            return shard, DONE
        result = shard if self._in_place else torch.empty_like(shard)
        # PyTorch deprecates the longer of the two names; both are the same collective.
        collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return result, collective(result, bank, op=dist.ReduceOp.SUM, async_op=True)

    def announce_rows(self, used: Tensor) -> SparseRows:
        """Start to tell every rank how many rows it will get from this one. `used` (rows of a bank,) is True for those that
        may differ from zero; bool, on the CPU. Waits for no device."""
        send_counts = used.view(self.world_size, -1).sum(1)
        receive_counts = torch.empty_like(send_counts)
        work = dist.all_to_all_single(receive_counts, send_counts, group=self._cpu_group, async_op=True)
        indices = used.nonzero().flatten()
        if self.device.type == "cuda":  # only from page-locked memory is a copy asynchronous
            indices = indices.pin_memory()
        return SparseRows(indices.to(self.device, non_blocking=True), send_counts, receive_counts, work)

    def reduce_scatter_rows(self, bank: Tensor, announced: SparseRows | None = None) -> tuple[Tensor, Work]:
        """Do the same as `reduce_scatter` for a bank most of whose rows are zero: send only rows that are not, with their
        indices. The sender must name them, because a receiver must know how many rows will arrive: without `announced` they
        are looked for, which waits for the device."""
        shard = bank[self.slice_of(bank.size(0))]
        if self.world_size == 1:
            return shard, DONE
        if announced is None:  # NaN counts as nonzero, so that bad gradients are sent and found
            announced = self.announce_rows(bank.flatten(1).any(1).cpu())
        announced.work.wait()
        receives, sends = announced.receive_counts.tolist(), announced.send_counts.tolist()
        # Exchange rows, and their indices within the receiver's shard.
        rows, indices = bank.new_empty(sum(receives), *bank.shape[1:]), announced.indices.new_empty(sum(receives))
        works = [dist.all_to_all_single(rows, bank[announced.indices], receives, sends, async_op=True),
                 dist.all_to_all_single(indices, announced.indices % shard.size(0), receives, sends, async_op=True)]
        result = torch.zeros_like(shard)
        return result, _RowsWork(works, result, list(zip(indices.split(receives), rows.split(receives), strict=True)))

    def all_gather(self, bank: Tensor) -> Work:
        """Start to send this rank's shard of `bank` to all ranks, in place: each rank gets the whole bank."""
        if self.world_size == 1:
            return DONE
        # Neither NCCL nor gloo has int16, the dtype of step_remainder; a gather only moves bytes.
        bank = bank.view(torch.uint8) if bank.dtype == torch.int16 else bank
        shard = bank[self.slice_of(bank.size(0))]
        collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return collective(bank, shard if self._in_place else shard.clone(), async_op=True)

    def all_reduce(self, tensor: Tensor) -> Work:
        """Start to sum a tensor over ranks, in place."""
        if self.world_size == 1:
            return DONE
        return dist.all_reduce(tensor, op=dist.ReduceOp.SUM, async_op=True)

    def broadcast(self, tensor: Tensor) -> None:
        """Copy rank 0's values to all ranks, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)

    def share(self, value: object) -> object:
        """Return rank 0's `value` on all ranks; for small Python values (text, numbers, None)."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def _combine(self, op: dist.ReduceOp, *values: float) -> list[float]:
        """Return sums or maxima of numbers over ranks, in float64; waits for the device."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=op)
        return tensor.tolist()

    sum = partialmethod(_combine, dist.ReduceOp.SUM)
    max = partialmethod(_combine, dist.ReduceOp.MAX)

    def barrier(self) -> None:
        """Wait until all ranks have come to this call."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1:
            dist.destroy_process_group()
