"""The optimizers' settings: one frozen dataclass per optimizer (a rule), which has the fields of that rule only.

A run has one rule for each role of parameters: Optim(matrix=Muon(lr=0.02), embed=Adam(lr=0.3), head=Adam(lr=0.01)). On the
command line `--optim.matrix.rule NAME` picks the class; fields that the old and the new class share keep their value. The
formulas of a rule stand in optim/muon.py, adam.py and normuon.py, and in optim/zoo/ for all others.

In the docstrings: W the weights, m the momentum buffer, mu its coefficient, g the gradient, m x n the shape of a matrix.
"""

from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import ClassVar, Literal

from configs.notation import check_ranges, check_table, nearest, parse_by_name, parse_kernel, raise_if, technique

NormName = Literal["spectral", "rms_operator", "schatten", "row", "column", "sign", "frobenius"]
# The units of rule steepest other than plain, each with the norms that have it.
UNIT_NORMS: dict[str, tuple[NormName, ...]] = {
    "at_least_one": ("spectral",), "match_adam": ("spectral",), "fan_in": ("row", "column", "sign"),
    "rms": ("frobenius", "schatten"),
}
# The interval of each numeric field, for `check_ranges`.
RANGES = {
    "[0, inf)": ("lr", "weight_decay", "eps", "clip", "row_floor", "kernel_from"),
    "[1, inf)": ("ns_steps", "averages", "whiten_steps", "every_steps", "update_every", "dual_steps", "schatten_p"),
    "[0, 1)": ("momentum", "momentum_fast", "beta1", "beta2"),
    "[0, 1]": ("gram_beta", "radial_brake", "average_blend"),
    "(0, 1]": ("rank_frac", "factor_lr"),
    "(0, inf)": ("distance_start", "step_rms"),
    "[-1, 0)": ("exponent",),
}


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Settings of every rule that few runs need."""

    lr_factors: tuple[str, ...] = technique((), off=())
    """Factors of lr, as NAME=FACTOR, for tensors with NAME in their name: mlp.down=4 (speedrun, 2025: down projections).
    NAME?=FACTOR: the model may have no such tensor."""
    blocks: tuple[str, ...] = technique((), off=())
    """Numbers of blocks of rows, as NAME=COUNT, into which matrices with NAME in their name are cut; each block is updated
    as a matrix of its own. attention.q=3: one block per pair of six heads (speedrun, 2026)."""
    clip: float = 0.0
    """Largest norm of each tensor's gradient; a larger gradient is projected onto that ball before anything else. 0: off."""
    clip_norm: NormName = "frobenius"
    """Norm that clip bounds. frobenius scales the gradient, sign clips its entries, row its rows, spectral its singular
    values."""
    radial_brake: float = 0.0
    """Share that is removed from the radial part of a step that increases a matrix's Frobenius norm (speedrun track 3,
    results 44 to 46: 0.5). 0: off."""
    row_floor: float = 0.0
    """Smallest length of each row of the direction, as a share of the length of the weights' row (speedrun track 3, result
    46: 0.3825). 0: off."""
    retraction: Literal["normalise", "geodesic"] = "normalise"
    """Step under constraint sphere. normalise: a straight step, then division by the length; geodesic: along the great
    circle."""
    tangent: Literal["none", "gradient", "momentum", "dual"] = "none"
    """Projection onto the tangent space under constraint sphere. gradient: of the gradient; momentum: also of its average;
    dual: also of the direction, which is steepest descent on the sphere."""
    update_every_from: tuple[str, ...] = ()
    """Later values of update_every, as STEP=VALUE: 336=4, every fourth step after the first 336 (ANVIL, speedrun, pull
    request 349, for tables). Each value must be a multiple of the one before, and STEP of both, so that no gradient waits at
    the change."""
    average_blend: float | None = None
    """Share of the average of train.weight_average in this role's validated weights (speedrun, pull requests 347 and 349:
    0.65 for embedding and head, 0.5 for matrices). None: train.weight_average_blend. 0: the role has no average."""
    sparse_rows: bool = False
    """Exchange only the rows of the gradient that a batch has used, for large lookup tables. A row costs 8 bytes on top of
    its entries, so that a full exchange is cheaper where most rows are used."""

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        parse_by_name(self.lr_factors)
        for name, count in parse_by_name(self.blocks).items():
            raise_if(count != int(count), f"extra.blocks are whole numbers, got {name}={count:g}")
        for step, every in parse_by_name(self.update_every_from).items():
            raise_if(not step.isdigit() or every != int(every),
                     f"extra.update_every_from are whole numbers STEP=VALUE, got '{step}={every:g}'")
        raise_if(self.clip_norm != "frobenius" and not self.clip, f"clip_norm {self.clip_norm} has no effect without clip")


