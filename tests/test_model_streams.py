"""Connections between layers against their definitions."""

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


def test_skips_are_read_from_words():
    assert parse_skips(("0>2", "1>2"), 4) == ((0, 2), (1, 2))


@pytest.mark.parametrize(("word", "message"), [("3-6", "SOURCE>TARGET.*'3-6'"), ("2>1", "later one of 4.*'2>1'"),
                                               ("1>4", "later one of 4"), (">", "SOURCE>TARGET")])
def test_other_words_are_refused(word, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, skips=(word,))


def test_a_skip_adds_its_share_of_what_the_source_wrote():
    streams, have = Streams(replace(CONFIG, skips=("0>2",), skip_weight=0.3)), history(3)
    torch.testing.assert_close(streams.add_skips(have[2], 2, have), have[2] + 0.3 * have[1])
    assert streams.add_skips(have[1], 1, have[:2]) is have[1]


def test_backout_takes_back_half_of_what_a_layer_wrote():
    streams, have = Streams(replace(CONFIG, backout=1)), history(5)
    torch.testing.assert_close(streams.subtract_backout(have[4], have), have[4] - 0.5 * have[2])


def test_the_same_earlier_stream_is_read_by_all_later_layers():
    streams, have = Streams(replace(CONFIG, shared_attention_input=1)), history(4)
    assert [streams.attention_input(layer, have) is have[2] for layer in range(4)] == [False, False, True, True]
    assert streams.attention_input(1, have) is None
    assert (build(shared_attention_input=1)(TOKENS) - build()(TOKENS)).abs().max() > 1e-3


def test_dense_mixtures():
    have = history(3)
    static, dynamic = StaticMixture(CONFIG, 3), DynamicMixture(CONFIG, 3)
    torch.testing.assert_close(static(have), have[2])
    torch.testing.assert_close(dynamic(have), have[2])
    static.weight.data = torch.tensor([0.2, -1.0, 0.5])
    torch.testing.assert_close(static(have), 0.2 * have[0] - have[1] + 0.5 * have[2])
    dynamic.down.data.normal_()
    x = have[2] / have[2].square().mean(-1, keepdim=True).sqrt()
    weights = 0.1 * torch.nn.functional.gelu(x @ dynamic.up.T) @ dynamic.down.T + torch.tensor([0.0, 0.0, 1.0])
    torch.testing.assert_close(dynamic(have), sum(weights[..., i, None] * have[i] for i in range(3)), atol=1e-5, rtol=1e-5)


def test_growth_alone_makes_the_stream_grow_by_its_factor_a_layer():
    config = replace(CONFIG, residual_growth=1.21, zero_init_projections=True)
    torch.manual_seed(0)
    model = GPT(config, vocab_size=40, max_tokens=12)
    seen = []
    model.blocks[-1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    start, _ = model.embed_tokens(TOKENS, None)
    model(TOKENS)
    torch.testing.assert_close(seen[0], start * 1.21**4)


def test_nothing_is_built_where_nothing_is_asked():
    assert build().streams is None
    assert build(backout=0).streams is not None and build(shared_attention_input=0).streams is not None
