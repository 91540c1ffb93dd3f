"""PSGD with Kronecker factors: descent in coordinates in which the gradient is white.

Li 2015, arXiv 1512.04202; Kronecker factors: Li 2024, arXiv 2402.11858, and Pooladzandi & Li 2024, arXiv 2402.04553. The fit
is the one that its author calls QUAD, which needs matrix products alone. With symmetric Q_L (m x m) and Q_R (n x n):

    u   <- b1 u + (1 - b1) G;   M = u / (1 - b1^t)
    P_L  = Q_L^2;   P_R = Q_R^2;   D = P_L M P_R           scaled down to an RMS of step_rms;   W <- W - lr D

The factors are fitted so that D is white, E[D D^T] = n I and E[D^T D] = m I. For the left one, A = D D^T + noise:

    noise = eps^2 ||P_R||_F^2 P_L^2;   c = factor_lr / (2 (bound of ||A|| + n))
    Q <- Q - c (A - n I) Q;   Q <- Q - c Q (A - n I);   Q <- (Q + Q^T) / 2

The right one likewise, with D^T D and m. `noise` is what independent entries of RMS eps, added to M, would add to D D^T in
expectation; nothing is drawn at random. It keeps P below 1 / eps. step_rms limits D because the factors lag behind when the
gradient grows.

State: `mean` u (K, m, n), in the dtype of the weights; `factor_left` Q_L (K, m, m), `factor_right` Q_R (K, n, n), float32,
zero until the first gradient that is not zero. Shapes: K matrices m x n in one stack; k for m or n.
"""

import torch
from torch import Tensor

import configs.optim as configs
from optim.norms import Spectral
from optim.rule import Hyper, Rule, zeros_like_bank

TINY = 1e-30
LEAST_EPS = 1e-20  # while gradients are zero the factors grow up to eps^-1/4, which must stay finite
LARGEST = 1e15  # the fit squares D, which is clipped here for the fit alone


class PSGD(Rule):
    """PSGD with Kronecker factors (Li 2024)."""

    config: configs.PSGD
    norm = Spectral()

    @property
    def eps(self) -> float:
        """The configured eps, but at least LEAST_EPS."""
        return max(self.config.eps, LEAST_EPS)

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return a zero average and zero factors, which stand for "no gradient yet"."""
        sizes = {"left": param.size(-2), "right": param.size(-1)}
        return {"mean": zeros_like_bank(param)} | {
            f"factor_{side}": torch.zeros(param.size(0), k, k, device=param.device) for side, k in sizes.items()}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return the whitened average D, with an RMS of at most step_rms, float32 (K, m, n)."""
        mean, left_Kmm, right_Knn = state["mean"], state["factor_left"], state["factor_right"]
        mean.lerp_(grad.to(mean.dtype), 1 - self.config.beta1)
        M_Kmn = mean.float() / (1 - self.config.beta1**hyper.count)
        self._init_factors(M_Kmn, left_Kmm, right_Knn)
        # D is white_Kmn times `scale`: the product of both might overflow.
        scale = _largest(M_Kmn)
        P_Kmm, P_Knn = left_Kmm @ left_Kmm, right_Knn @ right_Knn
        white_Kmn = P_Kmm @ (M_Kmn / scale.clamp_min(TINY)) @ P_Knn
        # Fit after D is computed: what the factors learn from this gradient acts from the next step on.
        self._fit_factors(white_Kmn * torch.minimum(scale, LARGEST / _largest(white_Kmn)), state, P_Kmm, P_Knn)
        return white_Kmn * torch.minimum(scale, self.config.step_rms / _rms(white_Kmn, 2))

    def _init_factors(self, M_Kmn: Tensor, left_Kmm: Tensor, right_Knn: Tensor) -> None:
        """Set both factors, in place, to multiples of I that scale the first gradient that is not zero to (a fourth-moment)
        RMS of 1."""
        is_first = (_largest(left_Kmm) == 0) & (_largest(M_Kmn) > 0)
        # D = Q_L^2 M Q_R^2 holds four factors of this multiple.
        multiple = torch.where(is_first, _rms(M_Kmn, 4).clamp_min(self.eps) ** -0.25, 0.0).squeeze(-1)
        for factor in (left_Kmm, right_Knn):
            factor.diagonal(dim1=-2, dim2=-1).add_(multiple)

    def _fit_factors(self, D_Kmn: Tensor, state: dict[str, Tensor], P_Kmm: Tensor, P_Knn: Tensor) -> None:
        """Move both factors towards those that whiten D, in place."""
        left_Kmm, right_Knn = state["factor_left"], state["factor_right"]
        for factor, D, own, other in ((left_Kmm, D_Kmn, P_Kmm, P_Knn), (right_Knn, D_Kmn.mT, P_Knn, P_Kmm)):
            noise = (self.eps * other.norm(dim=(-2, -1), keepdim=True)).square()
            self._update_factor(factor, D @ D.mT + noise * (own @ own), D.size(-1))
        # Only the product of the two is determined: give both the same largest entry, or one might overflow in time.
        ratio = (_largest(right_Knn) / _largest(left_Kmm).clamp_min(TINY)).sqrt()
        ratio = torch.where(ratio > 0, ratio, 1.0)
        left_Kmm.mul_(ratio)
        right_Knn.div_(ratio)

    def _update_factor(self, factor: Tensor, gram: Tensor, target: int) -> None:
        """Take one step of `factor` (K, k, k), in place, towards E[gram] = target I."""
        rate = self.config.factor_lr / 2 / (spectral_bound(gram) + target)
        factor.sub_(rate * (gram @ factor - target * factor))
        factor.sub_(rate * (factor @ gram - target * factor))
        factor.copy_((factor + factor.mT) / 2)


def spectral_bound(gram: Tensor) -> Tensor:
    """Return a close lower bound of the largest eigenvalue of positive semi-definite (K, k, k): (K, 1, 1), zero for zero.

    Two power iterations from the longest column.
    """
    scale = _largest(gram).clamp_min(TINY)
    A = gram / scale
    longest = A.square().sum(-2, keepdim=True).argmax(-1, keepdim=True)
    x = A @ A.gather(-1, longest.expand(-1, A.size(-2), 1))
    x = x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp_min(TINY)
    return scale * torch.linalg.vector_norm(A @ x, dim=-2, keepdim=True)


def _largest(x: Tensor) -> Tensor:
    """Return max |x_ij| of each matrix, (K, 1, 1)."""
    return x.abs().amax(dim=(-2, -1), keepdim=True)


def _rms(x: Tensor, power: int) -> Tensor:
    """Return (mean x_ij^power)^(1 / power) of each matrix, (K, 1, 1); power 2 is the root mean square."""
    largest = _largest(x)
    return largest * (x / largest.clamp_min(TINY)).pow(power).mean(dim=(-2, -1), keepdim=True) ** (1 / power)
