"""What a rule remembers and computes, counted without computing it: on PyTorch's meta device."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from configs.optim import RuleConfig
from optim.groups import build_rule
from optim.rule import Hyper

MATRIX = (768, 3072)


def floats_per_parameter(config: RuleConfig, shape: tuple[int, int] = MATRIX) -> float:
    """Numbers that the rule remembers of a matrix, over its own."""
    W = torch.empty(1, *shape, device="meta")
    return sum(tensor.numel() for tensor in build_rule(config).init_state(W).values()) / W.numel()


def eigh_flops(shape: tuple[int, ...], *_: object, **__: object) -> int:
    """9 k^3: all eigenvalues and vectors of a symmetric matrix (Golub & Van Loan, Matrix Computations, 8.3)."""
    return 9 * shape[-1] ** 3 * _stacked(shape)


def qr_flops(shape: tuple[int, ...], *_: object, **__: object) -> int:
    """4 (m n^2 - n^3 / 3), m >= n: Householder's R and explicit thin Q (Golub & Van Loan, 5.2)."""
    n, m = sorted(shape[-2:])
    return 4 * (m * n * n - n**3 // 3) * _stacked(shape)


def svd_flops(shape: tuple[int, ...], *_: object, **__: object) -> int:
    """6 m n^2 + 20 n^3, m >= n: thin U, S and V (Golub & Van Loan, 8.6, R-SVD)."""
    n, m = sorted(shape[-2:])
    return (6 * m * n * n + 20 * n**3) * _stacked(shape)


def product_flops(_: tuple[int, ...], A: tuple[int, ...], B: tuple[int, ...], **__: object) -> int:
    """2 m k n: C += A B in place, which the counter does not know."""
    return 2 * A[-2] * A[-1] * B[-1] * _stacked(A)


def _stacked(shape: tuple[int, ...]) -> int:
    return torch.Size(shape[:-2]).numel()


DECOMPOSITIONS = {torch.ops.aten._linalg_eigh: eigh_flops, torch.ops.aten.linalg_qr: qr_flops,
                  torch.ops.aten._linalg_svd: svd_flops}
PRODUCTS = {torch.ops.aten.baddbmm_: product_flops}


def flops(config: RuleConfig, shape: tuple[int, int] = MATRIX) -> int:
    """Operations of matrix products and decompositions in the second step on one matrix; elementwise work is not counted."""
    rule = build_rule(config)
    W, grad = (torch.zeros(1, *shape, device="meta") for _ in range(2))
    state = rule.init_state(W)
    shared = {key: tensor.to("meta") for key, tensor in rule.init_shared().items()}
    numbers = Hyper(*(torch.tensor(float(x)) for x in (0.1, 0, 0.9, 2)), shared)
    with FlopCounterMode(display=False, custom_mapping=DECOMPOSITIONS | PRODUCTS) as counter:
        rule.direction(W, grad, state, numbers)
    return counter.get_total_flops()
