"""Each technique of the model: its parameters, neutral settings and formula; causality and separate documents for all."""

import math
from dataclasses import fields, replace

import pytest
import torch

from configs.ablations import ROWS
from configs.cli import parse_row
from configs.notation import techniques_of
from configs.optim import Optim
from configs.presets import PRESETS
from configs.schema import Model
from kernels.cross_entropy import softcap
from model import GPT, MLP, Block, LayerInputs, NgramEmbedding, Norm, Rotary, Smear, relu2

VOCAB, START = 40, 0
PLAIN = Model(layers=2, dim=32, head_dim=16, position="learned", qk_norm=False, activation="gelu",
              norm_embedding=False, zero_init_projections=False, softcap="none")


def in_blocks(*names: str) -> set[str]:
    return {f"blocks.{i}.{name}" for i in range(PLAIN.layers) for name in names}


def on(name: str) -> dict:
    """The settings that switch a technique on, as its field declares them."""
    technique = techniques_of(Model)[name]
    return {key.removeprefix("model."): value for key, value in ({name: technique.on} | technique.needs).items()}


LINEAR_BIASES = in_blocks(*(f"attention.{n}.bias" for n in ("q", "k", "v", "out")), "mlp.up.bias", "mlp.down.bias")


def network(prefix: str, *, learned_scale: bool = False) -> set[str]:
    return {f"{prefix}.network.{name}" for name in ("up", "down", "bias", *(["scale"] if learned_scale else []))}


