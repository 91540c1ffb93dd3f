"""Attention: positions, masks, windows, and the three kernels against loops over pairs of tokens."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Model
from layers.attention import Around, Attention, Rotary
from layers.kernels import KERNELS, attend_flex, attend_sdpa, dense_mask, document_index, flex_mask, varlen_mask
from model import GPT

CPU = torch.device("cpu")
SMALL = Model(layers=2, dim=32, head_dim=16, norm_embedding=False)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="flex and varlen attention train on CUDA only")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def scramble(module: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Every parameter random and none zero, so that nothing hides behind a zero projection."""
    rng = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        noise = torch.randn(p.shape, generator=rng)
        p.copy_(noise / p.shape[-1] ** 0.5 if p.ndim == 2 else p + 0.5 * noise)
    return module


def build(config: Model, **options) -> GPT:
    return scramble(GPT(config, **({"vocab_size": 40, "max_tokens": 32, "document_start": 0} | options)))


def some_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(2))


# ---- Rotary ----------------------------------------------------------------------------------------------------------


def rotary(position: str = "rotary", head_dim: int = 16, base: float = 100.0, longest: int = 40) -> Rotary:
    return Rotary(Model(dim=head_dim, head_dim=head_dim, position=position, rotary_base=base), longest)


def frequencies(position: str, head_dim: int, base: float) -> list[float]:
    """From 1 down to 1/base in equal ratios; for half_rotary on half of the pairs, the others at rest."""
    moving = head_dim // (4 if position == "half_rotary" else 2)
    return [base ** (-i / max(moving - 1, 1)) for i in range(moving)] + [0.0] * (head_dim // 2 - moving)


@pytest.mark.parametrize("position", ["rotary", "half_rotary"])
@pytest.mark.parametrize("head_dim", [4, 8, 16])
def test_rotary_turns_each_pair_by_its_own_angle(position, head_dim):
    x = normal(2, 11, 3, head_dim)
    turned = rotary(position, head_dim)(x)
    pairs, pairs_turned = (torch.complex(*z.chunk(2, dim=-1)) for z in (x, turned))
    for i, frequency in enumerate(frequencies(position, head_dim, 100.0)):
        for t in range(11):
            turn = complex(math.cos(t * frequency), -math.sin(t * frequency))
            torch.testing.assert_close(pairs_turned[:, t, :, i], pairs[:, t, :, i] * turn, atol=1e-5, rtol=0)


@pytest.mark.parametrize("position", ["rotary", "half_rotary"])
def test_rotary_scores_depend_on_relative_position_alone(position):
    q, k = normal(16), normal(16, seed=1)
    turned_q, turned_k = (rotary(position)(x.expand(1, 30, 1, 16))[0, :, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    for shift in (1, 7, 20):
        torch.testing.assert_close(scores[shift:, shift:], scores[:-shift, :-shift], atol=1e-4, rtol=0)
    assert scores[:, 0].std() > 0.1
    torch.testing.assert_close(scores[0, 0], q @ k)


def test_rotary_keeps_lengths_and_the_first_position():
    x = normal(1, 20, 2, 16)
    turned = rotary()(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])
    assert (turned[:, 1:] - x[:, 1:]).abs().amax(dim=(0, 1, 2)).min() > 0.01


def test_half_rotary_leaves_half_the_dimensions_as_they_are():
    x = normal(1, 20, 2, 16)
    moved = (rotary("half_rotary")(x) - x).abs().amax(dim=(0, 1, 2)) > 0.01
    assert moved.tolist() == 2 * (4 * [True] + 4 * [False])
    still = [*range(4, 8), *range(12, 16)]
    assert torch.equal(rotary("half_rotary")(x)[..., still], x[..., still])


def test_rotary_computes_in_float32_and_returns_the_input_dtype():
    x = normal(1, 20, 2, 16).bfloat16()
    assert torch.equal(rotary()(x), rotary()(x.float()).bfloat16())


# ---- Masks -----------------------------------------------------------------------------------------------------------


def seen_by_loop(tokens: int, window: int | None, document: list[list[int]]) -> torch.Tensor:
    """May query i see key j? The definition, pair by pair: (B, 1, T, T)."""
    return torch.tensor([[[[j <= i and (window is None or i - j < window) and row[i] == row[j]
                            for j in range(tokens)] for i in range(tokens)]] for row in document])


def seen_by_boundaries(boundaries: list[int], left: int, rows: int, tokens: int) -> torch.Tensor:
    """What packed attention sees in the stream of rows x tokens: (N, N)."""
    seen = torch.zeros(rows * tokens, rows * tokens, dtype=torch.bool)
    for start, stop in zip(boundaries, boundaries[1:], strict=False):
        for i in range(start, stop):
            seen[i, max(start, i - left):i + 1] = True
    return seen


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
                       seen_by_loop(starts.size(1), window, document.tolist()))


@pytest.mark.parametrize("window", [1, 2, 5, 6, 9])
def test_dense_mask_of_a_window_alone_serves_every_row(window):
    assert torch.equal(dense_mask(6, window, None, CPU), seen_by_loop(6, window, [[0] * 6]))


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
    seen = mask.mask_mod(b, torch.tensor(0), i, j).expand(rows, tokens, tokens)
    assert torch.equal(seen[:, None], seen_by_loop(tokens, window, document.tolist()))


@settings(deadline=None)
@given(starts_and_window())
def test_varlen_boundaries_mean_the_dense_mask(case):
    starts, window = case
    rows, tokens = starts.shape
    document = document_index(starts)
    boundaries, left = varlen_mask(tokens, window, document, CPU)
    assert boundaries.dtype == torch.int32
    expected = torch.block_diag(*seen_by_loop(tokens, window, document.tolist())[:, 0]).bool()
    assert torch.equal(seen_by_boundaries(boundaries.tolist(), left, rows, tokens), expected)


# ---- Kernels ---------------------------------------------------------------------------------------------------------


def attend_by_loop(q, k, v, seen, scale):
    """softmax over the keys that each query sees, one query at a time: (B, T, H, D) and (B, 1, T, T)."""
    out = torch.zeros_like(v)
    for b, i, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keys = seen[b, 0, i].nonzero()[:, 0]
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
    seen = seen_by_loop(13, window, document.tolist() if by_document else 2 * [13 * [0]])
    mask = dense_mask(13, window, document if by_document else None, CPU)
    torch.testing.assert_close(attend_sdpa(*qkv, mask, 0.3), attend_by_loop(*qkv, seen, 0.3), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("tokens", [13, 130])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("by_document", [False, True])
@torch.no_grad()
def test_flex_equals_sdpa(tokens, window, by_document):
    """130 tokens: more than one of FlexAttention's blocks of 128, the last one ragged."""
    qkv, document = case_of_kernels(tokens)
    shared = (tokens, window, document if by_document else None, CPU)
    expected = attend_sdpa(*qkv, dense_mask(*shared), 0.3)
    torch.testing.assert_close(attend_flex(*qkv, flex_mask(*shared), 0.3), expected, atol=1e-5, rtol=0)


@needs_cuda
@pytest.mark.parametrize("kernel", ["flex", "varlen"])
@pytest.mark.parametrize("window", [None, 20])
def test_kernels_train_alike_on_cuda(kernel, window):
    config = Model(layers=2, dim=128, head_dim=64, document_mask=True, window_tokens=window)
    tokens = some_tokens(2, 150).cuda()
    tokens[:, ::37] = 0
    results = []
    for name in ("sdpa", kernel):
        gpt = build(replace(config, attention=name), max_tokens=150, on_cuda=True, dtype=torch.bfloat16).cuda()
        loss = gpt(tokens, tokens)
        results.append([loss.detach()[None], *torch.autograd.grad(loss, list(gpt.parameters()))])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() < 0.03 * expected.norm()


# ---- The module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {}, {"qk_norm": True}, {"attention_scale": 0.7}, {"biases": True}, {"position": "rotary"},
    {"qk_norm": True, "attention_scale": 0.12, "biases": True, "position": "half_rotary"},
], ids=lambda changes: "+".join(changes) or "plain")
def test_attention_equals_its_definition(changes):
    """Project, normalise, rotate, attend, project back."""
    config = replace(SMALL, **({"qk_norm": False, "position": "none"} | changes))
    attention, x = scramble(Attention(config, 9, mixes_value_embed=False, kernel=attend_sdpa)), normal(1, 9, 32)
    linear = {name: lambda z, layer=layer: z @ layer.weight.T + (0 if layer.bias is None else layer.bias)
              for name, layer in attention.named_children() if name in "qkvout"}
    q, k, v = (linear[name](x).view(1, 9, 2, 16) for name in "qkv")
    if config.qk_norm:
        q, k = (z * 4 / z.norm(dim=-1, keepdim=True) for z in (q, k))
    if "rotary" in config.position:
        q, k = (Rotary(config, 9)(z) for z in (q, k))
    mixed = attend_by_loop(q, k, v, seen_by_loop(9, None, [[0] * 9]), config.attention_scale or 0.25)
    torch.testing.assert_close(attention(x, Around()), linear["out"](mixed.reshape(1, 9, 32)), atol=1e-5, rtol=0)