@dataclass(frozen=True, kw_only=True)
class Graft:
    """Source of a step's length. Graft() itself: the rule's own direction; a RuleConfig: that other rule's direction."""

    rule: ClassVar[str] = "none"


@dataclass(frozen=True, kw_only=True)
class RuleConfig(Graft):
    """Settings of every rule. The classes below add the fields of one rule each."""

    rule: ClassVar[str]
    """Name of the rule in `--optim.ROLE.rule NAME` and in config.json."""
    takes_graft: ClassVar[bool] = True
    """True if another rule may set the length of its steps; False for rules that compute the length themselves."""
    gives_graft: ClassVar[bool] = True
    """True if it may set the length of another rule's steps."""

    lr: float = 0.01
    """Learning rate: the length of a step in the unit of the rule's norm, before schedule.lr."""
    weight_decay: float = technique(0.0, off=0.0)
    """Weight decay coefficient wd, before schedule.weight_decay. 0: none."""
    decay: Literal["decoupled", "independent", "corrected", "cautious", "none"] = technique(
        "decoupled", name="cautious_decay", off="decoupled", only=("cautious",))
    """Form of the weight decay. decoupled: W -= lr wd W; independent: W -= wd (lr / peak lr) W; corrected:
    W -= wd lr (lr / peak lr) W (Defazio 2025, arXiv 2506.02285); cautious: decoupled, only where update and weight agree in
    sign (Chen et al. 2025, arXiv 2510.12402); an update of 0 agrees, but not for Adam (as in the speedrun)."""
    constraint: Literal["none", "hyperball", "sphere", "radial", "stiefel"] = "none"
    """Constraint on the weights. hyperball: each matrix keeps its initial Frobenius norm (Wen et al. 2025, MuonH and AdamH);
    sphere: vectors along the model dimension have length 1 (nGPT, Loshchilov et al. 2024, arXiv 2410.01131); radial: only
    the radial part of a step changes a matrix's norm (speedrun track 3, result 44); stiefel: all singular values are 1 (rule
    stiefel sets it)."""
    update_every: int = 1
    """Number of steps between updates, each by the mean gradient of those steps; the last steps of a run may remain unused
    (speedrun: 2 for Adam)."""
    rounding: Literal["nearest", "stochastic", "remainder"] = "nearest"
    """Rounding of weights stored in bfloat16. nearest; stochastic: unbiased; remainder: the 16 bits that rounding drops are
    stored in a second tensor, so that weights are exact."""
    state_dtype: Literal["same", "float32"] = "same"
    """Storage dtype of the optimizer state of bfloat16 weights. same: bfloat16."""
    graft: Graft = Graft()
    """Another rule that sets the length of each tensor's step: the Frobenius norm of its direction (grafting, Agarwal et al.
    2020, arXiv 2002.11803). `--optim.ROLE.graft.rule NAME` picks it; none: off."""
    extra: Extra = Extra()
    """Settings that few runs need."""

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        if hasattr(self, "ns"):
            check_table(self.ns)
        self._check_periods()
        self._check_graft()
        on_sphere = self.constraint == "sphere"
        raise_if(bool(self.extra.blocks) and on_sphere, "extra.blocks would cut the vectors of constraint sphere")
        raise_if(not on_sphere and (self.extra.retraction != "normalise" or self.extra.tangent != "none"),
                 f"extra.retraction and extra.tangent belong to constraint sphere, got constraint {self.constraint}")
        raise_if(self.extra.radial_brake > 0 and self.constraint in ("hyperball", "sphere"),
                 f"extra.radial_brake has no effect under constraint {self.constraint}, which fixes lengths; set it to 0, "
                 "or the constraint to none or radial")
        self.check()

    def _check_periods(self) -> None:
        """Raise ValueError for periods that would change while gradients wait."""
        for (_, before), (start, every) in pairwise(self._periods):
            raise_if(every % before != 0 or start % every != 0,
                     f"extra.update_every_from {start}={every}: {every} must be a multiple of the value before, {before}, "
                     f"and step {start} one of {every}")

    @property
    def _periods(self) -> list[tuple[int, int]]:
        """Steps after which a value of update_every begins to act, with that value."""
        later = parse_by_name(self.extra.update_every_from)
        return [(0, self.update_every), *sorted((int(start), int(every)) for start, every in later.items())]

    @property
    def longest_period(self) -> int:
        """Largest number of steps between updates."""
        return self._periods[-1][1]

    def period(self, count: int) -> int:
        """Return the number of steps between updates at step `count` = 1, 2, ...: it updates if that divides `count`."""
        return next(every for start, every in reversed(self._periods) if start < max(count, 1))

    def updates(self, count: int) -> int:
        """Return the number of updates in the first `count` steps."""
        ends = [*(start for start, _ in self._periods[1:]), count]
        return sum(max(0, min(end, count) - start) // every
                   for (start, every), end in zip(self._periods, ends, strict=True))

    def _check_graft(self) -> None:
        """Raise ValueError for rules that cannot be grafted, and for settings of a graft that have no effect."""
        if not isinstance(self.graft, RuleConfig):
            return
        raise_if(not self.takes_graft, f"rule {self.rule} sets its own length: it cannot be grafted")
        raise_if(not self.graft.gives_graft, f"rule {self.graft.rule} gives no length to graft")
        raise_if(type(self.graft) is type(self), f"graft must be another rule than {self.rule}")
        # lr, decay, constraint and the like act on the whole step: they are read from the rule, never from its graft.
        idle = [f.name for f in fields(RuleConfig) if getattr(self.graft, f.name) != getattr(type(self.graft)(), f.name)]
        raise_if(bool(idle), f"graft.{', graft.'.join(idle)} has no effect: a graft sets only the length of the step")

    def check(self) -> None:
        """Raise ValueError for fields of the rule that exclude each other; subclasses override it."""


