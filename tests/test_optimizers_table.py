"""The table of all optimizers: complete, counted right, and its distances to public code still hold."""

import json

import pytest
import torch
from torch import nn

from benchmarks.optimizers import DECOMPOSITIONS, ENTRIES, RESULT, averaging, floats_per_parameter, flops, page
from benchmarks.oracles import LR, ORACLES, Oracle, parity
from configs.optim import AGD, RULES, Adam, Dion, Muon, Shampoo, Steepest

TABLE = json.loads(RESULT.read_text())
ROWS = {row["name"]: row for row in TABLE["optimizers"]}
ROUNDING = {"Shampoo": 1e-4, "SOAP": 1e-3}  # roots and eigenbases of float32 Gram matrices; all others: 3e-6
BY_NAME = {entry.name: entry for entry in ENTRIES}


def test_the_page_is_made_from_the_results():
    assert RESULT.with_suffix(".md").read_text() == page(TABLE)


def test_every_rule_has_its_row():
    assert {row["rule"] for row in ROWS.values()} == set(RULES)
    assert list(ROWS) == [entry.name for entry in ENTRIES] and set(ORACLES) <= set(ROWS)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_what_is_counted_is_what_the_file_says(entry):
    row = ROWS[entry.name]
    assert (floats_per_parameter(entry.group), flops(entry.group)) == (row["floats_per_parameter"], row["flops"])
    assert averaging(entry.group) == row["averaging"]


@pytest.mark.parametrize("name", ORACLES)
def test_distances_to_public_code(name):
    found = parity(BY_NAME[name].group, ORACLES[name])
    if found is None:
        pytest.skip(f"{ORACLES[name].package} is not installed")
    assert max(found, ROWS[name]["difference"]) < ROUNDING.get(name, 3e-6)


def test_a_wrong_formula_is_far_from_the_oracle():
    """Nesterov where the oracle has none, and a wrong eps."""
    assert parity(BY_NAME["Signum"].group, _changed("Signum", nesterov=True)) > 0.05
    assert parity(BY_NAME["AdamW"].group, _changed("AdamW", eps=1e-2)) > 1e-3


def _changed(name: str, **ours: object) -> Oracle:
    oracle = ORACLES[name]
    return Oracle(oracle.name, oracle.make, oracle.ours | ours, oracle.package, oracle.shapes)


def test_distance_is_relative_to_the_way_that_the_oracle_went():
    """Half its steps are half its way."""
    sgd = Oracle("SGD", lambda params: torch.optim.SGD(params, lr=LR), {"lr": LR / 2, "eps": 1e30}, "torch")
    assert parity(Adam(), sgd) == pytest.approx(1.0, rel=1e-6)  # Adam under an infinite eps stays
    halves = Oracle("sign", lambda params: _Half(params), {"lr": LR, "nesterov": False, "averaging": "none"}, "torch")
    assert parity(Steepest(norm="sign"), halves) == pytest.approx(1.0, rel=1e-4)


class _Half(torch.optim.Optimizer):
    """Sign descent with half the step."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self) -> None:
        for param in self.param_groups[0]["params"]:
            param.sub_(LR / 2 * param.grad.sign())


# ---- Counts --------------------------------------------------------------------------------------


def test_muons_operations_are_those_of_its_products():
    """Each of five iterations: X X^T and B X, 2 m^2 n each, and A A, 2 m^3."""
    m, n = 24, 40
    muon = Muon(unit="spectral")
    assert flops(muon, (m, n)) == flops(muon, (n, m)) == 5 * (4 * m * m * n + 2 * m**3)


def test_shampoos_operations_are_products_and_eigenvectors():
    """Per side: the Gram matrix 2 k^2 l, eigh 9 k^3, V diag V^T 2 k^3; then the root's product, 2 k^2 l."""
    m, n = 24, 40
    assert flops(Shampoo(), (m, n)) == sum(4 * k * k * (m * n // k) + 11 * k**3 for k in (m, n))


def test_decompositions_count_their_stacks():
    for count in DECOMPOSITIONS.values():
        assert count((3, 8, 8)) == 3 * count((8, 8)) > 0


def test_memories():
    """AdamW two; Dion its residual and a basis of a quarter of the short side; AGD nothing."""
    assert floats_per_parameter(Adam()) == 2
    assert floats_per_parameter(Dion(), (8, 32)) == 1 + 8 * 2 / (8 * 32)
    assert floats_per_parameter(AGD(lr=1.0)) == 0
    assert floats_per_parameter(Muon(graft=Adam())) == 3
