"""The GPT in one file: each technique a small named piece behind one flag of configs.schema.Model.

It maps tokens to summed nats or logits. It knows no rank, no clock and no optimizer; it only names each parameter's role.
With every flag off it is the plain pre-norm decoder of GPT-2 (Radford et al. 2019) with RMS norms.

Shapes: B sequences, T tokens, C model dimension, H heads, D head dimension, V padded vocabulary, N = B T tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from configs.schema import Model

Mask = Tensor | BlockMask | tuple[Tensor, int] | None
HASH_CURRENT, HASH_PREVIOUS = 36_313, 27_191  # odd multipliers of the bigram hash (speedrun, Jan 2026)
SMEAR_DIMS = 12  # the smear gate reads so many leading dimensions (speedrun, Sep 2025)


# ---- Pieces -----------------------------------------------------------------------------------------------------------


def parameter(value: Tensor, role: str) -> nn.Parameter:
    """A parameter that knows its role: what the optimizer chooses a norm by."""
    made = nn.Parameter(value)
    made.role = role
    return made


class Linear(nn.Module):
    """y = W x (+ b), W (out, in) in float32, cast to x's dtype at use; started at variance init_gain / in, or 0."""

    def __init__(self, fan_in: int, fan_out: int, *, config: Model, zero: bool = False, role: str = "matrix") -> None:
        super().__init__()
        std = 0.0 if zero and config.zero_init_projections else (config.init_gain / fan_in) ** 0.5
        self.weight = parameter(torch.randn(fan_out, fan_in) * std, role)
        self.bias = parameter(torch.zeros(fan_out), "bias") if config.biases else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2)) over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


class Norm(nn.Module):
    """RMS norm, with learned gains where `config.norm_gains`."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.gains = parameter(torch.ones(config.dim), "gain") if config.norm_gains else None

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return rms_norm(x_BTC) if self.gains is None else rms_norm(x_BTC) * self.gains.to(x_BTC.dtype)


class Rotary(nn.Module):
    """Rotates pairs (x_i, x_{i + D/2}) by position times frequency, so that scores depend on relative position alone.

    Frequencies fall geometrically from 1 to 1/base; `half_rotary` has half as many, and the other pairs stand still
    (speedrun 2025).
    Su et al. 2021, arXiv 2104.09864.
    """

    def __init__(self, config: Model, max_tokens: int) -> None:
        super().__init__()
        moving = config.head_dim // (4 if config.position == "half_rotary" else 2)
        frequency = config.rotary_base ** -torch.linspace(0, 1, moving)
        frequency = F.pad(frequency, (0, config.head_dim // 2 - moving))
        angle_TF = torch.outer(torch.arange(max_tokens, dtype=torch.float32), frequency)
        cos, sin = angle_TF.cos(), angle_TF.sin()
        self.register_buffer("cos_TD", torch.cat((cos, cos), dim=-1), persistent=False)
        self.register_buffer("sin_TD", torch.cat((sin, -sin), dim=-1), persistent=False)

    def forward(self, x_BTHD: Tensor) -> Tensor:
        """(B, T, H, D) -> (B, T, H, D), rotated in float32."""
        x, length = x_BTHD.float(), x_BTHD.size(1)
        partner = x.roll(x.size(-1) // 2, dims=-1)
        return torch.addcmul(x * self.cos_TD[:length, None], partner, self.sin_TD[:length, None]).type_as(x_BTHD)


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2; as a product, since .square() differentiates twice as slowly on CPUs."""
    return F.relu(x) * x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu2": relu2, "gelu": F.gelu, "swiglu": F.silu}