# ---- Shared parts of several rules ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Averaged(RuleConfig):
    """Fields of rules that step along an average of the gradients."""

    momentum: float = 0.95
    """Momentum: coefficient mu of the average of the gradients. `schedule.momentum`, if set, replaces it."""
    averaging: Literal["ema", "heavy_ball", "none"] = technique("ema", name="momentum", off="none")
    """Form of the average. ema: m <- mu m + (1 - mu) g; heavy_ball: m <- mu m + g; none: the gradient itself."""
    nesterov: bool = technique(True, off=False, needs={"optim.matrix.averaging": "ema"})
    """Use Nesterov momentum: step along mu m + (1 - mu) g in place of m, or mu m + g for heavy_ball. Look-ahead of the
    weights is train.lookahead."""
    averages: int = 1
    """Number of running averages, whose mean is the step's; their ages 1 / (1 - mu) are spaced evenly in the logarithm.
    Needs averaging ema."""
    momentum_fast: float = 0.5
    """Momentum of the fastest of several averages; `momentum` is that of the slowest."""
    kernel: tuple[str, ...] = technique((), name="momentum_kernel", off=(), on=("0.5=0.4", "0.9=0.6"),
                                        needs={"optim.matrix.averaging": "ema"})
    """Fixed averages in place of those, as MOMENTUM=WEIGHT: 0.85=0.4385 0.98=0.5615 (bi-Maxwell, speedrun track 3, pull
    request 339; ANVIL, 349). The step is their weighted mean, with Nesterov's look-ahead still by `momentum`. Empty: off."""
    kernel_from: int = 0
    """Number of updates with the average of `momentum` alone, before several averages or the kernel act; each of them starts
    from it, so that nothing jumps (track 3: 1000 of 2635; ANVIL: 514)."""

    def check(self) -> None:
        """Raise ValueError for several averages other than ema, and for a kernel that is none."""
        raise_if(self.averages > 1 and self.averaging != "ema",
                 f"averages {self.averages} belong to averaging ema, got {self.averaging}")
        raise_if(bool(self.kernel) and (self.averages > 1 or self.averaging == "heavy_ball"),
                 f"kernel replaces averages, of averaging ema; got averages {self.averages}, averaging {self.averaging}")
        for mu in parse_kernel(self.kernel):
            raise_if(mu >= 1, f"momentum in kernel must lie in (0, 1), got {mu:g}")


