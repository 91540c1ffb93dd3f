"""Generation with a cache is generation without."""

from dataclasses import replace

import pytest
import torch

from configs.model import Model
from layers.cache import Cache, caches, refuse_cache
from model import GPT

RICH = Model(layers=3, dim=32, head_dim=8, zero_init_projections=False, softcap="none", smear=True, value_embeds=1,
             bigram_buckets=37, ngram_orders=(3, 5), bigram_signs=7, x0_skip=True, head_gates=True, xsa=True, skips=("0>2",),
             dense="mudd", backout=1, inject=True)
CONFIGS = {
    "plain": Model(layers=2, dim=32, head_dim=16, zero_init_projections=False),
    "rich": RICH,
    "windows": replace(RICH, window_tokens=3, full_attention_layers=(1,), long_window_tokens=5),
    "sphere": Model(layers=2, dim=32, head_dim=16, zero_init_projections=False, geometry="sphere", smear=True),
}


def build(config: Model) -> GPT:
    torch.manual_seed(0)
    model = GPT(config, vocab_size=40, max_tokens=16)
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("portions", [(16,), (1,) * 16, (5, 1, 7, 3)], ids=str)
@torch.no_grad()
def test_logits_are_those_of_the_whole(config, portions):
    model, tokens = build(config), torch.randint(40, (2, 16), generator=torch.Generator().manual_seed(1))
    cache = Cache(len(model.blocks))
    found = torch.cat([model.extend(part, cache) for part in tokens.split(list(portions), dim=1)], dim=1)
    torch.testing.assert_close(found, model(tokens), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_samples_are_the_same_beyond_the_longest_context_too(config, monkeypatch):
    model, prompt = build(config), torch.arange(5)
    with_cache = model.generate(prompt, 20, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr("model.caches", lambda config: False)
    assert torch.equal(with_cache, model.generate(prompt, 20, generator=torch.Generator().manual_seed(2)))


@pytest.mark.filterwarnings("ignore:flex_attention called")
@torch.no_grad()
def test_a_model_that_trains_on_flex_attention_is_followed_too():
    config, tokens = CONFIGS["windows"], torch.arange(12)[None]
    model = GPT(config, vocab_size=40, max_tokens=16, on_cuda=True)
    assert model.kernel == "flex"
    cache = Cache(len(model.blocks))
    found = torch.cat([model.extend(part, cache) for part in tokens.split(5, dim=1)], dim=1)
    torch.testing.assert_close(found, model(tokens), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"paired_heads": (0,)}, {"dynamic_heads": (1,)}, {"position": "learned"},
                                     {"document_mask": True}, {"key_offset": True, "position": "half_rotary"}], ids=str)
def test_what_a_cache_cannot_follow_goes_without(changes):
    assert caches(RICH) and not caches(replace(RICH, **changes))
    with pytest.raises(ValueError, match=f"a cache cannot follow .*{next(iter(changes))}"):
        refuse_cache(replace(RICH, **changes), tokens=1, most=16)


def test_a_cache_beyond_the_longest_context_is_refused():
    model, cache = build(RICH), Cache(3)
    model.extend(torch.arange(10)[None], cache)
    with pytest.raises(ValueError, match=r"a context of 17 tokens; this model was built for 16"):
        model.extend(torch.arange(7)[None], cache)
