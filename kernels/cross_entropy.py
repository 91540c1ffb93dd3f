"""The loss of the head: cross-entropy of softcapped logits against several targets; plain lines, and a Triton kernel that
computes loss and gradient of a row together.

With raw logits z, softcapped logits y = softcap(z), targets t_k and weights w_k, the loss of a row is

    sum_k w_k [t_k >= 0] (logsumexp(y) - y_{t_k})    in nats,

and its gradient dL/dz_j = (W softmax(y)_j - sum_k w_k [j = t_k]) dy_j/dz_j, W the sum of the weights that act. The targets
are the next token, in training also further tokens and the prefix of the next one: all read the same logits.

The kernel reads a row of z twice. The first pass needs no row maximum in advance: it sums exp(y - running maximum) block by
block and rescales the sum when the maximum grows (Milakov & Gimelshein 2018, arXiv 1805.02867). The second pass writes the
gradient, which needs the finished logsumexp; the row is still in the cache then. So neither y nor softmax(y) nor a float32
copy of z is stored; the gradient is, in the dtype of z or in 8 bits (kernels/fp8.py). The factor that the loss is multiplied
by afterwards is applied to the products that the gradient enters, which are V / C times smaller than the gradient.

Both compute in float32. Raw logits keep the rounding of their dtype: bfloat16 has 8 significant bits, and only multiples of
1/16 between 8 and 16.

Shapes: N tokens, C model dimension, V vocabulary size (padded), K targets of a token, S sampled classes.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.operators import triton_operator, wrap_triton

ASYMMETRIC = (23.0, 5.0, 7.5)  # height, shift and width of the speedrun's sigmoid, 2025
IGNORED = -1  # target of a row in which a loss does not act
GRADIENT_8_BIT = torch.float8_e5m2
# Columns of a row that the kernel reads at a time, a power of two, and its warps. Programs are large so that few are in
# flight: rows of 100 kB, two to four on each of an H100's 132 multiprocessors, stay in its cache until the second pass.
BLOCK, WARPS = 4096, 16


class Softcap(NamedTuple):
    """Bound of the logits: configs/model.py, `softcap` and `softcap_value`."""

    kind: str
    c: float


def softcap(z: Tensor, kind: str, c: float) -> Tensor:
    """Return bounded logits, elementwise.

    tanh: c tanh(z/c) and rational: c z / sqrt(z^2 + c^2) have slope 1 at 0 and lie between -c and c. asymmetric:
    23 sigmoid((z + 5) / 7.5) lies between 0 and 23 and does not use c. none: z.
    """
    if kind == "tanh":
        return c * torch.tanh(z / c)
    if kind == "rational":
        return c * z * (z * z + c * c).rsqrt()
    if kind == "asymmetric":
        height, shift, width = ASYMMETRIC
        return height * torch.sigmoid((z + shift) / width)
    return z


def softcap_cross_entropy(z_NV: Tensor, targets_KN: Tensor, weights_K: Tensor, cap: Softcap) -> Tensor:
    """Return the summed loss in nats of raw logits, 0-D, in float32 or their own dtype if that is higher.

    The plain twin of the kernel: targets (K, N), IGNORED where a loss does not act; weights (K,).
    """
    exact = torch.promote_types(z_NV.dtype, torch.float32)
    log_p_NV = F.log_softmax(softcap(z_NV.to(exact), *cap), dim=-1)  # one for all targets
    return sum(weight * F.nll_loss(log_p_NV, target_N, reduction="sum", ignore_index=IGNORED)
               for weight, target_N in zip(weights_K, targets_KN, strict=True))


# ---- Targets ----------------------------------------------------------------------------------------------------------


class AuxLossWeights(NamedTuple):
    """What training adds to, or puts in place of, the next token's cross-entropy in one step. A loss that does not act in
    the step is None and costs nothing; weights are tensors, because changed Python numbers would recompile."""

    mtp: Tensor | None = None
    """(M,): weights of the next M further tokens (multi-token prediction)."""
    prefix: Tensor | None = None
    """(1,): weight of the target's prefix."""
    classes: Tensor | None = None
    """(S,): classes among which the softmax is taken, in place of all."""

    @classmethod
    def of(cls, mtp: tuple[float, ...], prefix: float, device: torch.device) -> "AuxLossWeights":
        """Copy weights to a device without waiting for it; those that are empty or 0 become None."""
        tensors = (torch.tensor(weights, dtype=torch.float32).to(device, non_blocking=True) if weights else None
                   for weights in (mtp, (prefix,) if prefix else ()))
        return cls(*tensors)

    def draw_classes(self, count: int, classes: int, *, key: tuple[int, ...], device: torch.device) -> "AuxLossWeights":
        """Return a copy with `count` of the classes, drawn uniformly without replacement from numbers that depend on `key`
        alone: a resumed run and every rank draw the same. With count 0 return self."""
        if not count:
            return self
        drawn_S = torch.from_numpy(np.random.default_rng(key).choice(classes, count, replace=False))
        drawn_S = drawn_S.pin_memory() if device.type == "cuda" else drawn_S
        return self._replace(classes=drawn_S.to(device, non_blocking=True))


