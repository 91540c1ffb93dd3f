"""Presets: each is complete, with a title of one line; the two reproductions have the published numbers, repeated here."""

import dataclasses

import pytest

from configs.notation import evaluate_curve, parse_curve
from configs.optim import Adam, Muon, Optim
from configs.presets import PRESETS, preset_title
from configs.schema import Run
from optim.schedule import Schedule

ROLES_OF_TRACK3 = ("matrix", "embed", "head", "gain", "bias")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_complete_run_with_its_name(name):
    run = PRESETS[name]()
    assert isinstance(run, Run) and run.preset == name and run == PRESETS[name]()
    assert run.run.name == ""
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.train.steps = 1


def test_names_and_titles_fit_a_terminal_of_80_columns():
    longest = max(map(len, PRESETS))
    assert all(0 < 2 + longest + 2 + len(preset_title(name)) <= 80 for name in PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_the_learning_rate_falls_to_a_fifth_or_less(name):
    run = PRESETS[name]()
    knots = parse_curve(run.schedule.lr)
    assert evaluate_curve(knots, run.train.steps - 1, run.train.steps) <= 0.2
    assert max(evaluate_curve(knots, step, run.train.steps) for step in range(run.train.steps)) >= 1


@pytest.mark.parametrize(("name", "base"), [("tiny_adamw", "tiny"), ("bytes_adamw", "bytes")])
def test_the_adamw_presets_differ_only_in_the_matrices(name, base):
    run, base = PRESETS[name](), PRESETS[base]()
    assert isinstance(run.optim.matrix, Adam) and isinstance(base.optim.matrix, Muon)
    optim = dataclasses.replace(run.optim, matrix=base.optim.matrix)
    assert dataclasses.replace(run, preset=base.preset, optim=optim) == base


# ---- Track 3 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["track3", "track3_adamw"])
def test_track3s_model_and_data(name):
    run = PRESETS[name]()
    model = run.model
    assert (model.layers, model.dim, model.head_dim) == (12, 768, 128) and model.mlp_dim in (None, 3072)
    assert model.position == "half_rotary" and model.rotary_base == 1024 and model.attention_scale == 0.12
    assert model.activation == "relu2" and model.qk_norm and model.norm_gains and model.biases
    assert (model.softcap, model.softcap_value) == ("rational", 15)
    assert model.zero_init_projections and model.init_gain == 0.33 and model.embed_std == 1
    assert model.embed_dtype == "bfloat16" and not model.tied_head and model.norm_embedding
    assert (model.x0_skip, model.smear, model.value_embeds, model.bigram_buckets) == (False, False, 0, 0)
    assert model.window_tokens is None and not model.document_mask and model.vocab_multiple in (64, 128)
    data = run.data
    assert (data.source, data.tokenizer, data.order) == ("shards", "gpt2", "contiguous")
    assert (data.sequence_tokens, data.val_sequence_tokens or 1024, data.val_tokens) == (1024, 1024, 10_485_760)


@pytest.mark.parametrize(("name", "steps"), [("track3", 3250), ("track3_adamw", 5625)])
def test_track3s_training(name, steps):
    run = PRESETS[name]()
    assert (run.train.steps, run.train.batch_tokens, run.train.micro_tokens) == (steps, 524_288, 65_536)
    assert run.train.loss_reduction == "sum" and run.run.target_loss_nats == 3.28 and not run.run.stop_at_target
    assert (run.train.val_every_steps, run.train.final_val_every_steps) == (125, 25)
    assert Schedule(run).tokens_before(2) == 1_048_576
    assert {Schedule(run).portions(step) for step in range(0, steps, 211)} == {(524_288, 1024, None)}


def test_track3s_optimizer():
    optim = PRESETS["track3"]().optim
    muon = optim.matrix
    assert (muon.rule, muon.lr, muon.weight_decay, muon.decay) == ("muon", 0.025, 0.05, "decoupled")
    assert (muon.momentum, muon.averaging, muon.nesterov) == (0.95, "ema", True)
    assert (muon.unit, muon.ns, muon.ns_steps) == ("at_least_one", "convergent", 12)
    for role, lr in {"embed": 0.7, "head": 0.004, "gain": 0.015, "bias": 0.015}.items():
        assert adam_of(getattr(optim, role)) == ("adam", lr, 0.8, 0.95, 1e-10, 0.001)
        assert getattr(optim, role).decay == "decoupled"


def test_track3_adamws_optimizer():
    optim = PRESETS["track3_adamw"]().optim
    assert adam_of(optim.matrix) == ("adam", 0.0015, 0.9, 0.95, 1e-10, 0.1) and optim.matrix.decay == "decoupled"
    for role, lr in {"embed": 0.3, "head": 0.003125, "gain": 0.01, "bias": 0.01}.items():
        assert adam_of(getattr(optim, role)) == ("adam", lr, 0.8, 0.95, 1e-10, 0.0)


def adam_of(config: Adam) -> tuple:
    return config.rule, config.lr, config.beta1, config.beta2, config.eps, config.weight_decay


@pytest.mark.parametrize(("step", "lr"), [
    (0, 0.025), (974, 0.025), (975, 0.025), (976, 0.024989010989), (1612, 0.018), (3249, 0.000010989011),
])
def test_track3s_schedule(step, lr):
    """Constant for 975 of 3250 steps, then linear to 0 at 3250; momentum and decay are constant."""
    run = PRESETS["track3"]()
    values = Schedule(run).values(step)
    assert run.optim.matrix.lr * values.lr == pytest.approx(lr, rel=1e-9)
    assert run.optim.embed.lr * values.lr == pytest.approx(28 * lr, rel=1e-9)
    assert (values.momentum or run.optim.matrix.momentum) == 0.95
    assert run.optim.matrix.weight_decay * values.weight_decay == 0.05


@pytest.mark.parametrize(("step", "lr"), [
    (0, 0.0), (1, 0.000006), (125, 0.00075), (250, 0.0015), (1000, 0.0015), (1687, 0.0015), (3656, 0.00075009523810),
    (5624, 0.00000038095238),
])
def test_track3_adamws_schedule(step, lr):
    """250 steps of warm-up, constant to 1687.5, then linear to 0 at 5625."""
    run = PRESETS["track3_adamw"]()
    values = Schedule(run).values(step)
    assert run.optim.matrix.lr * values.lr == pytest.approx(lr, rel=1e-6)
    assert run.optim.matrix.weight_decay * values.weight_decay == 0.1


def test_unused_roles_of_track3_are_the_defaults():
    """A role without tensors keeps its default: a reader would take another value for a setting that acts."""
    for name in ("track3", "track3_adamw"):
        optim = PRESETS[name]().optim
        for field in dataclasses.fields(Optim):
            if field.name not in ROLES_OF_TRACK3:
                assert getattr(optim, field.name) == getattr(Optim(), field.name)
