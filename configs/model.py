"""The GPT: sizes, and one flag per technique."""

from dataclasses import dataclass
from typing import Literal

from configs.notation import check_needs, check_ranges, parse_skips, raise_if, technique

# The sphere has norms everywhere and gains nowhere, and a zero vector has no direction.
SPHERE_NEEDS = {"zero_init_projections": False, "norm_gains": False, "biases": False, "tied_head": False, "qk_norm": True,
                "norm_embedding": True, "inject": False, "residual_growth": 0.0, "skips": (), "backout": None,
                "dense": "none"}


# Where numbers must lie.
RANGES = {
    "[1, inf)": ("layers", "dim", "head_dim", "mlp_dim", "vocab_multiple", "window_tokens", "long_window_tokens",
                 "dynamic_window", "fp8_x_headroom", "fp8_weight_headroom"),
    "[0, inf)": ("value_embeds", "bigram_buckets", "bigram_signs", "residual_growth", "prefix_loss", "sampled_softmax",
                 "fp8_grad_max"),
    "(0, inf)": ("softcap_value", "logit_scale", "fp8_x_max", "fp8_weight_max"),
    "(0, 1]": ("eigen_lr",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The GPT: sizes, and one flag per technique; a technique that is off costs nothing and changes nothing."""

    # ---- Size, start and storage ------------------------------------------------------------------------------------------

    layers: int = 2
    dim: int = 128
    """Width of the residual stream."""
    head_dim: int = 64
    """dim / head_dim heads."""
    mlp_dim: int | None = None
    """Hidden width of the MLP; None: 4 dim."""
    vocab_multiple: int = 64
    """The vocabulary is padded up to a multiple of this (efficient matrix shapes)."""
    activation: Literal["relu2", "gelu", "swiglu"] = technique(
        "relu2", name="relu2", off="gelu", on="relu2", only=("relu2",))
    """ReLU squared (So et al. 2021, arXiv 2109.08668), GELU, or SwiGLU (Shazeer 2020, arXiv 2002.05202)."""
    biases: bool = technique(False, off=False, on=True)
    """Biases in all linear maps."""
    init_gain: float = 0.33
    """Hidden matrices start with variance init_gain / fan_in (speedrun)."""
    zero_init_projections: bool = technique(True, off=False, on=True)
    """The maps that write to the stream, and the head, start at zero (muP's advice, Yang et al. 2022, arXiv 2203.03466)."""
    matrix_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of hidden matrices, their gradients and optimizer state. In bfloat16 with the group's rounding remainder and
    state_dtype float32 weights are as exact as in float32, and half as much goes through the network (speedrun, 2025)."""
    embed_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the token embedding (and of its optimizer state)."""
    table_dtype: Literal["float32", "bfloat16"] = "float32"
    """The same of value embeddings and hashed tables."""

    # ---- Attention --------------------------------------------------------------------------------------------------------

    position: Literal["none", "learned", "rotary", "half_rotary"] = technique(
        "rotary", name="rotary", off="learned", on="rotary", only=("rotary", "half_rotary"))
    """Learned table (GPT-2), rotary (Su et al. 2021, arXiv 2104.09864), or rotary on half the dimensions."""
    rotary_base: float = 1024.0
    """Longest wavelength of the rotary embedding, over 2 pi."""
    qk_norm: bool = technique(True, off=False, on=True)
    """RMS-normalised queries and keys (Henry et al. 2020, arXiv 2010.04245)."""
    attention_scale: float | None = technique(None, off=None, on=0.9)
    """Softmax scale; None: 1 / sqrt(head_dim)."""
    window_tokens: int | None = technique(None, name="window", off=None, on=3)
    """Sliding-window attention: each token sees so many last tokens; None: all."""
    long_window_tokens: int | None = technique(
        None, name="", off=None, on=4, needs={"model.window_tokens": 2, "model.full_attention_layers": (1,)})
    """With a window: the window of the layers that see further; None: everything."""
    full_attention_layers: tuple[int, ...] = technique((), name="", off=(), on=(1,), needs={"model.window_tokens": 3})
    """With a window: layers, from 0, that see further."""
    document_mask: bool = technique(False, off=False, on=True)
    """Attention stays within a document."""
    attention: Literal["auto", "sdpa", "flex", "varlen"] = "auto"
    """Kernel; auto: sdpa, or flex on CUDA where a window or document mask is on."""
    flash: Literal["default", "FA3", "FA4"] = "default"
    """FlashAttention inside sdpa and varlen: PyTorch's own, or version 3 (Hopper) or 4 where its package is installed."""
    key_offset: bool = technique(False, off=False, on=True, needs={"model.position": "half_rotary"})
    """Layers that see far take the unrotated dimensions of their keys from the token before (speedrun, Dec 2025)."""
    head_gates: bool = technique(False, off=False, on=True)
    """Each head's output times a gate that reads the layer's input (speedrun, Aug 2025)."""
    yarn: bool = technique(False, off=False, on=True, needs={"model.window_tokens": 3, "model.position": "rotary"})
    """Where windows grow, slow rotary frequencies are stretched and the softmax scale rises (YaRN, Peng et al. 2023,
    arXiv 2309.00071), in one go from the first window."""
    xsa: bool = technique(False, off=False, on=True)
    """Heads lose a learned share of their component along the token's own value (arXiv 2603.09078)."""
    paired_heads: tuple[int, ...] = technique((), off=(), on=(1,))
    """Layers whose heads attend in pairs to each other's keys, at half the window (speedrun, Dec 2025)."""
    dynamic_heads: tuple[int, ...] = technique((), off=(), on=(0,))
    """Layers whose heads mix their attention, as each token says (Xiao et al. 2024, arXiv 2405.08553)."""
    dynamic_window: int = 112
    """Tokens that the mixture sees."""
    attention_free: tuple[int, ...] = technique((), off=(), on=(1,))
    """Layers that are an MLP alone."""
    shared_attention_input: int | None = technique(None, off=None, on=0)
    """Attention of all layers after this one reads what this one wrote, in place of the stream (speedrun, 2026)."""
    projection_gains: bool = technique(False, off=False, on=True)
    """Learned factors of attention's input and output maps (speedrun, 2025)."""

    # ---- Embeddings -------------------------------------------------------------------------------------------------------

    embed_std: float = 1.0
    """Standard deviation of the token embedding's start."""
    norm_embedding: bool = technique(True, off=False, on=True)
    """RMS norm right after the token embedding."""
    tied_head: bool = technique(False, off=False, on=True)
    """The head is the token embedding, transposed."""
    smear: bool = technique(False, off=False, on=True)
    """x_t += lambda sigmoid(gate(x_t)) x_{t-1} right after the embedding (speedrun, Sep 2025)."""
    value_embeds: int = technique(0, off=0, on=2)
    """So many last layers mix a second token embedding into their values (speedrun, Dec 2024)."""
    value_embed_layers: tuple[int, ...] = technique((), name="", off=(), on=(0,), needs={"model.value_embeds": 1})
    """The layers that mix in value embeddings; none: the last ones."""
    value_gates: bool = technique(False, off=False, on=True, needs={"model.value_embeds": 1})
    """Value embeddings through gates of each head, in place of a learned mean (speedrun, Jan 2026)."""
    bigram_buckets: int = technique(0, name="bigram", off=0, on=37)
    """Rows of a hashed table of (previous, current) token pairs, added to the embedding; 0: none (speedrun, Jan 2026)."""
    bigram_signs: int = technique(0, off=0, on=11, needs={"model.bigram_buckets": 37})
    """Rows of the +-1 table that tells hashed n-grams apart that share a vector; 0: none (speedrun, 2026: 8192)."""
    ngram_orders: tuple[int, ...] = technique((), off=(), on=(3, 4), needs={"model.bigram_buckets": 37})
    """Further hashed tables, each of bigram_buckets rows, of n-grams this long, beside the pairs (speedrun, 2026)."""
    inject: bool = technique(False, off=False, on=True)
    """Learned weights: of hashed embeddings at the start; of both these and the start after attention (speedrun, 2026)."""

    # ---- Residual stream --------------------------------------------------------------------------------------------------

    norm_gains: bool = technique(False, off=False, on=True)
    """Learned gains in the RMS norms."""
    x0_skip: bool = technique(False, off=False, on=True)
    """Each block reads lambda_r x + lambda_0 x0, x0 the normed embedding (speedrun, Nov 2024)."""
    geometry: Literal["euclidean", "sphere"] = "euclidean"
    """sphere: vectors of the stream have length 1 and layers move them along it (nGPT, Loshchilov et al. 2024,
    arXiv 2410.01131); it belongs to the constraint sphere of the matrices, embeddings and head. attention_scale None is then
    sqrt(head_dim)."""
    eigen_lr: float = 0.05
    """On the sphere: the share of the way to a layer's suggestion that its step goes at the start; the paper's, for 24 and
    36 layers, about 1 / layers."""
    residual_growth: float = technique(0.0, off=0.0, on=1.1)
    """Learned factors of the stream and of what is added to it, the stream's growing it so much a layer at the start
    (speedrun, 2026: 1.1); 0: none."""
    skips: tuple[str, ...] = technique((), off=(), on=("0>1",))
    """Skips between layers: `3>6` from what layer 3 wrote to what layer 6 reads."""
    skip_weight: float = 0.18
    """Learned weight of each skip at the start (speedrun: .18)."""
    backout: int | None = technique(None, off=None, on=0)
    """A learned share, from 1/2, of what this layer wrote is taken back before the head (speedrun, Oct 2025)."""
    dense: Literal["none", "denseformer", "mudd"] = technique("none", off="none", on="mudd")
    """Each layer passes on a learned mixture of all streams so far (DenseFormer, Pagliardini et al. 2024, arXiv 2402.02622),
    or one that each token chooses (MUDD, Xiao et al. 2025, arXiv 2502.12170)."""

    # ---- Losses, and the kernels of the head and the MLP ------------------------------------------------------------------

    softcap: Literal["none", "tanh", "rational", "asymmetric"] = technique("tanh", off="none", on="tanh")
    """Bounded logits: c tanh(z/c) (Gemma 2, 2024, arXiv 2408.00118), c z / sqrt(z^2 + c^2), or the speedrun's
    23 sigmoid((z + 5) / 7.5)."""
    softcap_value: float = 15.0
    """The bound c."""
    logit_scale: float = 1.0
    """On the sphere: the factor of the cosines that are the logits, at the start."""
    mtp_weights: tuple[float, ...] = technique((), off=(), on=(0.5, 0.25))
    """In training the head also predicts the next tokens but one, but two, ...: weights of their nats (Gloeckle et al. 2024,
    arXiv 2404.19737)."""
    prefix_loss: float = technique(0.0, off=0.0, on=0.25)
    """In training: weight of the nats of the longest token that is a proper prefix of the right one (speedrun, Jul 2026)."""
    sampled_softmax: int = technique(0, off=0, on=9)
    """In training: the softmax sees the right token and so many drawn ones (Jean et al. 2015, arXiv 1412.2007); 0: all."""
    fused: Literal["auto", "off"] = "auto"
    """Loss, and linear map + ReLU^2, by fused Triton kernels; auto: where the device has them (CUDA, with activations in
    bfloat16)."""
    fp8: Literal["none", "head", "head_mlp"] = "none"
    """Training's matrix products in 8-bit floats: the head's, forward and backward, or also the MLP's, forward only
    (speedrun, 2025 and 2026); compute capability 8.9 or later."""
    fp8_scales: Literal["static", "dynamic", "delayed"] = "dynamic"
    """8-bit numbers are scaled for entries up to fp8_x_max and fp8_weight_max; up to the tensor's greatest; or up to the
    previous pass's greatest times the headroom."""
    fp8_x_max: float = 100.0
    """Static scales: the greatest entry of a map's input (the speedrun's, of the head)."""
    fp8_weight_max: float = 1.6
    """Static scales: the greatest weight (the speedrun's, of the head)."""
    fp8_grad_max: float = 0.0
    """The greatest gradient by a logit, the loss's factor included: .75 in the speedrun, over the step's tokens where
    train.loss_reduction is mean; 0: measured at each call."""
    fp8_x_headroom: float = 1.8
    """Delayed scales: room for the next input, over the last one's greatest entry (speedrun, 2026)."""
    fp8_weight_headroom: float = 1.12
    """Delayed scales: the same for the weights (speedrun, 2026)."""

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        check_needs(self, "model")
        raise_if(self.dim % self.head_dim != 0, f"head_dim must divide dim, got {self.head_dim} and {self.dim}")
        raise_if(self.position in ("rotary", "half_rotary") and self.head_dim % 4 != 0,
               f"{self.position} needs head_dim divisible by 4, got {self.head_dim}")
        raise_if(self.attention == "varlen" and not self.document_mask,
               "--model.attention varlen packs documents: it needs --model.document_mask")
        raise_if(self.flash != "default" and self.attention not in ("sdpa", "varlen"),
               f"flash {self.flash} serves --model.attention sdpa or varlen, got {self.attention}")
        raise_if(self.fp8 == "none" and self.fp8_scales != "dynamic",
               f"fp8_scales {self.fp8_scales} has no effect without --model.fp8 head or head_mlp")
        self._check_layers()
        self._check_heads()
        self._check_losses()
        if self.geometry == "sphere":
            self._check_sphere()
        if self.fp8 != "none":
            self._check_fp8()

    def _check_layers(self) -> None:
        """Numbers of layers that there are not."""
        raise_if(self.value_embeds > self.layers,
               f"value_embeds must be at most layers ({self.layers}), got {self.value_embeds}")
        named = {name: getattr(self, name) for name in ("full_attention_layers", "paired_heads", "dynamic_heads",
                                                        "attention_free", "value_embed_layers")}
        named |= {name: (value,) for name in ("shared_attention_input", "backout")
                  if (value := getattr(self, name)) is not None}
        for name, layers in named.items():
            missing = [layer for layer in layers if not 0 <= layer < self.layers]
            raise_if(bool(missing), f"{name}: there is no layer {missing[:1]}; layers are 0 to {self.layers - 1}")
        raise_if(len(self.value_embed_layers) not in (0, self.value_embeds),
               f"value_embed_layers names {len(self.value_embed_layers)} layers for {self.value_embeds} value_embeds")
        parse_skips(self.skips, self.layers)

    def _check_heads(self) -> None:
        """Windows and heads that cannot be."""
        raise_if(bool(self.paired_heads) and self.dim // self.head_dim % 2 != 0,
               f"paired_heads needs an even number of heads, got {self.dim // self.head_dim}")
        raise_if(bool(set(self.paired_heads) & set(self.dynamic_heads)), "a layer's heads are paired or dynamic, not both")
        raise_if(self.key_offset and self.position != "half_rotary",
               f"key_offset moves dimensions that stand still: --model.position half_rotary, got {self.position}")
        raise_if(self.yarn and self.position == "none", "yarn needs a rotary position, got none")

    def _check_losses(self) -> None:
        """Hashed tables and losses that exclude each other."""
        bad = [n for n in self.ngram_orders if not 3 <= n <= 6]
        raise_if(bool(bad), f"ngram_orders are numbers from 3 to 6 (pairs are there anyway), got {bad[:1]}")
        extra = bool(self.mtp_weights) or self.prefix_loss > 0
        raise_if(extra and self.sampled_softmax > 0, "sampled_softmax has no logits for mtp_weights or prefix_loss")
        raise_if(self.sampled_softmax > 0 and (self.biases or self.geometry == "sphere"),
               "sampled_softmax needs a head that is a matrix alone: no biases, geometry euclidean")

    def _check_sphere(self) -> None:
        """What has no meaning on the sphere."""
        for name, wanted in SPHERE_NEEDS.items():
            raise_if(getattr(self, name) != wanted,
                   f"geometry sphere needs --model.{name if wanted is not False else 'no_' + name}"
                   f"{'' if isinstance(wanted, bool) else ' ' + str(wanted)}, got {getattr(self, name)}")

    def _check_fp8(self) -> None:
        """Models without 8-bit products, and sizes that the hardware's tiles cannot hold."""
        raise_if(self.tied_head, f"fp8 {self.fp8} needs a head of its own: --model.no_tied_head")
        raise_if(self.geometry == "sphere", f"fp8 {self.fp8} belongs to geometry euclidean, got {self.geometry}")
        for name in ("dim", "mlp_dim", "vocab_multiple"):
            size = getattr(self, name) or 16
            raise_if(size % 16 != 0,
                   f"fp8 {self.fp8} needs {name} divisible by 16, got {size}; nearest: {max(1, round(size / 16)) * 16}")
