"""Sums over all tensors of a role, on all ranks, that automatic gradient descent and Prodigy need before they step."""

from collections.abc import Callable, Mapping, Sequence

import torch

from optim.bank import Bank
from optim.comm import Comm
from optim.hooks import Hook
from optim.rule import Hyper


class RoleSums(Hook):
    """Adds up `Rule.sums` over the banks and ranks of every role whose rule shares numbers; then the rule absorbs them."""

    def __init__(self, comm: Comm, receive: Callable[[Bank, int], None]) -> None:
        """`receive` waits for a bank's gradient."""
        self._comm, self._receive = comm, receive

    def before(self, banks: Sequence[Bank], due: Sequence[Bank], hypers: Mapping[str, Hyper], count: int) -> None:
        """Wait for the role's gradients, sum, and let its rule update the shared numbers."""
        for role, hyper in hypers.items():
            if hyper.shared:
                members = [bank for bank in due if bank.group.role == role]
                for bank in members:
                    self._receive(bank, count)
                total = torch.stack([self._part(bank, hyper) for bank in members]).sum(0)
                self._comm.all_reduce(total).wait()
                members[0].group.rule.absorb(total, hyper)

    def _part(self, bank: Bank, hyper: Hyper) -> torch.Tensor:
        """One bank's sums on this rank; a bank that every rank updates whole counts once."""
        hyper = hyper._replace(lr=hyper.lr * bank.spec.lr_factor) if bank.spec.lr_factor != 1 else hyper
        part = bank.group.rule.sums(bank.matrices, bank.rule_gradient(), bank.state, hyper)
        return part if bank.sharded or self._comm.rank == 0 else torch.zeros_like(part)
