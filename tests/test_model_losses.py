"""Auxiliary training losses, compared with loops and with limits."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from configs.schema import Model
from data.tokenizers import prefix_tokens
from kernels.cross_entropy import softcap
from model import GPT, AuxLossWeights, multi_token_cross_entropy, prefix_cross_entropy, sampled_cross_entropy

CONFIG = Model(layers=1, dim=16, head_dim=8, zero_init_projections=False, vocab_multiple=1)
VOCAB = 20
AUX = AuxLossWeights(torch.tensor(99.0), torch.tensor(1.0))


def build(**changes: object) -> GPT:
    torch.manual_seed(0)
    return GPT(replace(CONFIG, **changes), vocab_size=VOCAB, max_tokens=8, prefix_of=[-1, *range(VOCAB - 1)])


def some_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(3))


def test_asymmetric_softcap_equals_its_formula():
    z = torch.tensor([-1e4, -5.0, 2.5, 1e4], dtype=torch.float64)
    expected = torch.tensor([0.0, 11.5, 23 / (1 + math.exp(-1)), 23.0], dtype=torch.float64)
    torch.testing.assert_close(softcap(z, "asymmetric", 15.0), expected)


@pytest.mark.parametrize(("reach", "weights"), [(0.0, (0, 0)), (0.5, (0.25, 0)), (1.0, (0.5, 0)), (1.5, (0.5, 0.1)),
                                                (9.0, (0.5, 0.2))])
def test_multi_token_cross_entropy_equals_the_loop(reach, weights):
    logits, targets = torch.randn(2, 6, VOCAB), some_tokens(2, 6)
    expected = sum(weights[k - 1] * -logits[b, t].log_softmax(-1)[targets[b, t + k]]
                   for k in (1, 2) for b in range(2) for t in range(6 - k))
    loss = multi_token_cross_entropy(logits, targets, (0.5, 0.2), torch.tensor(reach))
    torch.testing.assert_close(loss, torch.as_tensor(expected, dtype=torch.float32), atol=1e-4, rtol=1e-5)


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


def test_prefix_cross_entropy_skips_tokens_without_prefix():
    logits, targets = torch.randn(3, 4), torch.tensor([0, 2, 3])
    prefix_of = torch.tensor([-1, -1, 1, 2])
    expected = -logits[1].log_softmax(-1)[1] - logits[2].log_softmax(-1)[2]
    torch.testing.assert_close(prefix_cross_entropy(logits, targets, prefix_of), expected)


def test_sampling_all_classes_equals_the_full_softmax():
    hidden, weight, targets = torch.randn(9, 16), torch.randn(VOCAB, 16), some_tokens(9)
    config = replace(CONFIG, sampled_softmax=VOCAB, softcap="tanh", softcap_value=5.0)
    full = F.cross_entropy(softcap(hidden @ weight.T, "tanh", 5.0), targets, reduction="sum")
    torch.testing.assert_close(sampled_cross_entropy(hidden, weight, targets, config), full, atol=1e-4, rtol=1e-5)


def test_sampled_partition_function_is_unbiased():
    """exp(loss) - 1 is the other classes' weight over the target's: linear in the sampled weights, so its mean is exact."""
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(1, 16) * 0.5, torch.randn(VOCAB, 16) * 0.5, torch.tensor([4])
    config = replace(CONFIG, sampled_softmax=5, softcap="none")
    exact = F.cross_entropy(hidden @ weight.T, target).exp() - 1
    drawn = torch.stack([sampled_cross_entropy(hidden, weight, target, config).exp() - 1 for _ in range(4000)])
    assert abs(drawn.mean() - exact) < 4 * drawn.std() / 4000**0.5


@pytest.mark.parametrize("changes", [{"mtp_weights": (0.5, 0.25)}, {"prefix_loss": 0.25}, {"sampled_softmax": 5}], ids=str)
def test_validation_loss_excludes_auxiliary_losses(changes):
    plain, model, tokens = build(), build(**changes), some_tokens(2, 8)
    targets = tokens.roll(-1, 1)
    assert torch.equal(model(tokens, targets), plain(tokens, targets))
    assert not torch.equal(model(tokens, targets, aux_weights=AUX), plain(tokens, targets))


def test_training_loss_is_the_sum_of_its_parts():
    model, tokens = build(mtp_weights=(0.5,), prefix_loss=0.25), some_tokens(2, 8)
    targets, logits = tokens.roll(-1, 1), model(tokens)
    parts = (F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
             + multi_token_cross_entropy(logits, targets, (0.5,), AUX.mtp)
             + 0.25 * 0.4 * prefix_cross_entropy(logits.flatten(0, 1), targets.flatten(), model.prefix_of))
    torch.testing.assert_close(model(tokens, targets, aux_weights=AUX._replace(prefix=torch.tensor(0.4))), parts)


def test_prefix_loss_without_prefixes_is_refused():
    with pytest.raises(ValueError, match="--model.prefix_loss 0"):
        GPT(replace(CONFIG, prefix_loss=0.1), vocab_size=VOCAB, max_tokens=8)