GATES = network("token_gates.0", learned_scale=True)
MIXTURES = network("streams.inputs.1") | network("streams.inputs.2")
# By flag: the settings to change in PLAIN, the parameters that this adds, and those that it removes.
FLAGS: dict[str, tuple[dict, set[str], set[str]]] = {
    "no_positions": ({"position": "none"}, set(), {"positions"}),
    "rotary": (on("position"), set(), {"positions"}),
    "half_rotary": ({"position": "half_rotary", "rotary_base": 50.0}, set(), {"positions"}),
    "qk_norm": (on("qk_norm"), set(), set()),
    "attention_scale": (on("attention_scale"), set(), set()),
    "relu2": (on("activation"), set(), set()),
    "swiglu": ({"activation": "swiglu"}, in_blocks("mlp.gate.weight"), set()),
    "qk_head_dim": (on("qk_head_dim"), set(), set()),
    "mlp_dim": ({"mlp_dim": 40}, set(), set()),
    "norm_gains": (on("norm_gains"), in_blocks("norm1.gains", "norm2.gains") | {"norm_final.gains"}, set()),
    "biases": (on("biases"), LINEAR_BIASES | {"head.bias"}, set()),
    "norm_embedding": (on("norm_embedding"), set(), set()),
    "zero_init": (on("zero_init_projections"), set(), set()),
    "zero_mlp": ({"zero_init_projections": True, "zero_attention_out": False}, set(), set()),
    "init_gain": ({"init_gain": 0.7}, set(), set()),
    "embed_std": ({"embed_std": 0.3}, set(), set()),
    "tied_head": (on("tied_head"), set(), {"head.weight"}),
    "tanh": ({"softcap": "tanh", "softcap_value": 2.0}, set(), set()),
    "rational": ({"softcap": "rational", "softcap_value": 2.0}, set(), set()),
    "x0_skip": (on("x0_skip"), in_blocks("skip"), set()),
    "smear": (on("smear"), {"smear.gate", "smear.strength"}, set()),
    "smear_first": ({"smear_first": True, "smear": True, "norm_embedding": True}, {"smear.gate", "smear.strength"}, set()),
    "value_embed": ({"value_embeds": 1}, {"value_embeds.0", "blocks.1.attention.mix_value.weight"}, set()),
    "value_embeds": ({"value_embeds": 2},
                     {"value_embeds.0", "value_embeds.1"} | in_blocks("attention.mix_value.weight"), set()),
    "value_embed_std": ({"value_embeds": 1, "value_embed_std": 0.2},
                        {"value_embeds.0", "blocks.1.attention.mix_value.weight"}, set()),
    "bigram": (on("bigram_buckets"), {"ngrams.0.table"}, set()),
    "window": (on("window_tokens"), set(), set()),
    "document_mask": (on("document_mask"), set(), set()),
    "bfloat16_embedding": ({"embed_dtype": "bfloat16"}, set(), set()),
    "bfloat16_head": ({"head_dtype": "bfloat16"}, set(), set()),
    "bfloat16_tables": ({"table_dtype": "bfloat16", "value_embeds": 1, "bigram_buckets": 37, "bigram_signs": 11},
                        {"value_embeds.0", "ngrams.0.table", "blocks.1.attention.mix_value.weight"}, set()),
    "bfloat16_matrices": ({"matrix_dtype": "bfloat16"}, set(), set()),
    "vocab_multiple": ({"vocab_multiple": 1}, set(), set()),
    "long_window": (on("long_window_tokens"), set(), set()),
    "yarn": (on("yarn"), set(), {"positions"}),
    "yarn_windows": (on("yarn_windows"), set(), {"positions"}),
    "head_gates": (on("head_gates"), GATES, set()),
    "head_gate_layers": (on("head_gate_layers"), GATES, set()),
    "gate_layers": ({"gate_layers": (0, 1), "head_gates": True},
                    GATES | network("token_gates.1", learned_scale=True), set()),
    "xsa": (on("xsa"), GATES, set()),
    "xsa_layers": (on("xsa_layers"), GATES, set()),
    "paired_heads": (on("paired_heads"), set(), set()),
    "key_offset": (on("key_offset"), set(), {"positions"}),
    "dynamic_heads": ({"dynamic_heads": (0,), "dynamic_window": 5}, GATES, set()),
    "attention_free": (on("attention_free"), set(), {f"blocks.1.attention.{n}.weight" for n in ("q", "k", "v", "out")}),
    "shared_attention_input": (on("shared_attention_input"), set(), set()),
    "projection_gains": (on("projection_gains"), in_blocks("attention.gains"), set()),
    "value_gates": ({"value_gates": True, "value_embeds": 1, "value_embed_layers": (0,)},
                    {"value_embeds.0", "blocks.0.attention.mix_value.weight"}, set()),
    "bigram_signs": (on("bigram_signs"), {"ngrams.0.table"}, set()),
    "ngram_orders": (on("ngram_orders"), {f"ngrams.{i}.table" for i in range(3)}, set()),
    "inject": ({"inject": True, "bigram_buckets": 37}, {"ngrams.0.table"} | GATES, set()),
    "inject_start_alone": (on("inject"), GATES, set()),
    "residual_growth": (on("residual_growth"), in_blocks("add1.weight", "add2.weight"), set()),
    "skips": ({"skips": ("0>1",), "skip_weight": 0.3}, GATES, set()),
    "backout": (on("backout"), {"streams.backout"}, set()),
    "denseformer": ({"dense": "denseformer"}, {f"streams.inputs.{i}.weight" for i in (1, 2)}, set()),
    "mudd": (on("dense"), MIXTURES, set()),
    "dense_skips": (on("dense_skips"), MIXTURES, set()),
    "dense_gates": (on("dense_gates"), MIXTURES | GATES | {"value_embeds.0", "blocks.0.add1.weight", "blocks.0.add2.weight"},
                    set()),
    "asymmetric": ({"softcap": "asymmetric"}, set(), set()),
    "mtp": (on("mtp_weights"), set(), set()),
    "prefix_loss": (on("prefix_loss"), set(), set()),
    "sampled_softmax": (on("sampled_softmax"), set(), set()),
    "sphere": ({"geometry": "sphere", "qk_norm": True, "norm_embedding": True, "eigen_lr": 0.3, "logit_scale": 4.0},
               in_blocks("add1.alpha.stored", "add2.alpha.stored", "attention.norm_qk.scale.stored", "mlp.up.scale.stored")
               | {"head.scale.stored"}, set()),
}
RICH = replace(PLAIN, layers=3, position="rotary", qk_norm=True, activation="relu2", norm_gains=True, biases=True,
               norm_embedding=True, softcap="rational", softcap_value=5.0, attention_scale=0.3, x0_skip=True,
               smear=True, value_embeds=2, bigram_buckets=37)
