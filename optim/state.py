"""The optimizer's state dict: to a checkpoint and back, at any world size; copied before a rehearsal and restored after."""

from collections.abc import Sequence

import torch
from torch import Tensor

from optim.bank import Bank
from optim.comm import Comm


class OptimizerState:
    """Weights and state of all banks, the groups' shared numbers, and gradients that add up for a later step."""

    def __init__(self, banks: list[Bank], shared: dict[str, dict[str, Tensor]], comm: Comm, *,
                 also_restored: Sequence[Tensor] = ()) -> None:
        """`shared`: role > name > 0-D number; `also_restored`: tensors that `restore` resets and no checkpoint holds."""
        self._banks, self._shared, self._comm, self._also_restored = banks, shared, comm, list(also_restored)

    def tensors(self) -> dict[str, Tensor]:
        """Weights and state of every parameter as whole CPU tensors, independent of the world size. A collective.

        `weights/NAME`; `STATE/NAME` for each state of the rule (`momentum/...`, `mean/...`) and of the step; `pending/NAME`,
        the sum over ranks of gradients that add up; `shared/ROLE/KEY` for numbers that a role shares.
        """
        tensors = {f"shared/{role}/{key}": tensor.reshape(1).clone().cpu()
                 for role, numbers in self._shared.items() for key, tensor in numbers.items()}
        for bank in self._banks:
            wholes = {key: self._whole(bank, owned) for key, owned in _owned(bank).items()}
            if bank.update_every > 1:
                wholes["pending"] = bank.grads.clone()
                self._comm.all_reduce(wholes["pending"]).wait()
            for key, whole in wholes.items():
                parts = bank.stacked(whole).cpu()
                tensors |= {f"{key}/{name}": part for name, part in zip(bank.names, parts, strict=True)}
        return tensors

    def _whole(self, bank: Bank, owned: Tensor) -> Tensor:
        if not bank.sharded:
            return owned.clone()
        whole = owned.new_zeros(bank.weights.size(0), *owned.shape[1:])
        whole[bank.own] = owned
        self._comm.all_gather(whole).wait()
        return whole

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load what `tensors` gave, at any world size. The caller has checked names and shapes (see `shapes`)."""
        for role, numbers in self._shared.items():
            for key, tensor in numbers.items():
                tensor.copy_(tensors[f"shared/{role}/{key}"][0])
        for bank in self._banks:
            for key, owned in _owned(bank).items():
                whole = owned.new_zeros(bank.weights.size(0), *owned.shape[1:])
                _fill(bank, whole, key, tensors)
                if key == "weights":
                    bank.weights.copy_(whole)
                else:
                    owned.copy_(whole[bank.own])
            if bank.update_every > 1:
                bank.grads.zero_()
                if self._comm.rank == 0:  # the sum over ranks is what will count
                    _fill(bank, bank.grads, "pending", tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of `tensors`, without communication."""
        shapes = {f"shared/{role}/{key}": (1,) for role, numbers in self._shared.items() for key in numbers}
        for bank in self._banks:
            of_bank = {key: bank.part_shape(owned) for key, owned in _owned(bank).items()}
            of_bank |= {"pending": tuple(bank.shape)} if bank.update_every > 1 else {}
            shapes |= {f"{key}/{name}": shape for key, shape in of_bank.items() for name in bank.names}
        return shapes

    def snapshot(self) -> list[Tensor]:
        """Copies of this rank's share of everything, for `restore`."""
        return [tensor.clone() for tensor in self._all()]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        """Undo every change since the snapshot was taken."""
        for tensor, saved in zip(self._all(), snapshot, strict=True):
            tensor.copy_(saved)

    def _all(self) -> list[Tensor]:
        tensors = [tensor for bank in self._banks for tensor in (bank.weights, *bank.state.values())]
        tensors += [bank.grads for bank in self._banks if bank.update_every > 1]
        return tensors + [tensor for numbers in self._shared.values() for tensor in numbers.values()] + self._also_restored


def _owned(bank: Bank) -> dict[str, Tensor]:
    """What this rank owns of a bank, the divided dimension first."""
    return {"weights": bank.weights[bank.own]} | {key: bank.lead(tensor) for key, tensor in bank.state.items()}


def _fill(bank: Bank, whole: Tensor, key: str, tensors: dict[str, Tensor]) -> None:
    bank.stacked(whole).copy_(torch.stack([tensors[f"{key}/{name}"] for name in bank.names]))
