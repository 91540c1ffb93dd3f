"""SM3: Adagrad whose memory is a number per row and a number per column."""

import torch
from torch import Tensor

import configs.optim as configs
from optim.muon import average_gradient, init_average
from optim.norms import TINY, Sign
from optim.rule import Hyper, Rule


class SM3(Rule):
    """nu_ij = min(r_i, c_j) + g_ij^2, D = average of g / sqrt(nu), r_i <- max_j nu_ij, c_j <- max_i nu_ij; 0 / 0 is 0.

    nu bounds the sum of all g_ij^2 so far from above, so that steps shrink like Adagrad's. SM3-II of Anil et al. 2019,
    arXiv 1901.11150, with a matrix's rows and columns as the sets; a vector is Adagrad. The memories are the square roots,
    float32, which neither over- nor underflow.
    """

    config: configs.SM3
    norm = Sign()
    scope = "matrix"

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """sqrt(r) (K, m, 1), sqrt(c) (K, 1, n), and the average of the steps."""
        stack, rows, columns = param.shape
        roots = {"row": param.new_zeros(stack, rows, 1, dtype=torch.float32),
                 "column": param.new_zeros(stack, 1, columns, dtype=torch.float32)}
        return roots | init_average(param, self.config)

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """The average of g / sqrt(nu): float32 (K, m, n)."""
        grad = grad.float()
        root = torch.minimum(state["row"], state["column"]).hypot(grad)
        state["row"].copy_(root.amax(-1, keepdim=True))
        state["column"].copy_(root.amax(-2, keepdim=True))
        return average_gradient(grad / root.clamp_min(TINY), state, self.config, hyper.momentum)
