"""Test grafting: the direction of one rule with the length of another rule's step, tensor by tensor."""

import pytest
import torch

from configs.optim import SM3, SOAP, SWAN, Adam, Muon, Shampoo
from optim.rule import Hyper
from tests.optim.oracle import FULL, directions, gaussian


@pytest.mark.parametrize(("way", "size"), [(Shampoo, Adam), (SM3, Shampoo), (Muon, Adam), (SOAP, Adam)])
def test_a_graft_has_the_direction_of_one_rule_and_the_length_of_the_other(way, size):
    grads = [gaussian(2, 6, 9, seed=i) for i in range(5)]
    grafts, ways, sizes = (directions(config, grads)[-1] for config in (way(graft=size()), way(), size()))
    for D, A, B in zip(grafts, ways, sizes, strict=True):
        torch.testing.assert_close(D.norm(), B.norm(), rtol=1e-5, atol=0)
        torch.testing.assert_close(D / D.norm(), A / A.norm(), rtol=0, atol=1e-6)


def test_momentum_is_the_grafts_own_if_the_rule_has_none():
    numbers = Hyper.at(SWAN(graft=Muon(momentum=0.8)), FULL, 1)
    assert numbers.momentum.item() == pytest.approx(0.8)
    assert Hyper.at(Muon(momentum=0.9, graft=Adam()), FULL, 1).momentum.item() == pytest.approx(0.9)
    assert Hyper.at(Adam(graft=Muon()), FULL._replace(momentum=0.5), 1).momentum.item() == 0.5
