"""What an optimizer needs in order to go on: to a checkpoint and back, at any world size, and undone after a rehearsal."""

import torch
from torch import Tensor

from optim.bank import Bank
from optim.comm import Comm


class Memory:
    """Weights and state of all banks, the groups' shared numbers, and gradients that wait for a later step."""

    def __init__(self, banks: list[Bank], shared: dict[str, dict[str, Tensor]], comm: Comm) -> None:
        """`shared`: role > name > 0-D number."""
        self._banks, self._shared, self._comm = banks, shared, comm

    def tensors(self) -> dict[str, Tensor]:
        """Weights and state of every parameter as whole CPU tensors, `weights/NAME` and `NAME`-keyed state: independent
        of the world size; `pending/NAME` is the sum over ranks of gradients that wait. A collective.
        """
        found = {f"shared/{role}/{key}": tensor.reshape(1).clone().cpu()
                 for role, numbers in self._shared.items() for key, tensor in numbers.items()}
        for bank in self._banks:
            wholes = {key: self._whole(bank, owned) for key, owned in _owned(bank).items()}
            if bank.waits:
                wholes["pending"] = bank.grads.clone()
                self._comm.all_reduce(wholes["pending"]).wait()
            for key, whole in wholes.items():
                parts = bank.stacked(whole).cpu()
                found |= {f"{key}/{name}": part for name, part in zip(bank.names, parts, strict=True)}
        return found

    def _whole(self, bank: Bank, owned: Tensor) -> Tensor:
        if not bank.sharded:
            return owned.clone()
        whole = owned.new_zeros(bank.weights.size(0), *owned.shape[1:])
        whole[bank.own] = owned
        self._comm.all_gather(whole).wait()
        return whole

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Undo `tensors`, at any world size. The caller has checked names and shapes (see `shapes`)."""
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
            if bank.waits:
                bank.grads.zero_()
                if self._comm.rank == 0:  # the sum over ranks is what will count
                    _fill(bank, bank.grads, "pending", tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of `tensors`, without communication."""
        found = {f"shared/{role}/{key}": (1,) for role, numbers in self._shared.items() for key in numbers}
        for bank in self._banks:
            kinds = {key: bank.part_shape(owned) for key, owned in _owned(bank).items()}
            kinds |= {"pending": tuple(bank.shape)} if bank.waits else {}
            found |= {f"{key}/{name}": shape for key, shape in kinds.items() for name in bank.names}
        return found

    def snapshot(self) -> list[Tensor]:
        """Copies of this rank's share of everything, for `restore`."""
        return [tensor.clone() for tensor in self._all()]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        """Undo every change since the snapshot was taken."""
        for tensor, saved in zip(self._all(), snapshot, strict=True):
            tensor.copy_(saved)

    def _all(self) -> list[Tensor]:
        found = [tensor for bank in self._banks for tensor in (bank.weights, *bank.state.values())]
        found += [bank.grads for bank in self._banks if bank.waits]
        return found + [tensor for numbers in self._shared.values() for tensor in numbers.values()]


def _owned(bank: Bank) -> dict[str, Tensor]:
    """What this rank keeps of a bank, the divided dimension first."""
    return {"weights": bank.weights[bank.own]} | {key: bank.lead(tensor) for key, tensor in bank.state.items()}


def _fill(bank: Bank, whole: Tensor, key: str, tensors: dict[str, Tensor]) -> None:
    bank.stacked(whole).copy_(torch.stack([tensors[f"{key}/{name}"] for name in bank.names]))
