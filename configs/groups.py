"""How the tensors of each role are trained: the fields of a group, which of them act, and one group a role."""

import math
from dataclasses import dataclass, field
from typing import Literal

from configs.by_name import parse_by_name
from configs.newton_schulz import check_ns
from configs.refuse import refuse, refuse_below

RuleName = Literal["steepest", "adam", "normuon", "muon2", "muown", "dion", "dion2",
                   "sm3", "prodigy", "agd", "swan", "shampoo", "soap", "soap_muon", "psgd", "stiefel"]
NormName = Literal["spectral", "rms_operator", "schatten", "row", "column", "sign", "frobenius"]

# The norms that have a unit beside their plain one.
UNIT_NORMS: dict[str, tuple[NormName, ...]] = {
    "at_least_one": ("spectral",), "match_adam": ("spectral",), "fan_in": ("row", "column", "sign"),
    "rms": ("frobenius", "schatten"),
}

# The fields of a Group that each rule reads, beside those that every rule reads.
EVERY_RULE_READS = frozenset({"rule", "lr", "weight_decay", "decay", "constraint", "rounding", "state_dtype",
                              "clip", "clip_norm", "graft", "retraction", "tangent", "radial_brake", "row_floor",
                              "update_every", "sparse_rows", "lr_factors", "blocks"})
