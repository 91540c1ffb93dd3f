"""Adam: the sign of the gradient, softened by running averages (without them it is steepest descent under max |.|)."""

import torch
from torch import Tensor
from torch.optim.adamw import adamw

import configs.optim as configs
from optim.norms import Sign
from optim.rule import Hyper, Rule, Step, update_second_moment, zeros_like_bank


class Adam(Rule):
    """D = mhat / (sqrt(vhat) + eps) with m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2, hats divided by 1 - b^t.

    Kingma & Ba 2014, arXiv 1412.6980, algorithm 1; with decoupled decay it is AdamW. State has the parameter's dtype; the
    arithmetic is at least float32.
    """

    config: configs.Adam
    norm = Sign()

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """First and second moment."""
        return {"mean": zeros_like_bank(param), "square": zeros_like_bank(param)}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """mhat / (sqrt(vhat) + eps), float32, of any shape."""
        config, mean, square = self.config, state["mean"], state["square"]
        grad = grad.float()
        mean.lerp_(grad.to(mean.dtype), 1 - config.beta1)
        update_second_moment(square, grad, config.beta2)
        root = (square.float() / (1 - config.beta2**hyper.count)).sqrt_().add_(config.eps)
        return mean.float().div(root).div_(1 - config.beta1**hyper.count)

    def update(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper, *, step: Step) -> None:
        """The whole step, in place; on CPUs in one pass over memory by PyTorch's fused AdamW, where it is the same."""
        config, mean, square = self.config, state["mean"], state["square"]
        exact = param.device.type == "cpu" and param.dtype == grad.dtype == mean.dtype == torch.float32
        plain = step.decay in ("none", "decoupled") and step.shape is None
        if not (exact and plain and (step.constraint is None or step.constraint.plain)):
            return super().update(param, grad, state, hyper, step=step)
        # PyTorch counts the step before it updates, hence count - 1.
        adamw([param], [grad], [mean], [square], [], [hyper.count - 1], fused=True, amsgrad=False, maximize=False,
              beta1=config.beta1, beta2=config.beta2, eps=config.eps, lr=hyper.lr.item(),
              weight_decay=0.0 if step.decay == "none" else hyper.weight_decay.item())
        if step.constraint is not None:
            step.constraint.retract(param, state)