class MLP(nn.Module):
    """W_down act(W_up x), or W_down (silu(W_gate x) * W_up x) for SwiGLU."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        hidden = config.mlp_dim or 4 * config.dim
        self.up = Linear(config.dim, hidden, config=config)
        self.gate = Linear(config.dim, hidden, config=config) if config.activation == "swiglu" else None
        self.down = Linear(hidden, config.dim, config=config, zero=True)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        hidden = self.up(x_BTC)
        hidden = self.activation(hidden) if self.gate is None else self.activation(self.gate(x_BTC)) * hidden
        return self.down(hidden)


# ---- Attention: three kernels, one meaning ------------------------------------------------------------------------------


def document_index(starts_BT: Tensor) -> Tensor:
    """Running number of each token's document, from the flags of the tokens that open one: (B, T) -> (B, T)."""
    return starts_BT.cumsum(dim=1)


def dense_mask(tokens: int, window: int | None, document_BT: Tensor | None, device: torch.device) -> Tensor | None:
    """True where query i may see key j: j <= i, i - j < window, same document. (B or 1, 1, T, T); None if just causal."""
    if window is None and document_BT is None:
        return None
    i = torch.arange(tokens, device=device)
    seen = (i[:, None] >= i) & (i[:, None] - i < (window or tokens))
    if document_BT is not None:
        seen = seen & (document_BT[:, :, None] == document_BT[:, None, :])
    return seen.view(-1, 1, tokens, tokens)


