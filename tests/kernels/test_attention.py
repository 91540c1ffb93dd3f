"""Masks and attention kernels, compared with loops over pairs of tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import attend_flex, attend_sdpa, dense_mask, document_index, flex_mask, varlen_mask

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- Masks -----------------------------------------------------------------------------------------------------------


def visible_by_loop(tokens: int, window: int | None, document: list[list[int]]) -> torch.Tensor:
    """The definition of the mask, pair by pair: True where query i sees key j, (B, 1, T, T)."""
    return torch.tensor([[[[j <= i and (window is None or i - j < window) and row[i] == row[j]
                            for j in range(tokens)] for i in range(tokens)]] for row in document])


def visible_by_boundaries(boundaries: list[int], left: int, rows: int, tokens: int) -> torch.Tensor:
    """True where token i sees token j of the packed stream of rows x tokens, (N, N), by varlen_attn's rules."""
    visible = torch.zeros(rows * tokens, rows * tokens, dtype=torch.bool)
    for start, stop in zip(boundaries, boundaries[1:], strict=False):
        for i in range(start, stop):
            visible[i, max(start, i - left):i + 1] = True
    return visible


@st.composite
def starts_and_window(draw) -> tuple[torch.Tensor, int | None]:
    rows, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    flags = draw(st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=rows, max_size=rows))
    return torch.tensor(flags), draw(st.none() | st.integers(1, 14))


@given(starts_and_window())
def test_documents_are_numbered_from_start_to_start(case):
    starts, _ = case
    for flags, numbers in zip(starts.tolist(), document_index(starts).tolist(), strict=True):
        assert numbers == [sum(flags[:t + 1]) for t in range(len(flags))]


@settings(deadline=None)
@given(starts_and_window())
def test_dense_mask_equals_the_loop(case):
    starts, window = case
    document = document_index(starts)
    assert torch.equal(dense_mask(starts.size(1), window, document, CPU),
                       visible_by_loop(starts.size(1), window, document.tolist()))


@pytest.mark.parametrize("window", [1, 2, 5, 6, 9])
def test_dense_mask_of_a_window_is_one_for_all_rows(window):
    assert torch.equal(dense_mask(6, window, None, CPU), visible_by_loop(6, window, [[0] * 6]))


def test_plain_causal_attention_builds_no_mask():
    assert dense_mask(6, None, None, CPU) is None


@settings(deadline=None, max_examples=30)
@given(starts_and_window(), st.booleans())
def test_flex_mask_equals_the_dense_mask(case, by_document):
    starts, window = case
    rows, tokens = starts.shape
    document = document_index(starts) if by_document else torch.zeros_like(starts, dtype=torch.int64)
    mask = flex_mask(tokens, window, document if by_document else None, CPU)
    b, i, j = torch.arange(rows)[:, None, None], torch.arange(tokens)[:, None], torch.arange(tokens)
    visible = mask.mask_mod(b, torch.tensor(0), i, j).expand(rows, tokens, tokens)
    assert torch.equal(visible[:, None], visible_by_loop(tokens, window, document.tolist()))


@settings(deadline=None)
@given(starts_and_window())
def test_varlen_mask_equals_the_dense_mask(case):
    starts, window = case
    rows, tokens = starts.shape
    document = document_index(starts)
    boundaries, left = varlen_mask(tokens, window, document, CPU)
    assert boundaries.dtype == torch.int32
    expected = torch.block_diag(*visible_by_loop(tokens, window, document.tolist())[:, 0]).bool()
    assert torch.equal(visible_by_boundaries(boundaries.tolist(), left, rows, tokens), expected)


# ---- Kernels ---------------------------------------------------------------------------------------------------------


def attend_by_loop(q, k, v, visible, scale):
    """Attention one query at a time: q, k, v (B, T, H, D), visible (B, 1, T, T) -> (B, T, H, D)."""
    out = torch.zeros_like(v)
    for b, i, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keys = visible[b, 0, i].nonzero()[:, 0]
        out[b, i, h] = (scale * k[b, keys, h] @ q[b, i, h]).softmax(0) @ v[b, keys, h]
    return out


def case_of_kernels(tokens: int = 13):
    q, k, v = (normal(2, tokens, 3, 16, seed=seed) for seed in range(3))
    starts = torch.zeros(2, tokens, dtype=torch.bool)
    starts[0, [4, 9]] = starts[1, 0] = starts[1, 7] = True
    return (q, k, v), document_index(starts)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("by_document", [False, True])
def test_sdpa_equals_the_loop(window, by_document):
    qkv, document = case_of_kernels()
    visible = visible_by_loop(13, window, document.tolist() if by_document else 2 * [13 * [0]])
    mask = dense_mask(13, window, document if by_document else None, CPU)
    torch.testing.assert_close(attend_sdpa(*qkv, mask, 0.3), attend_by_loop(*qkv, visible, 0.3), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("tokens", [13, 130])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("by_document", [False, True])
@torch.no_grad()
def test_flex_equals_sdpa(tokens, window, by_document):
    """130 tokens are two of FlexAttention's blocks of 128, the second partial."""
    qkv, document = case_of_kernels(tokens)
    shared = (tokens, window, document if by_document else None, CPU)
    expected = attend_sdpa(*qkv, dense_mask(*shared), 0.3)
    torch.testing.assert_close(attend_flex(*qkv, flex_mask(*shared), 0.3), expected, atol=1e-5, rtol=0)
