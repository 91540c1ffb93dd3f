"""The GPT: token ids in, logits or the summed cross-entropy in nats out.

Act one is the model that the presets `tiny`, `bytes`, `track3` and nGPT train; read it from top to bottom. Act two, below
GPT, holds the other techniques of the speedrun's record. Each is switched on by a field of configs/model.py, which rejects
combinations that cannot work, and is called from act one by a line or two. With every field off, the model is the pre-norm
decoder of GPT-2 (Radford et al. 2019) with RMS norms. This file does not know ranks, optimizers or schedules. Each parameter
carries a role, by which optim/groups.py chooses its update rule.

Shapes: B sequences, T tokens, C model dimension, H heads, D head dimension, V padded vocabulary, N = B T tokens.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import Model
from configs.notation import DenseSkip, parse_dense_skips, parse_skips
from kernels import Paths, choose_paths, define_operators
from kernels.attention import KERNELS, Mask, choose_kernel, document_first, use_flash
from kernels.cross_entropy import (
    AuxLossWeights,
    Softcap,
    head_cross_entropy,
    sampled_cross_entropy,
    softcap,
    softcap_cross_entropy,
    stack_targets,
)
from kernels.dynamic_heads import dynamic_heads, fused_dynamic_heads
from kernels.embedding import rows
from kernels.fp8 import Fp8Head, Fp8Product
from kernels.mlp import Fp8ReLU2MLP, relu2_mlp
from kernels.norms import rms_norm, unit

# ---- Act one: linear maps and norms -------------------------------------------------------------------------------------


def parameter(value: Tensor, role: str, *, axis: int = -1) -> nn.Parameter:
    """Return a parameter with its role, which decides its optimizer, and the axis, -1 or -2, along which C lies."""
    param = nn.Parameter(value)
    param.role, param.axis = role, axis
    return param


class Linear(nn.Module):
    """Linear map y = W x (+ b), W (out, in). W starts with variance init_gain / in; with `zero` at 0, if the config allows,
    so that every block starts as the identity and logits at 0."""

    def __init__(self, fan_in: int, fan_out: int, *, config: Model, zero: bool = False, role: str = "matrix",
                 axis: int = -1) -> None:
        super().__init__()
        std = 0.0 if zero and config.zero_init_projections else (config.init_gain / fan_in) ** 0.5
        dtype = getattr(torch, {"matrix": config.matrix_dtype, "head": config.head_dtype}.get(role, "float32"))
        # Drawn even if std is 0, so that other weights do not depend on `zero_init_projections`.
        self.weight = parameter((torch.randn(fan_out, fan_in) * std).to(dtype), role, axis=axis)
        self.bias = parameter(torch.zeros(fan_out), "bias") if config.biases else None
        self.product = F.linear  # use_fast_products replaces it where the device has a faster kernel

    def forward(self, x: Tensor, gain: Tensor | int = 1) -> Tensor:
        """(..., in) -> (..., out), y = gain W x (+ b). Weights are cast at use: they may be stored in another dtype than the
        activations. The gain multiplies W, which has fewer entries than x and y: its gradient then reads neither."""
        weight = self.matrix().to(x.dtype)
        weight = weight if isinstance(gain, int) else gain * weight
        return self.product(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def matrix(self) -> Tensor:
        """The matrix of the map, (out, in)."""
        return self.weight


class Norm(nn.Module):
    """RMS norm, with learned gains if `config.norm_gains`."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.gains = parameter(torch.ones(config.dim), "gain") if config.norm_gains else None

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return rms_norm(x_BTC) if self.gains is None else rms_norm(x_BTC) * self.gains.to(x_BTC.dtype)


# ---- Act one: embeddings of previous tokens -------------------------------------------------------------------------------

# Odd multipliers of the n-gram hash, that of the current token first. The first two are the speedrun's (Jan 2026).
HASH = (36_313, 27_191, 50_021, 41_231, 62_989, 33_461)
SMEAR_DIMS = 12  # number of leading dimensions that the smear gate reads (speedrun, Sep 2025)


