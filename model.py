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
from layers.attention import Around
from layers.basic import Linear, Norm, parameter, unit
from layers.block import INJECT_START, Block
from layers.cache import LOOKS_BACK, Cache, caches, later_mask, refuse_cache
from layers.embeddings import NgramEmbedding, Smear
from layers.fused import equip
from layers.fused.cross_entropy import linear_nats, row_nats
from layers.head import Terms, further_tokens, prefix_nats, sampled_nats, softcap
from layers.kernels import KERNELS, attends_far, choose_kernel, document_index, use_flash
from layers.sphere import Scale, ScaledLinear
from layers.streams import Streams, connects


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
        padded = -(-vocab_size // config.vocab_multiple) * config.vocab_multiple
        self.max_tokens, self.kernel = max_tokens, choose_kernel(config, on_cuda)
        use_flash(config, on_cuda)
        embed_dtype, table_dtype = getattr(torch, config.embed_dtype), getattr(torch, config.table_dtype)
        self.embed = parameter((torch.randn(padded, config.dim) * config.embed_std).to(embed_dtype), "embed")
        learned = config.position == "learned"
        self.positions = parameter(torch.randn(max_tokens, config.dim) * 0.02, "embed") if learned else None
        orders = (2, *config.ngram_orders) if config.bigram_buckets else ()
        self.ngrams = nn.ModuleList(NgramEmbedding(config, order) for order in orders)
        self.ngram_share = parameter(torch.tensor(INJECT_START), "scalar") if config.inject and orders else None
        self.smear = Smear(config) if config.smear else None
        on_sphere = config.geometry == "sphere"
        self.norm_embed = unit if on_sphere else Norm(config) if config.norm_embedding else nn.Identity()
        self.norm_mixture = unit if on_sphere else nn.Identity()
        self.value_embeds = nn.ParameterList(
            parameter((torch.randn(padded, config.dim) * config.embed_std).to(table_dtype), "value_embed")
            for _ in range(config.value_embeds))
        self.value_layers = config.value_embed_layers or tuple(range(config.layers))[config.layers - config.value_embeds:]
        self.blocks = nn.ModuleList(Block(config, max_tokens, mixes_value_embed=i in self.value_layers,
                                          kernel=KERNELS[self.kernel][1], layer=i) for i in range(config.layers))
        self.streams = Streams(config) if connects(config) else None
        self.norm_final = nn.Identity() if on_sphere else Norm(config)
        self.head = None if config.tied_head else make_head(config, padded)
        prefix_V = torch.tensor(prefix_of) if config.prefix_loss else None
        self.register_buffer("prefix_of", prefix_V, persistent=False)
        self.paths = equip(self, config, device=torch.device("cuda" if on_cuda else "cpu"), dtype=dtype)
        self._roles = {name: param.role for name, param in self.named_parameters()}  # a copy of the model keeps it
        self._axes = {name: param.axis for name, param in self.named_parameters()}

    def roles(self) -> dict[str, str]:
        """The role of every parameter, by name."""
        return dict(self._roles)

    def axes(self) -> dict[str, int]:
        """By name, which dimension of a parameter is the model's: -1, or -2 for the maps that write to the stream."""
        return dict(self._axes)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, *, window: int | None = None,
                long_window: int | None = None, terms: Terms | None = None) -> Tensor:
        """Summed cross-entropy in nats, 0-D float32, if targets are given; else logits (B, T, V) in float32.

        `window` and `long_window` override the configured sliding windows. With `terms` it is what training minimises:
        with its further losses, or over sampled classes, as configured.
        """
        config = self.config
        hidden = self.hidden(tokens_BT, window or config.window_tokens, long_window or config.long_window_tokens)
        if targets_BT is None:
            return self.logits(hidden)
        if terms is not None and (config.mtp_weights or config.prefix_loss or config.sampled_softmax):
            return self._objective(hidden, targets_BT, terms)
        hidden_NC, targets_N, chunk = hidden.flatten(0, 1), targets_BT.flatten(), config.loss_chunk_tokens
        if self.paths.head_loss == "triton":
            cap = config.softcap, config.softcap_value
            return linear_nats(hidden_NC, self.head_weight, targets_N, cap=cap, chunk=chunk)
        if not chunk or not torch.is_grad_enabled():
            parts = zip(hidden_NC.split(chunk or len(targets_N)), targets_N.split(chunk or len(targets_N)), strict=True)
            return sum(self._nats(h, t) for h, t in parts)
        return sum(checkpoint(self._nats, h, t, use_reentrant=False)
                   for h, t in zip(hidden_NC.split(chunk), targets_N.split(chunk), strict=True))

    def hidden(self, tokens_BT: Tensor, window: int | None, long_window: int | None = None) -> Tensor:
        """The normed residual stream that the head reads: (B, T) -> (B, T, C)."""
        if tokens_BT.size(1) > self.max_tokens:
            raise ValueError(f"a context of {tokens_BT.size(1)} tokens; this model was built for {self.max_tokens}")
        starts = tokens_BT == self.document_start if self.config.document_mask else None
        x, ngrams = self._start(tokens_BT, starts)
        around = Around(starts=starts, x0=x, ngrams=ngrams)
        return self._layers(tokens_BT, x, around, self._where(tokens_BT, starts, window, long_window))

    def _layers(self, tokens_BT: Tensor, x: Tensor, around: Around, places: list[dict]) -> Tensor:
        """The stream through all layers and the last norm; `places` has each layer's window, mask and cache."""
        kept = [x]
        for layer, (block, where) in enumerate(zip(self.blocks, places, strict=True)):
            around = around._replace(**where, value_embed=self._value_embed(layer, tokens_BT))
            if self.streams is None:
                x = block(x, around)
                continue
            kept.append(block(self.streams.enter(layer, kept), around._replace(read=self.streams.read(layer, kept))))
            self.streams.leave(layer, kept)
        return self.norm_final(x if self.streams is None else self.streams.finish(kept))

    def _start(self, tokens_BT: Tensor, starts_BT: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The stream before the first layer, and the sum of the hashed embeddings, if any."""
        x = F.embedding(tokens_BT, self.embed).to(self.dtype)
        if self.positions is not None:
            x = x + self.positions[:tokens_BT.size(1)].to(self.dtype)
        x = self.norm_embed(x)
        ngrams = sum(table(tokens_BT, starts_BT).to(self.dtype) for table in self.ngrams) if self.ngrams else None
        if ngrams is not None:
            x = x + (ngrams if self.ngram_share is None else self.ngram_share.to(self.dtype) * ngrams)
        if self.smear is not None:
            x = self.smear(x, starts_BT)
        return self.norm_mixture(x), ngrams

    def _value_embed(self, layer: int, tokens_BT: Tensor) -> Tensor | None:
        if layer not in self.value_layers:
            return None
        return F.embedding(tokens_BT, self.value_embeds[self.value_layers.index(layer)]).to(self.dtype)

    def _windows(self, window: int | None, long_window: int | None) -> list[int | None]:
        """Each layer's; None: it sees everything."""
        layers = range(len(self.blocks))
        return [long_window if window is not None and attends_far(self.config, i) else window for i in layers]

    def _where(self, tokens_BT: Tensor, starts_BT: Tensor | None, window: int | None, long_window: int | None) -> list[dict]:
        """Each layer's window and mask; layers with the same window share the mask."""
        build, tokens = KERNELS[self.kernel][0], tokens_BT.size(1)
        document = None if starts_BT is None else document_index(starts_BT)
        doubled = None if document is None else document.repeat_interleave(2, dim=1)
        kinds = [(w, i in self.config.paired_heads) for i, w in enumerate(self._windows(window, long_window))]
        made = {(w, paired): build(2 * tokens, w, doubled, tokens_BT.device) if paired
                else build(tokens, w, document, tokens_BT.device) for w, paired in dict.fromkeys(kinds)}
        return [{"window": kind[0], "mask": made[kind]} for kind in kinds]

    @property
    def head_weight(self) -> Tensor:
        """The output matrix, (V, C)."""
        return self.embed if self.head is None else self.head.weight

    def _objective(self, hidden_BTC: Tensor, targets_BT: Tensor, terms: Terms) -> Tensor:
        """What training minimises where it is not the next token's nats alone."""
        config, targets_N = self.config, targets_BT.flatten()
        if config.sampled_softmax:
            cap = config.softcap, config.softcap_value
            return sampled_nats(hidden_BTC.flatten(0, 1), self.head_weight, targets_N, config.sampled_softmax, cap)
        logits_BTV = self.logits(hidden_BTC)
        nats = F.cross_entropy(logits_BTV.flatten(0, 1), targets_N, reduction="sum")
        if config.mtp_weights:
            nats = nats + further_tokens(logits_BTV, targets_BT, config.mtp_weights, terms.mtp)
        if config.prefix_loss:
            prefix = prefix_nats(logits_BTV.flatten(0, 1), targets_N, self.prefix_of)
            nats = nats + config.prefix_loss * terms.prefix * prefix
        return nats

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
                 generator: torch.Generator | None = None, **windows: int | None) -> Tensor:
        """`count` tokens sampled after `tokens_T`, the context cropped to max_tokens: (T,) -> (T + count,); windows as in
        `forward`."""
        cache = Cache(len(self.blocks)) if caches(self.config) else None
        for _ in range(count):
            if cache is not None and len(tokens_T) <= self.max_tokens:
                read = 0 if cache.tokens_Bt is None else cache.tokens_Bt.size(1)
                logits_TV = self.extend(tokens_T[None, read:], cache, **windows)[0]
            else:
                logits_TV = self(tokens_T[None, -self.max_tokens:], **windows)[0]
            best, index = logits_TV[-1, :self.vocab_size].topk(min(top_k, self.vocab_size))
            weights = (best / max(temperature, 1e-6)).softmax(dim=-1).cpu()
            pick = torch.multinomial(weights, 1, generator=generator).to(index.device)
            tokens_T = torch.cat((tokens_T, index[pick]))
        return tokens_T

    def extend(self, tokens_BT: Tensor, cache: Cache, *, window: int | None = None,
               long_window: int | None = None) -> Tensor:
        """Logits of tokens that follow those of the cache, which takes them in: (B, T) -> (B, T, V), as of the whole.

        Raises ValueError for techniques that a cache cannot follow, and beyond the longest context.
        """
        config, new = self.config, tokens_BT.size(1)
        refuse_cache(config, tokens=new + (0 if cache.tokens_Bt is None else cache.tokens_Bt.size(1)), most=self.max_tokens)
        whole = tokens_BT if cache.tokens_Bt is None else torch.cat((cache.tokens_Bt, tokens_BT), dim=1)
        x, ngrams = (part if part is None else part[:, -new:] for part in self._start(whole[:, -new - LOOKS_BACK:], None))
        around = Around(x0=x, ngrams=ngrams)
        windows = self._windows(window or config.window_tokens, long_window or config.long_window_tokens)
        places = [{"window": window, "mask": later_mask(new, whole.size(1) - new, window, x.device), "cache": kept}
                  for window, kept in zip(windows, cache.layers, strict=True)]
        cache.tokens_Bt = whole
        return self.logits(self._layers(tokens_BT, x, around, places))

    def flops_per_token(self, sequence_tokens: int, window: int | None = None, long_window: int | None = None) -> float:
        """Floating-point operations of one token's forward and backward: 6 per matrix weight that it meets, 12 C per
        position it attends to (counted exactly: causal, windowed, not document-masked)."""
        config = self.config
        windows = self._windows(window or config.window_tokens, long_window or config.long_window_tokens)
        matrices = sum(p.numel() for name, p in self.named_parameters() if self._roles[name] in ("matrix", "head", "gate"))
        matrices += self.embed.numel() if self.head is None else 0
        reach = [window for i, window in enumerate(windows) if i not in config.attention_free]
        return 6 * matrices + 12 * config.dim * sum(mean_span(sequence_tokens, w or sequence_tokens) for w in reach)

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
