"""How the tensors of each role are trained: one frozen dataclass per optimizer, each with its own fields only.

A run chooses one per role: Optim(matrix=Muon(lr=0.02), embed=Adam(lr=0.3), head=Adam(lr=0.01)). On the command line
`--optim.matrix.rule NAME` picks the class; fields that the old and the new class share keep their value. The mathematics
behind a name stands in optim/muon.py, adam.py, normuon.py, and in optim/zoo/ for all others.
"""

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from configs.notation import check_ranges, check_table, nearest, parse_by_name, raise_if, technique

NormName = Literal["spectral", "rms_operator", "schatten", "row", "column", "sign", "frobenius"]
# The norms that have a unit beside their plain one.
UNIT_NORMS: dict[str, tuple[NormName, ...]] = {
    "at_least_one": ("spectral",), "match_adam": ("spectral",), "fan_in": ("row", "column", "sign"),
    "rms": ("frobenius", "schatten"),
}
# Where every number must lie.
RANGES = {
    "[0, inf)": ("lr", "weight_decay", "eps", "clip", "row_floor"),
    "[1, inf)": ("ns_steps", "averages", "whiten_steps", "every_steps", "update_every", "dual_steps", "schatten_p"),
    "[0, 1)": ("momentum", "momentum_fast", "beta1", "beta2"),
    "[0, 1]": ("gram_beta", "radial_brake"),
    "(0, 1]": ("rank_frac", "factor_lr"),
    "(0, inf)": ("distance_start", "step_rms"),
    "[-1, 0)": ("exponent",),
}


@dataclass(frozen=True, kw_only=True)
class Extra:
    """What every rule can be given and few runs need."""

    lr_factors: tuple[str, ...] = technique((), off=())
    """NAME=FACTOR of lr, for tensors with NAME in their names: mlp.down=4 (speedrun, 2025: down projections)."""
    blocks: tuple[str, ...] = technique((), off=())
    """NAME=COUNT: such matrices are cut into so many blocks of rows, each a matrix of its own to norm and rule:
    attention.q=3 for three pairs of heads (speedrun, 2026)."""
    clip: float = 0.0
    """Before all else each tensor's gradient is projected onto the ball of this radius in clip_norm; 0: it is not."""
    clip_norm: NormName = "frobenius"
    """The ball's norm: frobenius scales the gradient, sign clips its entries, row its rows, spectral its singular values."""
    radial_brake: float = 0.0
    """Share that is taken off the radial part of a matrix's step where it lengthens the matrix (speedrun track 3, results 44
    to 46: .5); 0: none."""
    row_floor: float = 0.0
    """Least length of each row of the direction, over the length of the weights' row (speedrun track 3, result 46: .3825);
    0: none."""
    retraction: Literal["normalise", "geodesic"] = "normalise"
    """Constraint sphere: a straight step, divided by its length; or along the great circle."""
    tangent: Literal["none", "gradient", "momentum", "dual"] = "none"
    """Constraint sphere: what is projected onto the tangent space, each beside those before it: the gradient, its average,
    and the direction (steepest descent on the sphere)."""
    sparse_rows: bool = False
    """Ranks exchange only the rows of the gradient that they have touched: for lookup tables of which a batch uses a small
    share. A row costs its length and 8 bytes; where most are touched, sending all is cheaper."""

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        parse_by_name(self.lr_factors)
        for name, count in parse_by_name(self.blocks).items():
            raise_if(count != int(count), f"blocks are whole numbers, got {name}={count:g}")
        raise_if(self.clip_norm != "frobenius" and not self.clip, f"clip_norm {self.clip_norm} has no effect without clip")


@dataclass(frozen=True, kw_only=True)
class Graft:
    """What gives a step its length: by itself, the rule's own direction does; as a RuleConfig, that rule's direction."""

    rule: ClassVar[str] = "none"