AVERAGE_READS = frozenset({"momentum", "averaging", "nesterov", "averages", "momentum_fast"})
STEEPEST_READS = EVERY_RULE_READS | AVERAGE_READS | {"norm", "unit", "schatten_p", "ns", "ns_steps", "equilibrate"}
RULE_READS: dict[str, frozenset[str]] = {
    "steepest": STEEPEST_READS,
    "adam": EVERY_RULE_READS | {"beta1", "beta2", "eps"},
    "normuon": STEEPEST_READS | {"beta2", "eps", "normalise"},
    "muon2": STEEPEST_READS | {"beta2", "eps"},
    "muown": STEEPEST_READS | {"beta1", "beta2", "eps"},
    "dion": EVERY_RULE_READS | {"momentum", "rank_frac"},
    "dion2": EVERY_RULE_READS | {"momentum", "rank_frac", "ns", "ns_steps"},
    "sm3": EVERY_RULE_READS | AVERAGE_READS,
    "prodigy": EVERY_RULE_READS | {"beta1", "beta2", "eps", "distance_start"},
    "agd": EVERY_RULE_READS,
    "swan": EVERY_RULE_READS | {"whiten_steps"},
    "shampoo": EVERY_RULE_READS | AVERAGE_READS | {"gram_beta", "every_steps", "eps", "sides", "exponent", "root"},
    "soap": EVERY_RULE_READS | {"beta1", "beta2", "eps", "gram_beta", "every_steps"},
    "soap_muon": STEEPEST_READS | {"beta2", "eps", "gram_beta", "every_steps"},
    "stiefel": EVERY_RULE_READS | AVERAGE_READS | {"dual_steps"},
    "psgd": EVERY_RULE_READS | {"beta1", "eps", "factor_lr", "step_rms"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """How the tensors of one role are trained. Which fields act depends on the rule: see RULE_READS."""

    rule: RuleName = "adam"
    """steepest: momentum, then the norm's dual (Muon, Signum, Scion's LMOs, normalised SGD); adam: Adam(W); for the others
    see their files in optim/rules."""
    lr: float = 0.01
    """Step length in units of the rule's norm, before the lr curve."""
    lr_factors: tuple[str, ...] = ()
    """NAME=FACTOR of lr, for tensors with NAME in their names: mlp.down=4 (speedrun, 2025: down projections)."""
    blocks: tuple[str, ...] = ()
    """NAME=COUNT: such matrices are cut into so many blocks of rows, each a matrix of its own to norm and rule:
    attention.q=3 for three pairs of heads (speedrun, 2026)."""
    weight_decay: float = 0.0
    """Decay per step, before its curve."""
    decay: Literal["decoupled", "independent", "corrected", "cautious", "none"] = "decoupled"
    """W -= lr wd W; W -= wd (lr / peak lr) W; W -= wd lr (lr / peak lr) W (Defazio 2025, arXiv 2506.02285); the first, only
    where update and weight agree in sign (Chen et al. 2025, arXiv 2510.12402); or none."""
    constraint: Literal["none", "hyperball", "sphere", "radial", "stiefel"] = "none"
    """hyperball: each matrix keeps the Frobenius norm that it started with (Wen et al. 2025, MuonH and AdamH); sphere: every
    vector along the model dimension has length 1 (nGPT, Loshchilov et al. 2024, arXiv 2410.01131); radial: a matrix's norm
    changes by its step's radial part alone (speedrun track 3, result 44); stiefel: all singular values are 1 (rule stiefel
    brings it)."""
    retraction: Literal["normalise", "geodesic"] = "normalise"
    """On the sphere: a straight step, divided by its length; or along the great circle."""
    tangent: Literal["none", "gradient", "momentum", "dual"] = "none"
    """On the sphere, what is projected onto the tangent space, each beside those before it: the gradient, its average, and
    the direction (steepest descent on the sphere)."""
    rounding: Literal["nearest", "stochastic", "remainder"] = "nearest"
    """Of weights stored in bfloat16: to the nearest; up or down by chance, right in the mean; or with the 16 bits that
    rounding drops kept beside them."""
    state_dtype: Literal["same", "float32"] = "same"
    """Memories of bfloat16 weights in bfloat16 too, or in float32."""
    graft: Literal["", "steepest", "adam", "normuon", "muon2", "dion", "dion2", "sm3", "swan", "shampoo", "soap",
                   "soap_muon"] = ""
    """Another rule, whose direction's Frobenius length each tensor's step takes: rule#graft (Agarwal et al. 2020,
    arXiv 2002.11803). It reads the same fields."""
    clip: float = 0.0
    """Before all else each tensor's gradient is projected onto the ball of this radius in clip_norm; 0: it is not."""
    clip_norm: NormName = "frobenius"
    """The ball's norm: frobenius scales the gradient, sign clips its entries, row its rows, spectral its singular values."""
    momentum: float = 0.95
    """Coefficient of the gradient average, unless scheduled."""
    averaging: Literal["ema", "heavy_ball", "none"] = "ema"
    """m <- mu m + (1 - mu) g, m <- mu m + g, or m <- g."""
    nesterov: bool = True
    """Step along the average's next value as the present gradient foresees it."""
    averages: int = 1
    """Step along the mean of so many running averages, their ages 1 / (1 - mu) log-spaced; averaging ema alone."""
    momentum_fast: float = 0.5
    """Coefficient of the youngest of several averages; `momentum` is the oldest's."""
    norm: NormName = "rms_operator"
    """The norm of steepest descent."""
    unit: Literal["plain", "at_least_one", "match_adam", "fan_in", "rms"] = "plain"
    """Length of a step of size 1: the norm's own; spectral x max(1, m/n)^.5 (Jordan); spectral x .2 max(m, n)^.5
    (Moonlight, Liu et al. 2025, arXiv 2502.16982); row, column or sign / inputs (Scion, Pethick et al. 2025,
    arXiv 2502.07529); frobenius at RMS 1, schatten as long as rms_operator."""
    schatten_p: float = 4.0
    """norm schatten: 1 is nuclear, 2 normalised SGD, and towards infinity Muon; by SVD."""
    ns: str = "polar_express"
    """How matrices are orthogonalised: quintic, polar_express, convergent, dion or radii (tables of coefficients), an inline
    table 'a,b,c;a,b,c;...' (configs/newton_schulz.py), or svd: exactly."""
    ns_steps: int = 5
    """Newton-Schulz iterations; a table's last triple repeats."""
    equilibrate: bool = False
    """Rows of the averaged gradient scaled to one length before they are orthogonalised (nanochat's MuonEq)."""
    normalise: Literal["rows", "longer"] = "rows"
    """NorMuon's second moments: of rows (Li et al. 2025, arXiv 2510.05491), or of the slices across the longer side
    (speedrun)."""
    rank_frac: float = 0.25
    """Dion: rank of a step, dion2: rows of a step, each as a share of the matrix's shorter side."""
    beta1: float = 0.8
    """Adam's average of the gradient."""
    beta2: float = 0.95
    """Adam's average of its square."""
    eps: float = 1e-10
    """Adam's floor under the root mean square gradient."""
    gram_beta: float = 0.95
    """Average of the gradients' Gram matrices; 1: their sum (Gupta et al. 2018, arXiv 1802.09568)."""
    every_steps: int = 1
    """Roots (Shampoo) or bases (SOAP) are refreshed every so many updates."""
    sides: Literal["both", "left", "right", "smaller"] = "both"
    """Which Gram matrices Shampoo takes: of rows (left), of columns (right)."""
    exponent: float | None = None
    """Shampoo's power of each; None: -1/4 for two, -1/2 for one."""
    root: Literal["eigh", "newton"] = "eigh"
    """Shampoo's roots: by eigenvectors, or by the coupled Newton iteration (exponents -1/p)."""
    distance_start: float = 1e-6
    """Prodigy's first estimate d0 of the distance to a solution; its steps start as small as lr d0."""
    whiten_steps: int = 10
    """SWAN's Newton-Schulz iterations: of a 256 x 768 Gaussian's singular values 5 leave .66 to 1, 10 all at 1."""
    radial_brake: float = 0.0
    """Share that is taken off the radial part of a matrix's step where it lengthens the matrix (speedrun track 3, results 44
    to 46: .5); 0: none."""
    row_floor: float = 0.0
    """Least length of each row of the direction, over the length of the weights' row (speedrun track 3, result 46: .3825);
    0: none."""
    update_every: int = 1
    """Update at every so many-th step, by the mean of the gradients since; a run's last steps may go unused (speedrun: Adam
    at every second)."""
    sparse_rows: bool = False
    """Ranks exchange those rows of the gradient alone that they have touched: for lookup tables of which a batch sees a
    small share. A row costs its length and 8 bytes; where most are touched, sending all is cheaper."""
    factor_lr: float = 0.1
    """PSGD: step length of the factors that learn to whiten, at most 1; from about .25 on they overshoot where a gradient
    stays, and the larger, the less white what they make of a noisy one."""
    step_rms: float = 1.1
    """PSGD: largest RMS of a direction; white ones have 1."""
    dual_steps: int = 20
    """Stiefel: iterations for the step's tangency: 5 leave 1e-4 where one side is four times the other, 20 leave 1e-3 where
    it is a quarter longer; square matrices need none."""

    def __post_init__(self) -> None:
        refuse_below(self, 0, "lr", "weight_decay", "eps", "clip", "row_floor")
        refuse_below(self, 1, "ns_steps", "averages", "whiten_steps", "every_steps", "update_every",
                     "dual_steps")
        refuse(not 0 <= self.gram_beta <= 1, f"gram_beta must lie in [0, 1], got {self.gram_beta}")
        refuse(self.exponent is not None and not -1 <= self.exponent < 0,
               f"exponent must lie in [-1, 0), got {self.exponent}")
        check_ns(self.ns)
        parse_by_name(self.lr_factors)
        self._refuse_blocks()
        refuse(self.graft == self.rule, f"graft must be another rule than {self.rule}")
        refuse(bool(self.graft) and self.rule in ("prodigy", "agd", "muown"),
               f"rule {self.rule} sets its own length: it cannot be grafted")
        refuse(not 0 < self.distance_start < math.inf, f"distance_start must be positive, got {self.distance_start}")
        refuse(self.rule == "stiefel" and self.constraint not in ("none", "stiefel"),
               f"rule stiefel brings the constraint stiefel, got constraint {self.constraint}")
        for name in ("momentum", "momentum_fast", "beta1", "beta2"):
            value = getattr(self, name)
            refuse(not 0 <= value < 1, f"{name} must lie in [0, 1), got {value}")
        having = UNIT_NORMS.get(self.unit, (self.norm,))
        refuse(self.norm not in having, f"unit {self.unit} belongs to norm {' or '.join(having)}, got norm {self.norm}")
        refuse(not 1 <= self.schatten_p < math.inf,
               f"schatten_p must be at least 1 and finite (norm spectral is its limit), got {self.schatten_p}")
        refuse(not 0 < self.rank_frac <= 1, f"rank_frac must lie in (0, 1], got {self.rank_frac}")
        refuse(self.averages > 1 and self.averaging != "ema",
               f"averages {self.averages} belong to averaging ema, got {self.averaging}")
        refuse(not 0 < self.factor_lr <= 1, f"factor_lr must lie in (0, 1], got {self.factor_lr}")
        refuse(not 0 < self.step_rms < math.inf, f"step_rms must be positive, got {self.step_rms}")
        refuse(not 0 <= self.radial_brake <= 1, f"radial_brake must lie in [0, 1], got {self.radial_brake}")
        refuse(self.radial_brake > 0 and self.constraint in ("hyperball", "sphere"),
               f"radial_brake has no effect under constraint {self.constraint}, which keeps lengths; set it to 0, or the "
               "constraint to none or radial")
        refuse(self.equilibrate and self.norm not in ("spectral", "rms_operator"),
               f"equilibrate belongs to norm spectral or rms_operator, got norm {self.norm}")

    def _refuse_blocks(self) -> None:
        """Blocks that are no whole number, or of vectors on the sphere."""
        for name, count in parse_by_name(self.blocks).items():
            refuse(count != int(count), f"blocks are whole numbers, got {name}={count:g}")
        refuse(bool(self.blocks) and self.constraint == "sphere", "blocks would cut the vectors of constraint sphere")


def acting_fields(group: Group) -> frozenset[str]:
    """The fields of a group that its rule, norm and averaging let act."""
    acting = set(RULE_READS[group.rule]) | (RULE_READS[group.graft] if group.graft else set())
    if "norm" in acting and group.norm not in ("spectral", "rms_operator"):
        acting -= {"ns", "ns_steps", "equilibrate"}
    if group.norm == "rms_operator":
        acting -= {"unit"}
    if group.norm != "schatten":
        acting -= {"schatten_p"}
    if group.ns == "svd":
        acting -= {"ns_steps"}
    if group.constraint != "sphere":
        acting -= {"retraction", "tangent"}
    if not group.clip:
        acting -= {"clip_norm"}
    if "averaging" in acting and group.averaging == "none":
        acting -= AVERAGE_READS - {"averaging"}
    if group.averages == 1:
        acting -= {"momentum_fast"}
    return frozenset(acting)


@dataclass(frozen=True, slots=True, kw_only=True)
class Optim:
    """One group per parameter role: the role chooses the norm (Bernstein & Newhouse 2024, arXiv 2409.20325)."""

    matrix: Group = field(default_factory=lambda: Group(rule="steepest", lr=0.03))
    """Hidden matrices of attention and MLP."""
    embed: Group = field(default_factory=lambda: Group(lr=0.3))
    """Token and position embeddings."""
    head: Group = field(default_factory=lambda: Group(lr=0.02))
    """The output matrix."""
    value_embed: Group = field(default_factory=lambda: Group(lr=0.1))
    """Token embeddings mixed into the values."""
    bigram_embed: Group = field(default_factory=lambda: Group(lr=0.1))
    """The hashed bigram table."""
    gate: Group = field(default_factory=lambda: Group(lr=0.02))
    """Small matrices that open and close a technique."""
    gain: Group = field(default_factory=lambda: Group(lr=0.02))
    """Gains of the norms."""
    bias: Group = field(default_factory=lambda: Group(lr=0.02))
    """Biases."""
    scalar: Group = field(default_factory=lambda: Group(lr=0.02))
    """Single learned numbers."""
    scale: Group = field(default_factory=lambda: Group(lr=0.01))
    """Learned factors and eigen learning rates of the sphere geometry."""
