"""Hooks of the optimizer's step: averaged weights, look-ahead, and sums over a role.

A hook acts twice in a step: in `before`, before any bank is updated; and in `after_update`, once for each bank, before its
all-gather, so that what the hook writes reaches all ranks with it. `after_update` is called for banks that were not due too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.optim import RuleConfig
from configs.schema import Run, Train
from optim.bank import Bank, rule_gradient
from optim.comm import Comm
from optim.rule import Hyper
from optim.schedule import Schedule

AVERAGE, BASE, DRIFT = "average", "ahead_base", "ahead_drift"  # keys in bank.state and in checkpoints


class Hook:
    """Base of all hooks: does nothing."""

    def init(self, bank: Bank) -> None:
        """Add the hook's state to bank.state."""

    def before(self, banks: Sequence[Bank], due: Sequence[Bank], hypers: Mapping[str, Hyper], count: int) -> None:
        """Act before any bank is updated; `due` are those updated in this step. Their gradients may still be in flight."""

    def after_update(self, bank: Bank, count: int) -> None:
        """Act on this rank's shard of a bank after update `count`, before other ranks get it."""

    def evaluation_weights(self, banks: Sequence[Bank], comm: Comm) -> AbstractContextManager[None]:
        """Return a context in which the parameters are the weights to evaluate. Entering it is a collective."""
        return nullcontext()


@dataclass(frozen=True, slots=True)
class WeightAverage(Hook):
    """Running average of the weights, for evaluation only: avg <- beta avg + (1 - beta) W after each step (Polyak & Juditsky
    1992). Each rank averages its shard, in float32, as one more state tensor of the bank."""

    beta: float
    start: int
    """Update until which the average equals the weights."""
    blend: float = 1.0
    """Evaluated are blend avg + (1 - blend) W, unless a role has its own blend; with 0 it has no average."""

    @classmethod
    def build(cls, train: Train) -> "WeightAverage":
        """Return the hook that a run's config describes."""
        return cls(train.weight_average, round(train.weight_average_start * train.steps), train.weight_average_blend)

    def blend_of(self, config: RuleConfig) -> float:
        """Return the blend of a role with this config."""
        return self.blend if config.extra.average_blend is None else config.extra.average_blend

    def init(self, bank: Bank) -> None:
        """Start the average at the initial weights."""
        if self.blend_of(bank.group.config):
            bank.state[AVERAGE] = bank.matrices.float().clone()

    def after_update(self, bank: Bank, count: int) -> None:
        """Update the average with the weights after update `count`."""
        if AVERAGE in bank.state:
            bank.state[AVERAGE].lerp_(bank.matrices.float(), 1.0 if count <= self.start else 1 - self.beta)

    def evaluation_weights(self, banks: Sequence[Bank], comm: Comm) -> AbstractContextManager[None]:
        """Return a context in which the parameters are blend avg + (1 - blend) W."""
        return swap_weights([bank for bank in banks if AVERAGE in bank.state], comm, lambda bank:
                            bank.matrices.float().lerp(bank.state[AVERAGE], self.blend_of(bank.group.config)))


@dataclass(frozen=True, slots=True)
class Lookahead(Hook):
    """Nesterov look-ahead for any rule (EMA-Nesterov, arXiv 2605.25395; speedrun track 3, results 39 and 40).

        y  = x + b d                             gradients are taken at y, and the rule steps from y
        x' = step(y)
        d <- gamma d + (1 - gamma) (x' - x)      average movement

    The weights in the banks are y. x, which is evaluated, and d are float32 state of each rank's shard: y then reaches the
    other ranks by the step's own all-gather.
    """

    gamma: float
    reach: tuple[float, ...]
    """b at each step of the run."""

    @classmethod
    def build(cls, run: Run) -> "Lookahead":
        """Return the hook that a run's config describes: b follows the lr curve from lookahead_start to lookahead_end."""
        train, schedule = run.train, Schedule(run)
        first, last = round(train.lookahead_start * train.steps), round(train.lookahead_end * train.steps)
        reach = (train.lookahead * schedule.values(step).lr if first <= step < last else 0.0 for step in range(train.steps))
        return cls(train.lookahead_gamma, tuple(reach))

    def init(self, bank: Bank) -> None:
        """Start with x at the initial weights and d = 0."""
        bank.state[BASE] = bank.matrices.float().clone()
        bank.state[DRIFT] = bank.state[BASE].new_zeros(bank.state[BASE].shape)

    def after_update(self, bank: Bank, count: int) -> None:
        """Replace the weights x' after update `count` by the next y; after the run's last step they stay x'."""
        base, drift = bank.state[BASE], bank.state[DRIFT]
        weights = bank.step.float32_weights(bank.matrices, bank.state)
        drift.lerp_(weights - base, 1 - self.gamma)
        base.copy_(weights)
        reach = self.reach[count] if count < len(self.reach) else 0.0
        if reach:
            bank.step.set_weights(bank.matrices, base + reach * drift, bank.state, count)

    def evaluation_weights(self, banks: Sequence[Bank], comm: Comm) -> AbstractContextManager[None]:
        """Return a context in which the parameters are x."""
        return swap_weights(banks, comm, lambda bank: bank.state[BASE])


class RoleSums(Hook):
    """Sums over all tensors of a role and all ranks, for rules that share numbers over their role (agd, prodigy)."""

    def __init__(self, comm: Comm, receive: Callable[[Bank, int], None]) -> None:
        """`receive(bank, count)` waits for a bank's gradient."""
        self._comm, self._receive = comm, receive

    def before(self, banks: Sequence[Bank], due: Sequence[Bank], hypers: Mapping[str, Hyper], count: int) -> None:
        """Wait for the role's gradients, add up `Rule.sums` over banks and ranks, and update the shared numbers."""
        for role, hyper in hypers.items():
            if hyper.shared:
                members = [bank for bank in due if bank.group.role == role]
                for bank in members:
                    self._receive(bank, count)
                total = torch.stack([self._local_sums(bank, hyper) for bank in members]).sum(0)
                self._comm.all_reduce(total).wait()
                members[0].group.rule.update_shared(total, hyper)

    def _local_sums(self, bank: Bank, hyper: Hyper) -> Tensor:
        """Return one bank's sums on this rank."""
        hyper = hyper._replace(lr=hyper.lr * bank.spec.lr_factor) if bank.spec.lr_factor != 1 else hyper
        grad = rule_gradient(bank.group, bank.step, bank.reduced_grad, bank.matrices, bank.state, period=hyper.period)
        sums = bank.group.rule.sums(bank.matrices, grad, bank.state, hyper)
        # Every rank has the whole of a bank that is not sharded; only rank 0's copy counts.
        return sums if bank.sharded or self._comm.rank == 0 else torch.zeros_like(sums)


def build_hooks(run: Run) -> list[Hook]:
    """Return the hooks of a run's config, in the order in which they act.

    The average comes before look-ahead, so that it averages the weights x' and not those ahead of them.
    """
    hooks: list[Hook] = []
    if run.train.weight_average:
        hooks.append(WeightAverage.build(run.train))
    if run.train.lookahead:
        hooks.append(Lookahead.build(run))
    return hooks


@contextmanager
def swap_weights(banks: Sequence[Bank], comm: Comm, weights_of: Callable[[Bank], Tensor]) -> Iterator[None]:
    """Replace the parameters within the context, and restore them after it, also after an exception.

    `weights_of` returns this rank's shard of a bank's new weights, as matrices (k, m, n). Entering is a collective.
    """
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
