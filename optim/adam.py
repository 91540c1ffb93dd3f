"""Adam: a step of about lr in every element, along the sign of the averaged gradient.

Without its running averages it is sign(G), steepest descent under the norm max |W_ij|.
"""

import torch
from torch import Tensor
from torch.optim.adamw import adamw

import configs.optim as configs
from optim.norms import Sign
from optim.rule import Hyper, Rule, Step, update_second_moment, zeros_like_bank


class Adam(Rule):
    """Direction D = mhat / (sqrt(vhat) + eps) (Kingma & Ba 2014, arXiv 1412.6980, algorithm 1).

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  mhat = m / (1 - b1^t);  vhat = v / (1 - b2^t) at update t = 1, 2, ...
    With decoupled weight decay it is AdamW. The state has the parameter's dtype; the arithmetic is in float32.
    """

    config: configs.Adam
    norm = Sign()

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return the zero first moment (`mean`) and second moment (`square`), of the parameter's shape."""
        return {"mean": zeros_like_bank(param), "square": zeros_like_bank(param)}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Update both moments in place and return mhat / (sqrt(vhat) + eps), float32, of any shape."""
        config, mean, square = self.config, state["mean"], state["square"]
        grad = grad.float()
        mean.lerp_(grad.to(mean.dtype), 1 - config.beta1)
        update_second_moment(square, grad, config.beta2)
        denominator = (square.float() / (1 - config.beta2**hyper.count)).sqrt_().add_(config.eps)
        return mean.float().div(denominator).div_(1 - config.beta1**hyper.count)

    def update(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper, *, step: Step) -> None:
        """Do the whole step in place; float32 parameters on CPUs by PyTorch's fused AdamW, in one pass over memory."""
        config, mean, square = self.config, state["mean"], state["square"]
        # On CPUs only: elsewhere .item() below would wait for the device.
        on_cpu_float32 = param.device.type == "cpu" and param.dtype == grad.dtype == mean.dtype == torch.float32
        is_adamw = step.decay in ("none", "decoupled") and step.shape is None
        if not (on_cpu_float32 and is_adamw and (step.constraint is None or step.constraint.plain)):
            return super().update(param, grad, state, hyper, step=step)
        # PyTorch increments the step count before it updates, hence count - 1.
        adamw([param], [grad], [mean], [square], [], [hyper.count - 1], fused=True, amsgrad=False, maximize=False,
              beta1=config.beta1, beta2=config.beta2, eps=config.eps, lr=hyper.lr.item(),
              weight_decay=0.0 if step.decay == "none" else hyper.weight_decay.item())
        if step.constraint is not None:
            step.constraint.retract(param, state)
