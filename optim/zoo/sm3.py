"""SM3: Adagrad with one number per row and one per column in place of one per entry.

SM3-II of Anil et al. 2019, arXiv 1901.11150, with the rows and the columns of a matrix as its sets; 0 / 0 = 0:

    nu_ij = min(r_i, c_j) + g_ij^2
    r_i  <- max over j of nu_ij;   c_j <- max over i of nu_ij
    D     = average of g / sqrt(nu);   W <- W - lr D           averaged after the division, as configured (momentum)

nu_ij is at least the sum of all squares of g_ij so far, so steps shrink like Adagrad's; for a vector SM3 is Adagrad.
Difference to pytorch_optimizer: it adds 1e-30 to nu.

State: `row` sqrt(r) (K, m, 1) and `column` sqrt(c) (K, 1, n), float32; averages as in Muon (K, m, n), in the dtype of the
weights. Shapes: K matrices m x n in one stack.
"""

import torch
from torch import Tensor

import configs.optim as configs
from optim.muon import average_gradient, init_average
from optim.norms import TINY, Sign
from optim.rule import Hyper, Rule


class SM3(Rule):
    """SM3-II (Anil et al. 2019)."""

    config: configs.SM3
    norm = Sign()
    scope = "matrix"  # not the norm's single elements: r and c are taken over whole rows and columns

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return zero `row` and `column`, and zero averages of the steps."""
        stack, rows, columns = param.shape
        roots = {"row": param.new_zeros(stack, rows, 1, dtype=torch.float32),
                 "column": param.new_zeros(stack, 1, columns, dtype=torch.float32)}
        return roots | init_average(param, self.config)

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return D, the average of g / sqrt(nu), float32 (K, m, n)."""
        grad = grad.float()
        # State and arithmetic use sqrt(nu), by hypot: squares of very large and small gradients would leave float32.
        root = torch.minimum(state["row"], state["column"]).hypot(grad)
        state["row"].copy_(root.amax(-1, keepdim=True))
        state["column"].copy_(root.amax(-2, keepdim=True))
        return average_gradient(grad / root.clamp_min(TINY), state, self.config, hyper)