@dataclass(frozen=True, kw_only=True)
class RuleConfig(Graft):
    """What every rule has. The classes below add what each of them alone reads."""

    rule: ClassVar[str]
    """The name in `--optim.ROLE.rule NAME` and in config.json."""
    takes_graft: ClassVar[bool] = True
    """Whether another rule may set the length of its steps: not where it finds that itself."""
    gives_graft: ClassVar[bool] = True
    """Whether it may set the length of another rule's steps."""

    lr: float = 0.01
    """Step length in units of the rule's norm, before the lr curve."""
    weight_decay: float = technique(0.0, off=0.0)
    """Decay per step, before its curve."""
    decay: Literal["decoupled", "independent", "corrected", "cautious", "none"] = technique(
        "decoupled", name="cautious_decay", off="decoupled", only=("cautious",))
    """W -= lr wd W; W -= wd (lr / peak lr) W; W -= wd lr (lr / peak lr) W (Defazio 2025, arXiv 2506.02285); the first, only
    where update and weight agree in sign (Chen et al. 2025, arXiv 2510.12402); or none."""
    constraint: Literal["none", "hyperball", "sphere", "radial", "stiefel"] = "none"
    """hyperball: each matrix keeps the Frobenius norm that it started with (Wen et al. 2025, MuonH and AdamH); sphere: every
    vector along the model dimension has length 1 (nGPT, Loshchilov et al. 2024, arXiv 2410.01131); radial: a matrix's norm
    changes by its step's radial part alone (speedrun track 3, result 44); stiefel: all singular values are 1 (rule stiefel
    brings it)."""
    update_every: int = 1
    """Update at every so many-th step, by the mean of the gradients since; a run's last steps may go unused (speedrun: Adam
    at every second)."""
    rounding: Literal["nearest", "stochastic", "remainder"] = "nearest"
    """Of weights stored in bfloat16: to the nearest; up or down by chance, right in the mean; or with the 16 bits that
    rounding drops stored beside them."""
    state_dtype: Literal["same", "float32"] = "same"
    """Optimizer state of bfloat16 weights in bfloat16 too, or in float32."""
    graft: Graft = Graft()
    """Another rule, whose direction's Frobenius length each tensor's step takes: rule#graft (Agarwal et al. 2020,
    arXiv 2002.11803). `--optim.ROLE.graft.rule NAME` picks it."""
    extra: Extra = Extra()

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        if hasattr(self, "ns"):
            check_table(self.ns)
        self._check_graft()
        vectors = self.constraint == "sphere"
        raise_if(bool(self.extra.blocks) and vectors, "blocks would cut the vectors of constraint sphere")
        raise_if(not vectors and (self.extra.retraction != "normalise" or self.extra.tangent != "none"),
               f"retraction and tangent belong to constraint sphere, got constraint {self.constraint}")
        raise_if(self.extra.radial_brake > 0 and self.constraint in ("hyperball", "sphere"),
               f"radial_brake has no effect under constraint {self.constraint}, which fixes lengths; set it to 0, or the "
               "constraint to none or radial")
        self.check()

    def _check_graft(self) -> None:
        """Grafts that cannot be, and settings of a graft that would not act: it gives the length of a step and no more."""
        if not isinstance(self.graft, RuleConfig):
            return
        raise_if(not self.takes_graft, f"rule {self.rule} sets its own length: it cannot be grafted")
        raise_if(not self.graft.gives_graft, f"rule {self.graft.rule} gives no length to graft")
        raise_if(type(self.graft) is type(self), f"graft must be another rule than {self.rule}")
        idle = [f.name for f in fields(RuleConfig) if getattr(self.graft, f.name) != getattr(type(self.graft)(), f.name)]
        raise_if(bool(idle), f"graft.{', graft.'.join(idle)} has no effect: a graft gives the length of the step alone")

    def check(self) -> None:
        """Raise ValueError for combinations of the rule's own fields that cannot be."""


# ---- Shared parts of several rules ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Averaged(RuleConfig):
    """Rules that step along an average of the gradients."""

    momentum: float = 0.95
    """Coefficient of the gradient average; `--schedule.momentum`, where it is set, replaces it."""
    averaging: Literal["ema", "heavy_ball", "none"] = technique("ema", name="momentum", off="none")
    """m <- mu m + (1 - mu) g, m <- mu m + g, or m <- g."""
    nesterov: bool = technique(True, off=False, needs={"optim.matrix.averaging": "ema"})
    """Step along the average's next value as the present gradient foresees it (train.lookahead, which moves the weights, is
    another thing)."""
    averages: int = 1
    """Step along the mean of so many running averages, their ages 1 / (1 - mu) log-spaced; averaging ema alone."""
    momentum_fast: float = 0.5
    """Coefficient of the youngest of several averages; `momentum` is the oldest's."""

    def check(self) -> None:
        """Several averages are of one kind."""
        raise_if(self.averages > 1 and self.averaging != "ema",
               f"averages {self.averages} belong to averaging ema, got {self.averaging}")


