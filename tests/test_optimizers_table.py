"""Table of all optimizers: it is complete, its counts are right, and its differences from public code still hold."""

import json

import pytest
import torch
from torch import nn

from benchmarks.optimizers import DECOMPOSITIONS, ENTRIES, RESULT, averaging, floats_per_parameter, flops, page
from benchmarks.oracles import LR, ORACLES, Oracle, relative_difference
from configs.optim import AGD, RULES, Adam, Dion, Muon, Shampoo, Steepest

TABLE = json.loads(RESULT.read_text())
ROWS = {row["name"]: row for row in TABLE["optimizers"]}
ROUNDING = {"Shampoo": 1e-4, "SOAP": 1e-3}  # roots and eigenbases of float32 Gram matrices lose digits; others: 3e-6
BY_NAME = {entry.name: entry for entry in ENTRIES}


def test_the_page_is_made_from_the_results():
    assert RESULT.with_suffix(".md").read_text() == page(TABLE)


def test_every_rule_has_a_row():
    assert {row["rule"] for row in ROWS.values()} == set(RULES)
    assert list(ROWS) == [entry.name for entry in ENTRIES] and set(ORACLES) <= set(ROWS)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_counts_are_those_of_the_file(entry):
    row = ROWS[entry.name]
    assert (floats_per_parameter(entry.group), flops(entry.group)) == (row["floats_per_parameter"], row["flops"])
    assert averaging(entry.group) == row["averaging"]


@pytest.mark.parametrize("name", ORACLES)
def test_differences_from_public_code(name):
    difference = relative_difference(BY_NAME[name].group, ORACLES[name])
    if difference is None:
        pytest.skip(f"{ORACLES[name].package} is not installed")
    assert max(difference, ROWS[name]["difference"]) < ROUNDING.get(name, 3e-6)


def test_a_wrong_formula_is_far_from_the_oracle():
    """The oracle's Signum has no Nesterov, and its AdamW a smaller eps."""
    assert relative_difference(BY_NAME["Signum"].group, _with_fields("Signum", nesterov=True)) > 0.05
    assert relative_difference(BY_NAME["AdamW"].group, _with_fields("AdamW", eps=1e-2)) > 1e-3


def _with_fields(name: str, **ours: object) -> Oracle:
    oracle = ORACLES[name]
    return Oracle(oracle.name, oracle.make, oracle.ours | ours, oracle.package, oracle.shapes)


def test_difference_is_relative_to_the_distance_that_the_oracle_moves():
    """Without any movement of ours it is 1, and with steps of twice the oracle's length as well."""
    sgd = Oracle("SGD", lambda params: torch.optim.SGD(params, lr=LR), {"lr": LR / 2, "eps": 1e30}, "torch")
    assert relative_difference(Adam(), sgd) == pytest.approx(1.0, rel=1e-6)  # an infinite eps stops Adam
    halves = Oracle("sign", lambda params: _Half(params), {"lr": LR, "nesterov": False, "averaging": "none"}, "torch")
    assert relative_difference(Steepest(norm="sign"), halves) == pytest.approx(1.0, rel=1e-4)


class _Half(torch.optim.Optimizer):
    """Sign descent with steps of half the length."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self) -> None:
        for param in self.param_groups[0]["params"]:
            param.sub_(LR / 2 * param.grad.sign())


# ---- Counts --------------------------------------------------------------------------------------


def test_flops_of_muon_are_its_matrix_products():
    """In each of five iterations: X X^T and B X take 2 m^2 n each, A A takes 2 m^3."""
    m, n = 24, 40
    muon = Muon(unit="spectral")
    assert flops(muon, (m, n)) == flops(muon, (n, m)) == 5 * (4 * m * m * n + 2 * m**3)


def test_flops_of_shampoo_are_matrix_products_and_eigh():
    """For each side k, l the other: Gram matrix 2 k^2 l, eigh 9 k^3, V diag V^T 2 k^3, product with the root 2 k^2 l."""
    m, n = 24, 40
    assert flops(Shampoo(), (m, n)) == sum(4 * k * k * (m * n // k) + 11 * k**3 for k in (m, n))


def test_flops_of_decompositions_grow_with_the_stack():
    for count in DECOMPOSITIONS.values():
        assert count((3, 8, 8)) == 3 * count((8, 8)) > 0


def test_state_in_numbers_per_parameter():
    """AdamW has two; Dion a residual, and a basis with a quarter of the shorter side's length; AGD none."""
    assert floats_per_parameter(Adam()) == 2
    assert floats_per_parameter(Dion(), (8, 32)) == 1 + 8 * 2 / (8 * 32)
    assert floats_per_parameter(AGD(lr=1.0)) == 0
    assert floats_per_parameter(Muon(graft=Adam())) == 3
