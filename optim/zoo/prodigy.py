"""Prodigy: Adam whose learning rate is an estimate d of the distance from the start W0 to a solution.

Mishchenko & Defazio 2023, arXiv 2306.06101, algorithm 4. With b3 = sqrt(b2), and sums over all tensors of the group:

    r  <- b3 r + (d / d0) d lr <G, W0 - W>               `numerator`
    s  <- b3 s + (d / d0) d lr G
    d'  = max(d, r / ||s||_1)
    m  <- b1 m + (1 - b1) d G;   v <- b2 v + (1 - b2) d^2 G^2
    D   = d m / (sqrt(v) + d' eps);   W <- (1 - d lr wd) W - lr D;   then d <- d'

lr is a factor on d: leave it at 1, or let a schedule lower it at the end. d never shrinks. The public code (prodigyopt) has
more options; this is its default, without bias correction, safeguard for warm-up, or limit on the growth of d. Its parameter
groups share one d; here each role has its own.

State, float32, of the weights' shape: `mean` m, `square` v, `s`, `origin` W0. Shared by the group, scalars: `d` (d' once the
step has updated it), `d_before` (the step's d), `numerator`.
"""

import torch
from torch import Tensor

import configs.optim as configs
from optim.norms import TINY, Sign
from optim.rule import Hyper, Rule, Step, zeros_like_bank

LARGE = 1e37  # larger sums are near the end of float32 and do not change d


class Prodigy(Rule):
    """Prodigy (Mishchenko & Defazio 2023, algorithm 4)."""

    config: configs.Prodigy
    norm = Sign()

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return zero averages and a copy of the weights."""
        wide = param.float()  # float32 also for bfloat16 weights: d^2 G^2 is tiny while d is near d0
        return {key: zeros_like_bank(wide) for key in ("mean", "square", "s")} | {"origin": wide.clone()}

    def init_shared(self) -> dict[str, Tensor]:
        """Return `d` and `d_before` at d0, and a zero numerator."""
        start = torch.tensor(self.config.distance_start)
        return {"d": start, "d_before": start.clone(), "numerator": torch.zeros(())}

    def sums(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Update s in place; return this stack's <G, W0 - W> and ||s||_1, (2,)."""
        grad, s, d = grad.float(), state["s"], hyper.shared["d"]
        s.mul_(self.config.beta2**0.5).add_(grad * (d / self.config.distance_start * d * hyper.lr)).clamp_(-LARGE, LARGE)
        return torch.stack([(grad * (state["origin"] - param)).sum(), s.abs().sum()])

    def update_shared(self, sums: Tensor, hyper: Hyper) -> None:
        """Update d and the numerator; d stays if there is no gradient, or if a sum is too large for float32."""
        d, numerator = hyper.shared["d"], hyper.shared["numerator"]
        hyper.shared["d_before"].copy_(d)
        # torch.where instead of `if`: the decision stays on the device, without a synchronisation.
        is_finite = (sums.abs() < LARGE).all()
        inner = torch.where(is_finite, sums[0], 0)
        numerator.mul_(self.config.beta2**0.5).add_(d / self.config.distance_start * d * hyper.lr * inner)
        estimate = numerator / sums[1].clamp_min(TINY)
        d.copy_(torch.where(is_finite & (sums[1] > 0), torch.maximum(d, estimate), d))

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return D = d m / (sqrt(v) + d' eps), float32, of any shape."""
        d, mean, square = hyper.shared["d_before"], state["mean"], state["square"]
        scaled = grad.float() * d
        mean.lerp_(scaled, 1 - self.config.beta1)
        square.lerp_(scaled.square(), 1 - self.config.beta2).clamp_(max=LARGE)
        # The old d but eps times the new one, as in the authors' code.
        return mean * d / (square.sqrt() + hyper.shared["d"] * self.config.eps).clamp_min(TINY)

    def update(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper, *, step: Step) -> None:
        """Apply the whole step to `param`, in place; weight decay is multiplied by d, as the learning rate is."""
        direction = self.direction(param, grad, state, hyper)
        step.apply(param, direction, state, hyper._replace(weight_decay=hyper.weight_decay * hyper.shared["d_before"]))
