"""What hangs on the optimizer's step: averages of the weights, look-ahead, sums over a role.

A hook acts at two moments of a step: `before` any bank is updated, and `after_update` of each bank, ahead of its all-gather,
also where the bank was not due.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.schema import Run, Train
from optim.bank import Bank
from optim.comm import Comm
from optim.rule import Hyper
from optim.schedule import Schedule

AVERAGE, BASE, DRIFT = "average", "ahead_base", "ahead_drift"  # names of state


class Hook:
    """The base of all hooks: does nothing."""

    def init(self, bank: Bank) -> None:
        """Add the hook's state to a bank's."""

    def before(self, banks: Sequence[Bank], due: Sequence[Bank], hypers: Mapping[str, Hyper], count: int) -> None:
        """Act before any bank is updated; gradients of `due` banks may still be on their way."""

    def after_update(self, bank: Bank, count: int) -> None:
        """Act on a bank's owned weights after update `count`, before other ranks get them."""

    def evaluation_weights(self, banks: Sequence[Bank], comm: Comm) -> AbstractContextManager[None]:
        """Within, the parameters are those to be evaluated; after, what they were. A collective at the start."""
        return nullcontext()


@dataclass(frozen=True, slots=True)
class WeightAverage(Hook):
    """avg <- beta avg + (1 - beta) W after each step (Polyak & Juditsky 1992), from the weights after update `start` on.

    Each rank averages what it owns, in float32, as one more state of its banks. Only evaluation sees it.
    """

    beta: float
    start: int
    blend: float = 1.0

    @classmethod
    def build(cls, train: Train) -> "WeightAverage":
        """What a run's configuration describes."""
        return cls(train.weight_average, round(train.weight_average_start * train.steps), train.weight_average_blend)

    def init(self, bank: Bank) -> None:
        """The average of the weights at the start: themselves."""
        bank.state[AVERAGE] = bank.matrices.float().clone()

    def after_update(self, bank: Bank, count: int) -> None:
        """Take in the weights after update `count`."""
        bank.state[AVERAGE].lerp_(bank.matrices.float(), 1.0 if count <= self.start else 1 - self.beta)

    def evaluation_weights(self, banks: Sequence[Bank], comm: Comm) -> AbstractContextManager[None]:
        """Within, the parameters are blend avg + (1 - blend) W."""
        def blended(bank: Bank) -> Tensor:
            return bank.matrices.float().lerp(bank.state[AVERAGE], self.blend)

        return replaced_weights(banks, comm, blended)


@dataclass(frozen=True, slots=True)
class Lookahead(Hook):
    """x' = step(y), y = x + b d with the mean movement d <- gamma d + (1 - gamma) (x' - x), for any rule's step
    (EMA-Nesterov, arXiv 2605.25395; speedrun track 3, results 39 and 40).

    The weights in the banks are y: where gradients are taken, and where the step starts. x, which is evaluated, and d are
    two more states of the banks, float32, of what each rank owns; so y costs no communication of its own.
    """

    gamma: float
    reach: tuple[float, ...]
    """b of each step of the run."""

    @classmethod
    def build(cls, run: Run) -> "Lookahead":
        """What a run's configuration describes."""
        train, schedule = run.train, Schedule(run)
        first, last = (round(share * train.steps) for share in (train.lookahead_start, train.lookahead_end))
        return cls(train.lookahead_gamma, tuple(train.lookahead * schedule.values(step).lr if first <= step < last else 0.0
                                                for step in range(train.steps)))

    def init(self, bank: Bank) -> None:
        """At the start nothing has moved."""
        bank.state[BASE] = bank.matrices.float().clone()
        bank.state[DRIFT] = bank.state[BASE].new_zeros(bank.state[BASE].shape)

    def after_update(self, bank: Bank, count: int) -> None:
        """From the weights x' after update `count` to where the next gradient is taken; after the last step nowhere."""
        own, base, drift = bank.matrices, bank.state[BASE], bank.state[DRIFT]
        weights = bank.step.exact(own, bank.state)
        drift.lerp_(weights - base, 1 - self.gamma)
        base.copy_(weights)
        reach = self.reach[count] if count < len(self.reach) else 0.0
        if reach:
            bank.step.place(own, base + reach * drift, bank.state, count)

    def evaluation_weights(self, banks: Sequence[Bank], comm: Comm) -> AbstractContextManager[None]:
        """Within, the parameters are x."""
        return replaced_weights(banks, comm, lambda bank: bank.state[BASE])


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
                members[0].group.rule.update_shared(total, hyper)

    def _part(self, bank: Bank, hyper: Hyper) -> Tensor:
        """One bank's sums on this rank; a bank that every rank updates whole counts once."""
        hyper = hyper._replace(lr=hyper.lr * bank.spec.lr_factor) if bank.spec.lr_factor != 1 else hyper
        part = bank.group.rule.sums(bank.matrices, bank.rule_gradient(), bank.state, hyper)
        return part if bank.sharded or self._comm.rank == 0 else torch.zeros_like(part)


def build_hooks(run: Run) -> list[Hook]:
    """The hooks of a run's configuration, in the order in which they act: the average does not see what lies ahead."""
    hooks: list[Hook] = []
    if run.train.weight_average:
        hooks.append(WeightAverage.build(run.train))
    if run.train.lookahead:
        hooks.append(Lookahead.build(run))
    return hooks


@contextmanager
def replaced_weights(banks: Sequence[Bank], comm: Comm, weights_of: Callable[[Bank], Tensor]) -> Iterator[None]:
    """Within, the parameters are others: `weights_of` gives each rank's own, as matrices; after, what they were. A
    collective at the start."""
    saved = [bank.weights.clone() for bank in banks]
    with torch.no_grad():
        for bank in banks:
            bank.matrices.copy_(weights_of(bank))
        for work in [comm.all_gather(bank.weights) for bank in banks if bank.sharded]:
            work.wait()
    try:
        yield
    finally:
        with torch.no_grad():
            for bank, weights in zip(banks, saved, strict=True):
                bank.weights.copy_(weights)
