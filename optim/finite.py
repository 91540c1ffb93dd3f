"""The watch on gradients: one that is not finite must reach no weight, and end the run on all ranks alike."""

import torch
from torch import Tensor

from optim.bank import Bank
from optim.comm import Comm

NEVER = 2.0**30
AT_ONCE = ("cpu", "mps")  # devices whose gradients are refused within the step


class NonFiniteError(RuntimeError):
    """A gradient holds a NaN or an infinity."""


class Watch:
    """Remembers, on the device, at which update each bank's gradient was first not finite, and where.

    Reading that waits for the device: `refuse` does, `see` does not, on CUDA.
    """

    def __init__(self, banks: list[Bank], comm: Comm) -> None:
        """Nothing seen yet."""
        self._banks, self._comm = banks, comm
        self._first = torch.full((len(banks),), NEVER, device=comm.device)
        self._place = torch.zeros(len(banks), dtype=torch.int64, device=comm.device)

    def reset(self) -> None:
        """Forget what was seen."""
        self._first.fill_(NEVER)

    def see(self, index: int, grad: Tensor, count: int) -> None:
        """Note whether a bank's owned gradient is finite; if it is not, it counts as zero from here on."""
        if not grad.numel():
            return
        low, high = torch.aminmax(grad)  # NaN is both; one pass, a tenth of what the maximum norm takes on CPUs
        finite = low.isfinite() & high.isfinite()
        if finite.device.type in AT_ONCE and finite:
            return
        fresh = ~finite & (self._first[index] == NEVER)
        lead = grad.isfinite().logical_not().reshape(grad.size(0), -1).any(1).int().argmax()
        self._place[index] = torch.where(fresh, lead, self._place[index])
        self._first[index] = torch.where(fresh, float(count), self._first[index])
        grad.masked_fill_(~finite, 0)

    def refuse(self) -> None:
        """Raise NonFiniteError, naming a parameter and the update, if any rank saw one. A collective."""
        first = [-x for x in self._comm.max(*(-self._first).tolist())]
        step = min(first, default=NEVER)
        if step == NEVER:
            return
        index = first.index(step)
        here = self._first[index].item() == step
        place = self._banks[index].own.start + int(self._place[index]) if here else -1
        name = self._banks[index].name_at(int(self._comm.max(place)[0]))
        raise NonFiniteError(f"the gradient of {name} is not finite at step {step:.0f}; no weight has seen it")
