"""Public implementations from PyPI beside our rules: the same gradients for 20 steps, and how far apart they end.

torch.optim, pytorch_optimizer and prodigyopt; for what only a repository implements see optimizer_parity.md. Those that
orthogonalise in bfloat16 do so here in float32, as ours do on CPUs.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.muon_step import optimizer_of
from configs.optim import RuleConfig
from optim.schedule import Values

STEPS = 20
SHAPES = ((24, 40), (40, 24), (32, 32))
LR, MU = 0.02, 0.9
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Oracle:
    """A public optimizer, and the fields of our rule that make it the same."""

    name: str
    make: Make
    ours: dict[str, object] = field(default_factory=dict)
    package: str = "pytorch_optimizer"
    shapes: tuple[tuple[int, int], ...] = SHAPES


def parity(config: RuleConfig, oracle: Oracle) -> float | None:
    """Largest distance between both sides' weights over the matrices, as a share of the distance that the oracle moved
    them; None if its package is not installed."""
    if find_spec(oracle.package) is None:
        return None
    fields = {name: value for name, value in oracle.ours.items() if name != "momentum" or hasattr(config, "momentum")}
    with in_float32(oracle.package):
        ours, theirs = _ours(replace(config, **fields), oracle.shapes), _theirs(oracle)
    return max(((mine - other).norm() / (other - start).norm()).item()
               for mine, other, start in zip(ours, theirs, _starts(oracle.shapes), strict=True))


@contextmanager
def in_float32(package: str) -> Iterator[None]:
    """Within, the public Newton-Schulz iterations keep their input's float32."""
    with ExitStack() as patches:
        patches.enter_context(patch.object(Tensor, "bfloat16", Tensor.clone))
        if package == "pytorch_optimizer":
            from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5 as iterate
            assert iterate.__defaults__[-1] is torch.bfloat16
            patches.enter_context(patch.object(iterate, "__defaults__", (*iterate.__defaults__[:-1], torch.float32)))
        yield


def _starts(shapes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    return [_gaussian(shape, seed=900 + i) for i, shape in enumerate(shapes)]


def _gradient(shape: tuple[int, int], step: int, index: int) -> Tensor:
    """Of several magnitudes."""
    return _gaussian(shape, seed=10 * step + index) * 10.0 ** (step % 3 - 1)


def _gaussian(shape: tuple[int, int], *, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _ours(config: RuleConfig, shapes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    params = {f"w{i}": nn.Parameter(start) for i, start in enumerate(_starts(shapes))}
    optimizer = optimizer_of(params, config)
    for step in range(STEPS):
        for i, param in enumerate(params.values()):
            param.grad.copy_(_gradient(param.shape, step, i))
        optimizer.step(Values(1, 1, None, 1, 1, None), step + 1)
    return [param.detach() for param in params.values()]


def _theirs(oracle: Oracle) -> list[Tensor]:
    params = [nn.Parameter(start) for start in _starts(oracle.shapes)]
    optimizer = oracle.make(params)
    for step in range(STEPS):
        for i, param in enumerate(params):
            param.grad = _gradient(param.shape, step, i)
        optimizer.step()
    return [param.detach() for param in params]


# ---- The optimizers ------------------------------------------------------------------------------


def public(name: str, *, ours: dict[str, object], shapes: tuple[tuple[int, int], ...] = SHAPES,
           package: str = "pytorch_optimizer", **options: object) -> Oracle:
    """An optimizer of a package by its name; its lr is LR unless the options say otherwise."""
    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        module = torch.optim if package == "torch" else import_module(package)
        return getattr(module, name)(params, **{"lr": LR} | options)

    title = f"torch.optim.{name}" if package == "torch" else f"{package}.{name}"
    return Oracle(title, make, {"lr": LR, "momentum": MU} | ours, package, shapes)


def muon(adjust: str) -> Oracle:
    """PyTorch's, with weight decay."""
    return public("Muon", package="torch", momentum=MU, weight_decay=0.1, adjust_lr_fn=adjust,
                  ours={"weight_decay": 0.1, "ns": "quintic"})


def scion(kind: int, **options: object) -> Oracle:
    """Constrained, radius 3: our lr is 3 eta, our weight decay 1/3; no look-ahead."""
    return public("SCION", momentum=1 - MU, constraint=True, norm_type=kind, norm_kwargs=options, scale=3.0,
                  ours={"lr": 3 * LR, "weight_decay": 1 / 3, "nesterov": False, "ns": "quintic"})


def normuon() -> Oracle:
    """Its groups say that they are Muon's."""
    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        import pytorch_optimizer
        return pytorch_optimizer.NorMuon([dict(params=params, use_muon=True)], lr=LR, momentum=MU, beta2=0.9)

    return Oracle("pytorch_optimizer.NorMuon", make, {"lr": LR, "momentum": MU, "beta2": 0.9, "ns": "quintic"})


ORACLES: dict[str, Oracle] = {
    "AdamW": public("AdamW", package="torch", betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1,
                    ours={"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}),
    "Muon": muon("original"),
    "Muon, Moonlight's": muon("match_rms_adamw"),
    "Signum": public("SignSGD", momentum=MU, ours={"nesterov": False}),
    "Scion, hidden": scion(2),
    "Scion, embedding": scion(6, transpose=True),
    "Scion, first layer": scion(6),
    "Scion, head": scion(4, normalize=True),
    "NorMuon": normuon(),
    "SM3": public("SM3", ours={"averaging": "none"}),
    "Prodigy": public("Prodigy", package="prodigyopt", lr=1.0, betas=(0.9, 0.99), d0=1e-3,
                      ours={"lr": 1.0, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "distance_start": 1e-3}),
    "Shampoo": public("Shampoo", matrix_eps=1e-12, ours={"gram_beta": 1.0, "averaging": "none", "eps": 0.0}),
    "SOAP": public("SOAP", betas=(0.9, 0.95), weight_decay=0.0, precondition_frequency=1, eps=1e-8, shapes=((32, 32),),
                   ours={"beta1": 0.9, "beta2": 0.95, "gram_beta": 0.95, "eps": 1e-8}),
}
