"""Auxiliary training losses, compared with loops and with limits."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from configs.schema import Model
from data.tokenizers import prefix_tokens
from kernels.cross_entropy import (
    AuxLossWeights,
    Softcap,
    sampled_cross_entropy,
    softcap,
    softcap_cross_entropy,
    stack_targets,
)
from model import GPT

CONFIG = Model(layers=1, dim=16, head_dim=8, zero_init_projections=False, vocab_multiple=1)
VOCAB = 20
AUX, NO_CAP = AuxLossWeights(torch.tensor([0.5, 0.25])), Softcap("none", 1.0)


def build(**changes: object) -> GPT:
    torch.manual_seed(0)
    return GPT(replace(CONFIG, **changes), vocab_size=VOCAB, max_tokens=8, prefix_of=[-1, *range(VOCAB - 1)])


def some_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(3))


def test_asymmetric_softcap_equals_its_formula():
    z = torch.tensor([-1e4, -5.0, 2.5, 1e4], dtype=torch.float64)
    expected = torch.tensor([0.0, 11.5, 23 / (1 + math.exp(-1)), 23.0], dtype=torch.float64)
    torch.testing.assert_close(softcap(z, "asymmetric", 15.0), expected)


def the_loop(logits, targets, weights) -> torch.Tensor:
    """Sum of all losses, token by token. logits (B, T, V), targets (B, T)."""
    B, T = targets.shape
    return sum(weight * -logits[b, t].log_softmax(-1)[targets[b, t + k]]
               for k, weight in enumerate(weights) for b in range(B) for t in range(T - k))


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.5), (1.0, 0.5, 0.2), (1.0, 0.1, 0.2, 0.3)])
@pytest.mark.parametrize("tokens", [6, 1])
def test_the_loss_of_further_tokens_equals_the_loop(weights, tokens):
    logits, targets = torch.randn(2, tokens, VOCAB), some_tokens(2, tokens)
    aux = AuxLossWeights(torch.tensor(weights[1:]))
    loss = softcap_cross_entropy(logits.flatten(0, 1), *stack_targets(targets, aux, None), NO_CAP)
    torch.testing.assert_close(loss, torch.as_tensor(the_loop(logits, targets, weights)), atol=1e-4, rtol=1e-5)


def test_targets_and_weights_stand_in_order():
    """Next token, further tokens, prefix; -1 where there is none."""
    prefix_of = torch.tensor([-1, 0, 1, -1])
    aux = AUX._replace(prefix=torch.tensor([0.3]))
    targets, weights = stack_targets(torch.tensor([[1, 2, 3], [3, 2, 1]]), aux, prefix_of)
    assert targets.tolist() == [[1, 2, 3, 3, 2, 1], [2, 3, -1, 2, 1, -1], [3, -1, -1, 1, -1, -1], [0, 1, -1, -1, 1, 0]]
    assert weights.tolist() == pytest.approx([1, 0.5, 0.25, 0.3])


def test_one_target_is_pytorchs_cross_entropy_to_the_bit():
    logits, targets = torch.randn(50, VOCAB, requires_grad=True), some_tokens(50)
    losses = (softcap_cross_entropy(logits, *stack_targets(targets[None], AuxLossWeights(), None), NO_CAP),
              F.cross_entropy(logits, targets, reduction="sum"))
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss / 50, logits)[0] for loss in losses))


@pytest.mark.parametrize("kind", ["none", "tanh", "rational", "asymmetric"])
def test_gradients_are_those_of_finite_differences(kind):
    z, weights = torch.randn(3, 7, dtype=torch.float64, requires_grad=True), torch.tensor([1.0, 0.5], dtype=torch.float64)
    targets = torch.tensor([[0, 6, -1], [0, -1, -1]])
    assert torch.autograd.gradcheck(lambda z: softcap_cross_entropy(z, targets, weights, Softcap(kind, 2.0)), z)


def test_prefix_tokens_are_the_longest_proper_prefixes():
    vocabulary = [b"a", b"ab", b"abc", b"b", b"abd", b"", b"abce", b"c"]
    assert prefix_tokens(vocabulary) == [-1, 0, 1, -1, 1, -1, 2, -1]


def test_prefix_tokens_of_a_random_vocabulary_equal_a_search_of_all_pairs():
    rng = torch.Generator().manual_seed(0)
    vocabulary = list({bytes(torch.randint(97, 100, (int(torch.randint(1, 6, (), generator=rng)),), generator=rng).tolist())
                       for _ in range(60)})
    for token, prefix in enumerate(prefix_tokens(vocabulary)):
        proper = [i for i, text in enumerate(vocabulary) if text != vocabulary[token] and vocabulary[token].startswith(text)]
        assert prefix == max(proper, key=lambda i: len(vocabulary[i]), default=-1)


def test_tokens_without_prefix_are_skipped():
    logits, targets, prefix_of = torch.randn(3, 4), torch.tensor([[0, 2, 3]]), torch.tensor([-1, -1, 1, 2])
    rows = stack_targets(targets, AuxLossWeights(prefix=torch.tensor([0.5])), prefix_of)
    log_p = logits.log_softmax(-1)
    expected = -log_p[0, 0] - log_p[1, 2] - log_p[2, 3] - 0.5 * (log_p[1, 1] + log_p[2, 2])
    torch.testing.assert_close(softcap_cross_entropy(logits, *rows, NO_CAP), expected)


def test_sampling_all_classes_equals_the_full_softmax():
    hidden, weight, targets = torch.randn(9, 16), torch.randn(VOCAB, 16), some_tokens(9)
    full = F.cross_entropy(softcap(hidden @ weight.T, "tanh", 5.0), targets, reduction="sum")
    sampled = sampled_cross_entropy(hidden, weight, targets, torch.randperm(VOCAB), Softcap("tanh", 5.0))
    torch.testing.assert_close(sampled, full, atol=1e-4, rtol=1e-5)


def draw(count: int, *key: int) -> torch.Tensor:
    return AuxLossWeights().draw_classes(count, VOCAB, key=key, device=torch.device("cpu")).classes


def test_drawn_classes_depend_on_their_key_alone():
    state = torch.get_rng_state()
    assert torch.equal(draw(7, 1, 2, 3), draw(7, 1, 2, 3)) and torch.equal(state, torch.get_rng_state())
    assert len({tuple(draw(7, *key).tolist()) for key in ((1, 2, 3), (1, 2, 4), (1, 3, 2), (2, 2, 3))}) == 4
    assert sorted(draw(VOCAB, 0, 0, 0).tolist()) == list(range(VOCAB))
    assert AuxLossWeights().draw_classes(0, VOCAB, key=(0,), device=torch.device("cpu")).classes is None
    shares = torch.stack([draw(5, 1, step, 0) for step in range(4000)]).flatten().bincount(minlength=VOCAB) / 4000
    assert (shares - 5 / VOCAB).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5


def test_sampled_partition_function_is_unbiased():
    """exp(loss) - 1 is the other classes' weight over the target's: linear in the sampled weights, so its mean is exact."""
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(1, 16) * 0.5, torch.randn(VOCAB, 16) * 0.5, torch.tensor([4])
    exact = F.cross_entropy(hidden @ weight.T, target).exp() - 1
    drawn = torch.stack([sampled_cross_entropy(hidden, weight, target, draw(5, step), NO_CAP).exp() - 1
                         for step in range(4000)])
    assert abs(drawn.mean() - exact) < 4 * drawn.std() / 4000**0.5


@pytest.mark.parametrize("aux", [AUX, AuxLossWeights(prefix=torch.tensor([0.25])), AuxLossWeights(classes=torch.arange(5))])
def test_validation_loss_excludes_auxiliary_losses(aux):
    model, tokens = build(prefix_loss=0.25), some_tokens(2, 8)
    targets = tokens.roll(-1, 1)
    assert torch.equal(model(tokens, targets), build()(tokens, targets))
    assert torch.equal(model(tokens, targets, aux_weights=AuxLossWeights()), model(tokens, targets))
    assert not torch.equal(model(tokens, targets, aux_weights=aux), model(tokens, targets))


def test_training_loss_is_the_sum_of_its_parts():
    model, tokens = build(prefix_loss=0.25), some_tokens(2, 8)
    targets, logits = tokens.roll(-1, 1), model(tokens)
    prefixes = model.prefix_of[targets].flatten()
    parts = the_loop(logits, targets, (1.0, 0.5, 0.25)) + 0.1 * F.cross_entropy(logits.flatten(0, 1), prefixes,
                                                                               reduction="sum", ignore_index=-1)
    torch.testing.assert_close(model(tokens, targets, aux_weights=AUX._replace(prefix=torch.tensor([0.1]))), parts)


def test_prefix_loss_without_prefixes_is_refused():
    with pytest.raises(ValueError, match="--model.prefix_loss 0"):
        GPT(replace(CONFIG, prefix_loss=0.1), vocab_size=VOCAB, max_tokens=8)
