"""Connections between layers, compared with their definitions."""

from dataclasses import replace

import pytest
import torch

from configs.notation import parse_skips
from configs.schema import Model
from model import GPT, DynamicMixture, StaticMixture, Streams

CONFIG = Model(layers=4, dim=32, head_dim=16, zero_init_projections=False, softcap="none")


def build(**changes: object) -> GPT:
    torch.manual_seed(0)
    return GPT(replace(CONFIG, **changes), vocab_size=40, max_tokens=12)


def history(count: int) -> list[torch.Tensor]:
    return [torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(i)) for i in range(count)]


TOKENS = torch.arange(12).view(1, 12)


def test_skips_are_parsed():
    assert parse_skips(("0>2", "1>2"), 4) == ((0, 2), (1, 2))


@pytest.mark.parametrize(("skip", "message"), [("3-6", "SOURCE>TARGET.*'3-6'"), ("2>1", "later one of 4.*'2>1'"),
                                               ("1>4", "later one of 4"), (">", "SOURCE>TARGET")])
def test_invalid_skips_are_refused(skip, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, skips=(skip,))


def test_a_skip_adds_its_share_of_the_output_of_its_source_layer():
    streams, states = Streams(replace(CONFIG, skips=("0>2",), skip_weight=0.3)), history(3)
    torch.testing.assert_close(streams.add_skips(states[2], 2, states), states[2] + 0.3 * states[1])
    assert streams.add_skips(states[1], 1, states[:2]) is states[1]


def test_backout_subtracts_half_of_the_output_of_a_layer():
    streams, states = Streams(replace(CONFIG, backout=1)), history(5)
    torch.testing.assert_close(streams.subtract_backout(states[4], states), states[4] - 0.5 * states[2])


def test_shared_attention_input_is_read_by_all_later_layers():
    streams, states = Streams(replace(CONFIG, shared_attention_input=1)), history(4)
    assert [streams.attention_input(layer, states) is states[2] for layer in range(4)] == [False, False, True, True]
    assert streams.attention_input(1, states) is None
    assert (build(shared_attention_input=1)(TOKENS) - build()(TOKENS)).abs().max() > 1e-3


def test_dense_mixtures_equal_their_formulas():
    states = history(3)
    static, dynamic = StaticMixture(CONFIG, 3), DynamicMixture(CONFIG, 3)
    torch.testing.assert_close(static(states), states[2])
    torch.testing.assert_close(dynamic(states), states[2])
    static.weight.data = torch.tensor([0.2, -1.0, 0.5])
    torch.testing.assert_close(static(states), 0.2 * states[0] - states[1] + 0.5 * states[2])
    dynamic.down.data.normal_()
    x = states[2] / states[2].square().mean(-1, keepdim=True).sqrt()
    weights = 0.1 * torch.nn.functional.gelu(x @ dynamic.up.T) @ dynamic.down.T + torch.tensor([0.0, 0.0, 1.0])
    expected = sum(weights[..., i, None] * states[i] for i in range(3))
    torch.testing.assert_close(dynamic(states), expected, atol=1e-5, rtol=1e-5)


def test_residual_growth_scales_the_stream_by_its_factor_per_layer():
    config = replace(CONFIG, residual_growth=1.21, zero_init_projections=True)
    torch.manual_seed(0)
    model = GPT(config, vocab_size=40, max_tokens=12)
    outputs = []
    model.blocks[-1].register_forward_hook(lambda _m, _i, out: outputs.append(out))
    start, _ = model.embed_tokens(TOKENS, None)
    model(TOKENS)
    torch.testing.assert_close(outputs[0], start * 1.21**4)


def test_streams_are_built_only_for_techniques_that_are_on():
    assert build().streams is None
    assert build(backout=0).streams is not None and build(shared_attention_input=0).streams is not None