TOGETHER = {
    "rich": RICH,
    "documents": replace(RICH, document_mask=True),
    "windows": replace(RICH, window_tokens=3, full_attention_layers=(1,)),
    "documents+windows": replace(RICH, document_mask=True, window_tokens=3, full_attention_layers=(1,), softcap="tanh"),
    "documents+half_rotary+swiglu+tied": replace(RICH, document_mask=True, position="half_rotary", activation="swiglu",
                                                 tied_head=True),
    "sphere": replace(RICH, norm_gains=False, biases=False, geometry="sphere", document_mask=True, window_tokens=3,
                      full_attention_layers=(1,)),
    "sphere+swiglu": replace(PLAIN, qk_norm=True, norm_embedding=True, geometry="sphere", activation="swiglu"),
    "record": replace(RICH, position="half_rotary", norm_gains=False, biases=False, document_mask=True, window_tokens=3,
                      full_attention_layers=(1,), long_window_tokens=6, yarn=True, yarn_windows=(4, 6), head_gates=True,
                      head_gate_layers=(1,), xsa=True, xsa_layers=(1,), gate_layers=(0, 2), smear_first=True,
                      paired_heads=(2,), key_offset=True, dynamic_heads=(1,), dynamic_window=4,
                      shared_attention_input=1, projection_gains=True,
                      value_gates=True, bigram_signs=11, ngram_orders=(3,), inject=True, residual_growth=1.1, skips=("0>2",),
                      backout=1, dense="mudd", dense_skips=("in>2", "0>2", "0>3=-0.5", "ve0>3"), dense_gates=(2,),
                      softcap="asymmetric", x0_skip=False, attention_free=(0,),
                      value_embeds=1, value_embed_layers=(2,)),
    "sphere+qk_head_dim": replace(PLAIN, qk_norm=True, norm_embedding=True, geometry="sphere", qk_head_dim=8),
    "learned+no_norms": replace(RICH, position="learned", norm_gains=False, norm_embedding=False, softcap="tanh"),
}

TOGETHER["record+qk_head_dim"] = replace(TOGETHER["record"], qk_head_dim=12)


def shrunk(config: Model) -> Model:
    small = {"dim": 32, "head_dim": 16, "qk_head_dim": config.qk_head_dim and 12,
             "bigram_buckets": min(config.bigram_buckets, 37)}
    try:
        return replace(config, layers=3, **small)
    except ValueError:  # the config names layers beyond the third
        return replace(config, **small)


ALONE = {name: replace(PLAIN, **changes) for name, (changes, _, _) in FLAGS.items()}
PRESET_MODELS = {name: shrunk(preset().model) for name, preset in PRESETS.items()}
PRESET_MODELS |= {row.name: shrunk(parse_row(row.base, row.flags.split()).model) for row in ROWS if "--model" in row.flags}
IN_DOCUMENTS = {f"{name}+documents": replace(config, document_mask=True) for name, config in ALONE.items()
                if not config.document_mask}
EVERY = {"plain": PLAIN} | ALONE | IN_DOCUMENTS | TOGETHER | PRESET_MODELS
every_model = pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)
every_flag = pytest.mark.parametrize(("changes", "added", "removed"), FLAGS.values(), ids=FLAGS)
documents = pytest.mark.parametrize("config", [c for c in EVERY.values() if c.document_mask],
                                    ids=[n for n, c in EVERY.items() if c.document_mask])


def test_every_technique_of_the_model_is_in_the_table():
    assert {name for name in techniques_of(Model)} <= {name for changes, _, _ in FLAGS.values() for name in changes}


