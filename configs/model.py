"""The model's settings: sizes of the GPT, and one field for each technique.

The fields stand under five banners: size, attention, embeddings, residual stream, losses. A field made by `technique(...)`
can be switched off alone, which gives it an ablation row and a test. The docstring of each field is its text in `--help`.
"""

from dataclasses import dataclass
from typing import Literal

from configs.notation import check_needs, check_ranges, parse_dense_skips, parse_skips, raise_if, technique

# The values that geometry sphere requires. Its norms are built in and have no gains; a vector of zeros, as a projection that
# starts at zero would write, has no direction; and terms added to the stream would leave the sphere.
SPHERE_NEEDS = {"zero_init_projections": False, "norm_gains": False, "biases": False, "tied_head": False, "qk_norm": True,
                "norm_embedding": True, "inject": False, "residual_growth": 0.0, "skips": (), "backout": None,
                "dense": "none"}


# The interval of each numeric field, for `check_ranges`.
RANGES = {
    "[1, inf)": ("layers", "dim", "head_dim", "qk_head_dim", "mlp_dim", "vocab_multiple", "window_tokens",
                 "long_window_tokens", "dynamic_window", "fp8_x_headroom", "fp8_weight_headroom"),
    "[0, inf)": ("value_embeds", "bigram_buckets", "bigram_signs", "residual_growth", "prefix_loss", "sampled_softmax",
                 "fp8_grad_max"),
    "(0, inf)": ("softcap_value", "logit_scale", "fp8_x_max", "fp8_weight_max"),
    "(0, 1]": ("eigen_lr",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The GPT: sizes, and one field for each technique; a technique that is off costs nothing and changes nothing."""

    # ---- Size, initialisation and storage ---------------------------------------------------------------------------------

    layers: int = 2
    """Number of blocks, each an attention layer and an MLP."""
    dim: int = 128
    """Width of the residual stream."""
    head_dim: int = 64
    """Dimension of an attention head; there are dim / head_dim heads."""
    qk_head_dim: int | None = technique(None, off=None, on=8)
    """Dimension of a head's queries and keys, at most head_dim, which values keep (speedrun, pull request 344: 96 of 128).
    None: head_dim."""
    mlp_dim: int | None = None
    """Hidden width of the MLP. None: 4 dim."""
    vocab_multiple: int = 64
    """Multiple to which the vocabulary size is rounded up, for efficient matrix shapes."""
    activation: Literal["relu2", "gelu", "swiglu"] = technique(
        "relu2", name="relu2", off="gelu", on="relu2", only=("relu2",))
    """Activation of the MLP. relu2: ReLU squared (So et al. 2021, arXiv 2109.08668); gelu: GELU; swiglu: SwiGLU (Shazeer
    2020, arXiv 2002.05202)."""
    biases: bool = technique(False, off=False, on=True)
    """Use biases in all linear maps."""
    init_gain: float = 0.33
    """Gain of the initial hidden matrices, whose entries have variance init_gain / fan_in (speedrun)."""
    zero_init_projections: bool = technique(True, off=False, on=True)
    """Start the head, and the projections that write to the residual stream, at zero (muP, Yang et al. 2022,
    arXiv 2203.03466)."""
    zero_attention_out: bool = True
    """With zero_init_projections, start attention's output projections at zero too. The speedrun of 2026 does not."""
    matrix_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage dtype of hidden matrices, their gradients and optimizer state. bfloat16 halves the communication; with
    rounding remainder and state_dtype float32 in the group, the weights stay as exact as in float32 (speedrun, 2025)."""
    embed_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage dtype of the token embedding, its gradient and optimizer state."""
    head_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage dtype of the head's matrix, its gradient and optimizer state, if it is not tied to the embedding."""
    table_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage dtype of value embeddings and hashed tables, their gradients and optimizer state."""

    # ---- Attention --------------------------------------------------------------------------------------------------------

    position: Literal["none", "learned", "rotary", "half_rotary"] = technique(
        "rotary", name="rotary", off="learned", on="rotary", only=("rotary", "half_rotary"))
    """Position encoding. learned: a table (GPT-2); rotary: Su et al. 2021, arXiv 2104.09864; half_rotary: rotary on half of
    each head's dimensions."""
    rotary_base: float = 1024.0
    """Base of the rotary frequencies: the longest wavelength is 2 pi times it, in tokens."""
    qk_norm: bool = technique(True, off=False, on=True)
    """Use RMS norms on queries and keys (Henry et al. 2020, arXiv 2010.04245)."""
    attention_scale: float | None = technique(None, off=None, on=0.9)
    """Factor of q k^T before the softmax. None: 1 / sqrt(D) for queries of dimension D, or sqrt(D) on the sphere."""
    window_tokens: int | None = technique(None, name="window", off=None, on=3)
    """Length of the sliding window, in tokens, the query's own included. None: attention sees the whole context."""
    long_window_tokens: int | None = technique(
        None, name="", off=None, on=4, needs={"model.window_tokens": 2, "model.full_attention_layers": (1,)})
    """Window of full_attention_layers, in tokens, where window_tokens is set. None: they see the whole context."""
    full_attention_layers: tuple[int, ...] = technique((), name="", off=(), on=(1,), needs={"model.window_tokens": 3})
    """Layers, numbered from 0, that have the long window in place of window_tokens."""
    document_mask: bool = technique(False, off=False, on=True)
    """Mask attention between documents."""
    attention: Literal["auto", "sdpa", "flex", "varlen"] = "auto"
    """Attention kernel. auto: on CUDA with a document mask varlen, if FlashAttention 3 runs; else flex where there is a
    window or a document mask; else sdpa."""
    flash: Literal["default", "FA3", "FA4"] = "default"
    """FlashAttention inside sdpa and varlen. default: PyTorch's own; FA3 (Hopper), FA4: versions of a package to install."""
    key_offset: bool = technique(False, off=False, on=True, needs={"model.position": "half_rotary"})
    """Take the unrotated dimensions of keys from the previous token, in layers with the long window or none (speedrun,
    Dec 2025)."""
    gate_layers: tuple[int, ...] = (0,)
    """Layers, 0 first, at whose input a small network computes coefficients of each token for head_gates, xsa, inject, skips
    and dynamic_heads of this layer and of those up to the next one named (MUDD gates, speedrun, 2026)."""
    head_gates: bool = technique(False, off=False, on=True)
    """Multiply each head's output by a gate of each token (speedrun, Aug 2025)."""
    head_gate_layers: tuple[int, ...] = technique((), name="", off=(), on=(1,), needs={"model.head_gates": True})
    """Layers with head_gates. Empty: all."""
    yarn: bool = technique(False, off=False, on=True, needs={"model.window_tokens": 3, "model.position": "rotary"})
    """Stretch slow rotary frequencies and raise the softmax scale, in all layers, as the long window (window_tokens without
    one) grows beyond its first length (YaRN, Peng et al. 2023, arXiv 2309.00071)."""
    yarn_windows: tuple[int, ...] = technique(
        (), name="", off=(), on=(3, 5), needs={"model.yarn": True, "model.window_tokens": 3, "model.position": "rotary"})
    """Lengths through which that window goes: each growth stretches the frequencies that the one before left (speedrun).
    Empty: every length stretches the first frequencies."""
    xsa: bool = technique(False, off=False, on=True)
    """Subtract from each head's output a share of its component along the token's own value, computed from each token (XSA,
    arXiv 2603.09078)."""
    xsa_layers: tuple[int, ...] = technique((), name="", off=(), on=(1,), needs={"model.xsa": True})
    """Layers with xsa. Empty: all but those of paired_heads, which never have it."""
    paired_heads: tuple[int, ...] = technique((), off=(), on=(1,))
    """Layers whose heads form pairs: each head attends to the keys of both, at half the window (speedrun, Dec 2025)."""
    dynamic_heads: tuple[int, ...] = technique((), off=(), on=(0,))
    """Layers whose heads mix their attention weights, by coefficients computed from the query's token (dynamic head
    composition, Xiao et al. 2024, arXiv 2405.08553)."""
    dynamic_window: int = 112
    """Number of last tokens whose attention weights dynamic_heads mix (speedrun: 112)."""
    attention_free: tuple[int, ...] = technique((), off=(), on=(1,))
    """Layers without attention, which are an MLP alone."""
    shared_attention_input: int | None = technique(None, off=None, on=0)
    """Layer whose output is the input of attention in all later layers, in place of the residual stream (speedrun, 2026).
    None: off."""
    projection_gains: bool = technique(False, off=False, on=True)
    """Use a learned factor for each attention layer's input, and one for its output (speedrun, 2025)."""

    # ---- Embeddings -------------------------------------------------------------------------------------------------------

    embed_std: float = 1.0
    """Standard deviation of the initial token embedding."""
    norm_embedding: bool = technique(True, off=False, on=True)
    """Use an RMS norm right after the token embedding."""
    tied_head: bool = technique(False, off=False, on=True)
    """Use the token embedding as the head's matrix."""
    smear: bool = technique(False, off=False, on=True)
    """Add a gated share of the previous token's embedding: x_t += lambda sigmoid(gate(x_t)) x_{t-1} (speedrun, Sep 2025)."""
    smear_first: bool = technique(False, name="", off=False, on=True, needs={"model.smear": True})
    """Smear the token embeddings before their norm, and do not smear hashed embeddings, nor add them to the x0 of inject and
    x0_skip (speedrun, 2026)."""
    value_embeds: int = technique(0, off=0, on=2)
    """Number of value embeddings: further token embeddings, each mixed into the attention values of one layer (speedrun,
    Dec 2024)."""
    value_embed_layers: tuple[int, ...] = technique((), name="", off=(), on=(0,), needs={"model.value_embeds": 1})
    """Layers of the value embeddings. Empty: the last ones."""
    value_embed_std: float | None = None
    """Standard deviation of the initial value embeddings. None: embed_std."""
    value_gates: bool = technique(False, off=False, on=True, needs={"model.value_embeds": 1})
    """Use a gate per head for value embeddings, in place of learned weights of value and embedding (speedrun, Jan 2026)."""
    bigram_buckets: int = technique(0, name="bigram", off=0, on=37)
    """Number of rows of the bigram table: a hash of the previous and the current token picks a vector that is added to the
    embedding (speedrun, Jan 2026). 0: no table."""
    bigram_signs: int = technique(0, off=0, on=11, needs={"model.bigram_buckets": 37})
    """Number of rows of a fixed random table of +-1 that multiplies the hashed vectors, so that n-grams with the same hash
    differ (speedrun, 2026: 8192). 0: no signs."""
    ngram_orders: tuple[int, ...] = technique((), off=(), on=(3, 4), needs={"model.bigram_buckets": 37})
    """Lengths n of further hashed n-gram tables, each of bigram_buckets rows, in addition to the bigrams (speedrun,
    2026)."""
    inject: bool = technique(False, off=False, on=True)
    """Add the stream's first state and the hashed embeddings again after each attention, with weights of each token
    (speedrun, 2026)."""

    # ---- Residual stream --------------------------------------------------------------------------------------------------

    norm_gains: bool = technique(False, off=False, on=True)
    """Use learned gains in the RMS norms."""
    x0_skip: bool = technique(False, off=False, on=True)
    """Mix the embedding into each block's input, lambda_r x + lambda_0 x0, with learned factors (speedrun, Nov 2024)."""
    geometry: Literal["euclidean", "sphere"] = "euclidean"
    """Geometry of the residual stream. sphere: its vectors have length 1 and layers move them along the sphere (nGPT,
    Loshchilov et al. 2024, arXiv 2410.01131); matrices, embeddings and head then need constraint sphere."""
    eigen_lr: float = 0.05
    """Initial eigen learning rate on the sphere: the share of the way from the stream to a layer's output that one step
    goes. The paper's is about 1 / layers, for 24 and 36 layers."""
    residual_growth: float = technique(0.0, off=0.0, on=1.1)
    """Initial growth of the stream per layer, when x + y becomes a x + b y with learned a and b (speedrun, 2026: 1.1). 0:
    the plain sum."""
    skips: tuple[str, ...] = technique((), off=(), on=("0>1",))
    """Skip connections: `3>6` adds the output of layer 3 to the input of layer 6, with a weight of each token."""
    skip_weight: float = 0.18
    """Initial weight of each skip connection (speedrun, 2025: 0.18; 2026: 0.09, half of sigmoid(-1.5))."""
    backout: int | None = technique(None, off=None, on=0)
    """Layer whose output, times a learned factor that starts at 1/2, is subtracted before the head (speedrun, Oct 2025).
    None: off."""
    dense: Literal["none", "denseformer", "mudd"] = technique("none", off="none", on="mudd")
    """Mixture of earlier streams at the input of layers. denseformer: with learned weights (Pagliardini et al. 2024,
    arXiv 2402.02622); mudd: with weights computed from each token (Xiao et al. 2025, arXiv 2502.12170)."""
    dense_skips: tuple[str, ...] = technique((), name="", off=(), on=("in>1", "0>2=-0.5"), needs={"model.dense": "mudd"})
    """Streams that dense adds: `7>10` the output of layer 7 to the input of layer 10, `7>10=-0.5` with this initial weight
    in place of 0. Other sources are `in`, the stream before the first block, and `ve0`, a value embedding; the target after
    the last layer is the head. Empty: all earlier streams at every layer and the head."""
    dense_gates: tuple[int, ...] = technique(
        (), name="", off=(), on=(1,), needs={"model.dense": "mudd", "model.inject": True, "model.residual_growth": 1.1,
                                             "model.value_gates": True, "model.value_embeds": 1})
    """Layers in which the network of mudd also computes an addition to the values from the same streams, and the weights of
    value embedding, sums and injection (the last layer in the speedrun, 2026)."""

    # ---- Losses, and the kernels of head and MLP --------------------------------------------------------------------------

    softcap: Literal["none", "tanh", "rational", "asymmetric"] = technique("tanh", off="none", on="tanh")
    """Bound of the logits. tanh: c tanh(z/c) (Gemma 2, 2024, arXiv 2408.00118); rational: c z / sqrt(z^2 + c^2); asymmetric:
    23 sigmoid((z + 5) / 7.5) (speedrun, 2025)."""
    softcap_value: float = 15.0
    """Bound c of softcap tanh and rational."""
    logit_scale: float = 1.0
    """Initial factor of the logits on the sphere, where they are cosines."""
    mtp_weights: tuple[float, ...] = technique((), off=(), on=(0.5, 0.25))
    """Weights of the further tokens that the head predicts in training, the token after the next first (multi-token
    prediction, Gloeckle et al. 2024, arXiv 2404.19737). Empty: off."""
    prefix_loss: float = technique(0.0, off=0.0, on=0.25)
    """Weight of an auxiliary loss in training: the cross-entropy of the longest token that is a proper prefix of the target
    (speedrun, Jul 2026). 0: off."""
    sampled_softmax: int = technique(0, off=0, on=9)
    """Number of classes, drawn at random, that the training softmax compares with the target (Jean et al. 2015,
    arXiv 1412.2007). 0: all classes."""
    fused: Literal["auto", "off"] = "auto"
    """Use fused Triton kernels for the loss, and for linear map + ReLU^2. auto: on CUDA with activations in bfloat16."""
    fp8: Literal["none", "auto", "head", "head_mlp"] = "none"
    """Matrix products in 8-bit floats, in training only. head: the head's, forward and backward; head_mlp: also the MLP's,
    forward (speedrun, 2025 and 2026). Needs compute capability 8.9 and fused. auto: head_mlp where the model and the device
    can, else none."""
    fp8_scales: Literal["static", "dynamic", "delayed"] = "dynamic"
    """Largest entry that e4m3 covers. static: fp8_x_max and fp8_weight_max in the head, delayed in the MLP (speedrun);
    dynamic: the tensor's own; delayed: that of the previous pass times the headroom."""
    fp8_x_max: float = 100.0
    """Largest entry of the head's input under static scales (the speedrun's value)."""
    fp8_weight_max: float = 1.6
    """Largest weight of the head under static scales (the speedrun's value)."""
    fp8_grad_max: float = 0.0
    """Largest gradient of one token's loss by a logit that e5m2 covers: 96 in the speedrun, whose scale is 0.75 / 448. It
    does not depend on train.loss_reduction, whose factor is applied afterwards. 0: the bound that the losses' weights and
    the slope of softcap give."""
    fp8_x_headroom: float = 1.8
    """Headroom of the input under delayed scales: a factor of the previous largest entry (speedrun, 2026)."""
    fp8_weight_headroom: float = 1.12
    """Headroom of the weights under delayed scales: a factor of the previous largest weight (speedrun, 2026)."""

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        check_needs(self, "model")
        raise_if(self.dim % self.head_dim != 0, f"head_dim must divide dim, got {self.head_dim} and {self.dim}")
        raise_if(self.query_dim > self.head_dim,
                 f"qk_head_dim must be at most head_dim ({self.head_dim}), got {self.qk_head_dim}")
        raise_if(self.position in ("rotary", "half_rotary") and self.query_dim % 4 != 0,
                 f"{self.position} needs {'qk_head_dim' if self.qk_head_dim else 'head_dim'} divisible by 4, got "
                 f"{self.query_dim}")
        raise_if(self.attention == "varlen" and not self.document_mask,
                 "--model.attention varlen packs documents: it needs --model.document_mask")
        raise_if(self.flash != "default" and self.attention not in ("sdpa", "varlen"),
                 f"flash {self.flash} serves --model.attention sdpa or varlen, got {self.attention}")
        self._check_layers()
        self._check_heads()
        self._check_losses()
        if self.geometry == "sphere":
            self._check_sphere()
        obstacle = self.fp8_obstacle()
        raise_if(self.fp8 in ("head", "head_mlp") and bool(obstacle), f"fp8 {self.fp8} {obstacle}")

    @property
    def query_dim(self) -> int:
        """Dimension of a head's queries and keys."""
        return self.qk_head_dim or self.head_dim

    def _check_layers(self) -> None:
        """Raise ValueError for a layer number that does not exist."""
        raise_if(self.value_embeds > self.layers,
                 f"value_embeds must be at most layers ({self.layers}), got {self.value_embeds}")
        several = [(name, layer) for name in ("full_attention_layers", "paired_heads", "dynamic_heads", "attention_free",
                                              "value_embed_layers", "gate_layers", "head_gate_layers", "xsa_layers",
                                              "dense_gates") for layer in getattr(self, name)]
        single = [(name, getattr(self, name)) for name in ("shared_attention_input", "backout")]
        for name, layer in several + single:
            exists = layer is None or 0 <= layer < self.layers
            raise_if(not exists, f"{name}: there is no layer {layer}; layers are 0 to {self.layers - 1}")
        raise_if(len(self.value_embed_layers) not in (0, self.value_embeds),
                 f"value_embed_layers names {len(self.value_embed_layers)} layers for {self.value_embeds} value_embeds")
        parse_skips(self.skips, self.layers)
        raise_if(list(self.gate_layers) != sorted({0, *self.gate_layers}),
                 f"gate_layers must begin with 0 and rise, got {self.gate_layers}")
        dense = parse_dense_skips(self.dense_skips, self.layers)
        raise_if(any(skip.source.startswith("ve") and int(skip.source[2:]) >= self.value_embeds for skip in dense),
                 f"dense_skips: there are {self.value_embeds} value_embeds, numbered from ve0; got {self.dense_skips}")
        raise_if(bool(self.dense_gates) and self.dense != "mudd", f"dense_gates needs --model.dense mudd, got {self.dense}")

    def _check_heads(self) -> None:
        """Raise ValueError for combinations of heads, positions and windows that exclude each other."""
        raise_if(bool(self.paired_heads) and self.dim // self.head_dim % 2 != 0,
                 f"paired_heads needs an even number of heads, got {self.dim // self.head_dim}")
        raise_if(bool(set(self.paired_heads) & set(self.dynamic_heads)), "a layer's heads are paired or dynamic, not both")
        raise_if(self.key_offset and self.position != "half_rotary",
                 f"key_offset moves unrotated dimensions: it needs --model.position half_rotary, got {self.position}")
        raise_if(self.yarn and self.position == "none", "yarn needs a rotary position, got none")

    def _check_losses(self) -> None:
        """Raise ValueError for n-gram orders out of range and for losses that exclude each other."""
        for order in self.ngram_orders:
            raise_if(not 3 <= order <= 6, f"ngram_orders are numbers from 3 to 6 (bigrams have bigram_buckets), got {order}")
        needs_logits = bool(self.mtp_weights) or self.prefix_loss > 0
        raise_if(needs_logits and self.sampled_softmax > 0, "sampled_softmax has no logits for mtp_weights or prefix_loss")
        raise_if(self.sampled_softmax > 0 and (self.biases or self.geometry == "sphere"),
                 "sampled_softmax needs a head without biases and scales: --model.no_biases --model.geometry euclidean")

    def _check_sphere(self) -> None:
        """Raise ValueError for settings that have no meaning on the sphere."""
        for name, needed in SPHERE_NEEDS.items():
            value = "" if isinstance(needed, bool) else f" {needed}"
            flag = f"no_{name}" if needed is False else f"{name}{value}"
            raise_if(getattr(self, name) != needed, f"geometry sphere needs --model.{flag}, got {getattr(self, name)}")

    def fp8_obstacle(self) -> str:
        """Return why this model has no 8-bit products, or "": they belong to a head that is a matrix of its own, in sizes
        that fit the hardware's tiles of 16."""
        if self.tied_head:
            return "needs a head of its own: --model.no_tied_head"
        if self.geometry == "sphere" or self.biases:
            return "needs a head without biases and scales: --model.no_biases --model.geometry euclidean"
        for name in ("dim", "mlp_dim", "vocab_multiple"):
            size = getattr(self, name) or 16  # mlp_dim None is 4 dim, which fits where dim does
            if size % 16 != 0:
                return f"needs {name} divisible by 16, got {size}; nearest: {max(1, round(size / 16)) * 16}"
        return ""
