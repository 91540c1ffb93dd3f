"""Parts of attention, compared with loops over tokens and heads in float64."""

import math
from dataclasses import replace

import pytest
import torch

from configs.schema import Model
from kernels.attention import attend_sdpa, dense_mask
from kernels.dynamic_heads import dynamic_heads
from kernels.norms import rms_norm
from model import (
    Attention,
    LayerGates,
    LayerInputs,
    Rotary,
    ValueGates,
    exclusive_heads,
    offset_keys,
    pair_heads,
    unpair_heads,
    windows_until,
    yarn_frequencies,
    yarn_softmax_factor,
)

B, T, H, D = 2, 7, 4, 8
CONFIG = Model(layers=2, dim=H * D, head_dim=D)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scrambled(module: torch.nn.Module) -> torch.nn.Module:
    for i, p in enumerate(module.parameters()):
        p.data = normal(*p.shape, seed=100 + i)
    return module


def test_head_gates_multiply_the_output_of_each_head():
    attention = Attention(replace(CONFIG, zero_init_projections=False), T, mixes_value_embed=False, attend=attend_sdpa)
    x, gate = torch.randn(B, T, H * D), torch.rand(B, T, H)
    heads = []
    attention.out.register_forward_pre_hook(lambda _module, inputs: heads.append(inputs[0].unflatten(-1, (H, D))))
    attention(x, LayerInputs())
    attention(x, LayerInputs(gates=LayerGates(head=gate)))
    torch.testing.assert_close(heads[1], gate[..., None] * heads[0])


