"""nGPT: the forward pass equals the paper's formulas; scores depend on relative positions; vectors keep length 1."""

import math
from dataclasses import replace

import pytest
import torch

from configs.optim import Adam, Extra, Muon, Optim, RuleConfig, SOAPMuon
from configs.presets import SPHERE_ROLES
from configs.schema import Model
from kernels.attention import attend_sdpa
from kernels.norms import unit
from model import GPT, Attention, SphereQK, SphereStep
from optim.comm import Comm
from optim.groups import build_groups
from optim.schedule import Values
from optim.sharded import ShardedOptimizer

SPHERE = Model(layers=2, dim=32, head_dim=16, geometry="sphere", zero_init_projections=False, softcap="none", eigen_lr=0.3,
               logit_scale=4.0)
VOCAB, LONGEST = 40, 24
ON_SPHERE = Adam(lr=0.05, constraint="sphere")


def build(config: Model = SPHERE, **options: object) -> GPT:
    torch.manual_seed(0)
    return GPT(config, **({"vocab_size": VOCAB, "max_tokens": LONGEST} | options))


@torch.no_grad()
def scramble(model: GPT) -> GPT:
    """Scale the learned factors at random around their initial values, with both signs."""
    rng = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith("stored"):
            p.mul_(1 + torch.randn(p.shape, generator=rng))
    return model


def sphere_optimizer(model: GPT, config: RuleConfig = ON_SPHERE) -> ShardedOptimizer:
    optim = replace(Optim(), **dict.fromkeys(SPHERE_ROLES, config))
    groups = build_groups(dict(model.named_parameters()), model.roles(), optim, model.axes())
    return ShardedOptimizer(groups, Comm(torch.device("cpu")))


def some_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(2))


# ---- The forward pass, formula by formula ------------------------------------------------------------------------------


def n(x):
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


def factors(w, name, *, value=1.0, stored):
    return w[f"{name}.stored"] * value / stored


def rotated(x):
    """Position t turns the pair (i, i + D/2) by t times its frequency, written with complex numbers."""
    half = x.shape[-1] // 2
    frequency = 1024.0 ** -torch.linspace(0, 1, half, dtype=torch.float64)
    turn = torch.polar(torch.ones(()).double(), -torch.outer(torch.arange(x.shape[-2]).double(), frequency))
    z = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat((z.real, z.imag), -1)


def twin_layer(h, w, at, config):
    d, heads = config.dim, (config.dim // config.head_dim, config.head_dim)
    q, k, v = ((h @ w[f"{at}.attention.{c}.weight"].T).unflatten(-1, heads).transpose(-2, -3) for c in "qkv")
    s_qk = factors(w, f"{at}.attention.norm_qk.scale", stored=d**-0.5).view(heads[0], 1, heads[1])
    q, k = rotated(s_qk * n(q)), rotated(s_qk * n(k))
    future = torch.ones(h.shape[-2], h.shape[-2]).triu(1).bool()
    scores = math.sqrt(config.head_dim) * q @ k.mT
    mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    h_a = n(mixed.transpose(-2, -3).flatten(-2) @ w[f"{at}.attention.out.weight"].T)
    h = n(h + factors(w, f"{at}.add1.alpha", value=config.eigen_lr, stored=d**-0.5).abs() * (h_a - h))
    u = h @ w[f"{at}.mlp.up.weight"].T * factors(w, f"{at}.mlp.up.scale", stored=1.0)
    if config.activation == "swiglu":
        v = h @ w[f"{at}.mlp.gate.weight"].T * factors(w, f"{at}.mlp.gate.scale", stored=1.0) * math.sqrt(d)
        u = u * v * torch.sigmoid(v)
    else:
        u = (math.sqrt(d) * u).clamp(min=0) ** 2
    h_m = n(u @ w[f"{at}.mlp.down.weight"].T)
    return n(h + factors(w, f"{at}.add2.alpha", value=config.eigen_lr, stored=d**-0.5).abs() * (h_m - h))


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_forward_equals_the_papers_formulas(activation):
    config = replace(SPHERE, activation=activation)
    model = scramble(build(config, dtype=torch.float64))
    sphere_optimizer(model)
    w = {name: tensor.detach().double() for name, tensor in model.named_parameters()}
    tokens = some_tokens(3, LONGEST)
    h = w["embed"][tokens]
    for i in range(config.layers):
        h = twin_layer(h, w, f"blocks.{i}", config)
    logits = h @ w["head.weight"].T * factors(w, "head.scale", value=config.logit_scale, stored=config.dim**-0.5)
    torch.testing.assert_close(model(tokens).double(), logits, atol=1e-6 * logits.abs().max().item(), rtol=0)


def test_sphere_step_with_alpha_one_moves_to_the_target_and_with_alpha_zero_stays():
    step, h, x = SphereStep(SPHERE), unit(torch.randn(5, 32)), torch.randn(5, 32)
    step.alpha.stored.data.fill_(-(32**-0.5) / SPHERE.eigen_lr)
    torch.testing.assert_close(step(h, x), unit(x))
    step.alpha.stored.data.zero_()
    torch.testing.assert_close(step(h, x), h)


# ---- Positions -----------------------------------------------------------------------------------------------------------


def test_scores_depend_on_relative_position_alone_for_any_factors():
    torch.manual_seed(0)
    attention = Attention(replace(SPHERE, dim=16), LONGEST, mixes_value_embed=False, attend=attend_sdpa)
    attention.norm_qk.scale.stored.data.normal_()
    same = torch.randn(1, 1, 16).expand(1, LONGEST, 16)
    shape = (1, LONGEST, 1, 16)
    q, k = (attention.rotary(attention.norm_qk(f(same).view(shape)))[0, :, 0] for f in (attention.q, attention.k))
    scores = q @ k.T
    for distance in range(LONGEST):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=2e-5, rtol=1e-5)
    assert scores[:, 0].std() > 1e-3