class NgramEmbedding(nn.Module):
    """Embedding of the n-gram that ends at each token, looked up by a hash of its n tokens.

    Tokens with fewer than n - 1 predecessors in their row (with `document_mask`, in their document) share the last row of
    the table. With `bigram_signs`, the vector is multiplied by a row of a fixed random table of +-1, chosen by a second
    hash: two n-grams that collide in the first hash then usually still differ in their signs (speedrun, 2026).
    """

    def __init__(self, config: Model, order: int = 2) -> None:
        super().__init__()
        self.order = order
        dtype = getattr(torch, config.table_dtype)
        self.table = parameter(torch.zeros(config.bigram_buckets, config.dim, dtype=dtype), "bigram_embed")
        signs = random_signs(config.bigram_signs, config.dim, seed=order) if config.bigram_signs else None
        self.register_buffer("signs", signs, persistent=False)

    def forward(self, tokens_BT: Tensor, starts_BT: Tensor | None) -> Tensor:
        """Token ids and document starts, (B, T) each -> (B, T, C)."""
        bucket, sign_row = self.table_rows(tokens_BT, starts_BT)
        vectors = rows(self.table, bucket, sparse=True)
        return vectors if self.signs is None else vectors * F.embedding(sign_row, self.signs)

    def table_rows(self, tokens_BT: Tensor, starts_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the rows of the table and of the signs that belong to each token, (B, T) each, on any device."""
        last_row, before = self.table.size(0) - 1, self.order - 1
        # Hash the n tokens: grams[k] holds the token k places back.
        past = F.pad(tokens_BT, (before, 0))
        grams = [past[:, before - k:past.size(1) - k] for k in range(self.order)]
        hashed = functools.reduce(operator.xor, (gram * factor for gram, factor in zip(grams, HASH, strict=False)))
        bucket, sign_row = hashed % max(last_row, 1), functools.reduce(operator.xor, grams)
        # An n-gram must not reach back before the row or into another document: that would leak text across the mask.
        crosses = torch.arange(tokens_BT.size(1), device=tokens_BT.device) < before
        if starts_BT is not None:
            starts = F.pad(starts_BT, (before, 0))
            crosses = crosses | sum(starts[:, before - k:starts.size(1) - k] for k in range(before)).bool()
        sign_row = sign_row.masked_fill(crosses, 0) % (1 if self.signs is None else len(self.signs))
        return bucket.masked_fill(crosses, last_row), sign_row


class Smear(nn.Module):
    """Add a gated share of the previous token's embedding, x_t + lambda sigmoid(w . x_t) x_{t-1}, but not across document
    starts; lambda starts at 0 (speedrun, Sep 2025)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.dims = min(SMEAR_DIMS, config.dim)
        self.gate = parameter(torch.zeros(1, self.dims), "gate")
        self.strength = parameter(torch.zeros(1), "scalar")

    def forward(self, x_BTC: Tensor, starts_BT: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        gate_BT1 = self.strength.to(x_BTC.dtype) * F.linear(x_BTC[:, 1:, :self.dims], self.gate.to(x_BTC.dtype)).sigmoid()
        if starts_BT is not None:
            gate_BT1 = gate_BT1.masked_fill(starts_BT[:, 1:, None], 0)
        return x_BTC + F.pad(gate_BT1 * x_BTC[:, :-1], (0, 0, 1, 0))


# ---- Act one: attention --------------------------------------------------------------------------------------------------


class LayerInputs(NamedTuple):
    """Inputs of a block besides the residual stream; None where the model does not use them."""

    mask: Mask = None
    """Attention mask in the form that the kernel needs; None: causal."""
    yarn_window: int | None = None
    """Sliding window in tokens, for YaRN."""
    starts: Tensor | None = None
    """(B, T) bool: true where a document begins, if attention stays within documents."""
    first: Tensor | None = None
    """(B, T) int64: position of the first token of each token's document, if attention stays within documents."""
    value_embed: Tensor | None = None
    """(B, T, C): second token embedding, mixed into the values."""
    x0: Tensor | None = None
    """(B, T, C): residual stream before the first block, without n-gram embeddings if `smear_first`."""
    ngrams: Tensor | None = None
    """(B, T, C): sum of the n-gram embeddings."""
    attention_input: Tensor | None = None
    """(B, T, C): residual stream of an earlier layer, which attention reads instead of the current one."""
    gates: "LayerGates | None" = None
    """Coefficients of each token that replace this layer's own weights; None: no technique computes any."""


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864).

    Rotates each pair (x_i, x_{i + D/2}) by position * frequency, so that q . k depends on the distance of two tokens only.
    Frequencies fall geometrically from 1 to 1/base. `half_rotary` rotates only the first half of the pairs (speedrun,
    2025). With `yarn`, frequencies are rescaled when the sliding window grows; see `yarn_frequencies`.
    """

    def __init__(self, config: Model, max_tokens: int) -> None:
        super().__init__()
        rotated = config.query_dim // (4 if config.position == "half_rotary" else 2)
        frequency = config.rotary_base ** -torch.linspace(0, 1, rotated)
        frequency = F.pad(frequency, (0, config.query_dim // 2 - rotated))  # frequency 0: not rotated
        positions_T = torch.arange(max_tokens, dtype=torch.float32)
        self.yarn_windows = yarn_windows(config)
        cos_TD, sin_TD = (None, None) if self.yarn_windows else rotation(positions_T, frequency)
        for name, tensor in {"unrotated_D": (frequency == 0).repeat(2), "frequency": frequency, "positions_T": positions_T,
                             "cos_TD": cos_TD, "sin_TD": sin_TD}.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x_BTHD: Tensor, window: int | None = None) -> Tensor:
        """Rotate queries or keys, (B, T, H, D) -> the same. Angles are float32: bfloat16 has no 257 between 256 and 258."""
        x, tokens = x_BTHD.float(), x_BTHD.size(1)
        if self.yarn_windows:  # angles depend on the current window, so they cannot be a table
            frequency = yarn_frequencies(self.frequency, windows_until(window, self.yarn_windows))
            cos_TD, sin_TD = rotation(self.positions_T[:tokens], frequency)
        else:
            cos_TD, sin_TD = self.cos_TD[:tokens], self.sin_TD[:tokens]
        partner = x.roll(x.size(-1) // 2, dims=-1)  # x_{i + D/2} beside x_i; sin carries the sign of each half
        return torch.addcmul(x * cos_TD[:, None], partner, sin_TD[:, None]).type_as(x_BTHD)


def rotation(positions_T: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and signed sines of position * frequency, (T, D) each; the sines of the second half are negative."""
    angle_TF = torch.outer(positions_T, frequency)
    cos, sin = angle_TF.cos(), angle_TF.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)


def has_long_window(config: Model, layer: int) -> bool:
    """True if the layer's attention uses the long sliding window, or none."""
    return config.window_tokens is None or layer in config.full_attention_layers


class ValueMix(nn.Module):
    """Learned mixture of values and value embeddings, a v + b e; a and b start at 1/2 (speedrun, Dec 2024)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(torch.tensor([0.5, 0.5]), "scalar")

    def forward(self, v_BTHD: Tensor, embed_BTC: Tensor, x_BTC: Tensor, gates: "LayerGates | None") -> Tensor:
        """(B, T, H, D), (B, T, C), (B, T, C) -> (B, T, H, D). Same signature as ValueGates, which read x and gates."""
        del x_BTC, gates
        value_share, embed_share = self.weight.to(v_BTHD.dtype)
        return value_share * v_BTHD + embed_share * embed_BTC.view_as(v_BTHD)


def offset_keys(k_BTHD: Tensor, unrotated_D: Tensor, starts_BT: Tensor | None) -> Tensor:
    """Take the dimensions of each key that rotary leaves alone from the previous token of the same document, (B, T, H, D) ->
    (B, T, H, D). A query then matches the token *after* an earlier occurrence of its own token: an induction head in one
    layer, where otherwise two are needed (speedrun, Dec 2025)."""
    previous = torch.cat((k_BTHD[:, :1], k_BTHD[:, :-1]), dim=1)
    take = unrotated_D if starts_BT is None else unrotated_D & ~starts_BT[:, :, None, None]
    return torch.where(take, previous, k_BTHD)


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, arXiv 1706.03762)."""

    def __init__(self, config: Model, max_tokens: int, *, mixes_value_embed: bool, attend: Callable, layer: int = 0) -> None:
        super().__init__()
        self.heads = config.dim // config.head_dim
        self.q, self.k, self.v = (Linear(config.dim, self.heads * size, config=config)
                                  for size in (config.query_dim, config.query_dim, config.head_dim))
        self.out = Linear(config.dim, config.dim, config=config, zero=config.zero_attention_out, axis=-2)
        self.attend = attend
        on_sphere = config.geometry == "sphere"
        # On the sphere q and k are unit vectors, and q . k has variance 1/D: the scale is sqrt(D) instead of 1 / sqrt(D).
        self.scale = config.attention_scale or config.query_dim ** (0.5 if on_sphere else -0.5)
        self.norm_qk = SphereQK(config) if on_sphere else rms_norm if config.qk_norm else None
        self.paired = layer in config.paired_heads
        self.rotary = Rotary(config, max_tokens * (2 if self.paired else 1)) if "rotary" in config.position else None
        self.offsets_keys = config.key_offset and has_long_window(config, layer) and not self.paired
        self.mix_value = None
        if mixes_value_embed:
            self.mix_value = ValueGates(config, own=layer not in config.dense_gates) if config.value_gates else ValueMix()
        # Dynamic head composition; use_fast_products replaces the plain lines where the device has a faster kernel.
        self.mix_heads, self.dynamic_window = dynamic_heads, config.dynamic_window
        # One factor before q, k, v and one after `out` (speedrun, 2025). With QK norm the first acts on v alone.
        self.gains = parameter(torch.tensor([0.5, 1.0]), "scalar") if config.projection_gains else None

    def forward(self, x_BTC: Tensor, inputs: LayerInputs) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        # Project to queries, keys and values, (B, T, H, D) each; mix the value embeddings in.
        gates = inputs.gates or LayerGates()
        gain_in, gain_out = (1, 1) if self.gains is None else self.gains.to(x_BTC.dtype)
        q, k, v = self.project(x_BTC, gain_in)
        if self.mix_value is not None:
            v = self.mix_value(v, inputs.value_embed, x_BTC, gates)
        if gates.values is not None:
            v = v + gates.values.view_as(v)
        # Normalise, then rotate. In this order because a rotation keeps lengths, while learned gains after it would scale
        # the two numbers of a rotated pair differently, and scores would depend on absolute positions.
        if self.norm_qk is not None:
            q, k = self.norm_qk(q), self.norm_qk(k)
        if self.paired:  # two heads become one of twice the length, (B, 2T, H/2, D), until unpair_heads below
            q, k, v = pair_heads(q), pair_heads(k), pair_heads(v)
        scale = self.scale
        if self.rotary is not None:
            q, k = self.rotary(q, inputs.yarn_window), self.rotary(k, inputs.yarn_window)
            if self.rotary.yarn_windows:  # more keys need a sharper softmax
                scale = scale * yarn_softmax_factor(windows_until(inputs.yarn_window, self.rotary.yarn_windows))
        if self.offsets_keys:
            k = offset_keys(k, self.rotary.unrotated_D, inputs.starts)
        # Attend: softmax(scale q k^T + mask) v.
        y_BTHD = self.attend(q, k, v, inputs.mask, scale)
        if gates.dynamic is not None:
            a_BTH, b_BTH = gates.dynamic.float().chunk(2, dim=-1)
            y_BTHD = y_BTHD + self.mix_heads((q, k, v), (rms_norm(a_BTH), b_BTH), first_BT=inputs.first,
                                             window=self.dynamic_window, scale=scale)
        if self.paired:
            y_BTHD = unpair_heads(y_BTHD)
        if gates.xsa is not None:
            y_BTHD = exclusive_heads(y_BTHD, v, gates.xsa)
        if gates.head is not None:
            y_BTHD = gates.head[..., None] * y_BTHD
        # Project back to the residual stream.
        return self.out(y_BTHD.reshape_as(x_BTC), gain_out)

    def project(self, x_BTC: Tensor, gain: Tensor | int = 1) -> tuple[Tensor, ...]:
        """(B, T, C) -> queries, keys and values, (B, T, H, D) each; the first two (B, T, H, `qk_head_dim`) if that is set.
        On GPUs by one product, which reads x once."""
        maps = (self.q, self.k, self.v)
        if x_BTC.device.type == "cpu":
            outputs = [linear(x_BTC, gain) for linear in maps]
        else:
            bias = None if self.q.bias is None else torch.cat([linear.bias for linear in maps]).to(x_BTC.dtype)
            weight = torch.cat([linear.weight for linear in maps]).to(x_BTC.dtype)
            weight = weight if isinstance(gain, int) else gain * weight
            outputs = F.linear(x_BTC, weight, bias).split([len(linear.weight) for linear in maps], dim=-1)
        return tuple(x.unflatten(-1, (self.heads, -1)) for x in outputs)