@dataclass(frozen=True, kw_only=True)
class Orthogonalised(Averaged):
    """Fields of rules that orthogonalise the average by Newton-Schulz iterations."""

    ns: str = "polar_express"
    """Table of the Newton-Schulz coefficients: quintic, polar_express, convergent, dion, radii, anvil (six steps), or an
    inline table 'a,b,c;a,b,c;...' (configs/notation.py). svd: orthogonalise exactly."""
    ns_steps: int = 5
    """Number of Newton-Schulz iterations; the last coefficients of the table repeat."""
    equilibrate: bool = False
    """Scale the rows of the average to one length before they are orthogonalised (nanochat's MuonEq)."""


# ---- The three of the record ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Muon(Orthogonalised):
    """Muon: orthogonalised momentum, steepest descent under the spectral norm (Jordan et al. 2024)."""

    rule: ClassVar[str] = "muon"
    unit: Literal["rms_operator", "spectral", "at_least_one", "match_adam"] = "rms_operator"
    """Spectral norm of a step of lr 1, for an m x n matrix. rms_operator: (m/n)^.5, length 1 in the RMS -> RMS operator norm
    (Bernstein & Newhouse 2024, arXiv 2409.20325); spectral: 1; at_least_one: max(1, m/n)^.5 (Jordan); match_adam:
    0.2 max(m, n)^.5, so that the RMS is about Adam's (Moonlight, Liu et al. 2025, arXiv 2502.16982)."""


@dataclass(frozen=True, kw_only=True)
class Adam(RuleConfig):
    """Adam: first over root of second moment (Kingma & Ba 2014, arXiv 1412.6980); with decoupled decay AdamW."""

    rule: ClassVar[str] = "adam"
    beta1: float = 0.8
    """Coefficient of the first moment, the average of the gradient."""
    beta2: float = 0.95
    """Coefficient of the second moment, the average of the squared gradient."""
    eps: float = 1e-10
    """Number added to the root of the second moment."""


@dataclass(frozen=True, kw_only=True)
class NorMuon(Muon):
    """NorMuon: Muon whose rows are scaled to equal length by a second moment (Li et al. 2025, arXiv 2510.05491)."""

    rule: ClassVar[str] = "normuon"
    beta2: float = 0.95
    """Coefficient of the second moment, the average of the mean square of each orthogonalised row."""
    eps: float = 1e-10
    """Number added to the root of the second moment."""
    normalise: Literal["rows", "longer"] = "rows"
    """Slices that have a second moment each. rows: the rows (the paper); longer: the rows of tall matrices and the columns
    of wide ones (speedrun)."""


