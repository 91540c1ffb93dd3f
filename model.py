"""The GPT: each technique a small named piece in layers/, behind one flag of configs.schema.Model.

It maps tokens to summed nats or logits. It knows no rank, no clock and no optimizer; it only names each parameter's role.
With every flag off it is the plain pre-norm decoder of GPT-2 (Radford et al. 2019) with RMS norms.

Shapes: B sequences, T tokens, C model dimension, H heads, D head dimension, V padded vocabulary, N = B T tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.schema import Model
from layers.basic import Linear, Norm, parameter, unit
from layers.block import Block
from layers.embeddings import BigramEmbedding, Smear
from layers.fused import equip
from layers.fused.cross_entropy import linear_nats, row_nats
from layers.head import softcap
from layers.kernels import KERNELS, Mask, choose_kernel, document_index
from layers.sphere import Scale, ScaledLinear


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
        on_sphere = config.geometry == "sphere"
        self.norm_embed = unit if on_sphere else Norm(config) if config.norm_embedding else nn.Identity()
        self.norm_mixture = unit if on_sphere else nn.Identity()
        self.value_embeds = nn.ParameterList(
            parameter(torch.randn(padded, config.dim) * config.embed_std, "value_embed") for _ in range(config.value_embeds))
        first = config.layers - config.value_embeds
        self.blocks = nn.ModuleList(Block(config, max_tokens, mixes_value_embed=i >= first, kernel=KERNELS[self.kernel][1])
                                    for i in range(config.layers))
        self.norm_final = nn.Identity() if on_sphere else Norm(config)
        self.head = None if config.tied_head else make_head(config, padded)
        self.paths = equip(self, config, device=torch.device("cuda" if on_cuda else "cpu"), dtype=dtype)
        self._roles = {name: param.role for name, param in self.named_parameters()}  # a copy of the model keeps it
        self._axes = {name: param.axis for name, param in self.named_parameters()}

    def roles(self) -> dict[str, str]:
        """The role of every parameter, by name."""
        return dict(self._roles)

    def axes(self) -> dict[str, int]:
        """By name, which dimension of a parameter is the model's: -1, or -2 for the maps that write to the stream."""
        return dict(self._axes)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, *, window: int | None = None) -> Tensor:
        """Summed cross-entropy in nats, 0-D float32, if targets are given; else logits (B, T, V) in float32.

        `window` overrides the configured sliding window.
        """
        hidden = self.hidden(tokens_BT, self.config.window_tokens if window is None else window)
        if targets_BT is None:
            return self.logits(hidden)
        hidden_NC, targets_N, chunk = hidden.flatten(0, 1), targets_BT.flatten(), self.config.loss_chunk_tokens
        if self.paths.head_loss == "triton":
            weight_VC = self.embed if self.head is None else self.head.weight
            cap = self.config.softcap, self.config.softcap_value
            return linear_nats(hidden_NC, weight_VC, targets_N, cap=cap, chunk=chunk)
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
        x = self.norm_mixture(x)
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
        return softcap(self._raw_logits(hidden).float(), self.config.softcap, self.config.softcap_value)

    def _raw_logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed.to(hidden.dtype)) if self.head is None else self.head(hidden)

    def _nats(self, hidden_NC: Tensor, targets_N: Tensor) -> Tensor:
        if self.paths.loss == "triton":
            return row_nats(self._raw_logits(hidden_NC), targets_N, self.config.softcap, self.config.softcap_value).sum()
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


def make_head(config: Model, outputs: int) -> Linear:
    """The map from the stream to logits."""
    if config.geometry == "sphere":
        scale = Scale(outputs, value=config.logit_scale, stored=config.dim**-0.5)
        return ScaledLinear(config.dim, outputs, config=config, role="head", scale=scale)
    return Linear(config.dim, outputs, config=config, zero=True, role="head")


def mean_span(tokens: int, window: int) -> float:
    """Mean over t = 1..tokens of min(t, window): how many positions a token attends to."""
    window = min(window, tokens)
    return (window * (window + 1) / 2 + (tokens - window) * window) / tokens
