"""Every rule on 2 and 3 ranks is the rule on one, saved and resumed on any number.

Run as a program with RANK and WORLD_SIZE in the environment, this file is one rank, which trains by all rules in turn.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from configs.groups import Group, Optim
from optim.comm import Comm
from optim.finite import NonFiniteError
from optim.groups import build_groups
from optim.lookahead import Lookahead
from optim.rules import RULES
from optim.schedule import Values
from optim.sharded import ShardedOptimizer
from optim.weight_average import WeightAverage

ROOT = Path(__file__).resolve().parents[2]
STEPS, HALF, REFUSED = 4, 2, 6
# Sizes that neither 2 nor 3 divides; the last two are too small to be cut.
SHAPES = {**{f"wide{i}": (56, 88) for i in range(4)}, "tall": (331, 50), "small": (12, 20), "vector": (37,)}
CASES: dict[str, dict] = {rule: {"rule": rule} for rule in RULES} | {
    "prodigy": {"rule": "prodigy", "lr": 1.0, "distance_start": 1e-3},
    "stiefel": {"rule": "stiefel", "constraint": "stiefel"},
    "adam_sphere": {"rule": "adam", "constraint": "sphere", "tangent": "momentum"},
    "muon_sphere": {"rule": "steepest", "constraint": "sphere", "retraction": "geodesic"},
    "adam_hyperball": {"rule": "adam", "constraint": "hyperball"},
    "adam_clipped": {"rule": "adam", "clip": 3.0, "clip_norm": "column"},
    "prodigy_clipped": {"rule": "prodigy", "lr": 1.0, "distance_start": 1e-3, "clip": 3.0},
    "normuon_braked": {"rule": "normuon", "constraint": "radial", "radial_brake": 0.5, "row_floor": 0.4},
    "normuon_in_blocks": {"rule": "normuon", "blocks": ("wide1=7", "small=3"), "lr_factors": ("wide2=2", "vector=.5")},
    "adam_waiting": {"rule": "adam", "update_every": 3},
    "prodigy_waiting": {"rule": "prodigy", "lr": 1.0, "distance_start": 1e-3, "update_every": 3},
    "adam_ahead": {"rule": "adam", "rounding": "remainder"},
    "adam_sparse": {"rule": "adam", "sparse_rows": True}}
# The direction of a rule whose memory is a product of the gradients' small singular values is less well determined.
TOLERANCE: dict[str, float] = {}


def random(shape: tuple[int, ...], *key: int) -> Tensor:
    seed = sum(x * 1009**i for i, x in enumerate(key))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(case: str, comm: Comm, seed: int = 0) -> tuple[dict[str, nn.Parameter], ShardedOptimizer]:
    dtype = torch.bfloat16 if "rounding" in CASES[case] else torch.float32
    params = {name: nn.Parameter((0.1 * random(shape, seed, i)).to(dtype)) for i, (name, shape) in enumerate(SHAPES.items())}
    optim = Optim(matrix=Group(**{"lr": 0.02, "weight_decay": 0.1} | CASES[case]))
    groups = build_groups(params, dict.fromkeys(params, "matrix"), optim)
    lookahead = Lookahead(0.8, (0.0, *[0.5] * STEPS)) if case == "adam_ahead" else None
    return params, ShardedOptimizer(groups, comm, average=WeightAverage(0.5, 1), lookahead=lookahead)


def gradient(index: int, step: int) -> Tensor:
    """Multiples of 1/16, whose sums are exact in any order; around a mean, so that distances grow."""
    return (random(list(SHAPES.values())[index], 77, index, step) * 16).round() / 16 + 0.5


def run(params: dict, optimizer: ShardedOptimizer, steps: range) -> dict[str, Tensor]:
    """Rank r contributes r shares of the gradient, rank 0 the rest of 1; where rows are sparse, of two rows in three nothing
    and of every sixth one rank all."""
    for step in steps:
        for index, param in enumerate(params.values()):
            share = sparse_share(optimizer.comm, len(param), step) if is_sparse(optimizer) else share_of(optimizer.comm)
            param.grad.add_(gradient(index, step) * share)
        optimizer.step(Values(1 - 0.1 * step, 1, 0.9, 1, 1, None), step + 1)
        optimizer.zero_grad()
    return optimizer.state_tensors()


def share_of(comm: Comm) -> int:
    return 1 - sum(range(1, comm.world_size)) if comm.rank == 0 else comm.rank


def sparse_share(comm: Comm, rows: int, step: int) -> Tensor:
    """A factor a row (of a vector: one for all)."""
    row = torch.arange(rows if rows != 37 else 1) + step
    one = (row // 6 % comm.world_size == comm.rank).float()
    share = torch.where(row % 6 == 0, one, torch.where(row % 3 == 0, share_of(comm), 0.0))
    return share.unsqueeze(1) if rows != 37 else share


def is_sparse(optimizer: ShardedOptimizer) -> bool:
    return optimizer.banks[0].group.config.sparse_rows


def averaged(params: dict, optimizer: ShardedOptimizer) -> dict[str, Tensor]:
    with optimizer.averaged_weights():
        return {name: param.detach().clone() for name, param in params.items()}


def refusal(params: dict, optimizer: ShardedOptimizer) -> str:
    """What this rank says when the last rank's gradient of wide2 has a NaN."""
    for param in params.values():
        param.grad.fill_(1.0)
    if optimizer.comm.rank == optimizer.comm.world_size - 1:
        params["wide2"].grad[3, 4] = float("nan")
    try:
        optimizer.step(Values(1, 1, 0.9, 1, 1, None), REFUSED)
    except NonFiniteError as error:
        return str(error)
    return "accepted"


