"""Connections between layers, compared with their definitions."""

from dataclasses import replace

import pytest
import torch

from configs.notation import DenseSkip, parse_dense_skips, parse_skips
from configs.schema import Model
from model import GPT, InputMixture, Streams, TokenGates, TokenNetwork, dense_skips, gate_starts

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


def test_dense_skips_are_parsed():
    assert parse_dense_skips(("in>1", "0>4=-0.5", "ve1>2"), 4) == (
        DenseSkip("in", 1, 0.0), DenseSkip("0", 4, -0.5), DenseSkip("ve1", 2, 0.0))


@pytest.mark.parametrize(("word", "message"), [("3-6", "SOURCE>TARGET.*'3-6'"), ("2>1", "'2>1' must end at a layer after"),
                                               ("1>5", "'1>5' must end"), ("0>1=x", "'0>1=x'"), ("ve>1", "'ve>1'"),
                                               ("ve0>1", "0 value_embeds.*ve0")])
def test_invalid_dense_skips_are_refused(word, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, dense="mudd", dense_skips=(word,))


def test_a_skip_adds_the_share_of_each_token_of_the_output_of_its_source_layer():
    streams, states, share = Streams(replace(CONFIG, skips=("0>2",))), history(3), torch.rand(2, 3, 1)
    torch.testing.assert_close(streams.add_skips(states[2], 2, states, share), states[2] + share * states[1])
    assert streams.add_skips(states[1], 1, states[:2], None) is states[1]


def test_backout_subtracts_half_of_the_output_of_a_layer():
    streams, states = Streams(replace(CONFIG, backout=1)), history(5)
    torch.testing.assert_close(streams.after_blocks(states[4], states, []), states[4] - 0.5 * states[2])


def test_shared_attention_input_is_read_by_all_later_layers():
    streams, states = Streams(replace(CONFIG, shared_attention_input=1)), history(4)
    assert [streams.attention_input(layer, states) is states[2] for layer in range(4)] == [False, False, True, True]
    assert streams.attention_input(1, states) is None
    assert (build(shared_attention_input=1)(TOKENS) - build()(TOKENS)).abs().max() > 1e-3


def test_token_network_equals_its_formula_and_starts_at_its_starts():
    network, x = TokenNetwork(CONFIG, [0.25, -1.0, 0.0], learned_scale=True), history(1)[0]
    torch.testing.assert_close(network(x), torch.tensor([0.25, -1.0, 0.0]).expand(2, 3, 3))
    network.down.data.normal_()
    network.scale.data.fill_(0.7)
    hidden = torch.nn.functional.gelu(x @ network.up.T)
    torch.testing.assert_close(network(x), 0.7 * (hidden @ network.down.T + torch.tensor([2.5, -10.0, 0.0])))


@pytest.mark.parametrize("dense", ["denseformer", "mudd"])
def test_dense_mixtures_equal_their_formula(dense):
    config = replace(CONFIG, dense=dense, dense_skips=("in>3=0.2", "1>3=-1", "ve0>3"), value_embeds=1)
    states, table = history(4), [torch.randn(2, 3, 32)]
    mixture = InputMixture(config, dense_skips(config)[3])
    mixed, gates = mixture(states[3], states, table)
    torch.testing.assert_close(mixed, states[3] + 0.2 * states[0] - states[2])
    assert gates == {}
    for parameter in mixture.parameters():
        parameter.data.normal_()
    weights = mixture.weight.expand(2, 3, 3) if dense == "denseformer" else mixture.network(states[3])
    expected = states[3] + sum(weights[..., i, None] * x for i, x in enumerate((states[0], states[2], table[0])))
    torch.testing.assert_close(mixture(states[3], states, table)[0], expected)


def test_dense_without_names_connects_every_earlier_stream():
    connections = dense_skips(replace(CONFIG, dense="mudd"))
    assert {target: [skip.source for skip in skips] for target, skips in connections.items()} == {
        1: ["in"], 2: ["in", "0"], 3: ["in", "0", "1"], 4: ["in", "0", "1", "2"]}


def test_dense_gates_compute_values_sums_and_injection_beside_the_mixture():
    config = replace(CONFIG, dense="mudd", dense_skips=("in>3", "1>3"), dense_gates=(3,), inject=True, residual_growth=1.21,
                     value_embeds=1, value_gates=True, bigram_buckets=11)
    mixture, states = InputMixture(config, dense_skips(config)[3]), history(4)
    mixed, gates = mixture(states[3], states, [])
    torch.testing.assert_close(mixed, states[3])
    starts = {"value": [2.0, 2.0], "sum1": [1.1, 1.0], "inject": [0.0, 0.05], "sum2": [1.1, 1.0]}
    for name, values in starts.items():
        torch.testing.assert_close(gates[name], torch.tensor(values).expand(2, 3, 2), msg=name)
    torch.testing.assert_close(gates["values"], torch.zeros(2, 3, 32))
    mixture.network.bias.data.normal_()
    v0, v1, v2, m0, m1, m2 = (0.1 * mixture.network.bias[:6]).tolist()
    mixed, gates = mixture(states[3], states, [])
    torch.testing.assert_close(mixed, (1 + m2) * states[3] + m0 * states[0] + m1 * states[2])
    torch.testing.assert_close(gates["values"], v0 * states[0] + v1 * states[2] + v2 * states[3])


def test_token_gates_serve_the_layers_up_to_the_next_that_reads():
    config = replace(CONFIG, xsa=True, xsa_layers=(0, 3), head_gates=True, head_gate_layers=(1,), inject=True,
                     skips=("0>2",), skip_weight=0.3, gate_layers=(0, 2), dynamic_heads=(3,), attention_free=(2,))
    gates = [TokenGates(config, layer)(torch.randn(2, 3, 32)) for layer in (0, 2)]
    assert [sorted(of) for of in gates] == [[0, 1], [2, 3]]
    assert gate_starts(config, 2) == {"skip": [0.3]}
    torch.testing.assert_close(gates[0][1].head, torch.full((2, 3, 2), 0.25))
    torch.testing.assert_close(gates[1][3].dynamic, torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(2, 3, 4))
    assert gates[0][1].xsa is None and gates[1][3].inject.shape == (2, 3, 1)


def test_residual_growth_scales_the_stream_by_its_factor_per_layer():
    config = replace(CONFIG, residual_growth=1.21, zero_init_projections=True)
    torch.manual_seed(0)
    model = GPT(config, vocab_size=40, max_tokens=12)
    outputs = []
    model.blocks[-1].register_forward_hook(lambda _m, _i, out: outputs.append(out))
    start, *_ = model.embed_tokens(TOKENS, None)
    model(TOKENS)
    torch.testing.assert_close(outputs[0], start * 1.21**4)


def test_streams_are_built_only_for_techniques_that_are_on():
    assert build().streams is None
    assert build(backout=0).streams is not None and build(shared_attention_input=0).streams is not None
