"""The GPT: from token ids to logits, or to the summed cross-entropy in nats.

Act one is the model that `tiny`, `bytes`, `track3` and nGPT train, to be read from top to bottom. Act two, below GPT, holds
the techniques of the speedrun's record, each behind one field of configs/model.py and called from act one by one line. With
every field off it is the pre-norm decoder of GPT-2 (Radford et al. 2019) with RMS norms. The model knows no rank, no clock
and no optimizer; each of its parameters knows its role.

Shapes: B sequences, T tokens, C model dimension, H heads, D head dimension, V padded vocabulary, N = B T tokens.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.model import Model
from configs.notation import parse_skips
from kernels import Paths, choose_paths
from kernels.attention import KERNELS, Mask, choose_kernel, document_index, use_flash
from kernels.cross_entropy import fused_cross_entropy, softcap
from kernels.fp8 import Fp8Product
from kernels.mlp import linear_relu2
from kernels.norms import rms_norm, unit

# ---- Act one: linear maps and norms -------------------------------------------------------------------------------------


def parameter(value: Tensor, role: str, *, axis: int = -1) -> nn.Parameter:
    """A parameter with its role, by which the optimizer chooses its group, and its model dimension, -1 or -2."""
    param = nn.Parameter(value)
    param.role, param.axis = role, axis
    return param


class Linear(nn.Module):
    """y = W x (+ b), W (out, in) cast to x's dtype at use; W starts with variance init_gain / in, or at 0."""

    def __init__(self, fan_in: int, fan_out: int, *, config: Model, zero: bool = False, role: str = "matrix",
                 axis: int = -1) -> None:
        super().__init__()
        std = 0.0 if zero and config.zero_init_projections else (config.init_gain / fan_in) ** 0.5
        dtype = getattr(torch, config.matrix_dtype if role == "matrix" else "float32")
        self.weight = parameter((torch.randn(fan_out, fan_in) * std).to(dtype), role, axis=axis)
        self.bias = parameter(torch.zeros(fan_out), "bias") if config.biases else None
        self.product = F.linear  # where the device has a faster one, use_fast_products puts it here

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.product(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Norm(nn.Module):
    """RMS norm, with learned gains where `config.norm_gains`."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.gains = parameter(torch.ones(config.dim), "gain") if config.norm_gains else None

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return rms_norm(x_BTC) if self.gains is None else rms_norm(x_BTC) * self.gains.to(x_BTC.dtype)


# ---- Act one: embeddings of the tokens before ----------------------------------------------------------------------------

# Odd multipliers of the hash, the present token's first: the speedrun's for two tokens (Jan 2026), and more.
HASH = (36_313, 27_191, 50_021, 41_231, 62_989, 33_461)
SMEAR_DIMS = 12  # the smear gate reads so many leading dimensions (speedrun, Sep 2025)


class NgramEmbedding(nn.Module):
    """A learned vector for each hashed n-gram that ends at a token; the last row is for tokens without n - 1 predecessors.

    With signs, row r of a fixed random table of +-1 multiplies it, r another hash of the same tokens: n-grams that share a
    vector then differ in sign patterns (speedrun, 2026).
    """

    def __init__(self, config: Model, order: int = 2) -> None:
        super().__init__()
        self.order = order
        dtype = getattr(torch, config.table_dtype)
        self.table = parameter(torch.zeros(config.bigram_buckets, config.dim, dtype=dtype), "bigram_embed")
        signs = random_signs(config.bigram_signs, config.dim, seed=order) if config.bigram_signs else None
        self.register_buffer("signs", signs, persistent=False)

    def forward(self, tokens_BT: Tensor, starts_BT: Tensor | None) -> Tensor:
        """(B, T) -> (B, T, C)."""
        last_row, before = self.table.size(0) - 1, self.order - 1
        past = F.pad(tokens_BT, (before, 0))
        grams = [past[:, before - k:past.size(1) - k] for k in range(self.order)]  # now, before, ...
        hashed = functools.reduce(operator.xor, (gram * factor for gram, factor in zip(grams, HASH, strict=False)))
        bucket, sign_row = hashed % max(last_row, 1), functools.reduce(operator.xor, grams)
        crosses = torch.arange(tokens_BT.size(1), device=tokens_BT.device) < before
        if starts_BT is not None:  # an n-gram that begins in another document is none
            starts = F.pad(starts_BT, (before, 0))
            crosses = crosses | sum(starts[:, before - k:starts.size(1) - k] for k in range(before)).bool()
        bucket, sign_row = bucket.masked_fill(crosses, last_row), sign_row.masked_fill(crosses, 0)
        # On CPUs the gradient's rows are added into the buffer that is there: no table-sized temporary; Inductor cannot.
        sparse = self.table.grad is not None and self.table.device.type == "cpu" and not torch.compiler.is_compiling()
        vectors = F.embedding(bucket, self.table, sparse=sparse)
        return vectors if self.signs is None else vectors * F.embedding(sign_row % len(self.signs), self.signs)


class Smear(nn.Module):
    """x_t + lambda sigmoid(gate(x_t)) x_{t-1}, within a document; lambda starts at 0 (speedrun, Sep 2025)."""

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
    """What a block reads beside the residual stream."""

    mask: Mask = None
    """Which keys a query sees, in the form of the attention kernel; None: all earlier ones."""
    window: int | None = None
    """The layer's sliding window in tokens; None: none."""
    starts: Tensor | None = None
    """(B, T): true where a document begins, if attention stays within documents."""
    value_embed: Tensor | None = None
    """(B, T, C), as the following: the tokens' second embedding, for the values."""
    x0: Tensor | None = None
    """The stream before the first block."""
    ngrams: Tensor | None = None
    """The sum of the hashed embeddings."""
    attention_input: Tensor | None = None
    """An earlier stream that attention reads in place of the present one."""


class Rotary(nn.Module):
    """Rotates pairs (x_i, x_{i + D/2}) by position times frequency, so that scores depend on relative position alone.

    Frequencies fall geometrically from 1 to 1/base; `half_rotary` has half as many, and the other pairs stand still
    (speedrun 2025). Su et al. 2021, arXiv 2104.09864. With `first_window` they change with the window: `yarn_frequencies`.
    """

    def __init__(self, config: Model, max_tokens: int, *, first_window: int | None = None) -> None:
        super().__init__()
        moving = config.head_dim // (4 if config.position == "half_rotary" else 2)
        frequency = config.rotary_base ** -torch.linspace(0, 1, moving)
        frequency = F.pad(frequency, (0, config.head_dim // 2 - moving))
        positions_T = torch.arange(max_tokens, dtype=torch.float32)
        cos_TD, sin_TD = (None, None) if first_window else rotation(positions_T, frequency)
        self.first_window = first_window
        for name, tensor in {"still_D": (frequency == 0).repeat(2), "frequency": frequency, "positions_T": positions_T,
                             "cos_TD": cos_TD, "sin_TD": sin_TD}.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x_BTHD: Tensor, window: int | None = None) -> Tensor:
        """(B, T, H, D) -> (B, T, H, D), rotated in float32: positions in bfloat16 would run together."""
        x, tokens = x_BTHD.float(), x_BTHD.size(1)
        if self.first_window:  # YaRN: the window of this step decides
            cos_TD, sin_TD = rotation(self.positions_T[:tokens], yarn_frequencies(self.frequency, self.first_window, window))
        else:
            cos_TD, sin_TD = self.cos_TD[:tokens], self.sin_TD[:tokens]
        partner = x.roll(x.size(-1) // 2, dims=-1)
        return torch.addcmul(x * cos_TD[:, None], partner, sin_TD[:, None]).type_as(x_BTHD)


def rotation(positions_T: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines, and sines with the sign of each half, (T, D) each."""
    angle_TF = torch.outer(positions_T, frequency)
    cos, sin = angle_TF.cos(), angle_TF.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)


def has_long_window(config: Model, layer: int) -> bool:
    """Whether a layer has no sliding window, or the long one."""
    return config.window_tokens is None or layer in config.full_attention_layers


class ValueMix(nn.Module):
    """a v + b e of a value embedding e, a and b learned from 1/2 (speedrun, Dec 2024)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(torch.tensor([0.5, 0.5]), "scalar")

    def forward(self, v_BTHD: Tensor, embed_BTC: Tensor, x_BTC: Tensor) -> Tensor:
        """(B, T, H, D), (B, T, C), (B, T, C) -> (B, T, H, D); called like ValueGates, which read x."""
        del x_BTC
        own, embed = self.weight.to(v_BTHD.dtype)
        return own * v_BTHD + embed * embed_BTC.view_as(v_BTHD)


def offset_keys(k_BTHD: Tensor, still_D: Tensor, starts_BT: Tensor | None) -> Tensor:
    """The dimensions of keys that rotary embedding leaves alone (`still_D`) taken from the token before, within a document:
    what followed the present token earlier is found in one layer (speedrun, Dec 2025)."""
    previous = torch.cat((k_BTHD[:, :1], k_BTHD[:, :-1]), dim=1)
    take = still_D if starts_BT is None else still_D & ~starts_BT[:, :, None, None]
    return torch.where(take, previous, k_BTHD)


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, arXiv 1706.03762)."""

    def __init__(self, config: Model, max_tokens: int, *, mixes_value_embed: bool, attend: Callable, layer: int = 0) -> None:
        super().__init__()
        self.q, self.k, self.v = (Linear(config.dim, config.dim, config=config) for _ in range(3))
        self.out = Linear(config.dim, config.dim, config=config, zero=True, axis=-2)
        self.head_dim, self.attend = config.head_dim, attend
        on_sphere, far = config.geometry == "sphere", has_long_window(config, layer)
        # On the sphere queries and keys are unit vectors: scores need sqrt(D) to have variance 1, not 1 / sqrt(D).
        self.scale = config.attention_scale or config.head_dim ** (0.5 if on_sphere else -0.5)
        self.norm_qk = SphereQK(config) if on_sphere else rms_norm if config.qk_norm else None
        self.paired = layer in config.paired_heads
        first_window = (config.long_window_tokens if far else config.window_tokens) if config.yarn else None
        length = max_tokens * (2 if self.paired else 1)
        self.rotary = Rotary(config, length, first_window=first_window) if "rotary" in config.position else None
        self.offsets_keys = config.key_offset and far and not self.paired
        self.mix_value = (ValueGates(config) if config.value_gates else ValueMix()) if mixes_value_embed else None
        self.dynamic = DynamicHeads(config) if layer in config.dynamic_heads else None
        self.exclusive = ExclusiveHeads(config) if config.xsa and not self.paired else None
        self.gates = HeadGates(config) if config.head_gates else None
        self.gains = parameter(torch.ones(2), "scalar") if config.projection_gains else None

    def forward(self, x_BTC: Tensor, inputs: LayerInputs) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        # Queries, keys, values: (B, T, H, D) each, the values with the tokens' value embeddings.
        read_BTC = x_BTC if self.gains is None else self.gains[0].to(x_BTC.dtype) * x_BTC
        q, k, v = (project(read_BTC).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v))
        if self.mix_value is not None:
            v = self.mix_value(v, inputs.value_embed, x_BTC)
        # Norms and positions. The norm comes first: a rotation keeps lengths, and gains of single dimensions after it would
        # break relative positions.
        if self.norm_qk is not None:
            q, k = self.norm_qk(q), self.norm_qk(k)
        if self.paired:  # two heads as one sequence of twice the length, (B, 2T, H/2, D), until they are unpaired
            q, k, v = pair_heads(q), pair_heads(k), pair_heads(v)
        scale = self.scale
        if self.rotary is not None:
            q, k = self.rotary(q, inputs.window), self.rotary(k, inputs.window)
            if self.rotary.first_window and inputs.window:  # YaRN: a longer window, a sharper softmax
                scale = scale * yarn_softmax_factor(self.rotary.first_window, inputs.window)
        if self.offsets_keys:
            k = offset_keys(k, self.rotary.still_D, inputs.starts)
        # Attend: softmax(scale q k^T + mask) v.
        y_BTHD = self.attend(q, k, v, inputs.mask, scale)
        if self.dynamic is not None:
            y_BTHD = y_BTHD + self.dynamic((q, k, v), x_BTC, inputs.starts, scale)
        if self.paired:
            y_BTHD = unpair_heads(y_BTHD)
        if self.exclusive is not None:
            y_BTHD = self.exclusive(y_BTHD, v)
        if self.gates is not None:
            y_BTHD = self.gates(y_BTHD, x_BTC)
        # Back to the stream.
        y_BTC = self.out(y_BTHD.reshape_as(x_BTC))
        return y_BTC if self.gains is None else self.gains[1].to(y_BTC.dtype) * y_BTC


# ---- Act one: MLP --------------------------------------------------------------------------------------------------------


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2; as a product, since .square() differentiates twice as slowly on CPUs."""
    return F.relu(x) * x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu2": relu2, "gelu": F.gelu, "swiglu": F.silu}


class MLP(nn.Module):
    """W_down act(W_up x), or W_down (silu(W_gate x) * W_up x) for SwiGLU."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        hidden = config.mlp_dim or 4 * config.dim
        # On the sphere W x are cosines of about 1 / sqrt(C): sqrt(C) brings them to where activations bend.
        first = functools.partial(ScaledLinear, constant=config.dim**0.5) if config.geometry == "sphere" else Linear
        self.up = first(config.dim, hidden, config=config)
        self.gate = first(config.dim, hidden, config=config) if config.activation == "swiglu" else None
        self.down = Linear(hidden, config.dim, config=config, zero=True, axis=-2)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        hidden = self.up(x_BTC)
        hidden = self.activation(hidden) if self.gate is None else self.activation(self.gate(x_BTC)) * hidden
        return self.down(hidden)


# ---- Act one: the sphere -------------------------------------------------------------------------------------------------
#
# nGPT (Loshchilov et al. 2024, arXiv 2410.01131): every vector of the stream has length 1, and a layer moves it along the
# sphere. The optimizer keeps the weights at length 1 along the model dimension (constraint sphere), so that every product
# here is a cosine, and learned factors give it its size.


class Scale(nn.Module):
    """Learned factors, `value` at the start, stored as `stored`: Adam's step of lr moves them by lr value / stored."""

    def __init__(self, size: int, *, value: float = 1.0, stored: float = 1.0) -> None:
        super().__init__()
        self.stored = parameter(torch.full((size,), stored), "scale")
        self.unit_of_storage = value / stored

    def forward(self) -> Tensor:
        """The factors, (size,), float32."""
        return self.stored * self.unit_of_storage


class ScaledLinear(Linear):
    """y = constant s * (W x), s learned factors, one for each output: s_u, s_v, s_z of the paper (equations 3, 20, 21).

    Computed as (constant s W) x: a matrix has fewer entries than its outputs for a batch.
    """

    def __init__(self, fan_in: int, fan_out: int, *, config: Model, role: str = "matrix", constant: float = 1.0,
                 scale: Scale | None = None) -> None:
        super().__init__(fan_in, fan_out, config=config, role=role)
        self.scale, self.constant = scale or Scale(fan_out), constant

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, (self.weight * (self.scale() * self.constant)[:, None]).to(x.dtype))


class SphereStep(nn.Module):
    """h <- n(h + |alpha| (n(x) - h)): from h towards the layer's suggestion, alpha of the way, each dimension its own.

    alpha are the eigen learning rates: equations 10 and 11.
    """

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.alpha = Scale(config.dim, value=config.eigen_lr, stored=config.dim**-0.5)

    def forward(self, h_BTC: Tensor, x_BTC: Tensor) -> Tensor:
        """(B, T, C) of length 1, (B, T, C) -> (B, T, C) of length 1."""
        return unit(torch.lerp(h_BTC, unit(x_BTC), self.alpha().abs().to(h_BTC.dtype)))


class SphereQK(nn.Module):
    """s_qk n(q), s_qk n(k), the factors shared by both (equations 15 and 16).

    They act before the rotary embedding: after it, factors that differ within a rotated pair would make scores depend on
    absolute positions.
    """

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.head_dim, self.scale = config.head_dim, Scale(config.dim, stored=config.dim**-0.5)

    def forward(self, x_BTHD: Tensor) -> Tensor:
        """(B, T, H, D) -> (B, T, H, D)."""
        return unit(x_BTHD) * self.scale().view(-1, self.head_dim).to(x_BTHD.dtype)


# ---- Act one: the block --------------------------------------------------------------------------------------------------


def residual_sum(config: Model) -> nn.Module | None:
    """What stands in place of x + y, y the output of attention or MLP; None: the plain sum."""
    if config.geometry == "sphere":
        return SphereStep(config)
    return ResidualGrowth(config) if config.residual_growth else None


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `x0_skip` the input is first mixed with x0.

    On the sphere both sums are steps along it, and the mixture returns to it: nothing else needs a norm.
    """

    def __init__(self, config: Model, max_tokens: int, *, mixes_value_embed: bool, attend: Callable, layer: int = 0) -> None:
        super().__init__()
        on_sphere, attends = config.geometry == "sphere", layer not in config.attention_free
        self.norm1, self.norm2 = (nn.Identity() if on_sphere else Norm(config) for _ in range(2))
        self.add1 = residual_sum(config) if attends else None
        self.add2 = residual_sum(config)
        self.norm_mixture = unit if on_sphere else nn.Identity()
        self.attention = Attention(config, max_tokens, mixes_value_embed=mixes_value_embed, attend=attend,
                                   layer=layer) if attends else None
        self.mlp = MLP(config)
        self.skip = parameter(torch.tensor([1.0, 0.0]), "scalar") if config.x0_skip else None
        self.inject = Inject(config) if config.inject and attends else None

    def forward(self, x_BTC: Tensor, inputs: LayerInputs) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if self.skip is not None:
            stream, start = self.skip.to(x_BTC.dtype)
            x_BTC = self.norm_mixture(stream * x_BTC + start * inputs.x0)
        if self.attention is not None:
            read_BTC = x_BTC if inputs.attention_input is None else inputs.attention_input
            y_BTC = self.attention(self.norm1(read_BTC), inputs)
            x_BTC = x_BTC + y_BTC if self.add1 is None else self.add1(x_BTC, y_BTC)
        if self.inject is not None:
            x_BTC = self.inject(x_BTC, inputs)
        y_BTC = self.mlp(self.norm2(x_BTC))
        return x_BTC + y_BTC if self.add2 is None else self.add2(x_BTC, y_BTC)


# ---- Act one: GPT --------------------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """Decoder-only Transformer; see the module's docstring for the shapes."""

    def __init__(self, config: Model, *, vocab_size: int, max_tokens: int, document_start: int | None = None,
                 prefix_of: list[int] | None = None, on_cuda: bool = False,
                 dtype: torch.dtype = torch.float32) -> None:
        """`max_tokens` is the longest context; `document_start` the token that opens a document; `prefix_of` each token's
        longest proper prefix or -1; `dtype` that of the activations (weights have their own). Raises ValueError for
        combinations that the arguments make impossible.
        """
        super().__init__()
        if config.document_mask and document_start is None:
            raise ValueError("document_mask needs a source with document starts; use --model.no_document_mask")
        if config.prefix_loss and prefix_of is None:
            raise ValueError("prefix_loss needs a tokenizer whose tokens have prefixes; use --model.prefix_loss 0")
        self.config, self.vocab_size, self.document_start, self.dtype = config, vocab_size, document_start, dtype
        self.max_tokens, self.kernel = max_tokens, choose_kernel(config, on_cuda)
        if config.flash != "default":
            use_flash(config, on_cuda)
        on_sphere = config.geometry == "sphere"
        padded = -(-vocab_size // config.vocab_multiple) * config.vocab_multiple
        embed_dtype, table_dtype = getattr(torch, config.embed_dtype), getattr(torch, config.table_dtype)

        # Embeddings. Here and below the order is that of the random draws, made in float32 whatever the dtype.
        self.embed = parameter((torch.randn(padded, config.dim) * config.embed_std).to(embed_dtype), "embed")
        learned = config.position == "learned"
        self.positions = parameter(torch.randn(max_tokens, config.dim) * 0.02, "embed") if learned else None
        orders = (2, *config.ngram_orders) if config.bigram_buckets else ()
        self.ngrams = nn.ModuleList(NgramEmbedding(config, order) for order in orders)
        self.ngram_share = parameter(torch.tensor(INJECT_START), "scalar") if config.inject and orders else None
        self.smear = Smear(config) if config.smear else None
        self.norm_embed = unit if on_sphere else Norm(config) if config.norm_embedding else nn.Identity()
        self.norm_mixture = unit if on_sphere else nn.Identity()
        self.value_embeds = nn.ParameterList(
            parameter((torch.randn(padded, config.dim) * config.embed_std).to(table_dtype), "value_embed")
            for _ in range(config.value_embeds))
        self.value_layers = config.value_embed_layers or tuple(range(config.layers - config.value_embeds, config.layers))

        # Blocks, and the connections between them beside the residual stream.
        self.blocks = nn.ModuleList(Block(config, max_tokens, mixes_value_embed=i in self.value_layers,
                                          attend=KERNELS[self.kernel].attend, layer=i) for i in range(config.layers))
        connected = config.skips or config.dense != "none" or config.backout is not None
        self.streams = Streams(config) if connected or config.shared_attention_input is not None else None

        # Head. Tied, it is the token embedding.
        self.norm_final = nn.Identity() if on_sphere else Norm(config)
        self.head = None
        if on_sphere:
            scale = Scale(padded, value=config.logit_scale, stored=config.dim**-0.5)
            self.head = ScaledLinear(config.dim, padded, config=config, role="head", scale=scale)
        elif not config.tied_head:
            self.head = Linear(config.dim, padded, config=config, zero=True, role="head")
        self.register_buffer("prefix_of", torch.tensor(prefix_of) if config.prefix_loss else None, persistent=False)
        self.paths = Paths()
        if on_cuda or config.fp8 != "none":  # fp8 on a CPU is refused here
            self.paths = choose_paths(config, torch.device("cuda" if on_cuda else "cpu"), dtype)
        if self.paths.relu2 == "triton" or config.fp8 != "none":
            use_fast_products(self)
        self._roles = {name: param.role for name, param in self.named_parameters()}  # a copy of the model keeps it
        self._axes = {name: param.axis for name, param in self.named_parameters()}

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, *, window: int | None = None,
                long_window: int | None = None, aux_weights: "AuxLossWeights | None" = None) -> Tensor:
        """Logits (B, T, V) in float32; with targets the summed cross-entropy in nats, 0-D float32.

        `window` and `long_window` override the configured sliding windows. With `aux_weights` the loss is what training
        minimises: with its auxiliary losses, or over sampled classes, as configured.
        """
        if tokens_BT.size(1) > self.max_tokens:
            raise ValueError(f"a context of {tokens_BT.size(1)} tokens; this model was built for {self.max_tokens}")

        # Masks: a query sees the keys before it, within its layer's window and its own document.
        starts_BT = tokens_BT == self.document_start if self.config.document_mask else None
        windows = self.windows(window, long_window)
        masks = self.masks(tokens_BT, starts_BT, windows)

        # Embeddings: the residual stream before the first block.
        x_BTC, ngrams_BTC = self.embed_tokens(tokens_BT, starts_BT)
        inputs = LayerInputs(starts=starts_BT, x0=x_BTC, ngrams=ngrams_BTC)

        # Blocks: each reads the stream and adds to it. `history`, for `streams`: before the first block and after each.
        history = [x_BTC]
        for i, block in enumerate(self.blocks):
            embed_BTC = None
            if i in self.value_layers:
                embed_BTC = F.embedding(tokens_BT, self.value_embeds[self.value_layers.index(i)]).to(self.dtype)
            inputs = inputs._replace(mask=masks[i], window=windows[i], value_embed=embed_BTC)
            if self.streams is None:
                x_BTC = block(x_BTC, inputs)
                continue
            x_BTC = self.streams.add_skips(x_BTC, i, history)
            inputs = inputs._replace(attention_input=self.streams.attention_input(i, history))
            x_BTC = self.streams.mix(block(x_BTC, inputs), i, history)
            history.append(x_BTC)
        if self.streams is not None:
            x_BTC = self.streams.subtract_backout(x_BTC, history)

        # Head, and loss.
        x_BTC = self.norm_final(x_BTC)
        return self.logits(x_BTC) if targets_BT is None else self.loss(x_BTC, targets_BT, aux_weights)

    def windows(self, window: int | None, long_window: int | None) -> list[int | None]:
        """Each layer's sliding window, of the configured ones where none is given; None: it sees everything."""
        window, long_window = window or self.config.window_tokens, long_window or self.config.long_window_tokens
        return [long_window if window is not None and has_long_window(self.config, i) else window
                for i in range(self.config.layers)]

    def masks(self, tokens_BT: Tensor, starts_BT: Tensor | None, windows: list[int | None]) -> list[Mask]:
        """Each layer's attention mask; layers with the same window share one."""
        document_BT, tokens = None if starts_BT is None else document_index(starts_BT), tokens_BT.size(1)
        masks: dict[tuple[int | None, bool], Mask] = {}
        kinds = [(window, i in self.config.paired_heads) for i, window in enumerate(windows)]
        for window, paired in dict.fromkeys(kinds):
            length, document = tokens, document_BT
            if paired:  # both heads' tokens stand next to each other
                length, document = 2 * tokens, None if document_BT is None else document_BT.repeat_interleave(2, dim=1)
            masks[window, paired] = KERNELS[self.kernel].mask(length, window, document, tokens_BT.device)
        return [masks[kind] for kind in kinds]

    def embed_tokens(self, tokens_BT: Tensor, starts_BT: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The stream before the first block and the sum of the hashed embeddings, if any: (B, T) -> (B, T, C) each."""
        x_BTC = F.embedding(tokens_BT, self.embed).to(self.dtype)
        if self.positions is not None:
            x_BTC = x_BTC + self.positions[:tokens_BT.size(1)].to(self.dtype)
        x_BTC = self.norm_embed(x_BTC)
        ngrams_BTC = None
        if len(self.ngrams) > 0:
            ngrams_BTC = sum(ngram(tokens_BT, starts_BT).to(self.dtype) for ngram in self.ngrams)
            x_BTC = x_BTC + (ngrams_BTC if self.ngram_share is None else self.ngram_share.to(self.dtype) * ngrams_BTC)
        if self.smear is not None:
            x_BTC = self.smear(x_BTC, starts_BT)
        return self.norm_mixture(x_BTC), ngrams_BTC

    def raw_logits(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V) in x's dtype, before the softcap."""
        return F.linear(x, self.embed.to(x.dtype)) if self.head is None else self.head(x)

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., V) in float32, softcapped: in bfloat16 logits between 8 and 16 would be multiples of 1/16."""
        return softcap(self.raw_logits(x).float(), self.config.softcap, self.config.softcap_value)

    def loss(self, x_BTC: Tensor, targets_BT: Tensor, aux_weights: "AuxLossWeights | None" = None) -> Tensor:
        """Summed cross-entropy in nats of the normed stream, 0-D float32; `aux_weights` as in `forward`."""
        config, targets_N = self.config, targets_BT.flatten()
        if aux_weights is not None and config.sampled_softmax:
            return sampled_cross_entropy(x_BTC.flatten(0, 1), self.head_weight, targets_N, config)
        has_aux = aux_weights is not None and (config.mtp_weights or config.prefix_loss)
        if self.paths.loss == "triton" and not has_aux:
            z_NV = self.raw_logits(x_BTC.flatten(0, 1))
            return fused_cross_entropy(z_NV, targets_N, config.softcap, config.softcap_value).sum()
        logits_BTV = self.logits(x_BTC)
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_N, reduction="sum")
        if has_aux and config.mtp_weights:
            loss = loss + multi_token_cross_entropy(logits_BTV, targets_BT, config.mtp_weights, aux_weights.mtp)
        if has_aux and config.prefix_loss:
            prefix = prefix_cross_entropy(logits_BTV.flatten(0, 1), targets_N, self.prefix_of)
            loss = loss + config.prefix_loss * aux_weights.prefix * prefix
        return loss

    @torch.no_grad()
    def generate(self, tokens_T: Tensor, count: int, *, temperature: float = 0.8, top_k: int = 50,
                 generator: torch.Generator | None = None, **windows: int | None) -> Tensor:
        """`count` tokens sampled after `tokens_T`, the context cropped to max_tokens: (T,) -> (T + count,); windows as in
        `forward`."""
        for _ in range(count):
            # forward, not the module's call: a compiled model would be compiled again for every length
            logits_V = self.forward(tokens_T[None, -self.max_tokens:], **windows)[0, -1, :self.vocab_size]
            best, index = logits_V.topk(min(top_k, self.vocab_size))
            weights = (best / max(temperature, 1e-6)).softmax(dim=-1).cpu()
            pick = torch.multinomial(weights, 1, generator=generator).to(index.device)
            tokens_T = torch.cat((tokens_T, index[pick]))
        return tokens_T

    # ---- What others ask of the model ----

    @property
    def head_weight(self) -> Tensor:
        """The output matrix, (V, C)."""
        return self.embed if self.head is None else self.head.weight

    def roles(self) -> dict[str, str]:
        """The role of every parameter, by name."""
        return dict(self._roles)

    def axes(self) -> dict[str, int]:
        """By name, which dimension of a parameter is the model's: -1, or -2 for the maps that write to the stream."""
        return dict(self._axes)

    def factors(self) -> dict[str, Tensor]:
        """The sphere's learned factors as they act, by module name: eigen learning rates alpha, s_qk, s_u, s_v, s_z."""
        return {name: module() for name, module in self.named_modules() if isinstance(module, Scale)}

    def flops_per_token(self, sequence_tokens: int, window: int | None = None, long_window: int | None = None) -> float:
        """Floating-point operations of one token's forward and backward: 6 per matrix weight that it meets, 12 C per
        position it attends to (counted exactly: causal, windowed, not document-masked)."""
        matrices = sum(p.numel() for name, p in self.named_parameters() if self._roles[name] in ("matrix", "head", "gate"))
        matrices += self.embed.numel() if self.head is None else 0
        windows = self.windows(window, long_window)
        attending = [windows[i] for i in range(self.config.layers) if i not in self.config.attention_free]
        spans = sum(mean_span(sequence_tokens, w or sequence_tokens) for w in attending)
        return 6 * matrices + 12 * self.config.dim * spans

    def activation_bytes(self, tokens: int) -> int:
        """Estimate of what one forward-backward on `tokens` tokens stores: 12 C + 3 hidden numbers a layer, and the logits
        three times in float32."""
        config = self.config
        per_token = config.layers * (12 * config.dim + 3 * (config.mlp_dim or 4 * config.dim))
        return per_token * self.dtype.itemsize * tokens + 12 * len(self.embed) * tokens


def mean_span(tokens: int, window: int) -> float:
    """Mean over t = 1..tokens of min(t, window): how many positions a token attends to."""
    window = min(window, tokens)
    return (window * (window + 1) / 2 + (tokens - window) * window) / tokens


# =========================================================================================================================
# Act two: the record's techniques (speedrun, 2025 and 2026), each behind one field of configs/model.py and off by default.
# Those with parameters start as the identity, or as near to it as the record does.
# =========================================================================================================================

# ---- Positions: `yarn` ---------------------------------------------------------------------------------------------------

YARN_ALPHA, YARN_BETA = 1, 32  # rotations within the first window: below, interpolated; above, unchanged (arXiv 2309.00071)


def yarn_frequencies(frequency: Tensor, first_window: int, window: int | None) -> Tensor:
    """Rotary frequencies at a window w: pairs that turn less than once within the first window w0 are slowed by w0 / w,
    those that turn 32 times are not (YaRN, Peng et al. 2023, arXiv 2309.00071). (D/2,) -> (D/2,)."""
    unchanged = (first_window * frequency / (2 * math.pi) - YARN_ALPHA) / (YARN_BETA - YARN_ALPHA)
    share = first_window / (window or first_window)
    return frequency * (share + unchanged.clamp(0, 1) * (1 - share))


def yarn_softmax_factor(first_window: int, window: int) -> float:
    """YaRN's factor of the softmax scale at a window w: 1 + .2 log(w / w0)."""
    return 1 + 0.2 * math.log(window / first_window)


# ---- Attention heads: `head_gates`, `xsa`, `value_gates`, `paired_heads`, `dynamic_heads` --------------------------------

GATE_DIMS = 12  # gates of heads read so many leading dimensions of the layer's input (speedrun, Aug 2025)
VALUE_GATE_DIMS = 6  # gates of value embeddings read so many of the input and of the embedding (speedrun, Jan 2026)


class HeadGates(nn.Module):
    """y_h <- 2 sigmoid(w_h . x) y_h: a head can close where it has nothing to add (speedrun, Aug 2025)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.dims = min(GATE_DIMS, config.dim)
        self.weight = parameter(torch.zeros(config.dim // config.head_dim, self.dims), "gate")

    def forward(self, y_BTHD: Tensor, x_BTC: Tensor) -> Tensor:
        """(B, T, H, D), (B, T, C) -> (B, T, H, D)."""
        gate_BTH = 2 * F.linear(x_BTC[..., :self.dims], self.weight.to(x_BTC.dtype)).sigmoid()
        return y_BTHD * gate_BTH[..., None]


class ExclusiveHeads(nn.Module):
    """XSA: y_h loses the share tanh(alpha_h) of its component along the token's own value, which the stream has already.

    arXiv 2603.09078, with a learned share (speedrun, 2026).
    """

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.alpha = parameter(torch.zeros(config.dim // config.head_dim), "scalar")

    def forward(self, y_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
        """(B, T, H, D) twice -> (B, T, H, D)."""
        along = (y_BTHD * v_BTHD).sum(-1, keepdim=True) / v_BTHD.square().sum(-1, keepdim=True).clamp_min(1e-8)
        return y_BTHD - self.alpha.tanh()[:, None].to(y_BTHD.dtype) * along * v_BTHD


class ValueGates(nn.Module):
    """v_h + 2 sigmoid(w_h . [x, e]) e_h of a value embedding e, in place of ValueMix (speedrun, Jan 2026)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.dims = min(VALUE_GATE_DIMS, config.dim)
        self.weight = parameter(torch.zeros(config.dim // config.head_dim, 2 * self.dims), "gate")

    def forward(self, v_BTHD: Tensor, embed_BTC: Tensor, x_BTC: Tensor) -> Tensor:
        """(B, T, H, D), (B, T, C), (B, T, C) -> (B, T, H, D)."""
        read = torch.cat((x_BTC[..., :self.dims], embed_BTC[..., :self.dims]), dim=-1)
        gate_BTH = 2 * F.linear(read, self.weight.to(read.dtype)).sigmoid()
        return v_BTHD + gate_BTH[..., None] * embed_BTC.view_as(v_BTHD)


def pair_heads(x_BTHD: Tensor) -> Tensor:
    """Heads h and h + H/2 as one of twice the length, tokens t of both next to each other: (B, T, H, D) -> (B, 2T, H/2, D).

    So a query sees the keys of both: those of earlier tokens, and of its own token the first head's, or both (speedrun,
    Dec 2025).
    """
    B, T, H, D = x_BTHD.shape
    return x_BTHD.reshape(B, 2 * T, H // 2, D)


def unpair_heads(x_BTHD: Tensor) -> Tensor:
    """The inverse: (B, 2T, H/2, D) -> (B, T, H, D)."""
    B, T, H, D = x_BTHD.shape
    return x_BTHD.reshape(B, T // 2, 2 * H, D)


class DynamicHeads(nn.Module):
    """Heads that use each other's attention: with A_h(t, s) the attention of head h, y_h(t) gains

        b_h(t) sum_s [sum_g a_g(t) A_g(t, s)] v_h(s),    a = rms_norm(1 + W_a x), b = W_b x, starting at b = 0.

    Dynamic head composition (Xiao et al. 2024, arXiv 2405.08553) in the speedrun's form of 2026: rank one, by the query's
    token alone, over the last `dynamic_window` tokens w, whose attention is normalised among themselves. Queries in blocks
    of w see their own block and the one before, so that B H T 2w attention is materialised.
    """

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.window = config.dynamic_window
        self.weight = parameter(torch.zeros(2 * config.dim // config.head_dim, config.dim), "gate")

    def forward(self, qkv_BTHD: tuple[Tensor, Tensor, Tensor], x_BTC: Tensor, starts_BT: Tensor | None,
                scale: float) -> Tensor:
        """Queries, keys, values (B, T, H, D) and the layer's input (B, T, C) -> what y gains, (B, T, H, D)."""
        T, w = x_BTC.size(1), min(self.window, x_BTC.size(1))
        q, k, v = (in_blocks(x.float(), w) for x in qkv_BTHD)  # (B, N, w, H, D)
        read, write = F.linear(x_BTC, self.weight.to(x_BTC.dtype)).float().chunk(2, dim=-1)
        scores_BNHts = torch.einsum("bnthd,bnshd->bnhts", q, with_previous(k)) * scale
        attention = scores_BNHts.masked_fill(~local_mask(T, w, starts_BT, q.device), -torch.inf).softmax(-1)
        mixed = torch.einsum("bnth,bnhts->bnts", in_blocks(rms_norm(1 + read), w), attention)
        y = torch.einsum("bnts,bnshd->bnthd", mixed, with_previous(v)).flatten(1, 2)[:, :T]
        return (y * write[..., None]).type_as(qkv_BTHD[2])


def in_blocks(x_BT: Tensor, size: int) -> Tensor:
    """(B, T, ...) -> (B, N, size, ...), zeros after the end."""
    missing = -x_BT.size(1) % size
    return F.pad(x_BT, (0, 0) * (x_BT.ndim - 2) + (0, missing)).unflatten(1, (-1, size))


def with_previous(x_BNw: Tensor) -> Tensor:
    """Each block behind the one before it, the first behind zeros: (B, N, w, ...) -> (B, N, 2w, ...)."""
    return torch.cat((torch.cat((torch.zeros_like(x_BNw[:, :1]), x_BNw[:, :-1]), dim=1), x_BNw), dim=2)


def local_mask(tokens: int, window: int, starts_BT: Tensor | None, device: torch.device) -> Tensor:
    """True where a block's query i sees key j of its own block or the one before: i - window < j <= i, j >= 0, same
    document. (B or 1, N, 1, w, 2w)."""
    i = in_blocks(torch.arange(-(-tokens // window) * window, device=device)[None], window)[..., None]
    j = torch.cat((i - window, i), dim=2).transpose(2, 3)
    visible = (j <= i) & (i - j < window) & (j >= 0)
    if starts_BT is not None:
        document = in_blocks(document_index(starts_BT), window)
        visible = visible & (document[..., None] == with_previous(document)[:, :, None])
    return visible[:, :, None]


# ---- Hashed embeddings: `bigram_signs`, `inject` -------------------------------------------------------------------------

INJECT_START = 0.05  # weight of hashed embeddings wherever they are injected (speedrun, 2026)


def random_signs(rows: int, dim: int, *, seed: int) -> Tensor:
    """(rows, dim) of +-1, the same everywhere, without a draw from the run's generator."""
    return torch.randint(0, 2, (rows, dim), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


class Inject(nn.Module):
    """x + a x0 + b e after attention, e the hashed embeddings: the token's identity once more; a starts at 0, b at .05
    (speedrun, 2026)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.weight = parameter(torch.tensor([0.0, INJECT_START] if config.bigram_buckets else [0.0]), "scalar")

    def forward(self, x_BTC: Tensor, inputs: LayerInputs) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        weight = self.weight.to(x_BTC.dtype)
        x_BTC = x_BTC + weight[0] * inputs.x0
        return x_BTC if inputs.ngrams is None else x_BTC + weight[1] * inputs.ngrams


# ---- Residual stream: `residual_growth`, `skips`, `shared_attention_input`, `dense`, `backout` ---------------------------

BACKOUT_START = 0.5  # speedrun, Oct 2025
MUDD_DIM, MUDD_SCALE = 64, 0.1  # the speedrun's inner width and scale of dynamic weights, 2026


class ResidualGrowth(nn.Module):
    """a x + b y, a and b learned, a from the root of `residual_growth`: the stream grows by that factor in a layer, so that
    later layers write relatively less (speedrun, 2026: 1.1)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.weight = parameter(torch.tensor([config.residual_growth**0.5, 1.0]), "scalar")

    def forward(self, x_BTC: Tensor, y_BTC: Tensor) -> Tensor:
        """(B, T, C) twice -> (B, T, C)."""
        old, new = self.weight.to(x_BTC.dtype)
        return old * x_BTC + new * y_BTC


class Streams(nn.Module):
    """Connections between blocks beside the residual stream.

    In `history`, entry 0 is the stream before the first block and entry i + 1 that after block i, (B, T, C) each.
    """

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.pairs = parse_skips(config.skips, config.layers)
        self.skips = nn.ParameterList(parameter(torch.tensor(config.skip_weight), "scalar") for _ in self.pairs)
        self.shared_layer, self.backout_layer = config.shared_attention_input, config.backout
        self.backout = None if config.backout is None else parameter(torch.tensor(BACKOUT_START), "scalar")
        mixture = {"denseformer": StaticMixture, "mudd": DynamicMixture}.get(config.dense)
        self.mixtures = nn.ModuleList(mixture(config, i + 2) for i in range(config.layers)) if mixture else None

    def add_skips(self, x_BTC: Tensor, layer: int, history: list[Tensor]) -> Tensor:
        """The layer's input with the skips that end there: learned shares of what earlier layers wrote."""
        for (source, target), weight in zip(self.pairs, self.skips, strict=True):
            if target == layer:
                x_BTC = x_BTC + weight.to(x_BTC.dtype) * history[source + 1]
        return x_BTC

    def attention_input(self, layer: int, history: list[Tensor]) -> Tensor | None:
        """The one earlier stream that attention of all later layers reads, if any (speedrun, 2026)."""
        return history[self.shared_layer + 1] if self.shared_layer is not None and layer > self.shared_layer else None

    def mix(self, x_BTC: Tensor, layer: int, history: list[Tensor]) -> Tensor:
        """The layer's output mixed with all earlier streams."""
        return x_BTC if self.mixtures is None else self.mixtures[layer]([*history, x_BTC])

    def subtract_backout(self, x_BTC: Tensor, history: list[Tensor]) -> Tensor:
        """The last stream without a learned share of an earlier one (speedrun, Oct 2025)."""
        return x_BTC if self.backout is None else x_BTC - self.backout.to(x_BTC.dtype) * history[self.backout_layer + 1]


class StaticMixture(nn.Module):
    """sum_j a_j x_j over all streams so far, a_j learned, at the start the last alone (DenseFormer, Pagliardini et al. 2024,
    arXiv 2402.02622, equation 2)."""

    def __init__(self, config: Model, streams: int) -> None:
        super().__init__()
        del config
        self.weight = parameter(F.one_hot(torch.tensor(streams - 1), streams).float(), "scalar")

    def forward(self, history: list[Tensor]) -> Tensor:
        """`streams` tensors (B, T, C) -> (B, T, C)."""
        return sum(w * x for w, x in zip(self.weight.to(history[0].dtype), history, strict=True))


class DynamicMixture(StaticMixture):
    """The same with weights that each token chooses: a_j + s W_2 gelu(W_1 norm(x)) (MUDD, Xiao et al. 2025,
    arXiv 2502.12170, its way into the residual stream); W_2 starts at 0."""

    def __init__(self, config: Model, streams: int) -> None:
        super().__init__(config, streams)
        self.up = parameter(torch.randn(MUDD_DIM, config.dim) * config.dim**-0.5, "gate")
        self.down = parameter(torch.zeros(streams, MUDD_DIM), "gate")

    def forward(self, history: list[Tensor]) -> Tensor:
        """`streams` tensors (B, T, C) -> (B, T, C)."""
        dtype = history[0].dtype
        hidden = F.gelu(F.linear(rms_norm(history[-1]), self.up.to(dtype)))
        weight_BTS = self.weight.to(dtype) + MUDD_SCALE * F.linear(hidden, self.down.to(dtype))
        return sum(w[..., None] * x for w, x in zip(weight_BTS.unbind(-1), history, strict=True))


# ---- Losses of training alone: `mtp_weights`, `prefix_loss`, `sampled_softmax` -------------------------------------------


class AuxLossWeights(NamedTuple):
    """How much of the auxiliary losses a step has, as 0-D tensors so that a changing number compiles once."""

    mtp: Tensor
    """How many further tokens are predicted: 1.5 is the next but one, and half of the one after."""
    prefix: Tensor
    """Weight of the prefix loss."""


def multi_token_cross_entropy(logits_BTV: Tensor, targets_BT: Tensor, weights: tuple[float, ...], reach: Tensor) -> Tensor:
    """Multi-token prediction with the same head: sum over k of w_k clamp(reach - k + 1, 0, 1) times the cross-entropy of the
    k-th token after the next, within the row (Gloeckle et al. 2024, arXiv 2404.19737; weights as in the speedrun, Dec 2025).
    0-D."""
    total = logits_BTV.new_zeros(())
    for k, weight in enumerate(weights, start=1):
        loss = F.cross_entropy(logits_BTV[:, :-k].flatten(0, 1), targets_BT[:, k:].flatten(), reduction="sum")
        total = total + weight * (reach - k + 1).clamp(0, 1) * loss
    return total


def prefix_cross_entropy(logits_NV: Tensor, targets_N: Tensor, prefix_of_V: Tensor) -> Tensor:
    """Cross-entropy of each target's longest proper prefix that is itself a token, where there is one: partial credit for
    the right letters (speedrun, Jul 2026). 0-D."""
    return F.cross_entropy(logits_NV, prefix_of_V[targets_N], reduction="sum", ignore_index=-1)


def sampled_cross_entropy(x_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, config: Model) -> Tensor:
    """Cross-entropy against `sampled_softmax` classes drawn uniformly without replacement, each standing for V / count.

    The target is always there and never counted twice. With all classes it is the full cross-entropy (importance
    sampling: Bengio & Senecal 2003; Jean et al. 2015, arXiv 1412.2007). 0-D.
    """
    classes, count, cap = weight_VC.size(0), config.sampled_softmax, (config.softcap, config.softcap_value)
    drawn_S = torch.randperm(classes, device="cpu")[:count].to(targets_N.device)
    target_N = softcap((x_NC * F.embedding(targets_N, weight_VC).to(x_NC.dtype)).sum(-1).float(), *cap)
    others_NS = softcap(F.linear(x_NC, weight_VC[drawn_S].to(x_NC.dtype)).float(), *cap)
    others_NS = (others_NS + math.log(classes / count)).masked_fill(drawn_S == targets_N[:, None], -math.inf)
    return (torch.logsumexp(torch.cat((target_N[:, None], others_NS), dim=1), dim=1) - target_N).sum()


# ---- Fast products: `fused`, `fp8` ---------------------------------------------------------------------------------------


def use_fast_products(model: GPT) -> None:
    """Give linear maps the products that `model.paths` chose, in place. Changes no parameter and draws no random number."""
    config = model.config
    for mlp in (block.mlp for block in model.blocks):
        if model.paths.relu2 == "triton":
            mlp.up.product, mlp.activation = linear_relu2, nn.Identity()
        for linear in (mlp.up, mlp.gate, mlp.down) if config.fp8 == "head_mlp" else ():
            if linear is not None:
                linear.product = Fp8Product(config, gradients=False)
    if config.fp8 != "none":
        model.head.product = Fp8Product(config, gradients=True)