def build(config: Model, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(config, vocab_size=VOCAB, max_tokens=32, document_start=START, prefix_of=[-1, *range(VOCAB - 1)])


@torch.no_grad()
def scramble(module: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Make every parameter random and non-zero, since a zero projection would hide errors before it."""
    rng = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=rng)
        noise = noise * p if name.endswith("stored") else noise  # factors much larger would saturate the softmax
        p.copy_(noise / p.shape[-1] ** 0.5 if p.ndim == 2 else p + 0.5 * noise)
    return module


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_tokens(*shape: int, starts: tuple[int, ...] = ()) -> torch.Tensor:
    """Random tokens; the token that begins a document stands at the positions `starts` only."""
    tokens = torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(2))
    tokens[:, list(starts)] = START
    return tokens


def another(token: torch.Tensor) -> torch.Tensor:
    """A different ordinary token."""
    return token % (VOCAB - 1) + 1


# ---- Parameters of a flag, and neutral settings ----------------------------------------------------------------------


def test_every_field_of_the_model_is_changed_by_a_flag():
    switched = {field for changes, _, _ in FLAGS.values() for field in changes}
    fused = {field.name for field in fields(Model) if field.name.startswith(("fp8", "fused"))}  # tests/kernels
    assert switched == {field.name for field in fields(Model)} - {"layers", "dim", "head_dim", "attention", "flash"} - fused


@every_flag
def test_flag_adds_only_its_own_parameters(changes, added, removed):
    plain, built = set(build(PLAIN).state_dict()), build(replace(PLAIN, **changes))
    model = set(built.state_dict())
    assert set(built.roles().values()) <= {field.name for field in fields(Optim)}
    assert model - plain == added
    assert plain - model == removed


OTHER_START = {"zero_init", "zero_mlp", "init_gain", "embed_std", "bfloat16_embedding", "bfloat16_head", "bfloat16_matrices"}
DRAWS = {"no_positions", "rotary", "half_rotary", "swiglu", "value_embed", "value_embeds", "bfloat16_tables",
         "yarn", "yarn_windows", "key_offset", "attention_free", "value_gates", "value_embed_std", "mudd", "dense_skips",
         "dense_gates", "head_gates", "head_gate_layers", "gate_layers", "xsa", "xsa_layers", "dynamic_heads", "inject",
         "inject_start_alone", "skips"}  # not PLAIN's random numbers
OTHER_SHAPE = {"qk_head_dim", "mlp_dim", "vocab_multiple"}
SAME_DRAWS = [name for name in FLAGS if name not in OTHER_START | OTHER_SHAPE | DRAWS]


@pytest.mark.parametrize("name", SAME_DRAWS)
def test_same_seed_gives_the_shared_parameters_the_same_values(name):
    plain, model = build(PLAIN, seed=3).state_dict(), build(ALONE[name], seed=3).state_dict()
    assert all(torch.equal(model[key], plain[key]) for key in plain.keys() & model.keys())


def with_plain_weights(changes: dict) -> tuple[GPT, GPT]:
    """Return a scrambled plain GPT, and a GPT with the flag that shares its weights; its other parameters are initial."""
    plain, model = scramble(build(PLAIN)), build(replace(PLAIN, **changes))
    shared = {name: value for name, value in plain.state_dict().items() if name in model.state_dict()}
    model.load_state_dict(shared, strict=False)
    return plain, model


@pytest.mark.parametrize("name", ["norm_gains", "biases", "x0_skip", "smear", "bigram", "zero_init", "zero_mlp", "init_gain",
                                  "embed_std", "xsa", "xsa_layers", "dynamic_heads", "bigram_signs", "ngram_orders",
                                  "inject", "denseformer", "mudd"])
def test_technique_that_starts_neutral_changes_no_logit(name):
    plain, model = with_plain_weights(FLAGS[name][0])
    assert torch.equal(model(some_tokens(2, 12)), plain(some_tokens(2, 12)))


@torch.no_grad()
def neutralise(model: GPT, plain: GPT) -> None:
    """Set the parameters of every technique such that it has no effect."""
    for block in model.blocks[PLAIN.layers - len(model.value_embeds):]:
        block.attention.mix_value.weight.copy_(torch.tensor([1.0, 0.0]))
    if model.positions is None:
        plain.positions.zero_()
    if model.head is None:
        plain.head.weight.copy_(plain.embed)


@pytest.mark.parametrize("changes", [
    {"value_embeds": 2}, {"position": "none"}, {"tied_head": True}, {"attention_scale": 16**-0.5}, {"mlp_dim": 128},
    {"window_tokens": 12}, {"window_tokens": 1, "full_attention_layers": (0, 1)}, {"document_mask": True},
    {"softcap": "tanh", "softcap_value": 1e5}, {"softcap": "rational", "softcap_value": 1e5},
], ids=str)
def test_technique_set_to_do_nothing_changes_no_logit(changes):
    plain, model = with_plain_weights(changes)
    neutralise(model, plain)
    torch.testing.assert_close(model(some_tokens(2, 12)), plain(some_tokens(2, 12)), atol=1e-5, rtol=0)


# These act on the initial weights, on memory or on training only; shared_attention_input has no effect in two layers.
WITHOUT_EFFECT_ON_LOGITS = {"zero_init", "zero_mlp", "init_gain", "embed_std", "value_embed_std", "mtp", "prefix_loss",
                            "sampled_softmax", "kernels", "shared_attention_input"}


@pytest.mark.parametrize("name", [name for name in FLAGS if name not in WITHOUT_EFFECT_ON_LOGITS | OTHER_SHAPE])
def test_every_flag_changes_the_logits(name):
    plain, model = with_plain_weights(FLAGS[name][0])
    tokens, own = some_tokens(2, 12, starts=(5,)), FLAGS[name][1]
    with torch.no_grad():
        for i, key in enumerate(sorted(own)):
            parameter = model.get_parameter(key)
            parameter.add_(normal(*parameter.shape, seed=i))
    assert (model(tokens) - plain(tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("config", list((TOGETHER | PRESET_MODELS).values()), ids=[*TOGETHER, *PRESET_MODELS])
def test_every_parameter_has_a_gradient(config):
    """Every parameter has a gradient. Exception: on the sphere the first block mixes its input with itself, which changes
    nothing, so the weights of that mixture have none."""
    untrained = ["blocks.0.skip"] if config.geometry == "sphere" and config.x0_skip else []
    model, tokens = scramble(build(config)), some_tokens(2, 16, starts=(6,))
    model(tokens, tokens.roll(-1, dims=1)).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-7}
    assert set(model.roles()) - trained <= set(untrained)


# ---- Causality and documents -----------------------------------------------------------------------------------------


@torch.no_grad()
def effects(config: Model, tokens: torch.Tensor, changes: list[tuple[int, int]]) -> torch.Tensor:
    """Return the largest change of the logits at each position, (changes + 1, T): one row per changed (position, token), and
    a last row of the same batch in which no token changed."""
    model, rows = scramble(build(config)), tokens.repeat(len(changes) + 1, 1)
    changed = rows.clone()
    for row, (t, token) in enumerate(changes):
        changed[row, t] = token
    return (model(changed) - model(rows)).abs().amax(-1)


@every_model
def test_no_token_changes_earlier_logits_or_another_row(config):
    tokens = some_tokens(1, 16, starts=(4,))
    changes = [(t, token) for t in (1, 7, 15) for token in (another(tokens[0, t]).item(), START)]
    *moved, unchanged = effects(config, tokens, changes)
    assert unchanged.max() == 0
    for (t, _), difference in zip(changes, moved, strict=True):
        assert difference[:t].max() == 0
        assert difference[t:t + 3].min() > 1e-4


@documents
def test_no_token_changes_logits_of_another_document(config):
    tokens = some_tokens(1, 20, starts=(6, 13))
    ends = {1: 6, 5: 6, 7: 13, 12: 13}
    *moved, _ = effects(config, tokens, [(t, another(tokens[0, t]).item()) for t in ends])
    for (t, end), difference in zip(ends.items(), moved, strict=True):
        assert difference[:t].max() == 0
        assert difference[t:min(t + 3, end)].min() > 1e-4
        assert difference[end:].max() == 0


@documents
def test_without_the_mask_documents_influence_each_other(config):
    """The control of the test above."""
    tokens = some_tokens(1, 20, starts=(6, 13))
    moved = effects(replace(config, document_mask=False), tokens, [(12, another(tokens[0, 12]).item())])
    assert moved[0, 13:15].min() > 1e-4


@documents
@torch.no_grad()
def test_packed_documents_have_the_logits_of_documents_alone(config):
    """Positions are relative, so the logits of a document do not depend on its place in the row."""
    config = config if "rotary" in config.position else replace(config, position="rotary")
    model, tokens = scramble(build(config)), some_tokens(1, 20, starts=(6, 13))
    packed = model(tokens)
    for start, stop in ((0, 6), (6, 13), (13, 20)):
        torch.testing.assert_close(packed[:, start:stop], model(tokens[:, start:stop]), atol=2e-5, rtol=0)


# ---- The whole model against a slow twin -----------------------------------------------------------------------------


def twin_norm(x, gains):
    return x / x.pow(2).mean(-1, keepdim=True).sqrt() * gains


def twin_linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def twin_embedding(w, tokens):
    """Embed, normalise, add the bigram, smear: one token at a time."""
    plain, out = [], []
    for t, token in enumerate(tokens):
        opens = t == 0 or token == START
        bucket = 36 if opens else (token * 36_313 ^ tokens[t - 1] * 27_191) % 36
        plain.append(twin_norm(w["embed"][token], w["norm_embed.gains"]) + w["ngrams.0.table"][bucket])
        gate = torch.sigmoid(w["smear.gate"][0] @ plain[t][:12]) * w["smear.strength"]
        out.append(plain[t] if opens else plain[t] + gate * plain[t - 1])
    return torch.stack(out)


def twin_attention(w, x, tokens, config, values):
    """Attention with an explicit loop over queries; `values` are mixed with the value embedding already."""
    heads = (len(tokens), 2, 16)
    q, k = (twin_linear(x, w, name).view(heads) for name in "qk")
    q, k = (Rotary(config, 32)(twin_norm(z, 1)[None])[0] for z in (q, k))
    out = torch.zeros(heads)
    for i in range(len(tokens)):
        first = max([0, *(j for j in range(i + 1) if tokens[j] == START)])
        scores = config.attention_scale * torch.einsum("hd,jhd->hj", q[i], k[first:i + 1])
        out[i] = torch.einsum("hj,jhd->hd", scores.softmax(-1), values.view(heads)[first:i + 1])
    return twin_linear(out.view(len(tokens), 32), w, "out")


def below(w, prefix):
    return {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}


def twin(w, tokens, config):
    """The model TOGETHER["documents"] on one row of tokens, without fused operations: (T,) -> (T, V)."""
    x = x0 = twin_embedding(w, tokens)
    for i in range(3):
        block = below(w, f"blocks.{i}.")
        attention, mlp = below(block, "attention."), below(block, "mlp.")
        x = block["skip"][0] * x + block["skip"][1] * x0
        normed = twin_norm(x, block["norm1.gains"])
        values = twin_linear(normed, attention, "v")
        if i > 0:
            own, other = attention["mix_value.weight"]
            values = own * values + other * w[f"value_embeds.{i - 1}"][tokens]
        x = x + twin_attention(attention, normed, tokens, config, values)
        hidden = twin_linear(twin_norm(x, block["norm2.gains"]), mlp, "up").clamp(min=0) ** 2
        x = x + twin_linear(hidden, mlp, "down")
    z = twin_linear(twin_norm(x, w["norm_final.gains"]), w, "head")
    return 5.0 * z / (z**2 + 25).sqrt()


@torch.no_grad()
def test_all_techniques_together_equal_the_twin():
    config = TOGETHER["documents"]
    model, tokens = scramble(build(config)), some_tokens(2, 14, starts=(5, 6, 10))
    for row, logits in zip(tokens.tolist(), model(tokens), strict=True):
        torch.testing.assert_close(logits, twin(model.state_dict(), row, config), atol=2e-5, rtol=0)


def test_gradients_of_all_techniques_together_equal_the_twin():
    config, tokens = TOGETHER["documents"], some_tokens(1, 14, starts=(5, 6, 10))
    model, direction = scramble(build(config)), normal(14, 64)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    (model(tokens)[0] * direction).sum().backward()
    (twin(weights, tokens[0].tolist(), config) * direction).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, weights[name].grad, atol=1e-4, rtol=1e-3, msg=name)


# ---- Each part against its formula -----------------------------------------------------------------------------------


Z = torch.tensor([-1e4, -40.0, -3.0, -0.2, 0.0, 0.2, 3.0, 40.0, 1e4], dtype=torch.float64)
CAPS = {"tanh": lambda z, c: c * math.tanh(z / c), "rational": lambda z, c: c * z / math.hypot(z, c)}


@pytest.mark.parametrize("kind", CAPS)
@pytest.mark.parametrize("c", [2.0, 15.0])
def test_softcap_is_its_formula_bounded_and_steepest_at_zero(kind, c):
    z = Z.clone().requires_grad_()
    capped = softcap(z, kind, c)
    torch.testing.assert_close(capped.tolist(), [CAPS[kind](v, c) for v in Z.tolist()])
    slope = torch.autograd.grad(capped.sum(), z)[0]
    assert slope[4].item() == pytest.approx(1) and (slope >= 0).all() and (slope <= 1 + 1e-12).all()
    assert capped.abs().max() <= c
    torch.testing.assert_close(capped, -capped.flip(0))
    assert capped[-1].item() == pytest.approx(c, rel=1e-5)


def test_no_softcap_is_the_identity():
    assert torch.equal(softcap(Z, "none", 2.0), Z)


def test_relu2_and_its_slope():
    z = torch.tensor([-2.0, -0.5, 0.0, 0.5, 3.0], requires_grad=True)
    assert relu2(z).tolist() == [0, 0, 0, 0.25, 9]
    assert torch.autograd.grad(relu2(z).sum(), z)[0].tolist() == [0, 0, 0, 1, 6]


@pytest.mark.parametrize("activation", ["relu2", "gelu", "swiglu"])
@pytest.mark.parametrize("biases", [False, True])
def test_mlp_is_its_formula(activation, biases):
    mlp, x = scramble(MLP(replace(PLAIN, activation=activation, biases=biases, mlp_dim=20))), normal(2, 5, 32)

    def linear(layer, z):
        return z @ layer.weight.T + (layer.bias if biases else 0)

    up = linear(mlp.up, x)
    hidden = {"relu2": lambda: up.clamp(min=0) ** 2,
              "gelu": lambda: up * torch.distributions.Normal(0, 1).cdf(up),
              "swiglu": lambda: linear(mlp.gate, x) / (1 + (-linear(mlp.gate, x)).exp()) * up}[activation]()
    torch.testing.assert_close(mlp(x), linear(mlp.down, hidden), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gains", [False, True])
def test_norm_gives_root_mean_square_one_times_the_gains(gains):
    norm, x = Norm(replace(PLAIN, norm_gains=gains)), normal(3, 5, 32) * 7
    assert not gains or torch.equal(norm.gains, torch.ones(32))
    scramble(norm)
    torch.testing.assert_close(norm(x), twin_norm(x, norm.gains if gains else 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dim", [8, 32])
def test_smear_equals_the_loop(dim):
    """The gate reads the first 12 dimensions, or all where there are fewer; a document's first token is left alone."""
    smear, x = scramble(Smear(replace(PLAIN, dim=dim, head_dim=8, smear=True))), normal(2, 7, dim)
    starts = torch.zeros(2, 7, dtype=torch.bool)
    starts[0, 3] = starts[1, 0] = starts[1, 6] = True
    for flags in (None, starts):
        expected = x.clone()
        for b, t in torch.cartesian_prod(torch.arange(2), torch.arange(1, 7)).tolist():
            if flags is None or not flags[b, t]:
                gate = 1 / (1 + math.exp(-(smear.gate[0] @ x[b, t, :12]).item()))
                expected[b, t] += smear.strength.item() * gate * x[b, t - 1]
        torch.testing.assert_close(smear(x, flags), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("buckets", [1, 2, 37, 16_384])
def test_bigram_rows_equal_the_hash_in_python_integers(buckets):
    embedding = NgramEmbedding(replace(PLAIN, dim=1, head_dim=1, position="none", bigram_buckets=buckets))
    assert not embedding.table.any()
    with torch.no_grad():
        embedding.table.copy_(torch.arange(buckets)[:, None])
    tokens = torch.randint(50_257, (2, 50), generator=torch.Generator().manual_seed(0))
    starts = tokens % 7 == 0
    for flags in (None, starts):
        expected = [[buckets - 1 if t == 0 or (flags is not None and flags[b, t])
                     else (row[t] * 36_313 ^ row[t - 1] * 27_191) % max(buckets - 1, 1)
                     for t in range(50)] for b, row in enumerate(tokens.tolist())]
        assert embedding(tokens, flags)[..., 0].tolist() == expected


def test_bigram_hash_depends_on_order_and_spreads_pairs():
    embedding = NgramEmbedding(replace(PLAIN, dim=1, head_dim=1, position="none", bigram_buckets=1001))
    with torch.no_grad():
        embedding.table.copy_(torch.arange(1001)[:, None])
    pairs = torch.cartesian_prod(torch.arange(100), torch.arange(100))
    buckets = embedding(pairs, None)[:, 1, 0].long()
    counts = buckets.bincount(minlength=1001)
    assert counts[1000] == 0 and counts[:1000].min() > 0
    assert counts.max() < 40
    assert (buckets != embedding(pairs.flip(1), None)[:, 1, 0])[pairs[:, 0] != pairs[:, 1]].float().mean() > 0.98


def test_x0_skip_mixes_the_stream_with_its_start():
    config = replace(PLAIN, position="none", x0_skip=True)
    block = scramble(Block(config, 8, mixes_value_embed=False, attend=lambda q, k, v, mask, scale: v))
    x, x0 = normal(1, 4, 32), normal(1, 4, 32, seed=1)
    stream, start = block.skip.tolist()
    plain = Block(replace(config, x0_skip=False), 8, mixes_value_embed=False, attend=lambda q, k, v, mask, scale: v)
    plain.load_state_dict({name: value for name, value in block.state_dict().items() if name != "skip"})
    expected = plain(stream * x + start * x0, LayerInputs())
    torch.testing.assert_close(block(x, LayerInputs(x0=x0)), expected, atol=1e-5, rtol=0)
    assert Block(config, 8, mixes_value_embed=False, attend=None).skip.tolist() == [1.0, 0.0]


def test_tied_head_reads_and_writes_the_same_table():
    model = scramble(build(replace(PLAIN, tied_head=True)))
    tokens, hidden = some_tokens(1, 5), []
    model.norm_final.register_forward_hook(lambda _module, _inputs, output: hidden.append(output))
    torch.testing.assert_close(model(tokens), hidden[0] @ model.embed.T, atol=1e-5, rtol=0)
    unused = 63  # a padding row is never read, only written
    assert torch.autograd.grad(model(tokens, tokens), model.embed)[0][unused].abs().max() > 1e-3


def test_learned_positions_are_added_to_the_embedding():
    """Adding a position's vector equals changing the embeddings of the tokens at that position."""
    model, tokens = scramble(build(PLAIN)), torch.tensor([[7, 7, 7]])
    unplaced = scramble(build(replace(PLAIN, position="none")))
    unplaced.load_state_dict({name: value for name, value in model.state_dict().items() if name != "positions"})
    with torch.no_grad():
        unplaced.embed[1:4] = model.embed[7] + model.positions[:3]
    torch.testing.assert_close(model(tokens), unplaced(torch.tensor([[1, 2, 3]])), atol=1e-5, rtol=0)


@torch.no_grad()
def test_norm_embedding_removes_the_scale_of_the_table():
    for normed in (True, False):
        model = scramble(build(replace(PLAIN, position="none", norm_embedding=normed)))
        before = model(some_tokens(1, 5))
        model.embed.mul_(4)
        assert torch.allclose(model(some_tokens(1, 5)), before, atol=1e-4) == normed
