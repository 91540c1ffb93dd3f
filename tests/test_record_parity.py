"""The comparison with the public record's script: its stand-ins for kernels, its page, and the differences that it found."""

import json
import os
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import HERE
from benchmarks.record_parity import BUCKETS, DIM, SECTIONS, VOCAB, compare_moves, page
from benchmarks.record_script import (
    SoftcappedCrossEntropy,
    add_dynamic_composition,
    load_record,
    relu2_mlp,
    varlen_attention,
    write_gram_polynomial,
)
from tests.optim.oracle import gaussian

RESULT = json.loads((HERE / "record_parity.json").read_text())


def test_the_page_is_made_from_the_results():
    assert (HERE / "record_parity.md").read_text() == page(RESULT)


def test_ten_steps_of_the_optimizer_are_the_records():
    for row in RESULT["sections"]["optimizer"]:
        assert row["update"] < 1e-5 and row["weights"] < 1e-4 and row["apart"] <= 1e-5 * row["entries"], row


@pytest.mark.skipif("RECORD_SCRIPT" not in os.environ, reason="needs RECORD_SCRIPT, the path of the public train_gpt.py")
def test_the_public_script_loads_and_has_been_compared():
    record = load_record(Path(os.environ["RECORD_SCRIPT"]), dim=DIM, vocab_tokens=VOCAB, bigram_buckets=BUCKETS)
    for name, section in SECTIONS.items():
        for row, known in zip(section(record), RESULT["sections"][name], strict=True):
            for key, value in row.items():
                assert value == known[key] if isinstance(value, str) else value <= 2 * known[key] + 1e-6


def test_another_script_is_refused(tmp_path):
    script = tmp_path / "train_gpt.py"
    script.write_text("class TrainingManager: ...")
    with pytest.raises(ValueError, match="another version of the script"):
        load_record(script, dim=96, vocab_tokens=128, bigram_buckets=10)
    with pytest.raises(ValueError, match="dim must be a multiple of 48, got 100"):
        load_record(script, dim=100, vocab_tokens=128, bigram_buckets=10)


def test_entries_that_are_apart_are_counted_and_left_out():
    theirs = torch.ones(10)
    ours = theirs + torch.tensor([1e-6, *[0.0] * 8, 0.01])
    apart, update = compare_moves(ours, theirs)
    assert apart == 1 and update == pytest.approx(1e-6 / 3, rel=0.1)


# ---- Stand-ins ----------------------------------------------------------------------------------------------------------

ENDS = torch.tensor([0, 5, 11, 16, 16], dtype=torch.int32)  # three documents, padded
DOCUMENT = torch.tensor([0] * 5 + [1] * 6 + [2] * 5)


def visible(tokens: int, reach: int) -> torch.Tensor:
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i, j in product(range(tokens), repeat=2):
        mask[i, j] = DOCUMENT[i] == DOCUMENT[j] and i - reach <= j <= i
    return mask


@pytest.mark.parametrize("reach", [0, 2, 16])
def test_attention_is_sdpas_with_documents_and_a_window(reach):
    q, k, v = (gaussian(16, 3, 8, seed=i) for i in range(3))
    heads_first = (x.transpose(0, 1) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads_first, attn_mask=visible(16, reach), scale=0.3)
    actual = varlen_attention(q, k, v, cu_seqlens_q=ENDS, softmax_scale=0.3, window_size=(reach, 0), causal=True)
    torch.testing.assert_close(actual, expected.transpose(0, 1))


def test_dynamic_composition_is_its_sum():
    q, k, v, base = (gaussian(1, 16, 3, 8, seed=i) for i in range(4))
    w1, w2 = (gaussian(1, 16, 3, seed=i) for i in (4, 5))
    expected, mask = base.clone(), visible(16, 3)
    weights = [(0.3 * q[0, :, h] @ k[0, :, h].T).masked_fill(~mask, -torch.inf).softmax(-1) for h in range(3)]
    for i, h in product(range(16), range(3)):
        mixed = sum(w1[0, i, g] * weights[g][i] for g in range(3))
        expected[0, i, h] += w2[0, i, h] * sum(mixed[j] * v[0, j, h] for j in range(16))
    actual = add_dynamic_composition(base, q, k, v, (w1, w2), None, scaling=0.3, window=4, seq_lens=ENDS)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_sum_of_its_terms():
    x, head, targets = gaussian(6, 4), gaussian(4, 9, seed=1), torch.tensor([1, 2, 0, 8, 3, 5])
    prefixes = torch.tensor([0, -1, 4, -1, 2, 2])
    log_p = (23 / (1 + torch.exp(-(x @ head + 5) / 7.5))).log_softmax(-1)
    losses = SoftcappedCrossEntropy.apply(x, targets, torch.tensor([1.0, 0.5]), prefixes, torch.tensor([0.25]), head)
    for i, loss in enumerate(losses):
        expected = -log_p[i, targets[i]]
        expected = expected - (0.5 * log_p[i, targets[i + 1]] if i < 5 else 0)
        expected = expected - (0.25 * log_p[i, prefixes[i]] if prefixes[i] >= 0 else 0)
        torch.testing.assert_close(loss, expected)


def test_products_are_their_formulas():
    x, up, down, A = gaussian(2, 4), gaussian(7, 4, seed=1), gaussian(7, 4, seed=2), gaussian(3, 3)
    expected = sum(torch.relu(x @ up[i])[:, None] ** 2 * down[i] for i in range(7))
    torch.testing.assert_close(relu2_mlp(x, up, down), expected)
    out = torch.empty(3, 3)
    write_gram_polynomial(A, alpha=2.0, beta=3.0, out=out)
    torch.testing.assert_close(out, 3 * A + 2 * A @ A)