def test_value_gates_equal_the_formula():
    gates, v = scrambled(ValueGates(CONFIG)), normal(B, T, H, D)
    e, x = normal(B, T, H * D, seed=1), normal(B, T, H * D, seed=2)
    output = gates(v, e, x, LayerGates())
    for h in range(H):
        gate = 2 / (1 + torch.exp(-(x[..., :6] @ gates.weight[h, :6] + e[..., :6] @ gates.weight[h, 6:])))
        torch.testing.assert_close(output[:, :, h], v[:, :, h] + gate[..., None] * e[..., h * D:(h + 1) * D])
    given, halves = ValueGates(CONFIG, own=False), normal(B, T, 2, seed=3)
    for h in range(H):
        expected = v[:, :, h] + halves[..., h // (H // 2), None] * e[..., h * D:(h + 1) * D]
        torch.testing.assert_close(given(v, e, x, LayerGates(value=halves))[:, :, h], expected)


def test_exclusive_heads_remove_the_projection_onto_their_value():
    y, v, alpha = normal(B, T, H, D), normal(B, T, H, D, seed=1), torch.zeros(B, T, H, dtype=torch.float64)
    assert torch.equal(exclusive_heads(y, v, alpha), y)
    assert (exclusive_heads(y, v, alpha + 20) * v).sum(-1).abs().max() < 1e-10
    torch.testing.assert_close((exclusive_heads(y, v, alpha + math.atanh(0.25)) * v).sum(-1), 0.75 * (y * v).sum(-1))


def test_paired_heads_attend_to_the_keys_of_both_heads():
    """A query attends, in one softmax, to both heads' keys of earlier tokens; at its own token to one of them or both."""
    q, k, v = (normal(1, T, H, D, seed=i) for i in range(3))
    window = 6
    mask = dense_mask(2 * T, window, None, q.device)
    output = unpair_heads(attend_sdpa(pair_heads(q), pair_heads(k), pair_heads(v), mask, 0.3))
    for t in range(T):
        for h in range(H):
            position = 2 * t + h // (H // 2)
            keys = [(s // 2, h % (H // 2) + (s % 2) * (H // 2)) for s in range(max(0, position - window + 1), position + 1)]
            weights = torch.stack([0.3 * q[0, t, h] @ k[0, s, g] for s, g in keys]).softmax(0)
            expected = sum(w * v[0, s, g] for w, (s, g) in zip(weights, keys, strict=True))
            torch.testing.assert_close(output[0, t, h], expected)


def test_unpair_heads_inverts_pair_heads():
    x = normal(B, T, H, D)
    assert torch.equal(unpair_heads(pair_heads(x)), x)


def test_offset_keys_take_unrotated_dimensions_from_the_token_before_in_the_document():
    k, still = normal(1, 5, 2, 4), torch.tensor([False, True, False, True])
    starts = torch.tensor([[True, False, False, True, False]])
    output, unmasked = offset_keys(k, still, starts), offset_keys(k, still, None)
    assert torch.equal(output[..., [0, 2]], k[..., [0, 2]])
    for t, source in enumerate((0, 0, 1, 3, 3)):
        assert torch.equal(output[:, t, :, [1, 3]], k[:, source, :, [1, 3]])
    assert torch.equal(unmasked[:, 3, :, [1, 3]], k[:, 2, :, [1, 3]])


def test_still_dimensions_are_those_that_rotary_does_not_rotate():
    rotary = Rotary(replace(CONFIG, position="half_rotary"), T)
    x = torch.randn(1, T, 1, D)
    moved = (rotary(x) - x).abs().amax((0, 1, 2)) > 1e-6
    assert torch.equal(~moved, rotary.unrotated_D) and rotary.unrotated_D.sum() == D // 2


@pytest.mark.parametrize("window", [1, 3, 6, 7, 30])
@pytest.mark.parametrize("second", [0, 3, 6])
def test_dynamic_heads_equal_the_loop(window, second):
    q, k, v, a, b = (normal(*shape, seed=i).float() for i, shape in enumerate([(1, T, H, D)] * 3 + [(1, T, H)] * 2))
    first_BT = torch.where(torch.arange(T) < second, 0, second)[None] if second else None
    output = dynamic_heads((q, k, v), (rms_norm(a), b), first_BT=first_BT, window=window, scale=0.3)
    for t in range(T):
        first = max(t - window + 1, 0 if t < second else second)
        attention = torch.stack([torch.stack([0.3 * q[0, t, g] @ k[0, s, g] for s in range(first, t + 1)]).softmax(0)
                                 for g in range(H)])
        mixed = a[0, t] / a[0, t].square().mean().sqrt() @ attention
        for h in range(H):
            expected = b[0, t, h] * sum(w * v[0, s, h] for w, s in zip(mixed, range(first, t + 1), strict=True))
            torch.testing.assert_close(output[0, t, h], expected, atol=1e-5, rtol=1e-5)


def test_yarn_lowers_only_low_frequencies_and_sharpens_the_softmax():
    config = replace(CONFIG, head_dim=16, dim=32, rotary_base=1e4, window_tokens=512, yarn=True)
    rotary = Rotary(config, 64)
    frequency, slowed = rotary.frequency, yarn_frequencies(rotary.frequency, (512, 1024))
    turns = 512 * frequency / (2 * math.pi)
    torch.testing.assert_close(slowed[turns > 32], frequency[turns > 32])
    torch.testing.assert_close(slowed[turns < 1], frequency[turns < 1] / 2)
    between = (turns > 1) & (turns < 32)
    slowing = slowed[between] / frequency[between]
    assert between.any() and (slowing < 1).all() and (slowing > 0.5).all()
    assert yarn_softmax_factor((512, 1024)) == pytest.approx(1 + 0.2 * math.log(2))
    assert yarn_softmax_factor((512, 512)) == yarn_softmax_factor((512,)) == 1.0
    plain, x = Rotary(replace(config, yarn=False), 64), torch.randn(1, 9, 2, 16)
    torch.testing.assert_close(rotary(x, 512), plain(x))
    torch.testing.assert_close(rotary(x), plain(x))
    assert (rotary(x, 2048) - plain(x)).abs().max() > 1e-4


def test_yarn_grows_through_its_windows_one_after_another():
    assert windows_until(None, (4, 8, 32)) == (4,) and windows_until(99, (4, 8, 32)) == (4, 8, 32)
    assert windows_until(8, (4, 8, 32)) == (4, 8) and windows_until(9, (4,)) == (4, 9)
    frequency = torch.linspace(1.0, 0.01, 5)
    twice = yarn_frequencies(yarn_frequencies(frequency, (64, 128)), (128, 512))
    torch.testing.assert_close(yarn_frequencies(frequency, (64, 128, 512)), twice)
    assert (twice - yarn_frequencies(frequency, (64, 512))).abs().max() > 1e-3
    factor = yarn_softmax_factor((64, 128, 512))
    assert factor == pytest.approx((1 + 0.2 * math.log(2)) * (1 + 0.2 * math.log(4)))
