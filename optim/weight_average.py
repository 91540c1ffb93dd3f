"""Averages of the weights over the steps, for evaluation alone."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.schema import Train
from optim.bank import Bank
from optim.comm import Comm

KEY = "average"


@dataclass(frozen=True, slots=True)
class WeightAverage:
    """avg <- beta avg + (1 - beta) W after each step (Polyak & Juditsky 1992), from the weights after update `start` on.

    Each rank averages what it owns, in float32, as one more memory of its banks. The training never sees it.
    """

    beta: float
    start: int
    blend: float = 1.0

    @classmethod
    def build(cls, train: Train) -> "WeightAverage | None":
        """What a run's configuration describes; None where it averages nothing."""
        if not train.weight_average:
            return None
        return cls(train.weight_average, round(train.weight_average_start * train.steps), train.weight_average_blend)

    def init(self, bank: Bank) -> None:
        """The average of the weights at the start: themselves."""
        bank.state[KEY] = bank.as_matrices(bank.weights[bank.own]).float().clone()

    def update(self, bank: Bank, count: int) -> None:
        """Take in the weights after update `count`."""
        weights = bank.as_matrices(bank.weights[bank.own]).float()
        bank.state[KEY].lerp_(weights, 1.0 if count <= self.start else 1 - self.beta)

    def shown(self, banks: list[Bank], comm: Comm) -> AbstractContextManager[None]:
        """Within, the parameters are blend avg + (1 - blend) W; after, what they were. A collective at the start."""
        def blended(bank: Bank) -> Tensor:
            return bank.as_matrices(bank.weights[bank.own]).float().lerp(bank.state[KEY], self.blend)

        return shown_instead(banks, comm, blended)


@contextmanager
def shown_instead(banks: list[Bank], comm: Comm, weights_of: Callable[[Bank], Tensor]) -> Iterator[None]:
    """Within, the parameters are others, of which `weights_of` knows each rank's own as matrices; after, what they were.
    A collective at the start."""
    kept = [bank.weights.clone() for bank in banks]
    with torch.no_grad():
        for bank in banks:
            bank.as_matrices(bank.weights[bank.own]).copy_(weights_of(bank))
        for work in [comm.all_gather(bank.weights) for bank in banks if bank.sharded]:
            work.wait()
    try:
        yield
    finally:
        with torch.no_grad():
            for bank, weights in zip(banks, kept, strict=True):
                bank.weights.copy_(weights)