def stack_targets(targets_BT: Tensor, aux: AuxLossWeights, prefix_of_V: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the targets that act, (K, N), and their weights, (K,) float32: the next token, with weight 1; those after it,
    within the row (Gloeckle et al. 2024, arXiv 2404.19737; speedrun, Dec 2025); the longest proper prefix of the next token
    that is a token itself, `prefix_of_V` (-1: none), which rewards the right first letters (speedrun, Jul 2026)."""
    further = 0 if aux.mtp is None else len(aux.mtp)
    # Padded, not sliced: all losses then read the same rows of logits, and share one softmax.
    rows = [F.pad(targets_BT, (0, k), value=IGNORED)[:, k:] for k in range(further + 1)]
    weights = [torch.ones(1, device=targets_BT.device), aux.mtp, aux.prefix]
    if aux.prefix is not None:
        rows.append(prefix_of_V[targets_BT])
    return torch.stack(rows).flatten(1), torch.cat([weight for weight in weights if weight is not None])


def sampled_cross_entropy(x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, classes_S: Tensor, cap: Softcap) -> Tensor:
    """Summed cross-entropy, 0-D, against classes that were drawn uniformly without replacement.

    Each drawn class stands for V / S classes, hence the added logarithm. The target is always included and its draw
    masked, so that with all classes drawn this is the full cross-entropy (importance sampling: Bengio & Senecal 2003; Jean
    et al. 2015, arXiv 1412.2007).
    """
    target_N = softcap((x_NC * F.embedding(targets_N, weight_VC).to(x_NC.dtype)).sum(-1).float(), *cap)
    others_NS = softcap(F.linear(x_NC, weight_VC[classes_S].to(x_NC.dtype)).float(), *cap)
    others_NS = others_NS + math.log(len(weight_VC) / len(classes_S))
    others_NS = others_NS.masked_fill(classes_S == targets_N[:, None], -math.inf)
    return (torch.logsumexp(torch.cat((target_N[:, None], others_NS), dim=1), dim=1) - target_N).sum()


# ---- Head and loss in one function --------------------------------------------------------------------------------------


def head_cross_entropy(x_NC: Tensor, head: tuple[Tensor, Tensor | None], targets_KN: Tensor, weights_K: Tensor,
                       cap: Softcap) -> Tensor:
    """Return `softcap_cross_entropy` of the logits x W^T + b by the kernel, 0-D float32; `head` is W (V, C) and b (V,) or
    None, stored in any dtype and cast to that of x."""
    # Asked here: within `forward` gradients are always off, and ctx.needs_input_grad is true even under no_grad.
    return HeadCrossEntropy.apply(x_NC, *head, targets_KN, weights_K, cap, torch.is_grad_enabled())


class HeadCrossEntropy(torch.autograd.Function):
    """Summed loss of the head's logits. Their gradient is computed in the forward pass, which has the logits in the cache,
    for upstream factor 1; the backward pass multiplies its two products by the factor."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None,
                targets_KN: Tensor, weights_K: Tensor, cap: Softcap, with_grad: bool) -> Tensor:
        """(N, C), (V, C), (V,), (K, N), (K,) -> 0-D float32."""
        W_VC, b_V = weight_VC.to(x_NC.dtype), None if bias_V is None else bias_V.to(x_NC.dtype)
        loss_N, grad_NV = loss_and_grad(F.linear(x_NC, W_VC, b_V), targets_KN, weights_K, cap, with_grad=with_grad)
        ctx.save_for_backward(x_NC, W_VC, grad_NV)
        ctx.dtype, ctx.has_bias = weight_VC.dtype, bias_V is not None
        return loss_N.sum()

    # To autograd the stored gradient is a constant: without this mark second derivatives would be silently wrong.
    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients g W by x, (N, C), g^T x by W, (V, C), and that by b, each times the factor, 0-D."""
        x_NC, W_VC, grad_NV = ctx.saved_tensors
        by_b = (grad_NV.sum(0, dtype=torch.float32) * upstream).to(ctx.dtype) if ctx.has_bias else None
        return (grad_NV @ W_VC) * upstream, (grad_NV.mT @ x_NC).to(ctx.dtype) * upstream, by_b, None, None, None, None


# ---- Kernel -----------------------------------------------------------------------------------------------------------


def loss_and_grad(z_NV: Tensor, targets_KN: Tensor, weights_K: Tensor, cap: Softcap, *, with_grad: bool,
                  grad_scale: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return each token's loss in nats, (N,) float32, and its gradient by the raw logits, (N, V), by the kernel.

    The gradient has the dtype of z. With a `grad_scale` it is divided by it and rounded to 8 bits; entries beyond the
    format's largest number become that number. Without `with_grad` it is empty, (0, V).
    """
    if not torch.compiler.is_compiling():  # define_operators has done it before
        define_operator()
    family, coefficients = softcap_family(*cap)
    return torch.ops.steepest.loss_and_grad(z_NV, targets_KN, weights_K, family, coefficients, grad_scale, with_grad)