# ---- Act one: MLP --------------------------------------------------------------------------------------------------------


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2, as a product: the backward of .square() is slower on CPUs (up to 1.5 times, torch 2.13, float32)."""
    return F.relu(x) * x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu2": relu2, "gelu": F.gelu, "swiglu": F.silu}


class MLP(nn.Module):
    """Feed-forward layer: W_down act(W_up x), or W_down (silu(W_gate x) * W_up x) for SwiGLU."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        hidden = config.mlp_dim or 4 * config.dim
        # On the sphere W x are cosines of size 1 / sqrt(C); sqrt(C) scales them to 1, where the activation is not linear.
        first = functools.partial(ScaledLinear, constant=config.dim**0.5) if config.geometry == "sphere" else Linear
        self.up = first(config.dim, hidden, config=config)
        self.gate = first(config.dim, hidden, config=config) if config.activation == "swiglu" else None
        self.down = Linear(hidden, config.dim, config=config, zero=True, axis=-2)
        self.activation = ACTIVATIONS[config.activation]
        self.fused = None  # use_fast_products sets it to a kernel for the whole layer

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if self.fused is not None:
            return self.fused(x_BTC, self.up.weight.to(x_BTC.dtype), self.down.weight.to(x_BTC.dtype))
        hidden = self.up(x_BTC)
        hidden = self.activation(hidden) if self.gate is None else self.activation(self.gate(x_BTC)) * hidden
        return self.down(hidden)


# ---- Act one: the sphere -------------------------------------------------------------------------------------------------
#
# nGPT (Loshchilov et al. 2024, arXiv 2410.01131): every vector of the residual stream has length 1, and each layer moves it
# along the sphere. The optimizer keeps the weights at length 1 along the model dimension (constraint `sphere`): every W x
# is a vector of cosines, which learned factors scale to the size that the next operation needs.


class Scale(nn.Module):
    """Learned factors s that start at `value` and are stored as s * stored / value.

    Adam changes a stored number by about lr a step, whatever its size: a small `stored` makes the factor learn faster
    (section 2.5 of the paper).
    """

    def __init__(self, size: int, *, value: float = 1.0, stored: float = 1.0) -> None:
        super().__init__()
        self.stored = parameter(torch.full((size,), stored), "scale")
        self.unit_of_storage = value / stored

    def forward(self) -> Tensor:
        """The factors, (size,), float32."""
        return self.stored * self.unit_of_storage


class ScaledLinear(Linear):
    """Linear map with learned factors s (out,) and a fixed one, y = constant * s * (W x): s_u, s_v, s_z of the paper,
    equations 3, 20, 21. Computed as (constant * s * W) x, because W has fewer entries than the outputs of a batch."""

    def __init__(self, fan_in: int, fan_out: int, *, config: Model, role: str = "matrix", constant: float = 1.0,
                 scale: Scale | None = None) -> None:
        super().__init__(fan_in, fan_out, config=config, role=role)
        self.scale, self.constant = scale or Scale(fan_out), constant

    def matrix(self) -> Tensor:
        """The matrix of the map, (out, in)."""
        return self.weight * (self.scale() * self.constant)[:, None]


class SphereStep(nn.Module):
    """Residual sum on the sphere: h <- n(h + |alpha| (n(x) - h)), n(x) = x / ||x|| (equations 10 and 11). alpha (C,), the
    eigen learning rates, are the learned share of the way from h to the layer's output x in each dimension."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.alpha = Scale(config.dim, value=config.eigen_lr, stored=config.dim**-0.5)

    def forward(self, h_BTC: Tensor, x_BTC: Tensor, weights: None = None) -> Tensor:
        """Stream h of length 1 and a layer's output x, (B, T, C) each -> (B, T, C) of length 1. Same signature as
        ResidualGrowth, whose weights may be given."""
        return unit(torch.lerp(h_BTC, unit(x_BTC), self.alpha().abs().to(h_BTC.dtype)))


class SphereQK(nn.Module):
    """Unit queries and keys times learned factors s_qk (H, D), the same for both (equations 15 and 16). Applied before the
    rotary embedding, in the public code after it: `Attention.forward` says why."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        size = config.dim // config.head_dim * config.query_dim
        self.query_dim, self.scale = config.query_dim, Scale(size, stored=config.dim**-0.5)

    def forward(self, x_BTHD: Tensor) -> Tensor:
        """(B, T, H, D) -> (B, T, H, D)."""
        return unit(x_BTHD) * self.scale().view(-1, self.query_dim).to(x_BTHD.dtype)


# ---- Act one: the block --------------------------------------------------------------------------------------------------


