"""Parts of attention, compared with loops over tokens and heads in float64."""

import math
from dataclasses import replace

import pytest
import torch

from configs.schema import Model
from kernels.attention import attend_sdpa, dense_mask
from model import (
    Attention,
    DynamicHeads,
    ExclusiveHeads,
    HeadGates,
    LayerInputs,
    Rotary,
    ValueGates,
    offset_keys,
    pair_heads,
    unpair_heads,
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


def test_head_gates_equal_the_formula():
    gates, y, x = scrambled(HeadGates(CONFIG)), normal(B, T, H, D), normal(B, T, H * D, seed=1)
    output = gates(y, x)
    for h in range(H):
        gate = 2 / (1 + torch.exp(-(x[..., :12] @ gates.weight[h])))
        torch.testing.assert_close(output[:, :, h], gate[..., None] * y[:, :, h])


def test_value_gates_equal_the_formula():
    gates, v = scrambled(ValueGates(CONFIG)), normal(B, T, H, D)
    e, x = normal(B, T, H * D, seed=1), normal(B, T, H * D, seed=2)
    output = gates(v, e, x)
    for h in range(H):
        gate = 2 / (1 + torch.exp(-(x[..., :6] @ gates.weight[h, :6] + e[..., :6] @ gates.weight[h, 6:])))
        torch.testing.assert_close(output[:, :, h], v[:, :, h] + gate[..., None] * e[..., h * D:(h + 1) * D])


def test_exclusive_heads_remove_the_projection_onto_their_value():
    heads, y, v = ExclusiveHeads(CONFIG).double(), normal(B, T, H, D), normal(B, T, H, D, seed=1)
    assert torch.equal(heads(y, v), y)
    heads.alpha.data.fill_(20.0)
    assert (heads(y, v) * v).sum(-1).abs().max() < 1e-10
    heads.alpha.data.fill_(math.atanh(0.25))
    torch.testing.assert_close((heads(y, v) * v).sum(-1), 0.75 * (y * v).sum(-1))


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
    heads = scrambled(DynamicHeads(replace(CONFIG, dynamic_window=window)))
    q, k, v, x = normal(1, T, H, D), normal(1, T, H, D, seed=1), normal(1, T, H, D, seed=2), normal(1, T, H * D, seed=3)
    first_BT = torch.where(torch.arange(T) < second, 0, second)[None] if second else None
    output = heads((q, k, v), x, first_BT, 0.3)
    for t in range(T):
        first = max(t - window + 1, 0 if t < second else second)
        attention = torch.stack([torch.stack([0.3 * q[0, t, g] @ k[0, s, g] for s in range(first, t + 1)]).softmax(0)
                                 for g in range(H)])
        read, write = (heads.weight @ x[0, t]).chunk(2)
        read = (1 + read) / (1 + read).square().mean().sqrt()
        mixed = read @ attention
        for h in range(H):
            expected = write[h] * sum(w * v[0, s, h] for w, s in zip(mixed, range(first, t + 1), strict=True))
            torch.testing.assert_close(output[0, t, h], expected, atol=1e-5, rtol=1e-5)


def test_yarn_lowers_only_low_frequencies_and_sharpens_the_softmax():
    config = replace(CONFIG, head_dim=16, dim=32, rotary_base=1e4, window_tokens=512, yarn=True)
    rotary = Rotary(config, 64, first_window=512)
    frequency, slowed = rotary.frequency, yarn_frequencies(rotary.frequency, 512, 1024)
    turns = 512 * frequency / (2 * math.pi)
    torch.testing.assert_close(slowed[turns > 32], frequency[turns > 32])
    torch.testing.assert_close(slowed[turns < 1], frequency[turns < 1] / 2)
    between = (turns > 1) & (turns < 32)
    slowing = slowed[between] / frequency[between]
    assert between.any() and (slowing < 1).all() and (slowing > 0.5).all()
    assert yarn_softmax_factor(512, 1024) == pytest.approx(1 + 0.2 * math.log(2))
    assert yarn_softmax_factor(512, 512) == 1.0
    plain, x = Rotary(config, 64), torch.randn(1, 9, 2, 16)
    torch.testing.assert_close(rotary(x, 512), plain(x))
    assert (rotary(x, 2048) - plain(x)).abs().max() > 1e-4


@pytest.mark.parametrize(("flag", "value"), [("head_gates", True), ("xsa", True), ("dynamic_heads", (0,)),
                                             ("projection_gains", True)])
def test_gradients_reach_techniques_that_start_as_the_identity(flag, value):
    attention = Attention(replace(CONFIG, zero_init_projections=False, **{flag: value}), T, mixes_value_embed=False,
                          attend=attend_sdpa)
    attention(torch.randn(1, T, H * D), LayerInputs()).square().sum().backward()
    new = {name: p for name, p in attention.named_parameters() if name.split(".")[0] not in "qkv" and "out" not in name}
    assert new and all(p.grad.abs().max() > 1e-6 for p in new.values())
