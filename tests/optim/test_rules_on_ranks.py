"""Every rule gives the same weights on 1, 2 and 3 ranks, and resumes on any number of them.

Run as a program with RANK and WORLD_SIZE in the environment, this file is one rank, which trains by all rules in turn.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from configs.optim import RULES, Adam, Extra, Muon, NorMuon, Optim, Prodigy, RuleConfig
from optim.comm import Comm
from optim.groups import build_groups
from optim.hooks import Lookahead, WeightAverage
from optim.schedule import Values
from optim.sharded import NonFiniteError, ShardedOptimizer
from tests.optim.oracle import run_ranks

STEPS, HALF, REFUSED = 4, 2, 6
ADAM = Adam(lr=0.02, weight_decay=0.1)
PRODIGY = Prodigy(lr=1.0, weight_decay=0.1, distance_start=1e-3)
# Sizes that neither 2 nor 3 divides; the last two are too small to be cut.
SHAPES = {**{f"wide{i}": (56, 88) for i in range(4)}, "tall": (331, 50), "small": (12, 20), "vector": (37,)}
CASES: dict[str, RuleConfig] = {name: config(lr=0.02, weight_decay=0.1) for name, config in RULES.items()} | {
    "prodigy": PRODIGY,
    "adam_sphere": replace(ADAM, constraint="sphere", extra=Extra(tangent="momentum")),
    "muon_sphere": Muon(lr=0.02, weight_decay=0.1, constraint="sphere", extra=Extra(retraction="geodesic")),
    "adam_hyperball": replace(ADAM, constraint="hyperball"),
    "adam_clipped": replace(ADAM, extra=Extra(clip=3.0, clip_norm="column")),
    "prodigy_clipped": replace(PRODIGY, extra=Extra(clip=3.0)),
    "normuon_braked": NorMuon(lr=0.02, weight_decay=0.1, constraint="radial", extra=Extra(radial_brake=0.5, row_floor=0.4)),
    "normuon_in_blocks": NorMuon(lr=0.02, weight_decay=0.1, extra=Extra(blocks=("wide1=7", "small=3"),
                                                                       lr_factors=("wide2=2", "vector=.5"))),
    "muon_grafted": Muon(lr=0.02, weight_decay=0.1, graft=Adam()),
    "adam_waiting": replace(ADAM, update_every=3),
    "prodigy_waiting": replace(PRODIGY, update_every=3),
    "adam_ahead": replace(ADAM, rounding="remainder"),
    "adam_sparse": replace(ADAM, extra=Extra(sparse_rows=True)),
    # Rows are noted, as a trainer does. With update_every 3, the pending gradients of `middle` have rows that were not.
    "adam_sparse_noted": replace(ADAM, update_every=2, extra=Extra(sparse_rows=True)),
    "adam_sparse_pending": replace(ADAM, update_every=3, extra=Extra(sparse_rows=True))}


def random(shape: tuple[int, ...], *key: int) -> Tensor:
    seed = sum(x * 1009**i for i, x in enumerate(key))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(case: str, comm: Comm, seed: int = 0) -> tuple[dict[str, nn.Parameter], ShardedOptimizer]:
    dtype = torch.bfloat16 if case == "adam_ahead" else torch.float32
    params = {name: nn.Parameter((0.1 * random(shape, seed, i)).to(dtype)) for i, (name, shape) in enumerate(SHAPES.items())}
    groups = build_groups(params, dict.fromkeys(params, "matrix"), Optim(matrix=CASES[case]))
    hooks = [WeightAverage(0.5, 1)] + ([Lookahead(0.8, (0.0, *[0.5] * STEPS))] if case == "adam_ahead" else [])
    return params, ShardedOptimizer(groups, comm, hooks=hooks)


def gradient(index: int, step: int) -> Tensor:
    """Return multiples of 1/16, whose sums are exact in any order; with mean 1/2, so that the weights drift."""
    return (random(list(SHAPES.values())[index], 77, index, step) * 16).round() / 16 + 0.5


def run(params: dict, optimizer: ShardedOptimizer, steps: range) -> dict[str, Tensor]:
    """Run steps and return the state. Rank r contributes r times the gradient, rank 0 the rest of the sum 1.

    With sparse rows, two of three rows are zero on all ranks, and every sixth row comes from one rank alone.
    """
    for step in steps:
        if optimizer.exchanges_rows and optimizer.period > 1:
            optimizer.note_rows(noted_rows(optimizer.comm, step), step + 1)
        for index, param in enumerate(params.values()):
            share = sparse_share(optimizer.comm, len(param), step) if is_sparse(optimizer) else share_of(optimizer.comm)
            param.grad.add_(gradient(index, step) * share)
        optimizer.step(Values(1 - 0.1 * step, 1, 0.9, 1, 1, None), step + 1)
        optimizer.zero_grad()
    return optimizer.state.tensors()


def share_of(comm: Comm) -> int:
    return 1 - sum(range(1, comm.world_size)) if comm.rank == 0 else comm.rank


def sparse_share(comm: Comm, rows: int, step: int) -> Tensor:
    """Return the share of each row, (rows, 1); for a vector one share."""
    row = torch.arange(rows if rows != 37 else 1) + step
    by_one_rank = (row // 6 % comm.world_size == comm.rank).float()
    share = torch.where(row % 6 == 0, by_one_rank, torch.where(row % 3 == 0, share_of(comm), 0.0))
    return share.unsqueeze(1) if rows != 37 else share


def noted_rows(comm: Comm, step: int) -> dict[str, Tensor]:
    """Return the rows of each tensor to which this rank contributes, and row 1, which has gradient 0 in most steps."""
    return {name: torch.cat([sparse_share(comm, shape[0], step).nonzero()[:, 0], torch.tensor([1])])
            for name, shape in SHAPES.items() if len(shape) == 2}


def is_sparse(optimizer: ShardedOptimizer) -> bool:
    return optimizer.banks[0].group.config.extra.sparse_rows


def averaged(params: dict, optimizer: ShardedOptimizer) -> dict[str, Tensor]:
    with optimizer.evaluation_weights():
        return {name: param.detach().clone() for name, param in params.items()}


def refusal(params: dict, optimizer: ShardedOptimizer) -> str:
    """Return this rank's error message after a step in which the last rank's gradient of wide2 has a NaN."""
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
    optimizer.state.load(middle)
    results = {"middle": middle, "final": run(params, optimizer, range(HALF, STEPS)),
             "shapes": optimizer.state.shapes(), "averaged": averaged(params, optimizer)}
    return results | {"refusal": refusal(params, optimizer), "after": optimizer.state.tensors()}


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
    return run_ranks(__file__, request.param, tmp_path_factory.mktemp(f"ranks{request.param}"))


def assert_alike(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Check that tensors are equal up to `tolerance` times the distance moved (weights) or the norm (state)."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        short = name.removeprefix("weights/")
        index = list(SHAPES).index(short) if short in SHAPES else None
        start = 0.1 * random(SHAPES[short], 0, index).double() if index is not None else 0
        size = (tensor.double() - start).norm()
        assert actual[name].shape == tensor.shape
        assert (actual[name].double() - tensor.double()).norm() <= tolerance * size, name


@pytest.mark.parametrize("case", CASES)
def test_ranks_together_are_one_rank(ranks, single, case):
    for key in ("middle", "final", "averaged"):
        assert_alike(ranks[0][case][key], single[case][key], 1e-5)
        for rank in ranks[1:]:
            assert all(torch.equal(rank[case][key][name], tensor) for name, tensor in ranks[0][case][key].items())


@pytest.mark.parametrize("case", CASES)
def test_what_ranks_saved_continues_on_one(ranks, case):
    saved = ranks[0][case]["middle"]
    params, optimizer = make(case, Comm(), seed=5)
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == optimizer.state.shapes()
    assert ranks[0][case]["shapes"] == optimizer.state.shapes()
    optimizer.state.load(saved)
    assert_alike(run(params, optimizer, range(HALF, STEPS)), ranks[0][case]["final"], 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_every_rank_refuses_a_gradient_that_is_not_finite(ranks, single, case):
    for results in (*ranks, single):
        assert results[case]["refusal"].startswith(f"the gradient of wide2 is not finite at step {REFUSED}")
        assert all(torch.equal(results[case]["after"][name], tensor) for name, tensor in results[case]["final"].items()
                   if not name.startswith("pending/"))


if __name__ == "__main__":
    as_rank(Path(sys.argv[1]))