def attend_sdpa(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, mask: Mask, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v by PyTorch's fused attention; runs everywhere."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale).transpose(1, 2)


def flex_mask(tokens: int, window: int | None, document_BT: Tensor | None, device: torch.device) -> BlockMask:
    """`dense_mask` for FlexAttention, which skips blocks that are masked whole (Dong et al. 2024, arXiv 2412.05496)."""
    def seen(b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = (i >= j) & (i - j < (window or tokens))
        return near if document_BT is None else near & (document_BT[b, i] == document_BT[b, j])

    batch = None if document_BT is None else document_BT.size(0)
    return create_block_mask(seen, batch, None, tokens, tokens, device=device)


def attend_flex(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, mask: Mask, scale: float) -> Tensor:
    """The same by FlexAttention; trains on CUDA only."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    return flex_attention(q, k, v, block_mask=mask, scale=scale).transpose(1, 2)


def varlen_mask(tokens: int, window: int | None, document_BT: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """Documents as boundaries in the packed stream of N tokens, and the window to the left: for `varlen_attn`."""
    del device
    first = F.pad(document_BT[:, 1:] != document_BT[:, :-1], (1, 0), value=True).reshape(-1)
    return F.pad(first.nonzero()[:, 0], (0, 1), value=first.numel()).int(), (window or tokens) - 1


def attend_varlen(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, mask: Mask, scale: float) -> Tensor:
    """The same by packed FlashAttention; CUDA only."""
    from torch.nn.attention.varlen import varlen_attn

    boundaries, left = mask
    q, k, v = (x.flatten(0, 1) for x in (q_BTHD, k_BTHD, v_BTHD))
    longest = q_BTHD.size(1)
    return varlen_attn(q, k, v, boundaries, boundaries, longest, longest, scale=scale,
                       window_size=(left, 0)).view_as(q_BTHD)


KERNELS = {"sdpa": (dense_mask, attend_sdpa), "flex": (flex_mask, attend_flex), "varlen": (varlen_mask, attend_varlen)}


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, arXiv 1706.03762)."""

    def __init__(self, config: Model, max_tokens: int, *, mixes_value_embed: bool, kernel: Callable) -> None:
        super().__init__()
        self.q, self.k, self.v = (Linear(config.dim, config.dim, config=config) for _ in range(3))
        self.out = Linear(config.dim, config.dim, config=config, zero=True)
        self.head_dim, self.qk_norm, self.attend = config.head_dim, config.qk_norm, kernel
        self.scale = config.attention_scale or config.head_dim**-0.5
        self.rotary = Rotary(config, max_tokens) if "rotary" in config.position else None
        self.value_mix = parameter(torch.tensor([0.5, 0.5]), "scalar") if mixes_value_embed else None

    def forward(self, x_BTC: Tensor, mask: Mask, value_embed_BTC: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        shape = (*x_BTC.shape[:2], -1, self.head_dim)
        q, k, v = self.q(x_BTC), self.k(x_BTC), self.v(x_BTC)
        if self.value_mix is not None:
            own, embed = self.value_mix.to(v.dtype)
            v = own * v + embed * value_embed_BTC
        q, k, v = q.view(shape), k.view(shape), v.view(shape)
        if self.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        return self.out(self.attend(q, k, v, mask, self.scale).reshape_as(x_BTC))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `x0_skip` the input is first mixed with x0."""

    def __init__(self, config: Model, max_tokens: int, *, mixes_value_embed: bool, kernel: Callable) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(config), Norm(config)
        self.attention = Attention(config, max_tokens, mixes_value_embed=mixes_value_embed, kernel=kernel)
        self.mlp = MLP(config)
        self.skip = parameter(torch.tensor([1.0, 0.0]), "scalar") if config.x0_skip else None

    def forward(self, x_BTC: Tensor, x0_BTC: Tensor, mask: Mask, value_embed_BTC: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        if self.skip is not None:
            stream, start = self.skip.to(x_BTC.dtype)
            x_BTC = stream * x_BTC + start * x0_BTC
        x_BTC = x_BTC + self.attention(self.norm1(x_BTC), mask, value_embed_BTC)
        return x_BTC + self.mlp(self.norm2(x_BTC))


# ---- Before and after the blocks ----------------------------------------------------------------------------------------


class Smear(nn.Module):
    """x_t + lambda sigmoid(gate(x_t)) x_{t-1}, within a document; lambda starts at 0 (speedrun, Sep 2025)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.dims = min(SMEAR_DIMS, config.dim)
        self.gate = parameter(torch.zeros(1, self.dims), "gate")
        self.strength = parameter(torch.zeros(1), "scalar")

    def forward(self, x_BTC: Tensor, starts_BT: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        open_BT1 = self.strength.to(x_BTC.dtype) * F.linear(x_BTC[:, 1:, :self.dims], self.gate.to(x_BTC.dtype)).sigmoid()
        if starts_BT is not None:
            open_BT1 = open_BT1.masked_fill(starts_BT[:, 1:, None], 0)
        return x_BTC + F.pad(open_BT1 * x_BTC[:, :-1], (0, 0, 1, 0))


class BigramEmbedding(nn.Module):
    """A learned vector for each hashed pair (previous token, token); the last row is for tokens without a predecessor."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.table = parameter(torch.zeros(config.bigram_buckets, config.dim), "bigram_embed")

    def forward(self, tokens_BT: Tensor, starts_BT: Tensor | None) -> Tensor:
        """(B, T) -> (B, T, C)."""
        pairs = tokens_BT[:, 1:] * HASH_CURRENT ^ tokens_BT[:, :-1] * HASH_PREVIOUS
        last = self.table.size(0) - 1
        bucket = F.pad(pairs % max(last, 1), (1, 0), value=last)
        if starts_BT is not None:
            bucket = bucket.masked_fill(starts_BT, last)
        # On CPUs the gradient's rows are added into the buffer that is there: no table-sized temporary.
        return F.embedding(bucket, self.table, sparse=self.table.grad is not None and self.table.device.type == "cpu")


def softcap(z: Tensor, kind: str, c: float) -> Tensor:
    """Logits bounded by c in absolute value, with slope 1 at 0."""
    if kind == "tanh":
        return c * torch.tanh(z / c)
    if kind == "rational":
        return c * z * (z * z + c * c).rsqrt()
    return 2 * c * torch.sigmoid(2 * z / c) - c if kind == "sigmoid" else z


class GPT(nn.Module):
    """Decoder-only Transformer; see the module's docstring for the shapes."""

    def __init__(self, config: Model, *, vocab_size: int, max_tokens: int, document_start: int | None = None,
                 on_cuda: bool = False, dtype: torch.dtype = torch.float32) -> None:
        """`max_tokens` is the longest context; `document_start` the token that opens a document; `dtype` that of the
        activations (weights stay float32). Raises ValueError for combinations that the arguments make impossible.
        """
        super().__init__()
        if config.document_mask and document_start is None:
            raise ValueError("document_mask needs a source with document starts; use --model.no_document_mask")
        self.config, self.vocab_size, self.document_start, self.dtype = config, vocab_size, document_start, dtype
        padded = -(-vocab_size // config.vocab_multiple) * config.vocab_multiple
        self.max_tokens, self.kernel = max_tokens, choose_kernel(config, on_cuda)
        embed_dtype = getattr(torch, config.embed_dtype)
        self.embed = parameter((torch.randn(padded, config.dim) * config.embed_std).to(embed_dtype), "embed")
        learned = config.position == "learned"
        self.positions = parameter(torch.randn(max_tokens, config.dim) * 0.02, "embed") if learned else None
        self.bigram = BigramEmbedding(config) if config.bigram_buckets else None
        self.smear = Smear(config) if config.smear else None
        self.norm_embed = Norm(config) if config.norm_embedding else nn.Identity()
        self.value_embeds = nn.ParameterList(
            parameter(torch.randn(padded, config.dim) * config.embed_std, "value_embed") for _ in range(config.value_embeds))
        first = config.layers - config.value_embeds
        self.blocks = nn.ModuleList(Block(config, max_tokens, mixes_value_embed=i >= first, kernel=KERNELS[self.kernel][1])
                                    for i in range(config.layers))
        self.norm_final = Norm(config)
        self.head = None if config.tied_head else Linear(config.dim, padded, config=config, zero=True, role="head")
        self._roles = {name: param.role for name, param in self.named_parameters()}  # a copy of the model keeps it

    def roles(self) -> dict[str, str]:
        """The role of every parameter, by name."""
        return dict(self._roles)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, *, window: int | None = None) -> Tensor:
        """Summed cross-entropy in nats, 0-D float32, if targets are given; else logits (B, T, V) in float32.

        `window` overrides the configured sliding window.
        """
        hidden = self.hidden(tokens_BT, self.config.window_tokens if window is None else window)
        if targets_BT is None:
            return self.logits(hidden)
        hidden_NC, targets_N, chunk = hidden.flatten(0, 1), targets_BT.flatten(), self.config.loss_chunk_tokens
        if not chunk or not torch.is_grad_enabled():
            parts = zip(hidden_NC.split(chunk or len(targets_N)), targets_N.split(chunk or len(targets_N)), strict=True)
            return sum(self._nats(h, t) for h, t in parts)
        return sum(checkpoint(self._nats, h, t, use_reentrant=False)
                   for h, t in zip(hidden_NC.split(chunk), targets_N.split(chunk), strict=True))

    def hidden(self, tokens_BT: Tensor, window: int | None) -> Tensor:
        """The normed residual stream that the head reads: (B, T) -> (B, T, C)."""
        if tokens_BT.size(1) > self.max_tokens:
            raise ValueError(f"a context of {tokens_BT.size(1)} tokens; this model was built for {self.max_tokens}")
        starts = tokens_BT == self.document_start if self.config.document_mask else None
        x = F.embedding(tokens_BT, self.embed).to(self.dtype)
        if self.positions is not None:
            x = x + self.positions[:tokens_BT.size(1)].to(self.dtype)
        x = self.norm_embed(x)
        if self.bigram is not None:
            x = x + self.bigram(tokens_BT, starts).to(self.dtype)
        if self.smear is not None:
            x = self.smear(x, starts)
        x0, masks = x, self._masks(tokens_BT, starts, window)
        values = [None] * (len(self.blocks) - len(self.value_embeds)) + list(self.value_embeds)
        for block, mask, table in zip(self.blocks, masks, values, strict=True):
            x = block(x, x0, mask, None if table is None else F.embedding(tokens_BT, table).to(self.dtype))
        return self.norm_final(x)

    def _masks(self, tokens_BT: Tensor, starts_BT: Tensor | None, window: int | None) -> list[Mask]:
        """One mask per layer; layers with the same window share theirs."""
        build = KERNELS[self.kernel][0]
        document = None if starts_BT is None else document_index(starts_BT)
        every = self.config.full_attention_every
        windows = [None if every and (i + 1) % every == 0 else window for i in range(len(self.blocks))]
        made = {w: build(tokens_BT.size(1), w, document, tokens_BT.device) for w in dict.fromkeys(windows)}
        return [made[w] for w in windows]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V), float32, softcapped."""
        z = F.linear(hidden, self.embed.to(hidden.dtype)) if self.head is None else self.head(hidden)
        return softcap(z.float(), self.config.softcap, self.config.softcap_value)

    def _nats(self, hidden_NC: Tensor, targets_N: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(hidden_NC), targets_N, reduction="sum")

    @torch.no_grad()
    def generate(self, tokens_T: Tensor, count: int, *, temperature: float = 0.8, top_k: int = 50,
                 generator: torch.Generator | None = None) -> Tensor:
        """`count` tokens sampled after `tokens_T`, the context cropped to max_tokens: (T,) -> (T + count,)."""
        for _ in range(count):
            logits_V = self(tokens_T[None, -self.max_tokens:])[0, -1, :self.vocab_size]
            best, index = logits_V.topk(min(top_k, self.vocab_size))
            weights = (best / max(temperature, 1e-6)).softmax(dim=-1).cpu()
            pick = torch.multinomial(weights, 1, generator=generator).to(index.device)
            tokens_T = torch.cat((tokens_T, index[pick]))
        return tokens_T

    def flops_per_token(self, sequence_tokens: int, window: int | None = None) -> float:
        """Floating-point operations of one token's forward and backward: 6 per matrix weight that it meets, 12 C per
        position it attends to (counted exactly: causal, windowed, not document-masked)."""
        window = self.config.window_tokens if window is None else window
        matrices = sum(p.numel() for name, p in self.named_parameters() if self._roles[name] in ("matrix", "head", "gate"))
        matrices += self.embed.numel() if self.head is None else 0
        every, spans = self.config.full_attention_every, 0.0
        for i in range(len(self.blocks)):
            full = window is None or (every and (i + 1) % every == 0)
            spans += mean_span(sequence_tokens, sequence_tokens if full else window)
        return 6 * matrices + 12 * self.config.dim * spans


    def activation_bytes(self, tokens: int) -> int:
        """Estimate of what one forward-backward on `tokens` tokens keeps: 12 C + 3 hidden numbers a layer, and the logits
        three times in float32 (of one chunk, where the loss is chunked)."""
        config = self.config
        per_token = config.layers * (12 * config.dim + 3 * (config.mlp_dim or 4 * config.dim))
        logit_rows = min(tokens, config.loss_chunk_tokens or tokens)
        return per_token * self.dtype.itemsize * tokens + 12 * len(self.embed) * logit_rows


def mean_span(tokens: int, window: int) -> float:
    """Mean over t = 1..tokens of min(t, window): how many positions a token attends to."""
    window = min(window, tokens)
    return (window * (window + 1) / 2 + (tokens - window) * window) / tokens


def choose_kernel(config: Model, on_cuda: bool) -> str:
    """The attention kernel by name. Raises ValueError where the asked-for one cannot train on this device."""
    if config.attention in ("flex", "varlen") and not on_cuda:
        raise ValueError(f"--model.attention {config.attention} trains on CUDA only; use sdpa here")
    if config.attention != "auto":
        return config.attention
    return "flex" if on_cuda and (config.window_tokens is not None or config.document_mask) else "sdpa"