def test_factors_after_the_rotation_make_scores_depend_on_absolute_position():
    """Control of the test above: this is why the factors are applied before the rotation."""
    torch.manual_seed(0)
    attention = Attention(replace(SPHERE, dim=16), LONGEST, mixes_value_embed=False, attend=attend_sdpa)
    factor = torch.randn(16)
    q = attention.rotary(unit(torch.randn(1, 1, 1, 16)).expand(1, LONGEST, 1, 16))[0, :, 0] * factor
    along = (q @ q.T).diagonal(-1)
    assert (along - along[0]).abs().max() > 1e-2


def test_queries_and_keys_have_length_one_at_the_start():
    q = SphereQK(SPHERE)(torch.randn(2, 3, 2, 16))
    torch.testing.assert_close(q.norm(dim=-1), torch.ones(2, 3, 2))


# ---- Lengths while it trains ---------------------------------------------------------------------------------------------


def lengths(model: GPT) -> torch.Tensor:
    names = [name for name, role in model.roles().items() if role in SPHERE_ROLES]
    weights = dict(model.named_parameters())
    return torch.cat([weights[name].float().norm(dim=model.axes()[name]) for name in names])


MUON = Muon(lr=0.05, constraint="sphere")
RULES = {
    "adam": ON_SPHERE, "muon": MUON, "geodesic": replace(MUON, extra=Extra(retraction="geodesic")),
    "tangent": replace(ON_SPHERE, extra=Extra(tangent="momentum")),
    "descent_on_the_sphere": replace(MUON, extra=Extra(tangent="dual")),
    "soap_muon": SOAPMuon(lr=0.05, constraint="sphere"), "huge_lr": replace(ON_SPHERE, lr=100.0),
}


@pytest.mark.parametrize("config", RULES.values(), ids=RULES)
def test_every_vector_keeps_length_one(config):
    model = build(replace(SPHERE, value_embeds=1, x0_skip=True, smear=True))
    optimizer, tokens = sphere_optimizer(model, config), some_tokens(4, 16)
    assert (lengths(model) - 1).abs().max() < 1e-6
    for count in range(1, 9):
        before = {name: p.clone() for name, p in model.named_parameters()}
        model(tokens, tokens.roll(-1, 1)).backward()
        optimizer.step(Values(1.0, 1.0, None, 64, 16, None), count)
        optimizer.zero_grad()
        assert (lengths(model) - 1).abs().max() < 1e-5
        assert all((p - before[name]).abs().max() > 0 for name, p in model.named_parameters() if p.size(0) > 1 < p.ndim)


def test_bfloat16_embeddings_keep_length_one_to_their_precision():
    model = build(replace(SPHERE, embed_dtype="bfloat16"))
    optimizer, tokens = sphere_optimizer(model), some_tokens(4, 16)
    for count in range(1, 5):
        model(tokens, tokens.roll(-1, 1)).backward()
        optimizer.step(Values(1.0, 1.0, None, 64, 16, None), count)
        optimizer.zero_grad()
    assert (lengths(model) - 1).abs().max() < 2e-3


def test_matrices_that_write_to_the_residual_stream_are_normalised_by_columns():
    model = build()
    assert {name for name, axis in model.axes().items() if axis == -2} == {
        f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attention.out", "mlp.down")}
    sphere_optimizer(model)
    down = model.blocks[0].mlp.down.weight
    torch.testing.assert_close(down.norm(dim=0), torch.ones(down.size(1)))
    assert (down.norm(dim=1) - 1).abs().max() > 0.1


def test_zero_projections_are_refused():
    with pytest.raises(ValueError, match="--model.no_zero_init_projections"):
        Model(geometry="sphere")
    with pytest.raises(ValueError, match="zero vector.*--model.no_zero_init_projections"):
        sphere_optimizer(build(Model(dim=32, head_dim=16)))
