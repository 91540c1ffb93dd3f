"""Gradients from ahead: each is taken where the weights' mean movement is about to lead (EMA-Nesterov)."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

from configs.schema import Run
from optim.bank import Bank
from optim.comm import Comm
from optim.schedule import Schedule
from optim.weight_average import shown_instead

BASE, DRIFT = "ahead_base", "ahead_drift"


@dataclass(frozen=True, slots=True)
class Lookahead:
    """x' = step(y), y = x + b d with the mean movement d <- gamma d + (1 - gamma) (x' - x), for any rule's step
    (arXiv 2605.25395; speedrun track 3, results 39 and 40).

    The weights in the banks are y: what gradients are taken at, and what the step starts from. x, which is evaluated, and
    d are two more memories of the banks, float32, of what each rank owns; so y costs no communication of its own.
    """

    gamma: float
    reach: tuple[float, ...]
    """b of each step of the run."""

    @classmethod
    def build(cls, run: Run) -> "Lookahead | None":
        """What a run's configuration describes; None where nothing looks ahead."""
        train, schedule = run.train, Schedule(run)
        if not train.lookahead:
            return None
        first, last = (round(share * train.steps) for share in (train.lookahead_start, train.lookahead_end))
        return cls(train.lookahead_gamma, tuple(train.lookahead * schedule.values(step).lr if first <= step < last else 0.0
                                                for step in range(train.steps)))

    def init(self, bank: Bank) -> None:
        """At the start nothing has moved."""
        bank.state[BASE] = bank.as_matrices(bank.weights[bank.own]).float().clone()
        bank.state[DRIFT] = bank.state[BASE].new_zeros(bank.state[BASE].shape)

    def update(self, bank: Bank, count: int) -> None:
        """From the weights x' after update `count` to where the next gradient is taken."""
        own, base, drift = bank.as_matrices(bank.weights[bank.own]), bank.state[BASE], bank.state[DRIFT]
        weights = bank.step.exact(own, bank.state)
        drift.lerp_(weights - base, 1 - self.gamma)
        base.copy_(weights)
        if reach := self._reach(count):
            bank.step.place(own, base + reach * drift, bank.state, count)

    def _reach(self, count: int) -> float:
        """After the last step the weights stay where they are."""
        return self.reach[count] if count < len(self.reach) else 0.0

    def shown(self, banks: list[Bank], comm: Comm) -> AbstractContextManager[None]:
        """Within, the parameters are x; after, what they were. A collective at the start."""
        return shown_instead(banks, comm, lambda bank: bank.state[BASE])
