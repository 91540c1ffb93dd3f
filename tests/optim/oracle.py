"""Helpers of the optimizers' tests: gradients, a training loop, ranks, and slow exact duals in float64."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.optim import Optim, RuleConfig
from optim.comm import Comm
from optim.groups import build_groups, build_rule
from optim.rule import Hyper, Step
from optim.schedule import Values
from optim.sharded import ShardedOptimizer

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(2, 12, 20), (2, 20, 12), (2, 16, 16)]
FULL = Values(1, 1, None, 1, 1, None)


def gaussian(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def gradients(*shape: int, steps: int) -> list[Tensor]:
    """Return Gaussian gradients of three magnitudes."""
    return [gaussian(*shape, seed=i, scale=10.0 ** (i % 3 - 1)) for i in range(steps)]


def hyper(lr: float, *, wd: float = 0.0, momentum: float = 0.95, count: int = 1, shared: dict | None = None) -> Hyper:
    return Hyper(*(torch.tensor(float(x)) for x in (lr, wd, momentum, count)), shared or {})


def parameters(shapes: dict[str, tuple[int, ...]], *, scale: float = 1.0, seed: int = 0) -> dict[str, nn.Parameter]:
    """Return Gaussian parameters by name; the first has seed `seed`, the next seed + 1, ..."""
    return {name: nn.Parameter(gaussian(*shape, seed=seed + i, scale=scale))
            for i, (name, shape) in enumerate(shapes.items())}


def one_role(config: RuleConfig, params: dict[str, nn.Parameter], **options: object) -> ShardedOptimizer:
    """Return the optimizer of parameters that all have the role `matrix`."""
    groups = build_groups(params, dict.fromkeys(params, "matrix"), Optim(matrix=config))
    return ShardedOptimizer(groups, Comm(), **options)


def train(config: RuleConfig, start: Tensor, grads: list[Tensor], *, lr=None, momentum=None) -> Tensor:
    """Return the weights after a step by each gradient. `lr` and `momentum` are functions of the step; None: the config's.
    Check that gradients are not written to and that state tensors are updated in place."""
    rule, step, W = build_rule(config), Step.build(config), start.clone()
    state = step.init_state(W) | rule.init_state(W)
    state_tensors = dict(state)
    for t, grad in enumerate(grads):
        before = grad.clone()
        numbers = hyper(lr(t) if lr else config.lr, wd=config.weight_decay, count=t + 1,
                    momentum=momentum(t) if momentum else getattr(config, "momentum", 0.0))
        rule.update(W, grad, state, numbers, step=step)
        assert torch.equal(grad, before)
    assert state.keys() == state_tensors.keys() and all(state[key] is state_tensors[key] for key in state)
    return W


def directions(config: RuleConfig, grads: list[Tensor], *, mu: float | None = None,
               start: Tensor | None = None) -> list[Tensor]:
    """Return the rule's direction for each gradient, at fixed weights."""
    rule = build_rule(config)
    W = gaussian(*grads[0].shape, seed=77) if start is None else start
    state, W_before = rule.init_state(W), W.clone()
    mu = getattr(config, "momentum", 0.0) if mu is None else mu
    outputs = [rule.direction(W, grad, state, hyper(config.lr, momentum=mu, count=t + 1)).clone()
             for t, grad in enumerate(grads)]
    assert torch.equal(W, W_before)
    return outputs


def assert_moved_alike(actual: Tensor, expected: Tensor, start: Tensor, *, tolerance: float) -> None:
    """Check that weights are equal up to `tolerance` times the distance that they moved from `start`."""
    moved = (expected.double() - start.double()).norm()
    assert moved > 0
    assert (actual.double() - expected.double()).norm() / moved <= tolerance


def polar(G: Tensor) -> Tensor:
    """Return U V^T over the nonzero singular values of each matrix, in float64."""
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    return (U * (S > 1e-10 * S.amax(-1, keepdim=True)).unsqueeze(-2)) @ Vh


def nesterov_means(grads: list[Tensor], mu: float) -> list[Tensor]:
    """Return the Nesterov averages mu m + (1 - mu) g after each gradient, in float64."""
    momentum, means = torch.zeros_like(grads[0], dtype=torch.float64), []
    for grad in grads:
        momentum = mu * momentum + (1 - mu) * grad.double()
        means.append(mu * momentum + (1 - mu) * grad.double())
    return means


def run_ranks(script: str, world_size: int, folder: Path) -> list[dict]:
    """Run `script FOLDER` once for each rank, in processes; return what each saved as folder/rank{r}.pt."""
    with socket.socket() as sock:  # port 0: the system chooses a free one
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    processes = [subprocess.Popen(
        [sys.executable, script, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
                          "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}) for rank in range(world_size)]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world_size, "\n".join(outputs)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world_size)]