def test_qk_norm_makes_scores_blind_to_the_size_of_queries_and_keys():
    attention, x = scramble(Attention(SMALL, 9, mixes_value_embed=False, kernel=attend_sdpa)), normal(1, 9, 32)
    before = attention(x, Around())
    with torch.no_grad():
        attention.q.weight *= 5
        attention.k.weight *= 0.2
    torch.testing.assert_close(attention(x, Around()), before, atol=1e-4, rtol=0)


def test_values_are_mixed_with_the_value_embedding():
    attention = scramble(Attention(SMALL, 9, mixes_value_embed=True, kernel=lambda q, k, v, mask, scale: v))
    x, embed = normal(2, 9, 32), normal(2, 9, 32, seed=1)
    own, other = attention.mix_value.weight.tolist()
    expected = (own * x @ attention.v.weight.T + other * embed) @ attention.out.weight.T
    torch.testing.assert_close(attention(x, Around(value_embed=embed)), expected, atol=1e-5, rtol=0)
    fresh = Attention(SMALL, 9, mixes_value_embed=True, kernel=attend_sdpa)
    assert fresh.mix_value.weight.tolist() == [0.5, 0.5]


# ---- Windows in the model --------------------------------------------------------------------------------------------


@torch.no_grad()
def reach(model: GPT, **options) -> int:
    """How far behind itself a changed token still moves the logits, of 24 tokens, the change at position 2."""
    tokens = some_tokens(1, 24)
    changed = tokens.clone()
    changed[0, 2] = tokens[0, 2] % 39 + 1
    moved = (model(tokens, **options) - model(changed, **options)).abs().amax(-1)[0] > 1e-6
    assert not moved[:2].any() and moved[2:2 + moved.sum()].all()
    return int(moved.sum()) - 1