def softcap_family(kind: str, c: float) -> tuple[str, list[float]]:
    """Return the kernel's family of a softcap and its coefficients [height, shift, 1 / width, base].

    tanh and asymmetric are one family, y = height sigmoid((z + shift) / width) + base: c tanh(z/c) = 2c sigmoid(2z/c) - c.
    """
    if kind == "asymmetric":
        height, shift, width = ASYMMETRIC
        return "sigmoid", [height, shift, 1 / width, 0.0]
    if kind == "tanh":
        return "sigmoid", [2 * c, 0.0, 2 / c, -c]
    return {"none": "identity", "rational": "rational"}[kind], [c, 0.0, 1.0, 0.0]


def steepest_slope(cap: Softcap) -> float:
    """Return the largest dy/dz of a softcap."""
    height, _, width = ASYMMETRIC
    return height / width / 4 if cap.kind == "asymmetric" else 1.0


@functools.cache
def define_operator() -> None:
    """Define torch.ops.steepest.loss_and_grad, which launches the kernel on CUDA or in Triton's interpreter."""
    rows = row_kernel()

    def loss_and_grad(z_NV: Tensor, targets_KN: Tensor, weights_K: Tensor, family: str, coefficients: list[float],
                      grad_scale: float, with_grad: bool) -> tuple[Tensor, Tensor]:
        z_NV, targets_KN = z_NV.contiguous(), targets_KN.contiguous()
        loss_N, grad_NV = outputs(z_NV, targets_KN, weights_K, family, coefficients, grad_scale, with_grad)
        count, columns = z_NV.shape
        block = 1 << (min(BLOCK, columns) - 1).bit_length()  # tl.arange needs a power of two
        wrap_triton(rows)[(count,)](z_NV, targets_KN, weights_K, loss_N, grad_NV, count, columns, *coefficients,
                                    1 / grad_scale if grad_scale else 1.0, FAMILY=family, TERMS=len(targets_KN),
                                    WITH_GRAD=with_grad, BLOCK=block, num_warps=WARPS)
        return loss_N, grad_NV

    def outputs(z_NV: Tensor, targets_KN: Tensor, weights_K: Tensor, family: str, coefficients: list[float],
                grad_scale: float, with_grad: bool) -> tuple[Tensor, Tensor]:
        del targets_KN, weights_K, family, coefficients
        rows, columns = z_NV.shape
        dtype = GRADIENT_8_BIT if grad_scale else z_NV.dtype
        return (z_NV.new_empty(rows, dtype=torch.float32),
                z_NV.new_empty(rows if with_grad else 0, columns, dtype=dtype))

    triton_operator("steepest::loss_and_grad", loss_and_grad, shapes=outputs)


