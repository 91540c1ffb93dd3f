"""The ablation table: every row is a run that differs from its base, and leave-one-out rows switch off one technique."""

from dataclasses import fields

import pytest

from configs.ablations import ROWS, find_row, leave_one_out_rows, settings_off, techniques
from configs.cli import as_flags, parse_row
from configs.model import Model
from configs.notation import techniques_of
from configs.optim import Optim
from configs.presets import PRESETS
from configs.serialize import config_to_dict, flatten


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_change_their_base(row):
    assert parse_row(row.base, row.flags.split()) != PRESETS[row.base]()


def test_names_are_unique():
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_an_unknown_row_is_named():
    with pytest.raises(ValueError, match="unknown ablation 'nothing'; "):
        find_row("nothing")


def test_a_misspelt_row_gets_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'no_smear'"):
        find_row("nosmear")


# ---- Leave-one-out rows ----

MODEL_SWITCHES = {name for name, technique in techniques_of(Model).items() if technique.name is None}
CHANGES = {f"no_{name}": {f"model.{name}"} for name in MODEL_SWITCHES} | {
    "no_value_embeds": {"model.value_embeds"}, "no_bigram": {"model.bigram_buckets"}, "no_softcap": {"model.softcap"},
    "no_rotary": {"model.position"}, "no_relu2": {"model.activation"}, "no_attention_scale": {"model.attention_scale"},
    "no_window": {"model.window_tokens"}, "no_window_growth": {"schedule.window_tokens"},
    "no_tied_start": {"train.tied_until_frac"}, "no_row_moments": {"optim.matrix.rule"},
    "no_cautious_decay": {"optim.matrix.decay"}, "no_blocks": {"optim.matrix.extra.blocks"},
    "no_lr_factors": {"optim.matrix.extra.lr_factors"},
    "no_slow_adam": {f"optim.{role}.update_every" for role in ("embed", "head")},
    "no_nesterov": {"optim.matrix.nesterov"}, "no_momentum": {"optim.matrix.averaging"},
    "no_momentum_kernel": {"optim.matrix.kernel"},
    "no_momentum_curve": {"schedule.momentum"}, "no_weight_decay": {"optim.matrix.weight_decay"},
    "no_batch_growth": {"schedule.batch_tokens"}, "no_sequence_growth": {"schedule.sequence_tokens"},
    "no_lr_cooldown": {"schedule.lr"}}
# Settings that a row also switches off if they are on: without the technique they would have no effect or be refused.
COMPANIONS = {
    "no_window": {"model.full_attention_layers", "model.long_window_tokens", "model.yarn", "model.yarn_windows",
                  "schedule.window_tokens", "schedule.long_window_tokens", "train.val_long_window_tokens"},
    "no_window_growth": {"schedule.long_window_tokens"},
    "no_rotary": {"model.key_offset", "model.yarn", "model.yarn_windows"},
    "no_value_embeds": {"model.value_gates", "model.value_embed_layers", "model.dense_gates", "model.dense_skips"},
    "no_yarn": {"model.yarn_windows"}, "no_xsa": {"model.xsa_layers"}, "no_head_gates": {"model.head_gate_layers"},
    "no_smear": {"model.smear_first"}, "no_dense": {"model.dense_skips", "model.dense_gates"},
    "no_inject": {"model.dense_gates"}, "no_residual_growth": {"model.dense_gates"}, "no_value_gates": {"model.dense_gates"},
    "no_bigram": {"model.bigram_signs", "model.ngram_orders"},
    "no_slow_adam": {f"optim.{role.name}.update_every" for role in fields(Optim)}}