def residual_sum(config: Model, layer: int) -> nn.Module | None:
    """Return the module that adds a layer's output y to the stream x; None: the plain sum x + y."""
    if config.geometry == "sphere":
        return SphereStep(config)
    return ResidualGrowth(config, own=layer not in config.dense_gates) if config.residual_growth else None


class Block(nn.Module):
    """Transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    With `x0_skip` its input is first mixed with x0, the stream before the first block. On the sphere every sum and the
    mixture return to length 1, so that attention and MLP need no norm of their own.
    """

    def __init__(self, config: Model, max_tokens: int, *, mixes_value_embed: bool, attend: Callable, layer: int = 0) -> None:
        super().__init__()
        on_sphere, attends = config.geometry == "sphere", layer not in config.attention_free
        self.norm1, self.norm2 = (nn.Identity() if on_sphere else Norm(config) for _ in range(2))
        self.add1 = residual_sum(config, layer) if attends else None
        self.add2 = residual_sum(config, layer)
        self.norm_mixture = unit if on_sphere else nn.Identity()
        self.attention = Attention(config, max_tokens, mixes_value_embed=mixes_value_embed, attend=attend,
                                   layer=layer) if attends else None
        self.mlp = MLP(config)
        self.skip = parameter(torch.tensor([1.0, 0.0]), "scalar") if config.x0_skip else None

    def forward(self, x_BTC: Tensor, inputs: LayerInputs) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        gates = inputs.gates or LayerGates()
        if self.skip is not None:
            stream_share, x0_share = self.skip.to(x_BTC.dtype)
            x_BTC = self.norm_mixture(stream_share * x_BTC + x0_share * inputs.x0)
        if self.attention is not None:
            input_BTC = x_BTC if inputs.attention_input is None else inputs.attention_input
            y_BTC = self.attention(self.norm1(input_BTC), inputs)
            x_BTC = x_BTC + y_BTC if self.add1 is None else self.add1(x_BTC, y_BTC, gates.sum1)
        if gates.inject is not None:
            x_BTC = inject(x_BTC, inputs)
        y_BTC = self.mlp(self.norm2(x_BTC))
        return x_BTC + y_BTC if self.add2 is None else self.add2(x_BTC, y_BTC, gates.sum2)


