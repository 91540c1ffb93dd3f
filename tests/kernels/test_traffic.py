"""Bytes that our own kernels move: each tensor once, unless a kernel declares otherwise."""

import pytest
import torch

from kernels import traffic
from kernels.traffic import bytes_moved, declare_bytes, tensor_bytes


@pytest.fixture(autouse=True)
def no_rules(monkeypatch):
    monkeypatch.setattr(traffic, "RULES", {})


def test_each_tensor_counts_once():
    tensors = [torch.empty(3, 5, device="meta"), torch.empty(7, dtype=torch.bfloat16, device="meta")]
    assert bytes_moved("steepest::any", tensors) == 3 * 5 * 4 + 7 * 2


def test_a_kernel_may_declare_otherwise():
    declare_bytes("steepest::add_into", lambda tensors: 2 * tensor_bytes(tensors[0]) + tensor_bytes(tensors[1]))
    assert bytes_moved("steepest::add_into", [torch.empty(4), torch.empty(1)]) == 36
    assert bytes_moved("steepest::other", [torch.empty(4), torch.empty(1)]) == 20
    with pytest.raises(AssertionError, match="steepest::add_into are declared twice"):
        declare_bytes("steepest::add_into", lambda tensors: 0)


@pytest.mark.parametrize(("tensor", "expected"), [
    (torch.empty(()), 4), (torch.empty(0, 3), 0), (torch.empty(1).expand(9), 4), (torch.empty(2, 1).expand(2, 9), 8),
    (torch.empty(4, 6).mT, 96), (torch.empty(8, 6)[::2], 96)])
def test_an_expanded_dimension_counts_as_one_entry(tensor, expected):
    assert tensor_bytes(tensor) == expected