@functools.cache
def softcap_kernel() -> Callable:
    """Return the Triton function of softcap and its slope. Defined at first use: Triton is optional."""
    global tl  # Triton looks up the names in a kernel among the globals of its module
    import triton
    import triton.language as tl

    @triton.jit
    def softcap_and_slope(z, height: tl.constexpr, shift: tl.constexpr, inverse_width: tl.constexpr, base: tl.constexpr,
                          FAMILY: tl.constexpr):
        """y = softcap(z) and dy/dz. Multiplied by the inverse width: a division would cost as much as an exponential."""
        if FAMILY == "sigmoid":
            s = tl.sigmoid((z + shift) * inverse_width)
            y, slope = height * s + base, height * inverse_width * s * (1 - s)
        elif FAMILY == "rational":
            # y = z r with r = c / sqrt(z^2 + c^2), and dy/dz = r^3
            r = height * tl.rsqrt(z * z + height * height)
            y, slope = z * r, r * r * r
        else:
            y, slope = z, tl.full(z.shape, 1.0, tl.float32)
        return y, slope

    return softcap_and_slope


@functools.cache
def row_kernel() -> Callable:
    """Return the Triton kernel of loss and gradient, with one program for each row."""
    global softcap_and_slope
    import triton

    softcap_and_slope = softcap_kernel()

    @triton.jit
    def rows(z_ptr, targets_ptr, weights_ptr, loss_ptr, grad_ptr, count, columns, height: tl.constexpr,
             shift: tl.constexpr, inverse_width: tl.constexpr, base: tl.constexpr, inverse_scale: tl.constexpr,
             FAMILY: tl.constexpr, TERMS: tl.constexpr, WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr):
        """Loss of one row and, WITH_GRAD, its gradient by z times inverse_scale. Numbers are constants: compiled graphs
        would pass them in float64, and compute in it."""
        row = tl.program_id(0).to(tl.int64)  # row * columns exceeds 2^31 from 42,700 rows of 50,304 columns on
        z_ptr += row * columns
        targets_ptr += row
        # First pass: logsumexp(y). The row is asked to stay in the cache.
        running_max = tl.full((), float("-inf"), tl.float32)
        exp_sum = tl.full((), 0.0, tl.float32)
        for start in range(0, columns, BLOCK):
            index = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + index, mask=index < columns, other=0.0, eviction_policy="evict_last").to(tl.float32)
            y, _ = softcap_and_slope(z, height, shift, inverse_width, base, FAMILY)
            y = tl.where(index < columns, y, float("-inf"))
            new_max = tl.maximum(running_max, tl.max(y))
            exp_sum = exp_sum * tl.exp(running_max - new_max) + tl.sum(tl.exp(y - new_max))
            running_max = new_max
        log_sum = running_max + tl.log(exp_sum)
        # Loss: the logits of the targets are read once more.
        loss = tl.full((), 0.0, tl.float32)
        weight_sum = tl.full((), 0.0, tl.float32)
        for k in tl.static_range(TERMS):
            target = tl.load(targets_ptr + k * count)
            weight = tl.where(target >= 0, tl.load(weights_ptr + k), 0.0)
            z_target = tl.load(z_ptr + tl.maximum(target, 0)).to(tl.float32)
            y_target, _ = softcap_and_slope(z_target, height, shift, inverse_width, base, FAMILY)
            loss += weight * (log_sum - y_target)
            weight_sum += weight
        tl.store(loss_ptr + row, loss)
        # Second pass: the gradient by z.
        if WITH_GRAD:
            grad_ptr += row * columns
            for start in range(0, columns, BLOCK):
                index = start + tl.arange(0, BLOCK)
                z = tl.load(z_ptr + index, mask=index < columns, other=0.0, eviction_policy="evict_first").to(tl.float32)
                y, slope = softcap_and_slope(z, height, shift, inverse_width, base, FAMILY)
                grad = weight_sum * tl.exp(y - log_sum)
                for k in tl.static_range(TERMS):
                    grad -= tl.where(index == tl.load(targets_ptr + k * count), tl.load(weights_ptr + k), 0.0)
                grad *= slope * inverse_scale
                if grad_ptr.dtype.element_ty == tl.float8e5:
                    grad = tl.clamp(grad, -57344.0, 57344.0).to(tl.float8e5, fp_downcast_rounding="rtne")  # else infinite
                tl.store(grad_ptr + index, grad.to(grad_ptr.dtype.element_ty), mask=index < columns)

    return rows