# ---- Act one: GPT --------------------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """Decoder-only Transformer."""

    def __init__(self, config: Model, *, vocab_size: int, max_tokens: int, document_start: int | None = None,
                 prefix_of: list[int] | None = None, on_cuda: bool = False,
                 dtype: torch.dtype = torch.float32) -> None:
        """Draw the weights. `max_tokens`: longest context; `document_start`: token that opens a document; `prefix_of`: each
        token's longest proper prefix, or -1; `on_cuda`: use GPU kernels. Raises ValueError for what these do not allow."""
        super().__init__()
        if config.document_mask and document_start is None:
            raise ValueError("document_mask needs a source with document starts; use --model.no_document_mask")
        if config.prefix_loss and prefix_of is None:
            raise ValueError("prefix_loss needs a tokenizer whose tokens have prefixes; use --model.prefix_loss 0")
        self.config, self.vocab_size, self.document_start, self.dtype = config, vocab_size, document_start, dtype
        self.max_tokens = max_tokens
        self.kernel, reason = choose_kernel(config, on_cuda, dtype)
        self.kernel_note = f"attention {self.kernel}: {reason}"
        if config.flash != "default":
            use_flash(config, on_cuda)
        on_sphere = config.geometry == "sphere"
        padded = -(-vocab_size // config.vocab_multiple) * config.vocab_multiple
        embed_dtype, table_dtype = getattr(torch, config.embed_dtype), getattr(torch, config.table_dtype)

        # Embeddings. The order of the statements is the order of the random draws: changing it changes every loss. Draws are
        # float32 and then cast, so that weights do not depend on the storage dtype.
        self.embed = parameter((torch.randn(padded, config.dim) * config.embed_std).to(embed_dtype), "embed")
        learned = config.position == "learned"
        self.positions = parameter(torch.randn(max_tokens, config.dim) * 0.02, "embed") if learned else None
        orders = (2, *config.ngram_orders) if config.bigram_buckets else ()
        self.ngrams = nn.ModuleList(NgramEmbedding(config, order) for order in orders)
        self.smear = Smear(config) if config.smear else None
        self.norm_embed = unit if on_sphere else Norm(config) if config.norm_embedding else nn.Identity()
        self.norm_mixture = unit if on_sphere else nn.Identity()
        self.value_embeds = nn.ParameterList(
            parameter((torch.randn(padded, config.dim) * (config.value_embed_std or config.embed_std)).to(table_dtype),
                      "value_embed")
            for _ in range(config.value_embeds))
        self.value_layers = config.value_embed_layers or tuple(range(config.layers - config.value_embeds, config.layers))

        # Blocks, and connections between them other than the residual stream.
        self.blocks = nn.ModuleList(Block(config, max_tokens, mixes_value_embed=i in self.value_layers,
                                          attend=KERNELS[self.kernel].attend, layer=i) for i in range(config.layers))
        # Layers of one kind share their rotary embedding, so that a compiled graph computes its sines and cosines once.
        rotaries: dict[bool, Rotary] = {}
        for attention in (block.attention for block in self.blocks if block.attention and block.attention.rotary):
            attention.rotary = rotaries.setdefault(attention.paired, attention.rotary)
        connected = config.skips or config.dense != "none" or config.backout is not None
        self.streams = Streams(config) if connected or config.shared_attention_input is not None else None

        reading = [layer for layer in config.gate_layers if gate_starts_from(config, layer)]
        self.token_gates = nn.ModuleDict({str(layer): TokenGates(config, layer) for layer in reading})

        # Head: a matrix of its own, or None if it is tied to the token embedding.
        self.norm_final = nn.Identity() if on_sphere else Norm(config)
        self.head = None
        if on_sphere:
            scale = Scale(padded, value=config.logit_scale, stored=config.dim**-0.5)
            self.head = ScaledLinear(config.dim, padded, config=config, role="head", scale=scale)
        elif not config.tied_head:
            self.head = Linear(config.dim, padded, config=config, zero=True, role="head")
        self.register_buffer("prefix_of", torch.tensor(prefix_of) if config.prefix_loss else None, persistent=False)
        self.paths = Paths()
        if on_cuda or config.fp8 in ("head", "head_mlp"):  # choose_paths raises ValueError for these on a CPU
            self.paths = choose_paths(config, torch.device("cuda" if on_cuda else "cpu"), dtype)
            define_operators(self.paths)
        self.fp8_head = Fp8Head(config) if self.paths.fp8 != "none" else None
        if "triton" in (self.paths.relu2, self.paths.dynamic_heads) or self.paths.fp8 == "head_mlp":
            use_fast_products(self)
        # As tables by name, because copy.deepcopy drops attributes of parameters.
        self._roles = {name: param.role for name, param in self.named_parameters()}
        self._axes = {name: param.axis for name, param in self.named_parameters()}

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, *, window: int | None = None,
                long_window: int | None = None, longest_document: int | None = None,
                aux_weights: AuxLossWeights | None = None) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V), float32; with targets (B, T), the summed cross-entropy in nats, 0-D float32.

        `window` and `long_window`, in tokens, replace the configured sliding windows; no document has more tokens than
        `longest_document`. With `aux_weights` the loss is the one that training minimises: plus the auxiliary losses that
        act in this step, or over sampled classes only.
        """
        if tokens_BT.size(1) > self.max_tokens:
            raise ValueError(f"a context of {tokens_BT.size(1)} tokens; this model was built for {self.max_tokens}")

        # Masks: causal, within the layer's sliding window and within the document.
        starts_BT = tokens_BT == self.document_start if self.config.document_mask else None
        first_BT = None if starts_BT is None else document_first(starts_BT)
        windows = self.windows(window, long_window)
        masks = self.masks(tokens_BT, first_BT, windows, longest_document)

        # Embeddings: the residual stream before the first block. YaRN follows the long window on all layers.
        x_BTC, x0_BTC, ngrams_BTC, gates = self.embed_tokens(tokens_BT, starts_BT)
        value_embeds = [rows(table, tokens_BT).to(self.dtype) for table in self.value_embeds]
        yarn_window = long_window or self.config.long_window_tokens or windows[0]
        base = LayerInputs(starts=starts_BT, first=first_BT, x0=x0_BTC, ngrams=ngrams_BTC, yarn_window=yarn_window)

        # Blocks. `history` holds the stream before the first block and after each; only `streams` reads it.
        history = [x_BTC]
        for i, block in enumerate(self.blocks):
            if i > 0 and str(i) in self.token_gates:
                gates |= self.token_gates[str(i)](x_BTC)
            embed_BTC = value_embeds[self.value_layers.index(i)] if i in self.value_layers else None
            inputs = base._replace(mask=masks[i], value_embed=embed_BTC, gates=gates.get(i))
            if i == 0:  # the first layer's weight of the n-grams has acted before the first block
                inputs = inputs._replace(ngrams=None)
            if self.streams is None:
                x_BTC = block(x_BTC, inputs)
                continue
            x_BTC, inputs = self.streams.before_block(x_BTC, i, history, value_embeds, inputs)
            x_BTC = block(x_BTC, inputs)
            history.append(x_BTC)
        if self.streams is not None:
            x_BTC = self.streams.after_blocks(x_BTC, history, value_embeds)

        # Head, and loss.
        x_BTC = self.norm_final(x_BTC)
        return self.logits(x_BTC) if targets_BT is None else self.loss(x_BTC, targets_BT, aux_weights)

    def windows(self, window: int | None, long_window: int | None) -> list[int | None]:
        """Return each layer's sliding window in tokens, None: no window. Arguments that are None: as configured.
        `full_attention_layers` have the long window, so that they see all where that is None."""
        window, long_window = window or self.config.window_tokens, long_window or self.config.long_window_tokens
        return [long_window if window is not None and has_long_window(self.config, i) else window
                for i in range(self.config.layers)]

    def masks(self, tokens_BT: Tensor, first_BT: Tensor | None, windows: list[int | None],
              longest: int | None) -> list[Mask]:
        """Return each layer's attention mask; layers with the same window share one."""
        tokens, make = tokens_BT.size(1), KERNELS[self.kernel].mask
        masks: dict[tuple[int | None, bool], Mask] = {}
        kinds = [(window, i in self.config.paired_heads) for i, window in enumerate(windows)]
        for window, paired in dict.fromkeys(kinds):
            if paired:  # two heads are interleaved token by token, see pair_heads
                first = None if first_BT is None else 2 * first_BT.repeat_interleave(2, dim=1)
                masks[window, paired] = make(2 * tokens, window, first, tokens_BT.device, 2 * longest if longest else None)
            else:
                masks[window, paired] = make(tokens, window, first_BT, tokens_BT.device, longest)
        return [masks[kind] for kind in kinds]

    def embed_tokens(self, tokens_BT: Tensor, starts_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, dict]:
        """Token ids (B, T) -> the stream before the first block, x0, the sum of n-gram embeddings or None, (B, T, C) each,
        and the LayerGates by layer that are computed from x0."""
        x_BTC = rows(self.embed, tokens_BT).to(self.dtype)
        if self.positions is not None:
            x_BTC = x_BTC + self.positions[:tokens_BT.size(1)].to(self.dtype)
        first = self.config.smear_first
        if self.smear is not None and first:
            x_BTC = self.smear(x_BTC, starts_BT)
        x_BTC = x0_BTC = self.norm_embed(x_BTC)
        gates = self.token_gates["0"](x0_BTC) if "0" in self.token_gates else {}
        ngrams_BTC = None
        if len(self.ngrams) > 0:
            ngrams_BTC = sum(ngram(tokens_BT, starts_BT).to(self.dtype) for ngram in self.ngrams)
            share = gates[0].inject if 0 in gates else None
            x_BTC = x_BTC + (ngrams_BTC if share is None else share[..., 1:] * ngrams_BTC)
        if self.smear is not None and not first:
            x_BTC = self.smear(x_BTC, starts_BT)
        x_BTC = self.norm_mixture(x_BTC)
        return x_BTC, x0_BTC if first else x_BTC, ngrams_BTC, gates

    def raw_logits(self, x: Tensor) -> Tensor:
        """Logits before the softcap, (..., C) -> (..., V) in x's dtype."""
        return F.linear(x, self.embed.to(x.dtype)) if self.head is None else self.head(x)

    def logits(self, x: Tensor) -> Tensor:
        """Softcapped logits, (..., C) -> (..., V), float32, so that softcap and loss add no rounding of their own."""
        return softcap(self.raw_logits(x).float(), self.config.softcap, self.config.softcap_value)

    def loss(self, x_BTC: Tensor, targets_BT: Tensor, aux_weights: AuxLossWeights | None = None) -> Tensor:
        """Return the summed cross-entropy in nats, 0-D float32, of the normalised stream; `aux_weights` as in `forward`."""
        x_NC, cap = x_BTC.flatten(0, 1), Softcap(self.config.softcap, self.config.softcap_value)
        if aux_weights is not None and aux_weights.classes is not None:
            return sampled_cross_entropy(x_NC, self.head_weight, targets_BT.flatten(), aux_weights.classes, cap)
        targets = stack_targets(targets_BT, aux_weights or AuxLossWeights(), self.prefix_of)
        if self.paths.loss == "plain":
            return softcap_cross_entropy(self.raw_logits(x_NC), *targets, cap)
        if self.fp8_head is not None and torch.is_grad_enabled():
            return self.fp8_head(x_NC, self.head_weight, *targets)
        head = (self.embed, None) if self.head is None else (self.head.matrix(), self.head.bias)
        return head_cross_entropy(x_NC, head, *targets, cap)

    @torch.no_grad()
    def generate(self, tokens_T: Tensor, count: int, *, temperature: float = 0.8, top_k: int = 50,
                 generator: torch.Generator | None = None, **windows: int | None) -> Tensor:
        """Sample `count` tokens after the prompt, (T,) -> (T + count,), with a generator on the CPU; the context is cropped
        to max_tokens; `windows` as in `forward`."""
        for _ in range(count):
            # self.forward, not self(...): a compiled model would compile one graph per length.
            logits_V = self.forward(tokens_T[None, -self.max_tokens:], **windows)[0, -1, :self.vocab_size]
            best, index = logits_V.topk(min(top_k, self.vocab_size))
            weights = (best / max(temperature, 1e-6)).softmax(dim=-1).cpu()
            pick = torch.multinomial(weights, 1, generator=generator).to(index.device)
            tokens_T = torch.cat((tokens_T, index[pick]))
        return tokens_T

    # ---- Facts about the model, for the optimizer, the log and the plan ----

    @property
    def head_weight(self) -> Tensor:
        """Weight of the output layer, (V, C)."""
        return self.embed if self.head is None else self.head.weight

    def roles(self) -> dict[str, str]:
        """Return the role of each parameter by name."""
        return dict(self._roles)

    def axes(self) -> dict[str, int]:
        """Return, by name, the axis of each parameter that is the model dimension: -1, or -2 for output projections."""
        return dict(self._axes)

    def used_rows(self, tokens_BT: Tensor) -> dict[str, Tensor]:
        """Return the rows of each table that tokens (B, T) on the CPU look up, by parameter name; reads no weight."""
        starts_BT = tokens_BT == self.document_start if self.config.document_mask else None
        rows = {f"ngrams.{i}.table": ngram.table_rows(tokens_BT, starts_BT)[0] for i, ngram in enumerate(self.ngrams)}
        return rows | {f"value_embeds.{i}": tokens_BT for i in range(len(self.value_embeds))}

    def factors(self) -> dict[str, Tensor]:
        """Return the learned factors of nGPT by module name: eigen learning rates alpha, s_qk, s_u, s_v, s_z."""
        return {name: module() for name, module in self.named_modules() if isinstance(module, Scale)}

    def flops_per_token(self, sequence_tokens: int, window: int | None = None, long_window: int | None = None) -> float:
        """Return the floating-point operations of one token's forward and backward: 6 per matrix weight, and 6 per entry of
        query and value at each position within the causal mask and window. Document mask, paired and dynamic heads, sampled
        softmax do not count."""
        matrices = sum(p.numel() for name, p in self.named_parameters() if self._roles[name] in ("matrix", "head", "gate"))
        matrices += self.embed.numel() if self.head is None else 0
        windows = self.windows(window, long_window)
        attending = [windows[i] for i in range(self.config.layers) if i not in self.config.attention_free]
        spans = sum(mean_span(sequence_tokens, w or sequence_tokens) for w in attending)
        return 6 * matrices + 6 * self.config.dim * (1 + self.config.query_dim / self.config.head_dim) * spans

    def activation_bytes(self, tokens: int) -> int:
        """Estimate the bytes of activations that a forward-backward on `tokens` tokens stores. In bfloat16, where graphs are
        compiled and compute part of them again, those of speedrun need 8.3 GB for 16,384 tokens, 25 GB for 49,152."""
        dim, hidden, in_half = self.config.dim, self.config.mlp_dim or 4 * self.config.dim, self.dtype == torch.bfloat16
        per_token = 2 * (8 * dim + hidden) if in_half else self.dtype.itemsize * (12 * dim + 3 * hidden)
        return tokens * (self.config.layers * per_token + (6 if in_half else 12) * len(self.embed))


