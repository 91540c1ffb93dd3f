"""The first losses of small runs, on one rank and on two, equal those recorded in tests/golden/losses.json."""

import json

import pytest

from tests.golden.record import FILE, golden_losses
from tests.golden.runs import RUNS, SAME_ANYWHERE, machine

GOLDEN = json.loads(FILE.read_text())
ANYWHERE = 1e-6  # relative tolerance of the first losses
CLOSE = 5e-3  # relative tolerance of later losses: differences in rounding grow to about this size
EVERY_RUN = pytest.mark.parametrize("name", [run.name for run in RUNS])
EITHER = pytest.mark.parametrize("ranks", [1, 2])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Losses in nats by number of ranks and run. The runs on two ranks share one launch, which takes seconds."""
    folder = tmp_path_factory.mktemp("golden")
    return {ranks: golden_losses(folder, ranks=ranks) for ranks in (1, 2)}


def golden(name: str, ranks: int) -> list[float]:
    return GOLDEN["losses_nats_by_ranks"][str(ranks)][name]


@EVERY_RUN
@EITHER
def test_losses_are_the_golden_ones_on_any_machine(trained, name, ranks):
    losses, expected = trained[ranks][name], golden(name, ranks)
    assert losses[:SAME_ANYWHERE] == pytest.approx(expected[:SAME_ANYWHERE], rel=ANYWHERE)
    assert losses == pytest.approx(expected, rel=CLOSE)


@EVERY_RUN
@EITHER
def test_losses_are_the_golden_ones_to_the_bit(trained, name, ranks):
    if machine() != GOLDEN["machine"]:
        pytest.skip(f"recorded on another machine: {GOLDEN['machine']}, here {machine()}")
    assert trained[ranks][name] == golden(name, ranks)


@EVERY_RUN
def test_two_ranks_train_as_one(trained, name):
    one, two = trained[1][name], trained[2][name]
    assert two[:SAME_ANYWHERE] == pytest.approx(one[:SAME_ANYWHERE], rel=ANYWHERE)
    assert two == pytest.approx(one, rel=CLOSE)
