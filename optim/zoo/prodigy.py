"""Prodigy: Adam that finds its own learning rate, an estimate d of the distance from the start to a solution."""

import torch
from torch import Tensor

import configs.optim as configs
from optim.norms import TINY, Sign
from optim.rule import Hyper, Rule, Step, zeros_like_bank

LARGE = 1e37  # sums beyond it are not to be trusted in float32


class Prodigy(Rule):
    """D = d m / (sqrt(v) + d' eps), with m, v Adam's moments of d g, not debiased, and d' = max(d, numerator / ||s||_1):

    numerator <- b3 numerator + (d/d0) d lr <g, W0 - W>,  s <- b3 s + (d/d0) d lr g,  b3 = sqrt(b2), summed over the group.
    Mishchenko & Defazio 2023, arXiv 2306.06101, algorithm 4. lr is a factor on what it finds: leave it at 1, or schedule
    its end; weight decay acts as (1 - d lr wd) W.
    """

    config: configs.Prodigy
    norm = Sign()

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Adam's moments; s; and the weights at the start. float32: d^2 g^2 is small."""
        wide = param.float()
        return {key: zeros_like_bank(wide) for key in ("mean", "square", "s")} | {"origin": wide.clone()}

    def init_shared(self) -> dict[str, Tensor]:
        """d after and before the present step, and the numerator."""
        start = torch.tensor(self.config.distance_start)
        return {"d": start, "d_before": start.clone(), "numerator": torch.zeros(())}

    def sums(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """<g, W0 - W> and ||s||_1, with g taken into s."""
        grad, s, d = grad.float(), state["s"], hyper.shared["d"]
        s.mul_(self.config.beta2**0.5).add_(grad * (d / self.config.distance_start * d * hyper.lr)).clamp_(-LARGE, LARGE)
        return torch.stack([(grad * (state["origin"] - param)).sum(), s.abs().sum()])

    def update_shared(self, sums: Tensor, hyper: Hyper) -> None:
        """d never shrinks; a step without gradients, or with ones too large to sum, leaves it as it is."""
        d, numerator = hyper.shared["d"], hyper.shared["numerator"]
        hyper.shared["d_before"].copy_(d)
        trusted = (sums.abs() < LARGE).all()
        inner = torch.where(trusted, sums[0], 0)
        numerator.mul_(self.config.beta2**0.5).add_(d / self.config.distance_start * d * hyper.lr * inner)
        found = numerator / sums[1].clamp_min(TINY)
        d.copy_(torch.where(trusted & (sums[1] > 0), torch.maximum(d, found), d))

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """d m / (sqrt(v) + d' eps), float32, of any shape."""
        d, mean, square = hyper.shared["d_before"], state["mean"], state["square"]
        scaled = grad.float() * d
        mean.lerp_(scaled, 1 - self.config.beta1)
        square.lerp_(scaled.square(), 1 - self.config.beta2).clamp_(max=LARGE)
        return mean * d / (square.sqrt() + hyper.shared["d"] * self.config.eps).clamp_min(TINY)

    def update(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper, *, step: Step) -> None:
        """The whole step, in place; weight decay is in units of d."""
        direction = self.direction(param, grad, state, hyper)
        step.apply(param, direction, state, hyper._replace(weight_decay=hyper.weight_decay * hyper.shared["d_before"]))
