"""Attention: positions and windows, against the definition."""

import math
from dataclasses import replace

import pytest
import torch

from configs.schema import Model
from kernels.attention import KERNELS, attend_sdpa, dense_mask
from model import GPT, Attention, LayerInputs, Rotary

SMALL = Model(layers=2, dim=32, head_dim=16, norm_embedding=False)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="flex and varlen attention train on CUDA only")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def scramble(module: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Make every parameter random and non-zero, since a zero projection would hide errors before it."""
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
    """From 1 down to 1/base in equal ratios; half_rotary rotates half of the pairs, the others have frequency 0."""
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


def test_half_rotary_rotates_half_of_the_dimensions():
    x = normal(1, 20, 2, 16)
    moved = (rotary("half_rotary")(x) - x).abs().amax(dim=(0, 1, 2)) > 0.01
    assert moved.tolist() == 2 * (4 * [True] + 4 * [False])
    still = [*range(4, 8), *range(12, 16)]
    assert torch.equal(rotary("half_rotary")(x)[..., still], x[..., still])


def test_rotary_computes_in_float32_and_returns_the_input_dtype():
    x = normal(1, 20, 2, 16).bfloat16()
    assert torch.equal(rotary()(x), rotary()(x.float()).bfloat16())


# ---- The module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {}, {"qk_norm": True}, {"attention_scale": 0.7}, {"biases": True}, {"position": "rotary"},
    {"qk_norm": True, "attention_scale": 0.12, "biases": True, "position": "half_rotary"},
    {"qk_head_dim": 12}, {"qk_head_dim": 8, "qk_norm": True, "biases": True, "position": "half_rotary"},
], ids=lambda changes: "+".join(changes) or "plain")
def test_attention_equals_its_definition(changes):
    """Project, normalise, rotate, attend, project back."""
    config = replace(SMALL, **({"qk_norm": False, "position": "none"} | changes))
    attention, x = scramble(Attention(config, 9, mixes_value_embed=False, attend=attend_sdpa)), normal(1, 9, 32)
    linear = {name: lambda z, layer=layer: z @ layer.weight.T + (0 if layer.bias is None else layer.bias)
              for name, layer in attention.named_children() if name in "qkvout"}
    q, k, v = (linear[name](x).view(1, 9, 2, -1) for name in "qkv")
    width = config.qk_head_dim or 16
    assert q.size(-1) == k.size(-1) == width and v.size(-1) == 16
    if config.qk_norm:
        q, k = (z * width**0.5 / z.norm(dim=-1, keepdim=True) for z in (q, k))
    if "rotary" in config.position:
        q, k = (Rotary(config, 9)(z) for z in (q, k))
    mixed = attend_sdpa(q, k, v, None, config.attention_scale or width**-0.5)
    torch.testing.assert_close(attention(x, LayerInputs()), linear["out"](mixed.reshape(1, 9, 32)), atol=1e-5, rtol=0)


def test_qk_norm_makes_scores_independent_of_the_size_of_queries_and_keys():
    attention, x = scramble(Attention(SMALL, 9, mixes_value_embed=False, attend=attend_sdpa)), normal(1, 9, 32)
    before = attention(x, LayerInputs())
    with torch.no_grad():
        attention.q.weight *= 5
        attention.k.weight *= 0.2
    torch.testing.assert_close(attention(x, LayerInputs()), before, atol=1e-4, rtol=0)


def test_values_are_mixed_with_the_value_embedding():
    attention = scramble(Attention(SMALL, 9, mixes_value_embed=True, attend=lambda q, k, v, mask, scale: v))
    x, embed = normal(2, 9, 32), normal(2, 9, 32, seed=1)
    own, other = attention.mix_value.weight.tolist()
    expected = (own * x @ attention.v.weight.T + other * embed) @ attention.out.weight.T
    torch.testing.assert_close(attention(x, LayerInputs(value_embed=embed)), expected, atol=1e-5, rtol=0)
    fresh = Attention(SMALL, 9, mixes_value_embed=True, attend=attend_sdpa)
    assert fresh.mix_value.weight.tolist() == [0.5, 0.5]


# ---- Windows in the model --------------------------------------------------------------------------------------------


@torch.no_grad()
def reach(model: GPT, **options) -> int:
    """Change the token at position 2 of 24 and return the number of later positions whose logits change."""
    tokens = some_tokens(1, 24)
    changed = tokens.clone()
    changed[0, 2] = tokens[0, 2] % 39 + 1
    moved = (model(tokens, **options) - model(changed, **options)).abs().amax(-1)[0] > 1e-6
    assert not moved[:2].any() and moved[2:2 + moved.sum()].all()
    return int(moved.sum()) - 1


@pytest.mark.parametrize(("layers", "window", "full_layers", "expected"), [
    (1, 4, (), 3), (2, 4, (), 6), (3, 4, (), 9), (2, 1, (), 0), (2, None, (), 21),
    (2, 4, (0, 1), 21), (2, 4, (1,), 21), (3, 4, (1,), 21),
])
def test_each_layer_reaches_one_window_back(layers, window, full_layers, expected):
    gpt = build(replace(SMALL, layers=layers, window_tokens=window, full_attention_layers=full_layers))
    assert reach(gpt) == expected


@pytest.mark.parametrize(("window", "expected"), [(None, 6), (2, 2), (6, 10), (24, 21)])
def test_scheduled_window_overrides_the_configured_one(window, expected):
    gpt = build(replace(SMALL, window_tokens=4))
    assert reach(gpt, window=window) == expected
    assert reach(gpt) == 6


def test_full_layers_ignore_the_scheduled_window():
    assert reach(build(replace(SMALL, window_tokens=4, full_attention_layers=(1,))), window=1) == 21


def test_loss_uses_the_scheduled_window():
    gpt, tokens = build(replace(SMALL, window_tokens=4)), some_tokens(2, 12)
    expected = torch.nn.functional.cross_entropy(gpt(tokens, window=2).flatten(0, 1), tokens.flatten(), reduction="sum")
    torch.testing.assert_close(gpt(tokens, tokens, window=2), expected)
    assert abs(gpt(tokens, tokens) - expected) > 1e-3


def test_layers_of_one_window_share_their_mask(monkeypatch):
    built = []

    def count(tokens, window, *rest):
        built.append(window)
        return dense_mask(tokens, window, *rest)

    monkeypatch.setitem(KERNELS, "sdpa", KERNELS["sdpa"]._replace(mask=count))
    build(replace(SMALL, layers=6, window_tokens=4, full_attention_layers=(2, 5)))(some_tokens(1, 8))
    assert sorted(built, key=str) == [4, None]


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