# ---- The zoo --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Steepest(Orthogonalised):
    """Steepest descent under any norm: momentum, then its dual. Contains Muon, Signum, normalised SGD and Scion's layers."""

    rule: ClassVar[str] = "steepest"
    norm: NormName = "rms_operator"
    """Norm under which a step of given length decreases the loss most. sign is Signum, frobenius normalised SGD."""
    unit: Literal["plain", "at_least_one", "match_adam", "fan_in", "rms"] = "plain"
    """Length of a step of lr 1. plain: 1 in the norm; at_least_one: spectral times max(1, m/n)^.5 (Jordan); match_adam:
    spectral times 0.2 max(m, n)^.5 (Moonlight); fan_in: row, column or sign divided by the inputs (Scion, Pethick et al.
    2025, arXiv 2502.07529); rms: RMS 1 for frobenius, the length of rms_operator for schatten."""
    schatten_p: float = 4.0
    """Order p of norm schatten, computed by SVD. 1: nuclear norm; 2: normalised SGD; towards infinity: Muon."""

    def check(self) -> None:
        """Raise ValueError for a unit or equilibrate with a norm that does not have it."""
        super().check()
        norms = UNIT_NORMS.get(self.unit, (self.norm,))  # plain belongs to every norm
        raise_if(self.norm not in norms, f"unit {self.unit} belongs to norm {' or '.join(norms)}, got norm {self.norm}")
        raise_if(self.equilibrate and self.norm not in ("spectral", "rms_operator"),
                 f"equilibrate belongs to norm spectral or rms_operator, got norm {self.norm}")


@dataclass(frozen=True, kw_only=True)
class Muon2(Muon):
    """Muon^2: momentum divided by the root of Adam's second moment, then orthogonalised (arXiv 2604.09967)."""

    rule: ClassVar[str] = "muon2"
    beta2: float = 0.95
    """Coefficient of the second moment, the average of the squared gradient."""
    eps: float = 1e-10
    """Number added to the root of the second moment."""


@dataclass(frozen=True, kw_only=True)
class Muown(Muon):
    """Muown: Muon on the directions of the rows, Adam on their lengths (arXiv 2605.10797)."""

    rule: ClassVar[str] = "muown"
    takes_graft: ClassVar[bool] = False
    gives_graft: ClassVar[bool] = False
    beta1: float = 0.8
    """Coefficient of the first moment of the Adam that trains the lengths."""
    beta2: float = 0.95
    """Coefficient of the second moment of that Adam."""
    eps: float = 1e-10
    """Number added to the root of the second moment of that Adam."""


@dataclass(frozen=True, kw_only=True)
class Dion(RuleConfig):
    """Dion: orthonormalised low-rank part of the momentum, with error feedback (Ahn et al. 2025, arXiv 2504.05295)."""

    rule: ClassVar[str] = "dion"
    momentum: float = 0.95
    """Momentum: share of the low-rank part that remains in the buffer after its step. `schedule.momentum` replaces it."""
    rank_frac: float = 0.25
    """Rank of a step, as a share of the matrix's shorter side."""


@dataclass(frozen=True, kw_only=True)
class Dion2(RuleConfig):
    """Dion2: Muon on the largest rows of the momentum; the other rows wait (Ahn et al. 2025, arXiv 2512.16928)."""

    rule: ClassVar[str] = "dion2"
    momentum: float = 0.95
    """Momentum: share of the chosen rows that remains in the buffer after their step. `schedule.momentum` replaces it."""
    rank_frac: float = 0.25
    """Number of rows of a step, as a share of the matrix's shorter side."""
    ns: str = "polar_express"
    """Table of the Newton-Schulz coefficients, as for Muon. svd: orthogonalise exactly."""
    ns_steps: int = 5
    """Number of Newton-Schulz iterations; the last coefficients of the table repeat."""


@dataclass(frozen=True, kw_only=True)
class SM3(Averaged):
    """SM3: Adagrad with one number of state per row and one per column (Anil et al. 2019, arXiv 1901.11150)."""

    rule: ClassVar[str] = "sm3"


