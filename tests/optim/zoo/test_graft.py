"""Grafting: the direction of one rule at the length of another's, tensor by tensor."""

import pytest
import torch

from configs.optim import SM3, SOAP, Adam, Muon, Shampoo
from tests.optim.oracle import directions, gaussian


@pytest.mark.parametrize(("way", "size"), [(Shampoo, Adam), (SM3, Shampoo), (Muon, Adam), (SOAP, Adam)])
def test_a_graft_has_ones_direction_and_the_others_size(way, size):
    grads = [gaussian(2, 6, 9, seed=i) for i in range(5)]
    grafted, one, other = (directions(config, grads)[-1] for config in (way(graft=size()), way(), size()))
    for A, B, C in zip(grafted, one, other, strict=True):
        torch.testing.assert_close(A.norm(), C.norm(), rtol=1e-5, atol=0)
        torch.testing.assert_close(A / A.norm(), B / B.norm(), rtol=0, atol=1e-6)
