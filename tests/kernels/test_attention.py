"""Masks and attention kernels, compared with loops over pairs of tokens."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask

from configs.model import Model
from kernels import attention
from kernels.attention import (
    attend_flex,
    attend_sdpa,
    attend_varlen,
    choose_kernel,
    dense_mask,
    document_first,
    flex_mask,
    of_one_width,
    use_flash,
    varlen_mask,
)

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
            visible[i, start if left < 0 else max(start, i - left):i + 1] = True
    return visible


@st.composite
def starts_and_window(draw) -> tuple[torch.Tensor, int | None]:
    rows, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    flags = draw(st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=rows, max_size=rows))
    return torch.tensor(flags), draw(st.none() | st.integers(1, 14))


@given(starts_and_window())
def test_documents_reach_from_start_to_start(case):
    starts, _ = case
    for flags, first in zip(starts.tolist(), document_first(starts).tolist(), strict=True):
        assert first == [max([0, *(s for s in range(t + 1) if flags[s])]) for t in range(len(flags))]


@settings(deadline=None)
@given(starts_and_window())
def test_dense_mask_equals_the_loop(case):
    starts, window = case
    document = document_first(starts)
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
    document = document_first(starts) if by_document else torch.zeros_like(starts, dtype=torch.int64)
    mask = flex_mask(tokens, window, document if by_document else None, CPU)
    assert mask.seq_lengths == (tokens, tokens)
    b, i, j = torch.arange(rows)[:, None, None], torch.arange(tokens)[:, None], torch.arange(tokens)
    visible = mask.mask_mod(b, torch.tensor(0), i, j).expand(rows, tokens, tokens)
    assert torch.equal(visible[:, None], visible_by_loop(tokens, window, document.tolist()))


@settings(deadline=None)
@given(starts_and_window())
def test_varlen_mask_equals_the_dense_mask(case):
    starts, window = case
    rows, tokens = starts.shape
    document = document_first(starts)
    boundaries, left, longest = varlen_mask(tokens, window, document, CPU)
    assert longest == tokens
    assert boundaries.dtype == torch.int32
    expected = torch.block_diag(*visible_by_loop(tokens, window, document.tolist())[:, 0]).bool()
    assert torch.equal(visible_by_boundaries(boundaries.tolist(), left, rows, tokens), expected)


@st.composite
def many_blocks(draw) -> tuple[int, int | None, torch.Tensor | None]:
    """Tokens, window and document starts over several of FlexAttention's blocks, the last one partial or not."""
    tokens, rows = draw(st.sampled_from([1, 127, 128, 129, 256, 500, 640]) | st.integers(1, 700)), draw(st.integers(1, 2))
    window = draw(st.none() | st.sampled_from([1, 127, 128, 129, 256, 1000]) | st.integers(1, 700))
    if draw(st.booleans()):
        return tokens, window, None
    places = draw(st.lists(st.tuples(st.integers(0, rows - 1), st.integers(0, tokens - 1)), max_size=12))
    starts = torch.zeros(rows, tokens, dtype=torch.bool)
    for row, place in places:
        starts[row, place] = True
    return tokens, window, document_first(starts)


def blocks(mask, name: str) -> list[list[list[int]]]:
    """The blocks that a table of the mask lists, by sequence and block."""
    counts, indices = getattr(mask, f"{name}_num_blocks"), getattr(mask, f"{name}_indices")
    assert counts.dtype == indices.dtype == torch.int32 and indices.min() >= 0 and indices.max() < indices.size(-1)
    return [[sorted(row[:count].tolist()) for row, count in zip(rows, of_row, strict=True)]
            for rows, of_row in zip(indices[:, 0], counts[:, 0], strict=True)]


@settings(deadline=None, max_examples=150)
@given(many_blocks())
def test_flex_tables_equal_those_of_create_block_mask(case):
    tokens, window, first = case
    mask = flex_mask(tokens, window, first, CPU)
    twin = create_block_mask(mask.mask_mod, None if first is None else len(first), None, tokens, tokens, device="cpu")
    for name in ("kv", "full_kv", "q", "full_q"):
        assert blocks(mask, name) == blocks(twin, name), name
        assert getattr(mask, f"{name}_indices").shape == getattr(twin, f"{name}_indices").shape