EVERYTHING = ("--model.x0_skip --model.softcap tanh --model.norm_gains --model.biases --model.tied_head "
              "--model.attention_scale 0.1 --model.window_tokens 64 --model.full_attention_layers 1 --model.document_mask "
              "--schedule.window_tokens 0.5 --schedule.sequence_tokens 0.5 --optim.matrix.weight_decay 0.1 "
              "--model.value_gates --model.bigram_signs 8 --model.ngram_orders 3 --model.position half_rotary "
              "--model.key_offset --model.yarn --model.head_gates --model.xsa --model.projection_gains --model.inject "
              "--model.layers 3 --model.paired_heads 0 --model.dynamic_heads 1 --model.attention_free 2 --model.skips 0>2 "
              "--model.shared_attention_input 0 --model.backout 1 --model.residual_growth 1.1 --model.dense mudd "
              "--model.qk_head_dim 32")
EVERYTHING += " " + as_flags({f"model.{name}": True for name, technique in techniques_of(Model).items()
                              if technique.on is True and f"model.{name} " not in EVERYTHING and not technique.needs})
# Techniques that EVERYTHING cannot contain, since they exclude others of it or need other optimizers; tested separately.
APART = {"mtp_weights", "prefix_loss", "sampled_softmax", "tied_start", "row_moments", "slow_adam", "cautious_decay",
         "blocks", "lr_factors", "momentum_kernel"}


def labels(run):
    """The name after `no_` of each technique's row, by setting."""
    return {name: name.rpartition(".")[2] if technique.name is None else technique.name
            for name, technique in techniques(run).items() if technique.name != ""}


def changed(run, other):
    """Dotted names of the fields that both runs have and in which they differ."""
    left, right = flatten(config_to_dict(run)), flatten(config_to_dict(other))
    return {name for name in left.keys() & right.keys() if left[name] != right[name]}


# Together they use every technique that some preset uses.
KINDS = ("tiny", "track3", "ngpt_bytes", "speedrun_cpu", "speedrun")


@pytest.mark.parametrize("preset", [*KINDS, "everything"])
def test_each_row_switches_off_only_its_technique(preset):
    preset, flags = ("tiny", EVERYTHING.split()) if preset == "everything" else (preset, [])
    run = parse_row(preset, flags)
    for row in leave_one_out_rows(run):
        changes = changed(run, parse_row(row.base, [*flags, *row.flags.split()]))
        if row.name == "no_muon":
            assert {"optim.matrix.rule", "optim.matrix.lr"} <= changes
            assert all(name.startswith("optim.matrix.") for name in changes)
        else:
            assert CHANGES[row.name] <= changes <= CHANGES[row.name] | COMPANIONS.get(row.name, set())


def test_every_technique_can_be_left_out():
    run = parse_row("tiny", EVERYTHING.split())
    assert {row.name for row in leave_one_out_rows(run)} == {
        f"no_{name}" for name in labels(run).values() if name not in APART} | {"no_muon"}


def test_the_record_recipe_has_a_row_for_each_of_its_techniques():
    rows = {row.name for row in leave_one_out_rows(PRESETS["speedrun_cpu"]())}
    assert {f"no_{name}" for name in APART - {"sampled_softmax", "momentum_kernel"}} <= rows
    frontier = parse_row("tiny", ["--model.sampled_softmax", "9", "--optim.matrix.kernel", "0.85=0.4", "0.98=0.6"])
    assert {"no_sampled_softmax", "no_momentum_kernel"} <= {row.name for row in leave_one_out_rows(frontier)}


def test_a_technique_that_is_off_has_no_row():
    run = PRESETS["tiny_adamw"]()
    off = " ".join(as_flags(settings_off(run, name)) for name in labels(run))
    assert leave_one_out_rows(parse_row("tiny_adamw", off.split())) == []


def test_no_muon_gives_the_matrices_the_twins_rule():
    row = next(row for row in leave_one_out_rows(PRESETS["track3"]()) if row.name == "no_muon")
    assert parse_row("track3", row.flags.split()).optim.matrix == PRESETS["track3_adamw"]().optim.matrix


def test_without_its_curve_momentum_is_the_groups_own():
    row = next(row for row in leave_one_out_rows(PRESETS["tiny"]()) if row.name == "no_momentum_curve")
    assert parse_row("tiny", row.flags.split()).schedule.momentum is None
