"""What every layer is made of: parameters that know their role, linear maps, norms, the MLP.

Shapes: B sequences, T tokens, C model dimension, H heads, D head dimension.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Model


def parameter(value: Tensor, role: str, *, axis: int = -1) -> nn.Parameter:
    """A parameter that knows its role, what the optimizer chooses a norm by, and its model dimension, -1 or -2."""
    made = nn.Parameter(value)
    made.role, made.axis = role, axis
    return made


class Linear(nn.Module):
    """y = W x (+ b), W (out, in) cast to x's dtype at use; started at variance init_gain / in, or 0."""

    def __init__(self, fan_in: int, fan_out: int, *, config: Model, zero: bool = False, role: str = "matrix",
                 axis: int = -1) -> None:
        super().__init__()
        std = 0.0 if zero and config.zero_init_projections else (config.init_gain / fan_in) ** 0.5
        dtype = getattr(torch, config.matrix_dtype if role == "matrix" else "float32")
        self.weight = parameter((torch.randn(fan_out, fan_in) * std).to(dtype), role, axis=axis)
        self.bias = parameter(torch.zeros(fan_out), "bias") if config.biases else None
        self.product = F.linear  # layers/fused may put a faster one in its place

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.product(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Normalise(torch.autograd.Function):
    """y = x r with r = (s |x|^2 + eps)^-1/2 along the last dimension, and its derivative r (g - s y <g, y>), in float32.

    s = 1 / C is the RMS norm, s = 1 the unit vector. In closed form it takes half the time of autograd's on CPUs.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, s: float, eps: float) -> Tensor:
        """(..., C) -> (..., C)."""
        exact = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        r = length.square_().mul_(s).add_(eps).rsqrt_()
        y = (x * r).to(x.dtype)
        ctx.save_for_backward(y, r)
        ctx.s = s
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient without (s = 1) or with less of (s < 1) its radial part, times r."""
        y, r = ctx.saved_tensors
        radial = (grad * y).sum(dim=-1, keepdim=True, dtype=r.dtype)
        return torch.addcmul(grad.to(r.dtype), y.to(r.dtype), radial, value=-ctx.s).mul_(r).to(grad.dtype), None, None


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    if x.device.type != "cpu":
        return F.rms_norm(x, (x.size(-1),))
    return Normalise.apply(x, 1 / x.size(-1), torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps)


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension; zero vectors stay zero."""
    return Normalise.apply(x, 1.0, torch.finfo(torch.float32).tiny)


class Norm(nn.Module):
    """RMS norm, with learned gains where `config.norm_gains`."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.gains = parameter(torch.ones(config.dim), "gain") if config.norm_gains else None

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return rms_norm(x_BTC) if self.gains is None else rms_norm(x_BTC) * self.gains.to(x_BTC.dtype)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2; as a product, since .square() differentiates twice as slowly on CPUs."""
    return F.relu(x) * x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu2": relu2, "gelu": F.gelu, "swiglu": F.silu}


class MLP(nn.Module):
    """W_down act(W_up x), or W_down (silu(W_gate x) * W_up x) for SwiGLU; `first` makes the maps that read x."""

    def __init__(self, config: Model, *, first: Callable[..., Linear] = Linear) -> None:
        super().__init__()
        hidden = config.mlp_dim or 4 * config.dim
        self.up = first(config.dim, hidden, config=config)
        self.gate = first(config.dim, hidden, config=config) if config.activation == "swiglu" else None
        self.down = Linear(hidden, config.dim, config=config, zero=True, axis=-2)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        hidden = self.up(x_BTC)
        hidden = self.activation(hidden) if self.gate is None else self.activation(self.gate(x_BTC)) * hidden
        return self.down(hidden)