def random_documents(seed: int, share: float, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("make", [flex_mask, varlen_mask])
def test_masks_compile_once_for_any_number_of_documents(make):
    """One graph, without breaks, for batches with 1 to about 30 documents; and no sort in it."""
    graphs = CompileCounterWithBackend("eager")

    @torch.compile(backend=graphs, fullgraph=True, dynamic=False)
    def tensors(starts):
        mask = make(1024, 256, document_first(starts), CPU)
        return mask[0] if make is varlen_mask else (mask.kv_indices, mask.q_indices, mask.full_q_num_blocks)

    for seed, share in enumerate([0.0, 0.001, 0.01, 0.03]):
        tensors(random_documents(seed, share, 1, 1024))
    assert graphs.frame_count == 1 and "sort" not in graphs.graphs[0].code.replace("searchsorted", "")


def test_more_documents_than_varlen_has_room_for_are_an_error():
    starts = torch.zeros(2, 256, dtype=torch.bool)
    starts[:, :18] = True  # 36 documents; room for 2 + 32 + 512 // 256
    boundaries, *_ = varlen_mask(256, None, document_first(starts), CPU)
    assert boundaries.numel() == 37 and boundaries[-1] == 512 and boundaries[-2] < 512
    starts[1, 20] = True
    with pytest.raises(RuntimeError, match="more than 36 documents in a pass of 512 tokens.*use --model.attention flex"):
        varlen_mask(256, None, document_first(starts), CPU)


def test_documents_longer_than_their_bound_are_an_error():
    first = document_first(torch.arange(64)[None] % 20 == 0)
    assert varlen_mask(64, 30, first, CPU, 20)[1:] == (-1, 20)
    assert varlen_mask(64, 12, first, CPU, 20)[1:] == (11, 20)
    with pytest.raises(RuntimeError, match="a document of more than 19 tokens"):
        varlen_mask(64, 30, first, CPU, 19)


# ---- Kernels ---------------------------------------------------------------------------------------------------------


def attend_by_loop(q, k, v, visible, scale):
    """Attention one query at a time: q, k, v (B, T, H, D), visible (B, 1, T, T) -> (B, T, H, D)."""
    out = torch.zeros_like(v)
    for b, i, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keys = visible[b, 0, i].nonzero()[:, 0]
        out[b, i, h] = (scale * k[b, keys, h] @ q[b, i, h]).softmax(0) @ v[b, keys, h]
    return out


def case_of_kernels(tokens: int = 13, width: int = 16):
    q, k, v = (normal(2, tokens, 3, size, seed=seed) for seed, size in enumerate((width, width, 16)))
    starts = torch.zeros(2, tokens, dtype=torch.bool)
    starts[0, [4, 9]] = starts[1, 0] = starts[1, 7] = True
    return (q, k, v), document_first(starts)


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("by_document", [False, True])
@pytest.mark.parametrize("width", [16, 12])
def test_sdpa_equals_the_loop(window, by_document, width):
    qkv, document = case_of_kernels(width=width)
    visible = visible_by_loop(13, window, document.tolist() if by_document else 2 * [13 * [0]])
    mask = dense_mask(13, window, document if by_document else None, CPU)
    torch.testing.assert_close(attend_sdpa(*qkv, mask, 0.3), attend_by_loop(*qkv, visible, 0.3), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("tokens", [13, 130])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("by_document", [False, True])
@pytest.mark.parametrize("width", [16, 12])
@torch.no_grad()
def test_flex_equals_sdpa(tokens, window, by_document, width):
    """130 tokens are two of FlexAttention's blocks of 128, the second partial. Width: of queries and keys."""
    qkv, document = case_of_kernels(tokens, width)
    shared = (tokens, window, document if by_document else None, CPU)
    expected = attend_sdpa(*qkv, dense_mask(*shared), 0.3)
    torch.testing.assert_close(attend_flex(*qkv, flex_mask(*shared), 0.3), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_zeros_beside_narrow_queries_and_keys_change_no_score():
    q, k, v = case_of_kernels(width=12)[0]
    wide = of_one_width(q, k, v)
    assert [x.size(-1) for x in wide] == [16, 16, 16] and wide[2] is v
    torch.testing.assert_close(attend_sdpa(*wide, None, 0.3), attend_sdpa(q, k, v, None, 0.3), atol=1e-6, rtol=0)
    assert all(x is y for x, y in zip(of_one_width(*wide), wide, strict=True))


def test_varlen_gets_queries_and_keys_of_the_width_of_values(monkeypatch):
    """FlashAttention runs on GPUs only: in its place stands one that records the shapes."""
    seen = []

    def record(q, k, v, *_, **__):
        seen.extend(tuple(x.shape) for x in (q, k, v))
        return v

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", record)
    (q, k, v), document = case_of_kernels(width=12)
    assert attend_varlen(q, k, v, varlen_mask(13, None, document, CPU), 0.3).shape == v.shape
    assert seen == [(26, 3, 16)] * 3


# ---- The choice ------------------------------------------------------------------------------------------------------


PACKED = Model(document_mask=True, window_tokens=4)


@pytest.fixture
def hopper(monkeypatch):
    """A pretended H100 with FlashAttention 3. Returns the list of activated and restored versions."""
    calls = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", calls.append, raising=False)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda: calls.append("restored"), raising=False)
    monkeypatch.setattr(attention, "PROBED", torch.device("cpu"))
    monkeypatch.setitem(attention.KERNELS, "varlen", attention.KERNELS["varlen"]._replace(attend=attend_as_varlen))
    return calls


def attend_as_varlen(q, k, v, mask, scale):
    boundaries, left, longest = mask
    assert (boundaries[-1], left, longest, q.dtype) == (32, 15, 32, torch.bfloat16)
    return attend_sdpa(q, k, v, None, scale)


def fail_to_launch(*_):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")


def test_auto_takes_flash_attention_3_where_it_launches(hopper):
    assert choose_kernel(PACKED, on_cuda=True) == ("varlen", "FlashAttention 3 runs here")
    assert hopper == ["FA3"]


def test_auto_falls_back_where_flash_attention_3_fails_at_its_launch(hopper, monkeypatch):
    broken = attention.KERNELS["varlen"]._replace(attend=fail_to_launch)
    monkeypatch.setitem(attention.KERNELS, "varlen", broken)
    kernel, reason = choose_kernel(PACKED, on_cuda=True)
    assert kernel == "flex" and reason == ("FlashAttention 3 does not run here "
                                           "(CUDA error: no kernel image is available for execution on the device)")
    assert hopper == ["FA3", "restored"]
    with pytest.raises(ValueError, match="flash FA3: its package is missing or does not run here .*no kernel image"):
        use_flash(replace(PACKED, attention="varlen", flash="FA3"), on_cuda=True)


def test_auto_falls_back_where_flash_attention_3_is_not_installed(hopper, monkeypatch):
    def missing(version):
        raise ImportError("No module named 'flash_attn_interface'")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", missing)
    kernel, reason = choose_kernel(PACKED, on_cuda=True)
    assert kernel == "flex" and "No module named 'flash_attn_interface'" in reason and not hopper


@pytest.mark.parametrize(("capability", "dtype", "changes", "kernel"), [
    ((8, 9), torch.bfloat16, {}, "flex"), ((12, 0), torch.bfloat16, {}, "flex"), ((9, 0), torch.float32, {}, "flex"),
    ((9, 0), torch.bfloat16, {"document_mask": False}, "flex"), ((9, 0), torch.bfloat16, {"attention": "sdpa"}, "sdpa"),
    ((9, 0), torch.bfloat16, {"document_mask": False, "window_tokens": None}, "sdpa")])
def test_nothing_is_launched_where_flash_attention_3_cannot_help(hopper, monkeypatch, capability, dtype, changes, kernel):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choose_kernel(replace(PACKED, **changes), on_cuda=True, dtype=dtype)[0] == kernel
    assert choose_kernel(replace(PACKED, attention="auto"), on_cuda=False)[0] == "sdpa"
    assert not hopper
