"""The optimizer's state dict: saved and loaded at any world size; copied before warm-up and restored after it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from optim.bank import Bank
from optim.comm import Comm


class OptimizerState:
    """Weights and state of all banks, numbers that roles share, and gradients that add up for a later step."""

    def __init__(self, banks: list[Bank], shared: dict[str, dict[str, Tensor]], comm: Comm, *,
                 also_restored: Sequence[Tensor] = ()) -> None:
        """`shared`: role > name > 0-D number; `also_restored`: tensors that `restore` resets but no checkpoint contains."""
        self._banks, self._shared, self._comm, self._also_restored = banks, shared, comm, list(also_restored)

    def tensors(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Return weights and state of every parameter as whole CPU tensors, the same at any world size. A collective: a rank
        that needs no copy takes part with `keep` False, and returns {}.

        Names: `weights/NAME`; `KEY/NAME` for each state tensor of rule, step and hooks (`momentum/...`, `mean/...`);
        `pending/NAME`, the sum over ranks of gradients that add up; `shared/ROLE/KEY` for numbers that a role shares.
        """
        tensors = {f"shared/{role}/{key}": tensor.reshape(1).clone().cpu()
                   for role, numbers in self._shared.items() for key, tensor in numbers.items()}
        for bank in self._banks:
            wholes = {key: self._gather(bank, shard) for key, shard in _shards(bank).items()}
            if bank.update_every > 1:
                wholes["pending"] = bank.grads.clone()
                self._comm.all_reduce(wholes["pending"]).wait()
            for key, whole in wholes.items() if keep else ():
                parts = bank.per_parameter(whole.cpu())
                tensors |= {f"{key}/{name}": part for name, part in zip(bank.names, parts, strict=True)}
        return tensors if keep else {}

    def _gather(self, bank: Bank, shard: Tensor) -> Tensor:
        """Return the whole tensor of which this rank has `shard`, a copy."""
        if not bank.sharded:
            return shard.clone()
        whole = shard.new_zeros(bank.weights.size(0), *shard.shape[1:])
        whole[bank.shard] = shard
        self._comm.all_gather(whole).wait()
        return whole

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load the result of `tensors`, saved at any world size. The caller has compared names and shapes with `shapes`."""
        for role, numbers in self._shared.items():
            for key, tensor in numbers.items():
                tensor.copy_(tensors[f"shared/{role}/{key}"][0])
        for bank in self._banks:
            for key, shard in _shards(bank).items():
                whole = shard.new_zeros(bank.weights.size(0), *shard.shape[1:])
                _fill(bank, whole, key, tensors)
                # Every rank needs all weights for its forward pass, but only its shard of the state.
                if key == "weights":
                    bank.weights.copy_(whole)
                else:
                    shard.copy_(whole[bank.shard])
            if bank.used is not None:  # the loaded gradients have other rows
                bank.used.clear()
            if bank.update_every > 1:
                bank.grads.zero_()
                if self._comm.rank == 0:  # on one rank only: `pending` is a sum, and the step will sum over ranks again
                    _fill(bank, bank.grads, "pending", tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of `tensors`, without communication."""
        shapes = {f"shared/{role}/{key}": (1,) for role, numbers in self._shared.items() for key in numbers}
        for bank in self._banks:
            of_bank = {key: bank.part_shapes(shard) for key, shard in _shards(bank).items()}
            of_bank |= {"pending": bank.part_shapes(bank.grads)} if bank.update_every > 1 else {}
            shapes |= {f"{key}/{name}": shape for key, of_key in of_bank.items()
                       for name, shape in zip(bank.names, of_key, strict=True)}
        return shapes

    def snapshot(self) -> list[Tensor]:
        """Return copies of all tensors on this rank, for `restore`; on the CPU, because a second copy on a GPU would leave
        too little of 24 GB for the activations."""
        return [torch.empty_like(tensor, device="cpu").copy_(tensor) for tensor in self._all()]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        """Undo every change since the snapshot was taken, in place."""
        for tensor, saved in zip(self._all(), snapshot, strict=True):
            tensor.copy_(saved)
        for bank in self._banks:
            if bank.used is not None:
                bank.used.clear()

    @contextmanager
    def restored(self, model: nn.Module) -> Iterator[None]:
        """Undo, on leaving the context, every change of the optimizer, of the model's buffers (such as the scales of 8-bit
        products) and of the CPU's generator, from which sampled softmax draws."""
        snapshot, rng_state = self.snapshot(), torch.get_rng_state()
        buffers = [buffer.clone() for buffer in model.buffers()]
        yield
        self.restore(snapshot)
        for buffer, saved in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(saved)
        torch.set_rng_state(rng_state)

    def _all(self) -> list[Tensor]:
        """Return all tensors on this rank that a step changes."""
        tensors = [tensor for bank in self._banks for tensor in (bank.weights, *bank.state.values())]
        tensors += [bank.grads for bank in self._banks if bank.update_every > 1]
        return tensors + [tensor for numbers in self._shared.values() for tensor in numbers.values()] + self._also_restored


def _shards(bank: Bank) -> dict[str, Tensor]:
    """Return this rank's shards of a bank's weights and state, views with the shard dimension first."""
    return {"weights": bank.weights[bank.shard]} | {key: bank.shard_dim_first(tensor) for key, tensor in bank.state.items()}


def _fill(bank: Bank, whole: Tensor, key: str, tensors: dict[str, Tensor]) -> None:
    """Copy `KEY/NAME` of each of a bank's parameters into `whole`, in place."""
    for name, part in zip(bank.names, bank.per_parameter(whole), strict=True):
        part.copy_(tensors[f"{key}/{name}"])
