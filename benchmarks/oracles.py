"""Compare our rules with public implementations from PyPI: same weights, same gradients, 20 steps.

The packages are torch.optim, pytorch_optimizer and prodigyopt; optimizer_parity.md compares with code that is only in a
repository. Public code that orthogonalises in bfloat16 is made to do it in float32, as ours does on CPUs.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.muon_step import build_optimizer
from configs.optim import RuleConfig
from optim.schedule import Values

STEPS = 20
SHAPES = ((24, 40), (40, 24), (32, 32))
LR, MU = 0.02, 0.9
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Oracle:
    """A public optimizer, with the settings of our rule that make the two equal."""

    name: str
    make: Make
    """Builds the public optimizer for a list of parameters."""
    ours: dict[str, object] = field(default_factory=dict)
    """Fields of our rule's config; `momentum` is ignored by rules that have none."""
    package: str = "pytorch_optimizer"
    """The package to import; without it there is no comparison."""
    shapes: tuple[tuple[int, int], ...] = SHAPES
    """Shapes of the matrices to compare on."""


def relative_difference(config: RuleConfig, oracle: Oracle) -> float | None:
    """Return |ours - public| / |public - initial| of the weights after all steps, in Frobenius norms; the largest matrix's.

    None if the package is not installed.
    """
    if find_spec(oracle.package) is None:
        return None
    fields = {name: value for name, value in oracle.ours.items() if name != "momentum" or hasattr(config, "momentum")}
    with in_float32(oracle.package):
        our_weights, public_weights = _run_rule(replace(config, **fields), oracle.shapes), _run_oracle(oracle)
    triples = zip(our_weights, public_weights, _initial_weights(oracle.shapes), strict=True)
    return max(((ours - public).norm() / (public - initial).norm()).item() for ours, public, initial in triples)


@contextmanager
def in_float32(package: str) -> Iterator[None]:
    """Make public Newton-Schulz iterations compute in float32 inside the block, so that rounding hides no wrong formula."""
    with ExitStack() as patches:
        patches.enter_context(patch.object(Tensor, "bfloat16", Tensor.clone))
        if package == "pytorch_optimizer":
            from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5 as iterate
            # Its callers never name the dtype: it is the default of the last argument.
            assert iterate.__defaults__[-1] is torch.bfloat16
            patches.enter_context(patch.object(iterate, "__defaults__", (*iterate.__defaults__[:-1], torch.float32)))
        yield


def _initial_weights(shapes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """Return new tensors with every call, since both optimizers update in place."""
    return [_gaussian(shape, seed=900 + i) for i, shape in enumerate(shapes)]


def _gradient(shape: tuple[int, int], step: int, index: int) -> Tensor:
    """Return a Gaussian gradient. Its size cycles through 0.1, 1 and 10, so that a wrong eps or average shows."""
    return _gaussian(shape, seed=10 * step + index) * 10.0 ** (step % 3 - 1)


def _gaussian(shape: tuple[int, int], *, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _run_rule(config: RuleConfig, shapes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """Return the weights after all steps of our optimizer."""
    params = {f"w{i}": nn.Parameter(weight) for i, weight in enumerate(_initial_weights(shapes))}
    optimizer = build_optimizer(params, config)
    for step in range(STEPS):
        for i, param in enumerate(params.values()):
            param.grad.copy_(_gradient(param.shape, step, i))
        optimizer.step(Values(1, 1, None, 1, 1, None), step + 1)
    return [param.detach() for param in params.values()]


def _run_oracle(oracle: Oracle) -> list[Tensor]:
    """Return the weights after all steps of the public optimizer."""
    params = [nn.Parameter(weight) for weight in _initial_weights(oracle.shapes)]
    optimizer = oracle.make(params)
    for step in range(STEPS):
        for i, param in enumerate(params):
            param.grad = _gradient(param.shape, step, i)
        optimizer.step()
    return [param.detach() for param in params]


# ---- The optimizers ------------------------------------------------------------------------------


def public_oracle(name: str, *, ours: dict[str, object], shapes: tuple[tuple[int, int], ...] = SHAPES,
                  package: str = "pytorch_optimizer", **options: object) -> Oracle:
    """Return the oracle for a package's class `name` with these options; lr is LR unless the options set it.

    `ours` are fields of our rule that differ from lr = LR and momentum = MU.
    """
    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        module = torch.optim if package == "torch" else import_module(package)
        return getattr(module, name)(params, **{"lr": LR} | options)

    title = f"torch.optim.{name}" if package == "torch" else f"{package}.{name}"
    return Oracle(title, make, {"lr": LR, "momentum": MU} | ours, package, shapes)


def muon_oracle(adjust_lr_fn: str) -> Oracle:
    """Return PyTorch's Muon with weight decay. `adjust_lr_fn` sets the length of the step by the shape of the matrix."""
    return public_oracle("Muon", package="torch", momentum=MU, weight_decay=0.1, adjust_lr_fn=adjust_lr_fn,
                         ours={"weight_decay": 0.1, "ns": "quintic"})


def scion_oracle(norm_type: int, **options: object) -> Oracle:
    """Return constrained Scion with radius 3: our lr is 3 times its lr, our weight decay is 1/3; without Nesterov."""
    # SCION's momentum is the weight of the new gradient.
    return public_oracle("SCION", momentum=1 - MU, constraint=True, norm_type=norm_type, norm_kwargs=options, scale=3.0,
                         ours={"lr": 3 * LR, "weight_decay": 1 / 3, "nesterov": False, "ns": "quintic"})


def normuon_oracle() -> Oracle:
    """Return NorMuon, which needs parameter groups that set `use_muon`."""
    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        import pytorch_optimizer
        return pytorch_optimizer.NorMuon([dict(params=params, use_muon=True)], lr=LR, momentum=MU, beta2=0.9)

    return Oracle("pytorch_optimizer.NorMuon", make, {"lr": LR, "momentum": MU, "beta2": 0.9, "ns": "quintic"})


ORACLES: dict[str, Oracle] = {
    "AdamW": public_oracle("AdamW", package="torch", betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1,
                           ours={"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}),
    "Muon": muon_oracle("original"),
    "Muon, Moonlight's": muon_oracle("match_rms_adamw"),
    "Signum": public_oracle("SignSGD", momentum=MU, ours={"nesterov": False}),
    "Scion, hidden": scion_oracle(2),
    "Scion, embedding": scion_oracle(6, transpose=True),
    "Scion, first layer": scion_oracle(6),
    "Scion, head": scion_oracle(4, normalize=True),
    "NorMuon": normuon_oracle(),
    "SM3": public_oracle("SM3", ours={"averaging": "none"}),
    "Prodigy": public_oracle("Prodigy", package="prodigyopt", lr=1.0, betas=(0.9, 0.99), d0=1e-3,
                             ours={"lr": 1.0, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "distance_start": 1e-3}),
    "Shampoo": public_oracle("Shampoo", matrix_eps=1e-12, ours={"gram_beta": 1.0, "averaging": "none", "eps": 0.0}),
    # Square only: the Gram matrix of a first gradient of another shape is singular, and its eigenbasis not unique.
    "SOAP": public_oracle("SOAP", betas=(0.9, 0.95), weight_decay=0.0, precondition_frequency=1, eps=1e-8,
                          ours={"beta1": 0.9, "beta2": 0.95, "gram_beta": 0.95, "eps": 1e-8}, shapes=((32, 32),)),
}
