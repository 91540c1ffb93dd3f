"""The kernel of kernels/embedding.py on CPUs, in Triton's interpreter; test_interpreted.py runs this file by itself."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kernels import embedding
from kernels.embedding import RowsIntoGrad, add_rows, plain_add_rows
from tests.kernels.twins import gaussian


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    embedding.TILE = {"ROWS": 4, "COLUMNS": 8}


def add(grad: Tensor, ids: Tensor, upstream: Tensor) -> Tensor:
    """Add the rows by the kernel to a copy of `grad`."""
    result = grad.clone()
    add_rows(result, *ids.int().sort(stable=True), upstream)
    return result


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 20), st.sampled_from(["float32", "float16"]))
def test_sums_of_rows(ids, columns, dtype):
    """Ids that come once, often and not at all, the first and the last row of the table; columns beyond one block."""
    dtype, ids = getattr(torch, dtype), torch.tensor(ids)
    grad, upstream = gaussian(7, columns, dtype=dtype), gaussian(len(ids), columns, seed=1, dtype=dtype)
    result, twin = add(grad, ids, upstream), grad.clone()
    plain_add_rows(twin, *ids.int().sort(stable=True), upstream)
    exact = grad.double().index_add(0, ids, upstream.double())
    torch.testing.assert_close(result, twin, rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=1e-5)
    torch.testing.assert_close(result.double(), exact, rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=1e-5)
    untouched = ~torch.isin(torch.arange(7), ids)
    assert torch.equal(result[untouched], grad[untouched])


def test_equal_ids_are_summed_before_they_are_rounded():
    """Each of 1024 rows of 2^-12 is below half a unit in the last place of 1 in float16; together they are a quarter."""
    ids, upstream = torch.zeros(1024, dtype=torch.int64), torch.full((1024, 1), 2.0**-12, dtype=torch.float16)
    assert add(torch.ones(2, 1, dtype=torch.float16), ids, upstream).tolist() == [[1.25], [1.0]]


def test_the_sum_is_the_same_to_the_bit_each_time():
    ids, upstream = torch.randint(5, (60,), generator=torch.Generator().manual_seed(0)), gaussian(60, 9)
    first = add(torch.zeros(5, 9), ids, upstream)
    assert all(torch.equal(add(torch.zeros(5, 9), ids, upstream), first) for _ in range(3))


class Tables(nn.Module):
    """Three tables in one bank, whose gradients are views of another, as the optimizer lays them; one more in float16."""

    def __init__(self) -> None:
        super().__init__()
        bank, self.grads = gaussian(3, 10, 12), torch.zeros(3, 10, 12)
        self.tables = nn.ParameterList(nn.Parameter(table) for table in bank)
        self.ngrams, self.weight = nn.Parameter(gaussian(20, 12, seed=1).half()), nn.Parameter(gaussian(12, 12, seed=2) / 3)
        for table, grad in zip(self.tables, self.grads, strict=True):
            table.grad = grad
        self.ngrams.grad = torch.zeros_like(self.ngrams)

    def forward(self, ids: Tensor, look_up=lambda table, ids: RowsIntoGrad.apply(table, table.grad, ids)) -> Tensor:
        """Every table is looked up, one of them twice."""
        x = look_up(self.ngrams, (7 * ids) % 19).float() + look_up(self.tables[0], 9 - ids)
        for table in self.tables:
            x = F.linear(x, self.weight) + look_up(table, ids)
        return x.square().mean()


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_a_model(compiled):
    """Two passes add up, as of autograd's dense gradients; `.grad` stays the view of the bank; no gradient in validation."""
    model, twin = Tables(), Tables()
    run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else model
    views = [table.grad for table in model.tables]
    for seed in (0, 1):
        ids = torch.randint(10, (2, 9), generator=torch.Generator().manual_seed(seed))
        loss, exact = run(ids), twin(ids, look_up=lambda table, ids: F.embedding(ids, table))
        assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
        loss.backward()
        exact.backward()
    assert all(table.grad is view for table, view in zip(model.tables, views, strict=True))
    torch.testing.assert_close(model.grads, twin.grads, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.ngrams.grad, twin.ngrams.grad, rtol=5e-3, atol=1e-3)
    torch.testing.assert_close(model.weight.grad, twin.weight.grad, rtol=1e-4, atol=1e-5)
    before = model.grads.clone()
    with torch.no_grad():
        run(ids)
    assert torch.equal(model.grads, before)
