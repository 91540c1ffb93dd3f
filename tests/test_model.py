"""The whole GPT: equality with a plain twin, initial weights, roles, size and FLOPs, loss, generated text, errors."""

import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from configs.optim import Optim
from configs.presets import track3
from configs.schema import Model
from kernels import attention
from kernels.attention import choose_kernel, use_flash
from model import GPT, mean_span

LAYERS, DIM, HEAD_DIM, VOCAB, PADDED, LONGEST = 2, 32, 16, 40, 64, 24
PLAIN = Model(layers=LAYERS, dim=DIM, head_dim=HEAD_DIM, position="learned", qk_norm=False, activation="gelu",
              norm_embedding=False, zero_init_projections=False, softcap="none")
RICH = Model(layers=3, dim=DIM, head_dim=HEAD_DIM, norm_gains=True, biases=True, x0_skip=True, smear=True,
             value_embeds=2, bigram_buckets=37, window_tokens=5, document_mask=True)


def build(config: Model = PLAIN, *, seed: int = 0, **options) -> GPT:
    torch.manual_seed(seed)
    return GPT(config, **({"vocab_size": VOCAB, "max_tokens": LONGEST, "document_start": 0} | options))


@torch.no_grad()
def scramble(model: GPT, seed: int = 1) -> GPT:
    """Make every parameter random and non-zero, since a zero projection would hide errors before it."""
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=rng)
        p.copy_(noise / p.shape[-1] ** 0.5 if p.ndim == 2 else p + 0.5 * noise)
    return model


def some_tokens(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model: GPT, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(model.roles(), torch.autograd.grad(loss, list(model.parameters())), strict=True))


# ---- All techniques off: plain GPT ------------------------------------------------------------------------------------


def plain_norm(x):
    return x / x.pow(2).mean(-1, keepdim=True).sqrt()


