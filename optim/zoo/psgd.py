"""PSGD with Kronecker factors: descent in coordinates in which the gradient is white."""

import torch
from torch import Tensor

import configs.optim as configs
from optim.norms import Spectral
from optim.rule import Hyper, Rule, zeros_like_bank

TINY = 1e-30
LEAST_EPS = 1e-20  # where gradients stay zero factors grow as eps^-1/4: they must stay finite
LARGEST = 1e15  # whitened gradients are clipped here for the factors alone, whose fit squares them


class PSGD(Rule):
    """D = P_L mhat P_R, P_L = Q_L^2 and P_R = Q_R^2 learned such that D is white: E[D D^T] = n I and E[D^T D] = m I.

    Li 2015, arXiv 1512.04202; its Kronecker factors: Li 2024, arXiv 2402.11858, and Pooladzandi & Li 2024, arXiv 2402.04553.
    Q_L descends along E = D D^T - n I by Q <- Q - (lr / 2 b) (E Q), then (Q E), then its symmetric part, b a bound of
    ||D D^T|| + n: the form that its author calls QUAD, matrix products alone. Q_R likewise. What a step teaches acts from
    the next on. eps is the RMS of a noise that the fit imagines on the gradient, in expectation: P stays below 1 / eps.
    Steps of more than `most` RMS are scaled back, as the factors may lag behind a gradient that grows.
    """

    config: configs.PSGD
    norm = Spectral()

    @property
    def eps(self) -> float:
        """The configured one, at least LEAST_EPS."""
        return max(self.config.eps, LEAST_EPS)

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Mean, and factors (float32) that are zero until there is a gradient."""
        sizes = {"left": param.size(-2), "right": param.size(-1)}
        return {"mean": zeros_like_bank(param)} | {
            f"factor_{side}": torch.zeros(param.size(0), k, k, device=param.device) for side, k in sizes.items()}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """The whitened mean, its RMS at most `most`: float32 (K, m, n)."""
        mean, left, right = state["mean"], state["factor_left"], state["factor_right"]
        mean.lerp_(grad.to(mean.dtype), 1 - self.config.beta1)
        M = mean.float() / (1 - self.config.beta1**hyper.count)
        self._begin(M, left, right)
        size = _largest(M)
        P_left, P_right = left @ left, right @ right
        white = P_left @ (M / size.clamp_min(TINY)) @ P_right  # times `size`, whose product might overflow
        self._learn(white * torch.minimum(size, LARGEST / _largest(white)), state, P_left, P_right)
        return white * torch.minimum(size, self.config.step_rms / _rms(white, 2))

    def _begin(self, M: Tensor, left: Tensor, right: Tensor) -> None:
        """At the first gradient that is not zero: multiples of the identity that give it RMS 1, by its fourth moment."""
        fresh = (_largest(left) == 0) & (_largest(M) > 0)
        scale = torch.where(fresh, _rms(M, 4).clamp_min(self.eps) ** -0.25, 0.0).squeeze(-1)
        for factor in (left, right):
            factor.diagonal(dim1=-2, dim2=-1).add_(scale)

    def _learn(self, white: Tensor, state: dict[str, Tensor], P_left: Tensor, P_right: Tensor) -> None:
        """Both factors take a step, then are made equally large: only their product is determined."""
        left, right = state["factor_left"], state["factor_right"]
        for factor, A, own, other in ((left, white, P_left, P_right), (right, white.mT, P_right, P_left)):
            noise = (self.eps * other.norm(dim=(-2, -1), keepdim=True)).square()
            self._descend(factor, A @ A.mT + noise * (own @ own), A.size(-1))
        ratio = (_largest(right) / _largest(left).clamp_min(TINY)).sqrt()
        ratio = torch.where(ratio > 0, ratio, 1.0)
        left.mul_(ratio)
        right.div_(ratio)

    def _descend(self, factor: Tensor, gram: Tensor, wanted: int) -> None:
        rate = self.config.factor_lr / 2 / (spectral_bound(gram) + wanted)
        factor.sub_(rate * (gram @ factor - wanted * factor))
        factor.sub_(rate * (factor @ gram - wanted * factor))
        factor.copy_((factor + factor.mT) / 2)


def spectral_bound(gram: Tensor) -> Tensor:
    """A lower bound of the largest eigenvalue, near it, of positive semi-definite (K, k, k): two power iterations from the
    longest column. (K, 1, 1); zero for zero."""
    scale = _largest(gram).clamp_min(TINY)
    A = gram / scale
    longest = A.square().sum(-2, keepdim=True).argmax(-1, keepdim=True)
    x = A @ A.gather(-1, longest.expand(-1, A.size(-2), 1))
    x = x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp_min(TINY)
    return scale * torch.linalg.vector_norm(A @ x, dim=-2, keepdim=True)


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax(dim=(-2, -1), keepdim=True)


def _rms(x: Tensor, power: int) -> Tensor:
    """The root of the mean power; for 2 the root mean square."""
    largest = _largest(x)
    return largest * (x / largest.clamp_min(TINY)).pow(power).mean(dim=(-2, -1), keepdim=True) ** (1 / power)