@dataclass(frozen=True, kw_only=True)
class Prodigy(Adam):
    """Prodigy: Adam that estimates its own learning rate; lr multiplies it (Mishchenko & Defazio 2023, arXiv 2306.06101)."""

    rule: ClassVar[str] = "prodigy"
    takes_graft: ClassVar[bool] = False
    gives_graft: ClassVar[bool] = False
    distance_start: float = 1e-6
    """Initial estimate d0 of the distance to a solution; the first steps are as small as lr d0."""


@dataclass(frozen=True, kw_only=True)
class AGD(RuleConfig):
    """AGD, automatic gradient descent: the gradients set the step length; lr 1 (Bernstein et al. 2023, arXiv 2304.05187)."""

    rule: ClassVar[str] = "agd"
    takes_graft: ClassVar[bool] = False
    gives_graft: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class SWAN(RuleConfig):
    """SWAN: gradient with standardised rows, then whitened; no state (Ma et al. 2024, arXiv 2412.13148)."""

    rule: ClassVar[str] = "swan"
    whiten_steps: int = 10
    """Number of Newton-Schulz iterations. For a Gaussian 256 x 768 matrix, 5 bring the singular values to 0.66 to 1, 10 to
    1."""


@dataclass(frozen=True, kw_only=True)
class Shampoo(Averaged):
    """Shampoo: gradient times inverse roots of its averaged Gram matrices (Gupta et al. 2018, arXiv 1802.09568)."""

    rule: ClassVar[str] = "shampoo"
    gram_beta: float = 0.95
    """Coefficient of the averages of the gradients' Gram matrices. 1: their sum."""
    every_steps: int = 1
    """Number of updates between computations of the roots."""
    eps: float = 1e-10
    """Number added to the eigenvalues, as a share of the largest."""
    sides: Literal["both", "left", "right", "smaller"] = "both"
    """Sides with a Gram matrix: of the rows (left), of the columns (right), or of the shorter dimension (smaller)."""
    exponent: float | None = None
    """Power of each Gram matrix. None: -1/4 with two sides, -1/2 with one."""
    root: Literal["eigh", "newton"] = "eigh"
    """Method for the roots. eigh: eigenvectors; newton: the coupled Newton iteration, for exponents -1/p."""


@dataclass(frozen=True, kw_only=True)
class SOAP(Adam):
    """SOAP: Adam in the eigenbases of Shampoo's Gram matrices (Vyas et al. 2024, arXiv 2409.11321)."""

    rule: ClassVar[str] = "soap"
    gram_beta: float = 0.95
    """Coefficient of the averages of the gradients' Gram matrices."""
    every_steps: int = 1
    """Number of updates between updates of the eigenbases."""


@dataclass(frozen=True, kw_only=True)
class SOAPMuon(Muon):
    """SOAP-Muon: momentum preconditioned as in SOAP, then orthogonalised (speedrun track 3, result 46)."""

    rule: ClassVar[str] = "soap_muon"
    beta2: float = 0.95
    """Coefficient of the second moment, the average of the squared momentum in the eigenbases."""
    eps: float = 1e-10
    """Number added to the root of the second moment."""
    gram_beta: float = 0.95
    """Coefficient of the averages of the gradients' Gram matrices."""
    every_steps: int = 1
    """Number of updates between updates of the eigenbases."""


@dataclass(frozen=True, kw_only=True)
class PSGD(RuleConfig):
    """PSGD: descent in coordinates in which the gradient is white, by learned Kronecker factors (Li 2024, arXiv
    2402.11858)."""

    rule: ClassVar[str] = "psgd"
    gives_graft: ClassVar[bool] = False
    beta1: float = 0.8
    """Coefficient of the average of the gradient."""
    eps: float = 1e-10
    """Smallest root mean square of a gradient that is whitened."""
    factor_lr: float = 0.1
    """Learning rate of the factors, at most 1. From about 0.25 on they overshoot on a constant gradient; the larger it is,
    the less white is the result on a noisy one."""
    step_rms: float = 1.1
    """Largest RMS of a direction, whose RMS is 1 if it is white."""