def plain_attention(x, w):
    heads = (DIM // HEAD_DIM, HEAD_DIM)
    q, k, v = ((x @ w(name).T).unflatten(-1, heads).transpose(-2, -3) for name in ("q", "k", "v"))
    future = torch.ones(x.size(-2), x.size(-2)).triu(1).bool()
    weights = (q @ k.mT / math.sqrt(HEAD_DIM)).masked_fill(future, -math.inf).softmax(-1)
    return (weights @ v).transpose(-2, -3).flatten(-2) @ w("out").T


def plain_gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def plain_gpt(weights: dict[str, torch.Tensor], tokens_BT: torch.Tensor) -> torch.Tensor:
    """GPT-2 with RMS norms and an untied head, in textbook form: (B, T) -> (B, T, V)."""
    x = weights["embed"][tokens_BT] + weights["positions"][:tokens_BT.size(1)]
    for i in range(LAYERS):
        x = x + plain_attention(plain_norm(x), lambda name, i=i: weights[f"blocks.{i}.attention.{name}.weight"])
        hidden = plain_gelu(plain_norm(x) @ weights[f"blocks.{i}.mlp.up.weight"].T)
        x = x + hidden @ weights[f"blocks.{i}.mlp.down.weight"].T
    return plain_norm(x) @ weights["head.weight"].T


def plain_start(seed: int) -> dict[str, torch.Tensor]:
    """The initial weights of the plain GPT, drawn in the order of the network; no other random number is drawn."""
    torch.manual_seed(seed)
    weights = {"embed": torch.randn(PADDED, DIM), "positions": 0.02 * torch.randn(LONGEST, DIM)}
    shapes = {"attention.q": (DIM, DIM), "attention.k": (DIM, DIM), "attention.v": (DIM, DIM),
              "attention.out": (DIM, DIM), "mlp.up": (4 * DIM, DIM), "mlp.down": (DIM, 4 * DIM)}
    for i in range(LAYERS):
        weights |= {f"blocks.{i}.{name}.weight": torch.randn(shape) * (0.33 / shape[1]) ** 0.5
                    for name, shape in shapes.items()}
    return weights | {"head.weight": torch.randn(PADDED, DIM) * (0.33 / DIM) ** 0.5}


def test_plain_logits_equal_the_twin():
    model, tokens = scramble(build()), some_tokens(3, 17)
    torch.testing.assert_close(model(tokens), plain_gpt(model.state_dict(), tokens), atol=1e-5, rtol=0)


def test_plain_gradients_equal_the_twin():
    model, tokens = scramble(build()), some_tokens(3, 17)
    targets = tokens.roll(-1, dims=1)
    twin = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    loss = F.cross_entropy(plain_gpt(twin, tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    expected = dict(zip(twin, torch.autograd.grad(loss, list(twin.values())), strict=True))
    for name, grad in gradients(model, model(tokens, targets)).items():
        assert expected[name].abs().max() > 1e-3, name
        torch.testing.assert_close(grad, expected[name], atol=3e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("off", [
    {}, {"softcap_value": 3.0}, {"rotary_base": 7.0}, {"attention": "sdpa"},
], ids=lambda off: next(iter(off), "plain"))
def test_techniques_that_are_off_add_no_parameters_and_draw_no_random_numbers(off):
    """The weights are bit-identical to those of a plain GPT, even if settings of techniques that are off are changed."""
    model, expected = build(replace(PLAIN, **off), seed=5), plain_start(5)
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(some_tokens(2, 9)), build(seed=5)(some_tokens(2, 9)))


# ---- Initial weights ---------------------------------------------------------------------------------------------------


def test_projections_and_head_start_at_zero_only_with_the_setting():
    model = build(replace(PLAIN, zero_init_projections=True))
    zero = {name for name, p in model.named_parameters() if not p.any()}
    assert zero == {"head.weight"} | {f"blocks.{i}.{n}.weight" for i in range(2) for n in ("attention.out", "mlp.down")}
    assert all(p.any() for p in build().parameters())


def test_variance_of_the_first_weights():
    model = build(Model(layers=1, dim=256, mlp_dim=1024, init_gain=0.5, embed_std=0.2, zero_init_projections=False))
    assert model.embed.std().item() == pytest.approx(0.2, rel=0.05)
    for name, fan_in in (("attention.q", 256), ("mlp.up", 256), ("mlp.down", 1024)):
        weight = model.get_parameter(f"blocks.0.{name}.weight")
        assert weight.shape[1] == fan_in
        assert weight.var().item() == pytest.approx(0.5 / fan_in, rel=0.05)


@pytest.mark.parametrize(("vocab", "multiple", "padded"), [(40, 64, 64), (64, 64, 64), (65, 64, 128), (40, 1, 40)])
def test_vocabulary_is_padded_up_to_a_multiple(vocab, multiple, padded):
    model = build(replace(PLAIN, vocab_multiple=multiple, value_embeds=1), vocab_size=vocab)
    assert len(model.embed) == len(model.head.weight) == len(model.value_embeds[0]) == padded
    assert model(some_tokens(1, 3)).shape == (1, 3, padded)


def test_embedding_has_its_configured_dtype_and_other_parameters_float32():
    model = build(replace(PLAIN, embed_dtype="bfloat16"), dtype=torch.bfloat16)
    assert {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16} == {"embed"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}


def test_matrices_and_tables_in_bfloat16_equal_the_rounded_float32_ones():
    stored, rounded = build(replace(RICH, matrix_dtype="bfloat16", table_dtype="bfloat16")), build(RICH)
    bfloat16_roles = {"matrix", "value_embed", "bigram_embed"}
    for name, parameter in rounded.named_parameters():
        if rounded.roles()[name] in bfloat16_roles:
            parameter.data = parameter.data.bfloat16().float()
    halves = {stored.roles()[name] for name, parameter in stored.named_parameters() if parameter.dtype == torch.bfloat16}
    assert halves == bfloat16_roles
    assert torch.equal(stored(some_tokens(2, 9)), rounded(some_tokens(2, 9)))


# ---- Roles, size, cost -----------------------------------------------------------------------------------------------


def expected_role(name: str) -> str:
    endings = {"gains": "gain", "bias": "bias", "skip": "scalar", "mix_value.weight": "scalar", "smear.strength": "scalar",
               "smear.gate": "gate", "ngrams.0.table": "bigram_embed", "head.weight": "head", "positions": "embed"}
    special = [role for ending, role in endings.items() if name.endswith(ending)]
    if name == "embed" or name.startswith("value_embeds."):
        return "embed" if name == "embed" else "value_embed"
    return special[0] if special else "matrix"


@pytest.mark.parametrize("config", [
    PLAIN, RICH, replace(RICH, tied_head=True, position="learned", activation="swiglu"),
], ids=["plain", "rich", "tied"])
def test_roles_cover_every_parameter_exactly(config):
    model = build(config)
    assert model.roles() == {name: expected_role(name) for name, _ in model.named_parameters()}
    assert set(model.roles()) == set(model.state_dict())
    assert set(model.roles().values()) <= {field.name for field in fields(Optim)}


@pytest.fixture(scope="module")
def track3_model() -> GPT:
    torch.manual_seed(0)
    return GPT(track3().model, vocab_size=50_257, max_tokens=1024)


def test_track3_has_the_published_number_of_parameters(track3_model):
    sizes = {}
    for p in track3_model.parameters():
        sizes[p.role] = sizes.get(p.role, 0) + p.numel()
    assert sum(sizes.values()) == 162_354_816
    assert sizes == {"embed": 50_304 * 768, "head": 50_304 * 768, "matrix": 84_934_656, "gain": (2 * 12 + 2) * 768,
                     "bias": 12 * 9 * 768 + 50_304}


def test_track3_starts_at_the_published_loss(track3_model):
    tokens = torch.randint(50_257, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = track3_model(tokens, tokens.roll(-1)).item() / 16
    assert loss == pytest.approx(math.log(50_304), abs=1e-5)
    assert round(loss, 4) == 10.8258


def test_track3_flops_per_token(track3_model):
    assert track3_model.flops_per_token(1024) == 6 * (84_934_656 + 38_633_472) + 12 * 12 * 768 * (1025 / 2)


@given(tokens=st.integers(1, 200), window=st.integers(1, 300))
def test_mean_span_equals_the_loop(tokens, window):
    assert mean_span(tokens, window) == pytest.approx(sum(min(t, window) for t in range(1, tokens + 1)) / tokens)


@pytest.mark.parametrize("full_layers", [(), (1,), (0, 1, 2)])
def test_cost_counts_the_span_of_each_layer(full_layers):
    model = build(replace(PLAIN, layers=3, window_tokens=9, full_attention_layers=full_layers))
    spans = len(full_layers) * mean_span(20, 20) + (3 - len(full_layers)) * mean_span(20, 4)
    weights = 3 * 12 * DIM**2 + PADDED * DIM
    assert model.flops_per_token(20, window=4) == pytest.approx(6 * weights + 12 * DIM * spans)


def test_cost_of_the_smear_gate():
    assert build(replace(PLAIN, smear=True)).flops_per_token(20) - build().flops_per_token(20) == 6 * 12


@pytest.mark.parametrize("changes", [
    {}, {"tied_head": True}, {"activation": "swiglu"}, {"value_embeds": 1, "bigram_buckets": 9},
], ids=lambda changes: next(iter(changes), "plain"))
def test_cost_of_the_matrices_is_what_pytorch_counts(changes):
    model, tokens = scramble(build(replace(PLAIN, **changes))), some_tokens(2, 12)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    counted = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    attention = 12 * DIM * LAYERS * mean_span(12, 12)
    assert counted == tokens.numel() * (model.flops_per_token(12) - attention)


# ---- Loss ------------------------------------------------------------------------------------------------------------


def test_loss_is_the_summed_cross_entropy_of_the_logits():
    model, tokens, targets = scramble(build(RICH)), some_tokens(2, 12), some_tokens(2, 12, seed=3)
    expected = -model(tokens).log_softmax(-1).gather(-1, targets[..., None]).sum()
    loss = model(tokens, targets)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(loss, sum(model(x[None], y[None]) for x, y in zip(tokens, targets, strict=True)))


# ---- Activations in bfloat16 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [PLAIN, RICH, replace(RICH, position="half_rotary", embed_dtype="bfloat16")],
                         ids=["plain", "rich", "half_rotary"])
def test_bfloat16_activations_stay_close_to_float32(config):
    exact, rounded = (scramble(build(config, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    tokens = some_tokens(2, 16)
    expected, logits = exact(tokens), rounded(tokens)
    assert rounded.embed_tokens(tokens, None)[0].dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert 1e-5 < (logits - expected).norm() / expected.norm() < 0.03
    for name, grad in gradients(rounded, rounded(tokens, tokens)).items():
        assert grad.isfinite().all() and grad.dtype == rounded.get_parameter(name).dtype, name


# ---- Samples ---------------------------------------------------------------------------------------------------------


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def greedy(model: GPT, tokens: list[int], count: int, **windows: int) -> list[int]:
    """The slow twin of generate at top_k = 1."""
    for _ in range(count):
        logits = model(torch.tensor([tokens[-model.max_tokens:]]), **windows)[0, -1]
        tokens = [*tokens, max(range(model.vocab_size), key=lambda v, z=logits: z[v].item())]
    return tokens


def test_generate_draws_from_its_generator_and_leaves_the_global_one_alone():
    model, prompt = scramble(build(RICH)), some_tokens(3)
    state = torch.get_rng_state()
    first, again, other = (model.generate(prompt, 20, generator=generator(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[:3], prompt) and first.shape == (23,)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"temperature": 0.0}], ids=["top_k", "cold"])
@pytest.mark.parametrize("length", [1, 3, 30])
def test_greedy_generation_takes_the_most_likely_token(options, length):
    """A prompt longer than max_tokens = 24 included, which learned positions could not index uncropped."""
    model, prompt = scramble(build()), some_tokens(length)
    assert model.generate(prompt, 10, **options).tolist() == greedy(model, prompt.tolist(), 10)


def test_generate_uses_the_given_windows():
    model = scramble(build(replace(PLAIN, layers=3, window_tokens=9, full_attention_layers=(1,), long_window_tokens=20)))
    prompt, near = some_tokens(12), {"window": 2, "long_window": 5}
    generated = model.generate(prompt, 8, top_k=1, **near).tolist()
    assert generated == greedy(model, prompt.tolist(), 8, **near) != greedy(model, prompt.tolist(), 8)


def test_generate_crops_the_context_to_max_tokens(monkeypatch):
    model, lengths = scramble(build(max_tokens=8)), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda tokens, **windows: lengths.append(tokens.size(1)) or forward(tokens))
    model.generate(some_tokens(6), 5)
    assert lengths == [6, 7, 8, 8, 8]


def test_generate_does_not_compile_the_model():
    """Every generated token gives a new length, so a compiled forward pass would be compiled again for each."""
    model, graphs = scramble(build()), CompileCounter()
    model.compile(backend=graphs, dynamic=False)
    model.generate(some_tokens(3), 2)
    assert graphs.frame_count == 0
    model(some_tokens(1, 3))
    assert graphs.frame_count == 1


def test_generate_never_emits_padding():
    model = scramble(build(replace(PLAIN, biases=True)))
    with torch.no_grad():
        model.head.bias[VOCAB:] = 100.0
    assert model(some_tokens(1, 3)).argmax(-1).min() >= VOCAB
    for options in ({}, {"top_k": 1}, {"top_k": 1000, "temperature": 5.0}):
        assert model.generate(some_tokens(3), 20, generator=generator(), **options).max() < VOCAB


def test_generate_samples_the_top_k_distribution_at_its_temperature():
    model, rng, prompt, draws = scramble(build(replace(PLAIN, layers=1))), generator(), some_tokens(2), 300
    logits = model(prompt[None])[0, -1, :VOCAB].double()
    best = logits.topk(4).indices
    expected = (logits[best] / 1.5).softmax(-1)
    drawn = torch.stack([model.generate(prompt, 1, temperature=1.5, top_k=4, generator=rng)[-1] for _ in range(draws)])
    counts = (drawn[:, None] == best).sum(0)
    assert counts.sum() == draws
    assert ((counts - draws * expected).abs() < 4.5 * (draws * expected * (1 - expected)).sqrt()).all()


# ---- Errors ----------------------------------------------------------------------------------------------------------


def test_document_mask_needs_a_document_start():
    with pytest.raises(ValueError, match="document_mask needs a source with document starts.*no_document_mask"):
        build(RICH, document_start=None)
    build(replace(RICH, document_mask=False), document_start=None)


@pytest.mark.parametrize("kernel", ["flex", "varlen"])
def test_cuda_kernels_are_refused_on_other_devices(kernel):
    config = replace(RICH, attention=kernel)
    with pytest.raises(ValueError, match=f"attention {kernel} trains on CUDA only; use sdpa"):
        build(config)
    assert choose_kernel(config, on_cuda=True)[0] == kernel


def test_flash_attention_is_activated_once_and_refused_with_the_reason(monkeypatch):
    def activate(name):
        activated.append(name)
        if name == "FA4":
            raise ImportError("no module named flash_attn.cute")

    activated, config = [], replace(RICH, attention="sdpa", flash="FA3")
    monkeypatch.setattr(attention, "PROBED", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate, raising=False)
    use_flash(config, on_cuda=True)
    build(RICH)  # flash=default activates nothing
    assert activated == ["FA3"]
    with pytest.raises(ValueError, match="flash FA4: its package is missing .*flash_attn.cute.*or use default"):
        use_flash(replace(config, flash="FA4"), on_cuda=True)
    with pytest.raises(ValueError, match="flash FA3 needs CUDA; use default"):
        use_flash(config, on_cuda=False)
    with pytest.raises(ValueError, match="flash FA3 serves --model.attention sdpa or varlen, got auto"):
        replace(config, attention="auto")


@pytest.mark.parametrize(("changes", "on_cuda", "kernel"), [
    ({}, False, "sdpa"), ({}, True, "sdpa"),
    ({"window_tokens": 4}, False, "sdpa"), ({"window_tokens": 4}, True, "flex"),
    ({"document_mask": True}, False, "sdpa"), ({"document_mask": True}, True, "flex"),
    ({"document_mask": True, "attention": "sdpa"}, True, "sdpa"),
])
def test_auto_chooses_the_kernel_by_masks_and_device(changes, on_cuda, kernel):
    assert choose_kernel(replace(PLAIN, **changes), on_cuda)[0] == kernel