@dataclass(frozen=True, kw_only=True)
class Orthogonalised(Averaged):
    """Rules whose average is orthogonalised by Newton-Schulz."""

    ns: str = "polar_express"
    """How matrices are orthogonalised: quintic, polar_express, convergent, dion or radii (tables of coefficients), an inline
    table 'a,b,c;a,b,c;...' (configs/notation.py), or svd: exactly."""
    ns_steps: int = 5
    """Newton-Schulz iterations; a table's last triple repeats."""
    equilibrate: bool = False
    """Rows of the averaged gradient scaled to one length before they are orthogonalised (nanochat's MuonEq)."""


# ---- The three of the record ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Muon(Orthogonalised):
    """Momentum, orthogonalised: steepest descent under the spectral norm (Jordan et al. 2024)."""

    rule: ClassVar[str] = "muon"
    unit: Literal["rms_operator", "spectral", "at_least_one", "match_adam"] = "rms_operator"
    """Spectral norm of a step of lr 1, for m x n matrices: (m/n)^.5, so that it is a step of the RMS -> RMS operator norm
    (Bernstein & Newhouse 2024, arXiv 2409.20325); 1; max(1, m/n)^.5 (Jordan); .2 max(m, n)^.5 (Moonlight, Liu et al. 2025,
    arXiv 2502.16982: the step's RMS is about Adam's)."""


@dataclass(frozen=True, kw_only=True)
class Adam(RuleConfig):
    """Adam; with decoupled decay AdamW (Kingma & Ba 2014, arXiv 1412.6980)."""

    rule: ClassVar[str] = "adam"
    beta1: float = 0.8
    """Average of the gradient."""
    beta2: float = 0.95
    """Average of its square."""
    eps: float = 1e-10
    """Added to the root mean square gradient."""


@dataclass(frozen=True, kw_only=True)
class NorMuon(Muon):
    """Muon with its neurons brought to one length by a second moment (Li et al. 2025, arXiv 2510.05491)."""

    rule: ClassVar[str] = "normuon"
    beta2: float = 0.95
    """Average of the squares of the orthogonalised rows."""
    eps: float = 1e-10
    """Added to their root."""
    normalise: Literal["rows", "longer"] = "rows"
    """Second moments of rows (the paper), or of the slices across the longer side (speedrun)."""


# ---- The zoo --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Steepest(Orthogonalised):
    """Momentum, then the dual of any norm: Muon's general form; Signum, normalised SGD, Scion's layers, Schatten norms."""

    rule: ClassVar[str] = "steepest"
    norm: NormName = "rms_operator"
    """The norm of steepest descent."""
    unit: Literal["plain", "at_least_one", "match_adam", "fan_in", "rms"] = "plain"
    """Length of a step of size 1: the norm's own; spectral x max(1, m/n)^.5 (Jordan); spectral x .2 max(m, n)^.5
    (Moonlight); row, column or sign / inputs (Scion, Pethick et al. 2025, arXiv 2502.07529); frobenius at RMS 1, schatten as
    long as rms_operator."""
    schatten_p: float = 4.0
    """norm schatten: 1 is nuclear, 2 normalised SGD, and towards infinity Muon; by SVD."""

    def check(self) -> None:
        """Units and options belong to norms."""
        super().check()
        having = UNIT_NORMS.get(self.unit, (self.norm,))
        raise_if(self.norm not in having, f"unit {self.unit} belongs to norm {' or '.join(having)}, got norm {self.norm}")
        raise_if(self.equilibrate and self.norm not in ("spectral", "rms_operator"),
               f"equilibrate belongs to norm spectral or rms_operator, got norm {self.norm}")


@dataclass(frozen=True, kw_only=True)
class Muon2(Muon):
    """Adam's second moment before Muon's orthogonalisation (arXiv 2604.09967)."""

    rule: ClassVar[str] = "muon2"
    beta2: float = 0.95
    """Average of the squared gradient."""
    eps: float = 1e-10
    """Added to its root."""


@dataclass(frozen=True, kw_only=True)
class Muown(Muon):
    """Muon on the directions of the rows, Adam on their lengths (arXiv 2605.10797)."""

    rule: ClassVar[str] = "muown"
    takes_graft: ClassVar[bool] = False
    gives_graft: ClassVar[bool] = False
    beta1: float = 0.8
    """Of the Adam on the lengths: average of the gradient."""
    beta2: float = 0.95
    """Of the Adam on the lengths: average of its square."""
    eps: float = 1e-10
    """Of the Adam on the lengths: added to the root."""