def mean_span(tokens: int, window: int) -> float:
    """Return the mean number of positions that a token attends to: the mean over t = 1..tokens of min(t, window)."""
    window = min(window, tokens)
    return (window * (window + 1) / 2 + (tokens - window) * window) / tokens


# =========================================================================================================================
# Act two: techniques of the speedrun's record (2025 and 2026), each switched on by one field of configs/model.py. Those with
# parameters start as the identity, or where the record starts them.
# =========================================================================================================================

# ---- Positions: `yarn` ---------------------------------------------------------------------------------------------------

# Pairs that turn less than ALPHA times within the first window are interpolated, those above BETA kept (arXiv 2309.00071).
YARN_ALPHA, YARN_BETA = 1, 32


def yarn_windows(config: Model) -> tuple[int, ...]:
    """Return the windows through which training goes, the first one at least; () without `yarn`."""
    first = config.long_window_tokens or config.window_tokens
    return (config.yarn_windows or (first,)) if config.yarn else ()


def windows_until(window: int | None, windows: tuple[int, ...]) -> tuple[int, ...]:
    """Return those of `windows` that are at most `window`; if there is one only, it and `window`. None: the first."""
    if len(windows) == 1:
        return (*windows, window or windows[0])
    return tuple(w for w in windows if w <= (window or windows[0]))


def yarn_frequencies(frequency: Tensor, windows: tuple[int, ...]) -> Tensor:
    """Return the rotary frequencies (D/2,) after the window has grown through `windows` (YaRN, Peng et al. 2023,
    arXiv 2309.00071). From w0 to w, slow pairs are slowed by w0 / w, fast ones keep their frequency, a linear blend
    between."""
    for w0, w in itertools.pairwise(windows):
        unchanged = (w0 * frequency / (2 * math.pi) - YARN_ALPHA) / (YARN_BETA - YARN_ALPHA)
        frequency = frequency * (w0 / w + unchanged.clamp(0, 1) * (1 - w0 / w))
    return frequency


def yarn_softmax_factor(windows: tuple[int, ...]) -> float:
    """Return the speedrun's factor of the softmax scale, 1 + .2 log(w / w0) for each growth of the window from w0 to w.
    YaRN's own is (1 + .1 log(w / w0))^2."""
    return math.prod([1 + 0.2 * math.log(w / w0) for w0, w in itertools.pairwise(windows)])


# ---- Attention heads: `head_gates`, `xsa`, `value_gates`, `paired_heads`, `dynamic_heads` --------------------------------

VALUE_GATE_DIMS = 6  # value gates read so many of the input and as many of the value embedding (speedrun, Jan 2026)


def exclusive_heads(y_BTHD: Tensor, v_BTHD: Tensor, alpha_BTH: Tensor) -> Tensor:
    """Exclusive self-attention (XSA, arXiv 2603.09078): remove from y_h the share tanh(alpha_h) of its component along the
    token's own value, which the residual stream already holds: (B, T, H, D) twice, (B, T, H) -> (B, T, H, D)."""
    coefficient = (y_BTHD * v_BTHD).sum(-1, keepdim=True) / v_BTHD.square().sum(-1, keepdim=True).clamp_min(1e-8)
    return y_BTHD - alpha_BTH.tanh()[..., None] * coefficient * v_BTHD


