"""Adam: the sign of the gradient, softened by running averages (without them it is steepest descent under max |.|)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from configs.groups import Group
from optim.norms import Norm, Sign
from optim.rules.average import absorb_square
from optim.rules.base import Hyper, Rule, zeros_like_bank
from optim.step import Step


@dataclass(frozen=True, slots=True)
class Adam(Rule):
    """D = mhat / (sqrt(vhat) + eps) with m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, hats divided by 1 - b^t.

    Kingma & Ba 2014, arXiv 1412.6980, algorithm 1; with decoupled decay it is AdamW. Memories keep the
    parameter's dtype; the arithmetic is at least float32.
    """

    beta1: float
    beta2: float
    eps: float
    norm: Norm = Sign()

    @classmethod
    def build(cls, group: Group) -> "Adam":
        """The rule that a group's configuration describes."""
        return cls(group.beta1, group.beta2, group.eps)

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """First and second moment."""
        return {"mean": zeros_like_bank(param), "square": zeros_like_bank(param)}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """mhat / (sqrt(vhat) + eps), float32, of any shape."""
        grad, mean, square = grad.float(), state["mean"], state["square"]
        mean.lerp_(grad.to(mean.dtype), 1 - self.beta1)
        absorb_square(square, grad, self.beta2)
        root = (square.float() / (1 - self.beta2**hyper.count)).sqrt_().add_(self.eps)
        return mean.float().div(root).div_(1 - self.beta1**hyper.count)

    def update(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper, *, step: Step) -> None:
        """The whole step, in place; on CPUs in one pass over memory by PyTorch's fused AdamW, where it is the same."""
        exact = {tensor.dtype for tensor in (param, grad, state["mean"])} == {torch.float32}
        if param.device.type == "cpu" and step.is_plain and exact:
            self._update_fused(param, grad, state, hyper, 0.0 if step.decay == "none" else hyper.weight_decay.item())
            step.constraint.retract(param, state)
        else:
            step.apply(param, self.direction(param, grad, state, hyper), state, hyper)

    def _update_fused(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper, decay: float) -> None:
        adamw([param], [grad], [state["mean"]], [state["square"]], [], [hyper.count - 1], fused=True, amsgrad=False,
              beta1=self.beta1, beta2=self.beta2, lr=hyper.lr.item(), weight_decay=decay, eps=self.eps, maximize=False)