@dataclass(frozen=True, kw_only=True)
class Dion(RuleConfig):
    """Orthonormal momentum of low rank, with error feedback (Ahn et al. 2025, arXiv 2504.05295)."""

    rule: ClassVar[str] = "dion"
    momentum: float = 0.95
    """Share of what a step took that stays in the residual, unless scheduled."""
    rank_frac: float = 0.25
    """Rank of a step as a share of the matrix's shorter side."""


@dataclass(frozen=True, kw_only=True)
class Dion2(RuleConfig):
    """Muon on the largest rows of its momentum (Ahn et al. 2025, arXiv 2512.16928)."""

    rule: ClassVar[str] = "dion2"
    momentum: float = 0.95
    """Share of the rows that a step took that stays, unless scheduled."""
    rank_frac: float = 0.25
    """Rows of a step as a share of the matrix's shorter side."""
    ns: str = "polar_express"
    """How the rows are orthogonalised, as Muon's."""
    ns_steps: int = 5
    """Newton-Schulz iterations; a table's last triple repeats."""


@dataclass(frozen=True, kw_only=True)
class SM3(Averaged):
    """Adagrad whose state is a number per row and one per column (Anil et al. 2019, arXiv 1901.11150)."""

    rule: ClassVar[str] = "sm3"


@dataclass(frozen=True, kw_only=True)
class Prodigy(Adam):
    """Adam that estimates its own learning rate (Mishchenko & Defazio 2023, arXiv 2306.06101)."""

    rule: ClassVar[str] = "prodigy"
    takes_graft: ClassVar[bool] = False
    gives_graft: ClassVar[bool] = False
    distance_start: float = 1e-6
    """First estimate d0 of the distance to a solution; its steps start as small as lr d0."""


@dataclass(frozen=True, kw_only=True)
class AGD(RuleConfig):
    """Automatic gradient descent: lr 1 is the paper's (Bernstein et al. 2023, arXiv 2304.05187)."""

    rule: ClassVar[str] = "agd"
    takes_graft: ClassVar[bool] = False
    gives_graft: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class SWAN(RuleConfig):
    """The gradient standardised and whitened, without state (Ma et al. 2024, arXiv 2412.13148)."""

    rule: ClassVar[str] = "swan"
    whiten_steps: int = 10
    """Newton-Schulz iterations: of a 256 x 768 Gaussian's singular values 5 leave .66 to 1, 10 all at 1."""


@dataclass(frozen=True, kw_only=True)
class Shampoo(Averaged):
    """Powers of the gradients' Gram matrices on both sides (Gupta et al. 2018, arXiv 1802.09568)."""

    rule: ClassVar[str] = "shampoo"
    gram_beta: float = 0.95
    """Average of the gradients' Gram matrices; 1: their sum."""
    every_steps: int = 1
    """Roots are computed anew every so many updates."""
    eps: float = 1e-10
    """Lift of the eigenvalues, over the largest."""
    sides: Literal["both", "left", "right", "smaller"] = "both"
    """Which Gram matrices it takes: of rows (left), of columns (right)."""
    exponent: float | None = None
    """Power of each; None: -1/4 for two, -1/2 for one."""
    root: Literal["eigh", "newton"] = "eigh"
    """Roots by eigenvectors, or by the coupled Newton iteration (exponents -1/p)."""


@dataclass(frozen=True, kw_only=True)
class SOAP(Adam):
    """Adam in the eigenbases of Shampoo's Gram matrices (Vyas et al. 2024, arXiv 2409.11321)."""

    rule: ClassVar[str] = "soap"
    gram_beta: float = 0.95
    """Average of the gradients' Gram matrices."""
    every_steps: int = 1
    """Bases are turned every so many updates."""


@dataclass(frozen=True, kw_only=True)
class SOAPMuon(Muon):
    """SOAP's preconditioned momentum, orthogonalised (speedrun track 3, result 46)."""

    rule: ClassVar[str] = "soap_muon"
    beta2: float = 0.95
    """Average of the squared momentum in the bases."""
    eps: float = 1e-10
    """Added to its root."""
    gram_beta: float = 0.95
    """Average of the gradients' Gram matrices."""
    every_steps: int = 1
    """Bases are turned every so many updates."""