class ValueGates(nn.Module):
    """Gated value embedding e, instead of ValueMix: v_h + 2 sigmoid(w_h . [x, e]) e_h (speedrun, Jan 2026)."""

    def __init__(self, config: Model, *, own: bool = True) -> None:
        super().__init__()
        self.dims = min(VALUE_GATE_DIMS, config.dim)
        weight = torch.zeros(config.dim // config.head_dim, 2 * self.dims)
        self.weight = parameter(weight, "gate") if own else None

    def forward(self, v_BTHD: Tensor, embed_BTC: Tensor, x_BTC: Tensor, gates: "LayerGates") -> Tensor:
        """(B, T, H, D), (B, T, C), (B, T, C) -> (B, T, H, D); without own weights one gate for each half of the heads."""
        if self.weight is None:
            gate_BTH = gates.value.repeat_interleave(v_BTHD.size(2) // 2, dim=-1)
        else:
            inputs = torch.cat((x_BTC[..., :self.dims], embed_BTC[..., :self.dims]), dim=-1)
            gate_BTH = 2 * F.linear(inputs, self.weight.to(inputs.dtype)).sigmoid()
        return v_BTHD + gate_BTH[..., None] * embed_BTC.view_as(v_BTHD)


def pair_heads(x_BTHD: Tensor) -> Tensor:
    """Interleave heads h and h + H/2 token by token into one head of twice the length, (B, T, H, D) -> (B, 2T, H/2, D): each
    query then sees the keys of both heads, and a window of w tokens spans w / 2 (speedrun, Dec 2025)."""
    B, T, H, D = x_BTHD.shape
    return x_BTHD.reshape(B, 2 * T, H // 2, D)


def unpair_heads(x_BTHD: Tensor) -> Tensor:
    """Undo pair_heads: (B, 2T, H/2, D) -> (B, T, H, D)."""
    B, T, H, D = x_BTHD.shape
    return x_BTHD.reshape(B, T // 2, 2 * H, D)


# ---- Hashed embeddings: `bigram_signs`, `inject` -------------------------------------------------------------------------

INJECT_START = 0.05  # initial weight of the n-gram embeddings wherever they are added (speedrun, 2026)


def random_signs(rows: int, dim: int, *, seed: int) -> Tensor:
    """Return a table (rows, dim) of +-1 that depends on `seed` only and leaves the global generator alone."""
    return torch.randint(0, 2, (rows, dim), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


def inject(x_BTC: Tensor, inputs: LayerInputs) -> Tensor:
    """Add the token's identity again after attention: x + a x0 + b e with the n-gram embeddings e, (B, T, C); a starts at 0,
    b at .05 (speedrun, 2026)."""
    x0_weight, *ngram_weight = inputs.gates.inject.split(1, dim=-1)
    x_BTC = x_BTC + x0_weight * inputs.x0
    return x_BTC if inputs.ngrams is None else x_BTC + ngram_weight[0] * inputs.ngrams


# ---- Residual stream: `residual_growth`, `skips`, `shared_attention_input`, `dense`, `backout` ---------------------------

BACKOUT_START = 0.5  # speedrun, Oct 2025
MUDD_DIM, MUDD_SCALE = 64, 0.1  # the speedrun's inner width and scale of dynamic weights, 2026
HEAD_GATE_START = 0.25  # speedrun, 2026


class ResidualGrowth(nn.Module):
    """Residual sum a x + b y with learned a and b, a from sqrt(residual_growth): two sums a layer make the stream grow by
    that factor, so that later layers change it relatively less (speedrun, 2026: 1.1)."""

    def __init__(self, config: Model, *, own: bool = True) -> None:
        super().__init__()
        self.weight = parameter(torch.tensor([config.residual_growth**0.5, 1.0]), "scalar") if own else None

    def forward(self, x_BTC: Tensor, y_BTC: Tensor, weights_BT2: Tensor | None = None) -> Tensor:
        """(B, T, C) twice -> (B, T, C); `weights_BT2` are a and b of each token, without weights of its own."""
        old, new = (weights_BT2 if self.weight is None else self.weight.to(x_BTC.dtype)).split(1, -1)
        return old * x_BTC + new * y_BTC


class Streams(nn.Module):
    """Connections between blocks other than the residual stream.

    `history` is a list of (B, T, C): entry 0 is the stream before the first block, entry i + 1 that after block i.
    """

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.pairs = parse_skips(config.skips, config.layers)
        self.shared_layer, self.backout_layer = config.shared_attention_input, config.backout
        self.backout = None if config.backout is None else parameter(torch.tensor(BACKOUT_START), "scalar")
        self.inputs = nn.ModuleDict({str(i): InputMixture(config, skips) for i, skips in dense_skips(config).items()})

    def before_block(self, x_BTC: Tensor, layer: int, history: list[Tensor], value_embeds: list[Tensor],
                     inputs: LayerInputs) -> tuple[Tensor, LayerInputs]:
        """Return a layer's stream and inputs with the connections that end there."""
        gates = inputs.gates or LayerGates()
        x_BTC = self.add_skips(x_BTC, layer, history, gates.skip)
        if str(layer) in self.inputs:
            x_BTC, of_mixture = self.inputs[str(layer)](x_BTC, history, value_embeds)
            if of_mixture:  # these layers add the stream before the first block as it is, n-grams included
                inputs = inputs._replace(gates=gates._replace(**of_mixture), x0=history[0])
        return x_BTC, inputs._replace(attention_input=self.attention_input(layer, history))

    def add_skips(self, x_BTC: Tensor, layer: int, history: list[Tensor], share_BT1: Tensor | None) -> Tensor:
        """Add to a layer's input, for each token, its share of every earlier stream whose skip ends at this layer."""
        for source in (source for source, target in self.pairs if target == layer):
            x_BTC = x_BTC + share_BT1 * history[source + 1]
        return x_BTC

    def attention_input(self, layer: int, history: list[Tensor]) -> Tensor | None:
        """Return the stream that attention reads in all layers after `shared_attention_input`, or None (speedrun, 2026)."""
        return history[self.shared_layer + 1] if self.shared_layer is not None and layer > self.shared_layer else None

    def after_blocks(self, x_BTC: Tensor, history: list[Tensor], value_embeds: list[Tensor]) -> Tensor:
        """Return the last stream with the connections that end at the head: `backout`'s share of an earlier stream
        subtracted (speedrun, Oct 2025), and the mixture of `dense_skips`."""
        if self.backout is not None:
            x_BTC = x_BTC - self.backout.to(x_BTC.dtype) * history[self.backout_layer + 1]
        layers = str(len(history) - 1)
        return self.inputs[layers](x_BTC, history, value_embeds)[0] if layers in self.inputs else x_BTC


class InputMixture(nn.Module):
    """Mixture at the input of a layer, or of the head: x + sum_j c_j x_j over the streams of `dense_skips`.

    denseformer: learned coefficients c (Pagliardini et al. 2024, arXiv 2402.02622, equation 2). mudd: of each token, by a
    network that reads x (MUDD, Xiao et al. 2025, arXiv 2502.12170, of its four ways the one into the residual stream). In
    layers of `dense_gates` it also computes a coefficient of x, a mixture of the same streams that is added to the values,
    and the weights of value embedding, sums and injection, as in the speedrun's last layer (2026).
    """

    def __init__(self, config: Model, skips: list[DenseSkip]) -> None:
        super().__init__()
        self.sources, starts = [skip.source for skip in skips], [skip.start for skip in skips]
        self.sizes = {"mix": len(skips)}
        if skips[0].target in config.dense_gates:
            streams, growth = len(skips) + 1, [config.residual_growth**0.5, 1.0]
            starts = [0.0] * streams + [*starts, 0.0] + [2.0, 2.0] + growth + [0.0, INJECT_START] + growth
            self.sizes = {"values": streams, "mix": streams, "value": 2, "sum1": 2, "inject": 2, "sum2": 2}
        dynamic = config.dense == "mudd"
        self.network = TokenNetwork(config, starts) if dynamic else None
        self.weight = None if dynamic else parameter(torch.tensor(starts), "scalar")

    def forward(self, x_BTC: Tensor, history: list[Tensor], value_embeds: list[Tensor]) -> tuple[Tensor, dict]:
        """(B, T, C) -> the mixed stream, (B, T, C), and the fields of LayerGates that the network computes."""
        weights = self.weight.to(x_BTC.dtype) if self.network is None else self.network(x_BTC)
        gates = dict(zip(self.sizes, weights.split(list(self.sizes.values()), dim=-1), strict=True))
        named = {"in": history[0]} | {f"ve{i}": embed for i, embed in enumerate(value_embeds)}
        streams = [named[source] if source in named else history[int(source) + 1] for source in self.sources] + [x_BTC]
        mixed = x_BTC + weighted_sum(gates.pop("mix"), streams)
        if "values" in gates:
            gates["values"] = weighted_sum(gates["values"], streams)
        return mixed, gates


def dense_skips(config: Model) -> dict[int, list[DenseSkip]]:
    """Return the connections of `dense` by the layer at whose input they end; without `dense_skips`, all from earlier
    streams to layers and head."""
    if config.dense == "none":
        return {}
    streams = ["in", *map(str, range(config.layers))]
    every = tuple(f"{source}>{i}" for i in range(1, config.layers + 1) for source in streams[:i])
    by_target: dict[int, list[DenseSkip]] = {}
    for skip in parse_dense_skips(config.dense_skips or every, config.layers):
        by_target.setdefault(skip.target, []).append(skip)
    return by_target


def weighted_sum(weights: Tensor, streams: list[Tensor]) -> Tensor:
    """Return the sum of the first n streams (B, T, C), each times its weight, (B, T, n) or (n,)."""
    return sum(w * x for w, x in zip(weights.split(1, dim=-1), streams, strict=False))


# ---- Coefficients of each token: `gate_layers` ---------------------------------------------------------------------------


class TokenNetwork(nn.Module):
    """Coefficients of each token, s (W_2 gelu(W_1 x) + b), which start at `starts`: W_2 at 0, b at starts / s (MUDD, Xiao et
    al. 2025, arXiv 2502.12170, in the speedrun's form of 2026). The scale s is fixed, or learned from its value."""

    def __init__(self, config: Model, starts: list[float], *, learned_scale: bool = False) -> None:
        super().__init__()
        bound = config.dim**-0.5
        self.up = parameter(torch.empty(MUDD_DIM, config.dim).uniform_(-bound, bound), "gate")
        self.down = parameter(torch.zeros(len(starts), MUDD_DIM), "gate")
        self.bias = parameter(torch.tensor(starts) / MUDD_SCALE, "gate")
        self.scale = parameter(torch.tensor(MUDD_SCALE), "gate") if learned_scale else None

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, number of coefficients)."""
        dtype = x_BTC.dtype
        hidden = F.gelu(F.linear(x_BTC, self.up.to(dtype)))
        scale = MUDD_SCALE if self.scale is None else self.scale.to(dtype)
        return F.linear(hidden, self.down.to(dtype), self.bias.to(dtype)) * scale


class LayerGates(NamedTuple):
    """Coefficients of one layer computed for each token; None where the layer has weights of its own, or nothing."""

    head: Tensor | None = None
    """(B, T, H): factors of the heads' outputs."""
    xsa: Tensor | None = None
    """(B, T, H): alpha of ExclusiveHeads."""
    dynamic: Tensor | None = None
    """(B, T, 2 H): a, before its norm, and b of kernels/dynamic_heads.py."""
    inject: Tensor | None = None
    """(B, T, 2): weights of x0 and of the n-gram embeddings; (B, T, 1) without n-grams."""
    skip: Tensor | None = None
    """(B, T, 1): factor of the skips that end at this layer."""
    values: Tensor | None = None
    """(B, T, C): addition to the values."""
    value: Tensor | None = None
    """(B, T, 2): factors of the value embedding, one for each half of the heads."""
    sum1: Tensor | None = None
    """(B, T, 2): weights of the stream and of attention's output in their sum."""
    sum2: Tensor | None = None
    """(B, T, 2): weights of the stream and of the MLP's output in their sum."""


class TokenGates(nn.Module):
    """LayerGates of the layers from `first` up to the next of `gate_layers`, by one network that reads the input of layer
    `first` (x0 for layer 0): one small product in place of several in each layer (speedrun, 2026)."""

    def __init__(self, config: Model, first: int) -> None:
        super().__init__()
        self.starts = gate_starts_from(config, first)
        starts = [start for of_layer in self.starts.values() for values in of_layer.values() for start in values]
        self.network = TokenNetwork(config, starts, learned_scale=True)

    def forward(self, x_BTC: Tensor) -> dict[int, LayerGates]:
        """(B, T, C) -> the gates by layer."""
        sizes = [len(values) for of_layer in self.starts.values() for values in of_layer.values()]
        parts = iter(self.network(x_BTC).split(sizes, dim=-1))
        return {layer: LayerGates(**{name: next(parts) for name in of_layer}) for layer, of_layer in self.starts.items()}


def gate_starts_from(config: Model, first: int) -> dict[int, dict[str, list[float]]]:
    """Return `gate_starts` of the layers from `first` up to the next of `gate_layers`, without layers that have none."""
    last = min((layer for layer in config.gate_layers if layer > first), default=config.layers)
    return {layer: starts for layer in range(first, last) if (starts := gate_starts(config, layer))}


def gate_starts(config: Model, layer: int) -> dict[str, list[float]]:
    """Return the starting values of a layer's coefficients that TokenGates computes, by field of LayerGates."""
    heads, every, starts = config.dim // config.head_dim, range(config.layers), {}
    if any(target == layer for _, target in parse_skips(config.skips, config.layers)):
        starts["skip"] = [config.skip_weight]
    if layer in config.attention_free:
        return starts
    # Paired heads have no value of their own, along which xsa could remove a share.
    if config.xsa and layer in (config.xsa_layers or every) and layer not in config.paired_heads:
        starts["xsa"] = [0.0] * heads
    if config.head_gates and layer in (config.head_gate_layers or every):
        starts["head"] = [HEAD_GATE_START] * heads
    if layer in config.dynamic_heads:
        starts["dynamic"] = [1.0] * heads + [0.0] * heads
    if config.inject and layer not in config.dense_gates:
        starts["inject"] = [0.0, INJECT_START] if config.bigram_buckets else [0.0]
    return starts


# ---- Fast products: `fused`, `fp8` ---------------------------------------------------------------------------------------


def use_fast_products(model: GPT) -> None:
    """Replace plain lines by the kernels that `model.paths` chose, in place; parameters stay as they are.
    choose_paths rejects fp8 for a tied head or the sphere."""
    config = model.config
    if model.paths.dynamic_heads == "triton":
        for attention in (block.attention for block in model.blocks if block.attention is not None):
            attention.mix_heads = fused_dynamic_heads
    for mlp in (block.mlp for block in model.blocks):
        if model.paths.relu2 == "triton":
            mlp.fused = Fp8ReLU2MLP(config.fp8_x_headroom) if model.paths.fp8 == "head_mlp" else relu2_mlp
        for linear in (mlp.up, mlp.gate, mlp.down) if model.paths.fp8 == "head_mlp" else ():
            if linear is not None and mlp.fused is None:
                linear.product = Fp8Product(config)
