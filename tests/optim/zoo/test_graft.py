"""Grafting: the direction of one rule at the length of another's, tensor by tensor."""

import pytest
import torch

from configs.optim import SM3, SOAP, SWAN, Adam, Muon, Shampoo
from optim.rule import Hyper
from tests.optim.oracle import FULL, directions, gaussian


@pytest.mark.parametrize(("way", "size"), [(Shampoo, Adam), (SM3, Shampoo), (Muon, Adam), (SOAP, Adam)])
def test_a_graft_has_ones_direction_and_the_others_size(way, size):
    grads = [gaussian(2, 6, 9, seed=i) for i in range(5)]
    grafted, one, other = (directions(config, grads)[-1] for config in (way(graft=size()), way(), size()))
    for A, B, C in zip(grafted, one, other, strict=True):
        torch.testing.assert_close(A.norm(), C.norm(), rtol=1e-5, atol=0)
        torch.testing.assert_close(A / A.norm(), B / B.norm(), rtol=0, atol=1e-6)


def test_the_graft_averages_with_its_own_momentum_where_the_rule_has_none():
    at = Hyper.at(SWAN(graft=Muon(momentum=0.8)), FULL, 1)
    assert at.momentum.item() == pytest.approx(0.8)
    assert Hyper.at(Muon(momentum=0.9, graft=Adam()), FULL, 1).momentum.item() == pytest.approx(0.9)
    assert Hyper.at(Adam(graft=Muon()), FULL._replace(momentum=0.5), 1).momentum.item() == 0.5