@dataclass(frozen=True, kw_only=True)
class PSGD(RuleConfig):
    """Descent in coordinates in which the gradient is white: Kronecker factors (Li 2024, arXiv 2402.11858)."""

    rule: ClassVar[str] = "psgd"
    gives_graft: ClassVar[bool] = False
    beta1: float = 0.8
    """Average of the gradient."""
    eps: float = 1e-10
    """Least root mean square of a gradient that is whitened."""
    factor_lr: float = 0.1
    """Step length of the factors that learn to whiten, at most 1; from about .25 on they overshoot where a gradient stays,
    and the larger, the less white what they make of a noisy one."""
    step_rms: float = 1.1
    """Largest RMS of a direction; white ones have 1."""


@dataclass(frozen=True, kw_only=True)
class Stiefel(Averaged):
    """Manifold Muon: spectral steepest descent where all singular values are 1 (Bernstein 2025, "Modular Manifolds")."""

    rule: ClassVar[str] = "stiefel"
    gives_graft: ClassVar[bool] = False
    dual_steps: int = 20
    """Iterations for the step's tangency: 5 leave 1e-4 where one side is four times the other, 20 leave 1e-3 where it is a
    quarter longer; square matrices need none."""

    def check(self) -> None:
        """The rule brings its constraint."""
        super().check()
        raise_if(self.constraint not in ("none", "stiefel"),
               f"rule stiefel brings the constraint stiefel, got constraint {self.constraint}")


RULES: dict[str, type[RuleConfig]] = {config.rule: config for config in (
    Muon, Adam, NorMuon, Steepest, Muon2, Muown, Dion, Dion2, SM3, Prodigy, AGD, SWAN, Shampoo, SOAP, SOAPMuon, PSGD,
    Stiefel)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Optim:
    """One rule per parameter role: the role chooses the norm (Bernstein & Newhouse 2024, arXiv 2409.20325)."""

    matrix: RuleConfig = field(default_factory=lambda: Muon(lr=0.03))
    """Hidden matrices of attention and MLP."""
    embed: RuleConfig = field(default_factory=lambda: Adam(lr=0.3))
    """Token and position embeddings."""
    head: RuleConfig = field(default_factory=lambda: Adam(lr=0.02))
    """The output matrix."""
    value_embed: RuleConfig = field(default_factory=lambda: Adam(lr=0.1))
    """Token embeddings mixed into the values."""
    bigram_embed: RuleConfig = field(default_factory=lambda: Adam(lr=0.1))
    """The hashed bigram table."""
    gate: RuleConfig = field(default_factory=lambda: Adam(lr=0.02))
    """Small matrices that open and close a technique."""
    gain: RuleConfig = field(default_factory=lambda: Adam(lr=0.02))
    """Gains of the norms."""
    bias: RuleConfig = field(default_factory=lambda: Adam(lr=0.02))
    """Biases."""
    scalar: RuleConfig = field(default_factory=lambda: Adam(lr=0.02))
    """Single learned numbers."""
    scale: RuleConfig = field(default_factory=lambda: Adam(lr=0.01))
    """Learned factors and eigen learning rates of the sphere geometry."""


def switch_rule(config: Graft, name: str) -> Graft:
    """The class `name` with the values that `config` has for fields of the same name and choices, lr included; the rest at
    the new class's defaults. Raises ValueError naming the nearest rule."""
    if name not in RULES:
        raise ValueError(f"unknown rule {name!r}{nearest(name, list(RULES))}")
    theirs = {f.name: f.type for f in fields(config)}
    shared = {f.name: getattr(config, f.name) for f in fields(RULES[name]) if theirs.get(f.name) == f.type}
    return RULES[name](**shared)


def summary(config: RuleConfig) -> str:
    """The settings of a rule in one line: its own fields, then those of all rules that are off their default."""
    common = {f.name for f in fields(RuleConfig)}
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in common}
    values |= {name: getattr(config, name) for name in ("constraint", "update_every", "rounding", "state_dtype")
               if getattr(config, name) != getattr(RuleConfig(), name)}
    values |= {f.name: value for f in fields(Extra) if (value := getattr(config.extra, f.name)) != f.default}
    values |= {} if config.graft == Graft() else {"graft": config.graft.rule}
    return " ".join(f"{name}={value}" for name, value in values.items())