@dataclass(frozen=True, kw_only=True)
class Stiefel(Averaged):
    """Manifold Muon: spectral steepest descent with all singular values at 1 (Bernstein 2025, "Modular Manifolds")."""

    rule: ClassVar[str] = "stiefel"
    gives_graft: ClassVar[bool] = False
    dual_steps: int = 20
    """Number of iterations that make the step tangent. 5 leave an error of 1e-4 if one side is four times the other, 20
    leave 1e-3 if it is a quarter longer; square matrices need none."""

    def check(self) -> None:
        """Raise ValueError for a constraint other than the rule's own."""
        super().check()
        raise_if(self.constraint not in ("none", "stiefel"),
                 f"rule stiefel sets constraint stiefel itself, got constraint {self.constraint}")


RULES: dict[str, type[RuleConfig]] = {config.rule: config for config in (
    Muon, Adam, NorMuon, Steepest, Muon2, Muown, Dion, Dion2, SM3, Prodigy, AGD, SWAN, Shampoo, SOAP, SOAPMuon, PSGD,
    Stiefel)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Optim:
    """Optimizers of a run, one rule for each role of parameters (Bernstein & Newhouse 2024, arXiv 2409.20325)."""

    matrix: RuleConfig = field(default_factory=lambda: Muon(lr=0.03))
    """Optimizer of the hidden matrices of attention and MLP."""
    embed: RuleConfig = field(default_factory=lambda: Adam(lr=0.3))
    """Optimizer of the token and position embeddings."""
    head: RuleConfig = field(default_factory=lambda: Adam(lr=0.02))
    """Optimizer of the head, the output matrix."""
    value_embed: RuleConfig = field(default_factory=lambda: Adam(lr=0.1))
    """Optimizer of the value embeddings."""
    bigram_embed: RuleConfig = field(default_factory=lambda: Adam(lr=0.1))
    """Optimizer of the hashed n-gram tables."""
    gate: RuleConfig = field(default_factory=lambda: Adam(lr=0.02))
    """Optimizer of the small matrices that compute gates."""
    gain: RuleConfig = field(default_factory=lambda: Adam(lr=0.02))
    """Optimizer of the norms' gains."""
    bias: RuleConfig = field(default_factory=lambda: Adam(lr=0.02))
    """Optimizer of the biases."""
    scalar: RuleConfig = field(default_factory=lambda: Adam(lr=0.02))
    """Optimizer of single learned numbers, such as the weight of a skip connection."""
    scale: RuleConfig = field(default_factory=lambda: Adam(lr=0.01))
    """Optimizer of the learned factors and eigen learning rates of geometry sphere."""


def switch_rule(config: Graft, name: str) -> Graft:
    """Return the config of rule `name` with the values that `config` has for fields of the same name and type, lr included.

    All other fields take the new class's defaults. Raises ValueError, with the nearest rule, for an unknown name.
    """
    if name not in RULES:
        raise ValueError(f"unknown rule {name!r}{nearest(name, list(RULES))}")
    # Fields of the same name may have other choices: `unit` in Muon and in Steepest.
    old_types = {f.name: f.type for f in fields(config)}
    shared = {f.name: getattr(config, f.name) for f in fields(RULES[name]) if old_types.get(f.name) == f.type}
    return RULES[name](**shared)


def summary(config: RuleConfig) -> str:
    """Return a rule's settings as one line: its own fields, then the common ones that differ from their default."""
    common = {f.name for f in fields(RuleConfig)}
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in common}
    values |= {name: getattr(config, name) for name in ("constraint", "update_every", "rounding", "state_dtype")
               if getattr(config, name) != getattr(RuleConfig(), name)}
    values |= {f.name: value for f in fields(Extra) if (value := getattr(config.extra, f.name)) != f.default}
    values |= {} if config.graft == Graft() else {"graft": config.graft.rule}
    return " ".join(f"{name}={value}" for name, value in values.items())