def trained(case: str, comm: Comm) -> dict:
    params, optimizer = make(case, comm, seed=comm.rank)
    middle = run(params, optimizer, range(HALF))
    optimizer.load_state_tensors(middle)
    found = {"middle": middle, "final": run(params, optimizer, range(HALF, STEPS)),
             "shapes": optimizer.state_shapes(), "averaged": averaged(params, optimizer)}
    return found | {"refusal": refusal(params, optimizer), "after": optimizer.state_tensors()}


def as_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    comm = Comm()
    torch.save({case: trained(case, comm) for case in CASES}, folder / f"rank{comm.rank}.pt")
    comm.close()


@pytest.fixture(scope="module")
def single() -> dict:
    return {case: trained(case, Comm()) for case in CASES}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    processes = [subprocess.Popen(
        [sys.executable, __file__, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(request.param), "MASTER_ADDR": "127.0.0.1",
                          "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}) for rank in range(request.param)]
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * request.param, "\n".join(said)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Within a share of what each tensor moved (weights) or is (memories)."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        short = name.removeprefix("weights/")
        index = list(SHAPES).index(short) if short in SHAPES else None
        start = 0.1 * random(SHAPES[short], 0, index).double() if index is not None else 0
        size = (tensor.double() - start).norm()
        assert found[name].shape == tensor.shape
        assert (found[name].double() - tensor.double()).norm() <= tolerance * size, name


@pytest.mark.parametrize("case", CASES)
def test_ranks_together_are_one_rank(ranks, single, case):
    for key in ("middle", "final", "averaged"):
        assert_alike(ranks[0][case][key], single[case][key], TOLERANCE.get(case, 1e-5))
        for found in ranks[1:]:
            assert all(torch.equal(found[case][key][name], tensor) for name, tensor in ranks[0][case][key].items())


@pytest.mark.parametrize("case", CASES)
def test_what_ranks_saved_continues_on_one(ranks, case):
    saved = ranks[0][case]["middle"]
    params, optimizer = make(case, Comm(), seed=5)
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == optimizer.state_shapes()
    assert ranks[0][case]["shapes"] == optimizer.state_shapes()
    optimizer.load_state_tensors(saved)
    assert_alike(run(params, optimizer, range(HALF, STEPS)), ranks[0][case]["final"], TOLERANCE.get(case, 1e-5))


@pytest.mark.parametrize("case", CASES)
def test_every_rank_refuses_a_gradient_that_is_not_finite(ranks, single, case):
    for found in (*ranks, single):
        assert found[case]["refusal"].startswith(f"the gradient of wide2 is not finite at step {REFUSED}")
        assert all(torch.equal(found[case]["after"][name], tensor) for name, tensor in found[case]["final"].items()
                   if not name.startswith("pending/"))


if __name__ == "__main__":
    as_rank(Path(sys.argv[1]))