@pytest.mark.parametrize(("layers", "window", "every", "expected"), [
    (1, 4, 0, 3), (2, 4, 0, 6), (3, 4, 0, 9), (2, 1, 0, 0), (2, None, 0, 21),
    (2, 4, 1, 21), (2, 4, 2, 21), (3, 4, 2, 21), (2, 4, 3, 6),
])
def test_each_layer_reaches_one_window_back(layers, window, every, expected):
    gpt = build(replace(SMALL, layers=layers, window_tokens=window, full_attention_every=every))
    assert reach(gpt) == expected


@pytest.mark.parametrize(("window", "expected"), [(None, 6), (2, 2), (6, 10), (24, 21)])
def test_scheduled_window_overrides_the_configured_one(window, expected):
    gpt = build(replace(SMALL, window_tokens=4))
    assert reach(gpt, window=window) == expected
    assert reach(gpt) == 6


def test_full_layers_ignore_the_scheduled_window():
    assert reach(build(replace(SMALL, window_tokens=4, full_attention_every=2)), window=1) == 21


def test_loss_uses_the_scheduled_window():
    gpt, tokens = build(replace(SMALL, window_tokens=4)), some_tokens(2, 12)
    expected = torch.nn.functional.cross_entropy(gpt(tokens, window=2).flatten(0, 1), tokens.flatten(), reduction="sum")
    torch.testing.assert_close(gpt(tokens, tokens, window=2), expected)
    assert abs(gpt(tokens, tokens) - expected) > 1e-3


def test_layers_of_one_window_share_their_mask(monkeypatch):
    built = []

    def count(tokens, window, document, device):
        built.append(window)
        return dense_mask(tokens, window, document, device)

    monkeypatch.setitem(KERNELS, "sdpa", (count, KERNELS["sdpa"][1]))
    build(replace(SMALL, layers=6, window_tokens=4, full_attention_every=3))(some_tokens(1, 8))
    assert sorted(built, key=str) == [4, None]
