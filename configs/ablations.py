"""The ablation table: each row is one experiment, a preset with a few changed flags.

Rows go through the same parser as the command line. `leave_one_out_rows` derives the rows that switch off one technique of a
run each from the fields that declare a technique (configs/notation.py), so that a new technique needs no row of its own.
"""

from dataclasses import fields
from typing import NamedTuple

from configs.cli import as_flags
from configs.model import SPHERE_NEEDS
from configs.notation import Technique, nearest, techniques_of
from configs.optim import Muon, Optim, switch_rule
from configs.presets import PRESETS
from configs.schema import Run
from configs.serialize import config_to_dict, flatten


class Row(NamedTuple):
    """An experiment of the ablation table."""

    name: str
    """Name on the command line of scripts.ablate."""
    base: str
    """Preset that it starts from."""
    flags: str
    """Flags of the command line that change the preset."""


# Scion (Pethick et al. 2025, arXiv 2502.07529): every role descends under a norm, none uses Adam.
SCION = ("--optim.embed.rule steepest --optim.embed.norm row --optim.head.rule steepest --optim.head.norm sign "
         "--optim.gate.rule steepest --optim.gate.norm sign --optim.gate.lr 0.01 "
         "--optim.scalar.rule steepest --optim.scalar.norm sign --optim.scalar.lr 0.01")
# Constrained Scion by weight decay: weights stay in the norm's ball of radius 1 / weight_decay, as each step is a mixture of
# the weights and a point of that ball, with share lr weight_decay <= 1.
SCION_BALLS = ("--optim.matrix.weight_decay 0.05 --optim.embed.weight_decay 0.2 --optim.head.weight_decay 0.5 "
               "--optim.gate.weight_decay 0.5 --optim.scalar.weight_decay 0.5")

ROWS = (
    Row("quintic", "bytes", "--optim.matrix.ns quintic"),
    Row("svd", "bytes", "--optim.matrix.ns svd"),
    Row("no_nesterov", "bytes", "--optim.matrix.no_nesterov"),
    Row("no_momentum", "bytes", "--optim.matrix.averaging none"),
    Row("signum", "bytes", "--optim.matrix.rule steepest --optim.matrix.norm sign --optim.matrix.lr 0.001"),
    Row("normalised_sgd", "bytes", "--optim.matrix.rule steepest --optim.matrix.norm frobenius --optim.matrix.lr 0.1"),
    Row("spectral_unit", "bytes", "--optim.matrix.unit spectral"),
    Row("row_embedding", "bytes", "--optim.embed.rule steepest --optim.embed.norm row --optim.embed.lr 0.1"),
    Row("no_qk_norm", "tiny", "--model.no_qk_norm"),
    Row("softcap", "tiny", "--model.softcap tanh"),
    Row("no_x0_skip", "bytes", "--model.no_x0_skip"),
    Row("no_smear", "tiny", "--model.no_smear"),
    Row("no_value_embeds", "tiny", "--model.value_embeds 0"),
    Row("no_bigram", "tiny", "--model.bigram_buckets 0"),
    Row("no_key_offset", "tiny", "--model.no_key_offset"),
    Row("short_context", "tiny", "--data.sequence_tokens 256"),
    Row("adam_matrices", "tiny", "--optim.matrix.rule adam --optim.matrix.lr 0.003"),
    Row("more_ngrams", "tiny", "--model.ngram_orders 3"),
    Row("gelu", "tiny", "--model.activation gelu"),
    Row("random_init_projections", "tiny", "--model.no_zero_init_projections"),
    Row("equilibrate", "bytes", "--optim.matrix.equilibrate"),
    Row("averages", "bytes", "--optim.matrix.averages 3 --optim.matrix.momentum 0.95"),
    Row("normuon", "bytes", "--optim.matrix.rule normuon"),
    Row("normuon_longer", "bytes", "--optim.matrix.rule normuon --optim.matrix.normalise longer"),
    Row("muon2", "bytes", "--optim.matrix.rule muon2"),
    Row("muown", "bytes", "--optim.matrix.rule muown --optim.matrix.unit match_adam "
                          "--optim.matrix.beta1 0.9 --optim.matrix.momentum 0.8 --optim.matrix.lr 0.008"),
    Row("dion", "bytes", "--optim.matrix.rule dion --optim.matrix.rank_frac 0.5 --optim.matrix.lr 0.05"),
    Row("dion2", "bytes", "--optim.matrix.rule dion2 --optim.matrix.rank_frac 0.5 --optim.matrix.lr 0.06"),
    Row("sm3", "bytes", "--optim.matrix.rule sm3 --optim.matrix.lr 0.01"),
    Row("prodigy", "bytes", "--optim.matrix.rule prodigy --optim.matrix.lr 1 --optim.matrix.distance_start 1e-4"),
    Row("agd", "bytes", "--optim.matrix.rule agd --optim.matrix.lr 1"),
    Row("swan", "bytes", "--optim.matrix.rule swan --optim.matrix.lr 0.004"),
    Row("psgd", "bytes", "--optim.matrix.rule psgd --optim.matrix.beta1 0.95 --optim.matrix.lr 0.006 "
                       "--optim.matrix.factor_lr 0.3"),
    Row("row_floor", "bytes", "--optim.matrix.extra.row_floor 0.3825 --optim.matrix.extra.radial_brake 0.5 "
                              "--optim.matrix.constraint radial --model.no_zero_init_projections"),
    Row("lookahead", "bytes", "--train.lookahead 0.6 --train.lookahead_gamma 0.95"),
    Row("slow_adam", "bytes", "--optim.embed.update_every 2 --optim.head.update_every 2"),
    Row("adamh", "bytes", "--optim.matrix.rule adam --optim.matrix.constraint hyperball --optim.matrix.lr 0.003 "
                          "--model.no_zero_init_projections"),
    Row("spectral_clip", "bytes", "--optim.matrix.extra.clip 0.05 --optim.matrix.extra.clip_norm spectral"),
    Row("weight_average", "bytes", "--train.weight_average 0.95 --train.weight_average_start 0.5"),
    Row("stiefel", "bytes", "--optim.matrix.rule stiefel --optim.matrix.dual_steps 6 "
                            "--model.no_zero_init_projections"),
    Row("muonh", "bytes", "--optim.matrix.constraint hyperball --model.no_zero_init_projections"),
    Row("sphere_adam", "ngpt_bytes", "--optim.matrix.rule adam --optim.matrix.lr 0.02"),
    Row("sphere_geodesic", "ngpt_bytes", "--optim.matrix.extra.retraction geodesic"),
    Row("sphere_tangent", "ngpt_bytes", "--optim.matrix.extra.tangent dual"),
    Row("sphere_free", "ngpt_bytes", "--optim.matrix.constraint none"),
    Row("asymmetric_softcap", "bytes", "--model.softcap asymmetric"),
    Row("head_gates", "bytes", "--model.head_gates"),
    Row("xsa", "bytes", "--model.xsa"),
    Row("paired_heads", "bytes", "--model.paired_heads 0 2"),
    Row("key_offset", "bytes", "--model.position half_rotary --model.key_offset"),
    Row("dynamic_heads", "bytes", "--model.dynamic_heads 3"),
    Row("qk_head_dim", "bytes", "--model.qk_head_dim 24"),
    Row("attention_free", "bytes", "--model.attention_free 2"),
    Row("shared_attention_input", "bytes", "--model.shared_attention_input 1"),
    Row("projection_gains", "bytes", "--model.projection_gains"),
    Row("inject", "bytes", "--model.inject --model.bigram_buckets 16384"),
    Row("bigram_signs", "bytes", "--model.bigram_buckets 16384 --model.bigram_signs 256"),
    Row("trigrams", "bytes", "--model.bigram_buckets 16384 --model.ngram_orders 3"),
    Row("residual_growth", "bytes", "--model.residual_growth 1.1"),
    Row("skip", "bytes", "--model.skips 0>2"),
    Row("backout", "bytes", "--model.backout 2"),
    Row("denseformer", "bytes", "--model.dense denseformer"),
    Row("mudd", "bytes", "--model.dense mudd"),
    Row("mtp", "bytes", "--model.mtp_weights 0.5"),
    Row("prefix_loss", "tiny", "--model.prefix_loss 0.25"),
    Row("sampled_softmax", "tiny", "--model.sampled_softmax 256"),
    Row("tied_start", "bytes", "--train.tied_until_frac 0.66 --optim.embed.lr 0.01 --model.embed_std 0.02"),
    Row("scion", "bytes", f"{SCION} --optim.embed.lr 0.03 --optim.head.lr 0.004"),
    Row("scion_constrained", "bytes", f"{SCION} {SCION_BALLS} --optim.matrix.lr 0.04 --optim.embed.lr 0.03 "
                                      "--optim.head.lr 0.005"),
    # From normalised SGD (p = 2) towards Muon (p = infinity). Unit rms gives all p the same length for a flat spectrum.
    *(Row(f"schatten_{p}", "bytes", "--optim.matrix.rule steepest --optim.matrix.norm schatten --optim.matrix.unit rms "
                                    f"--optim.matrix.schatten_p {p}") for p in (2, 4, 8, 32)),
    Row("sign_head", "bytes", "--optim.head.rule steepest --optim.head.norm sign --optim.head.unit fan_in "
                              "--optim.head.lr 0.5"),
    Row("row_head", "bytes", "--optim.head.rule steepest --optim.head.norm row --optim.head.unit fan_in "
                             "--optim.head.lr 0.5"),
)


def techniques(run: Run) -> dict[str, Technique]:
    """Return the techniques of a run by dotted name; of the optimizers, those of the hidden matrices only."""
    sections = {"model": run.model, "schedule": run.schedule, "train": run.train, "optim.matrix": run.optim.matrix,
                "optim.matrix.extra": run.optim.matrix.extra}
    return {f"{section}.{name}": technique for section, config in sections.items()
            for name, technique in techniques_of(type(config)).items()}


def is_on(run: Run, name: str) -> bool:
    """True if a run uses the technique `name` and all that it needs."""
    technique, value = techniques(run).get(name), flatten(config_to_dict(run)).get(name)
    # The sphere requires its settings: they cannot be switched off there.
    if technique is None or (run.model.geometry == "sphere" and name.removeprefix("model.") in SPHERE_NEEDS):
        return False
    value = tuple(value) if isinstance(value, list) else value  # `off` and `only` hold tuples, JSON lists
    is_used = value in technique.only if technique.only else value != technique.off
    return is_used and all(is_on(run, need) for need in technique.needs)


def settings_off(run: Run, name: str) -> dict[str, object]:
    """Return the settings that switch off the technique `name` and all techniques that need it.

    Options of an optimizer stay as they are: a rule whose averaging is off accepts nesterov.
    """
    off = {name: techniques(run)[name].off}
    needing = [other for other, technique in techniques(run).items()
               if name in technique.needs and not name.startswith("optim.")]
    for other in needing:
        off |= settings_off(run, other)
    from_embeds = [skip for skip in run.model.dense_skips if skip.startswith("ve")]
    if name == "model.value_embeds" and from_embeds:  # connections that begin at a value embedding end with it
        off["model.dense_skips"] = tuple(skip for skip in run.model.dense_skips if skip not in from_embeds)
    return off


# The preset with tuned AdamW for the matrices, where it is not called PRESET_adamw.
ADAMW_TWINS = {"bench_cpu": "bytes_adamw", "bench_cpu_prose": "bytes_adamw", "bench_gpu": "track3_adamw"}


def leave_one_out_rows(run: Run) -> list[Row]:
    """Return a row `no_NAME` for every technique that the run uses, which switches off that one, on the run's preset.

    `no_muon` is there if the preset has a twin with tuned settings for AdamW.
    """
    rows = []
    for name, technique in techniques(run).items():
        label = name.rpartition(".")[2] if technique.name is None else technique.name
        if label and is_on(run, name):
            rows.append(Row(f"no_{label}", run.preset, as_flags(settings_off(run, name))))
    # Techniques that are no field of their own: NorMuon's second moment, slow updates of all groups, and Muon.
    if run.optim.matrix.rule == "normuon":
        rows.append(Row("no_row_moments", run.preset, "--optim.matrix.rule muon"))
    if run.optim.embed.update_every > 1:
        every_step: dict[str, object] = {f"optim.{role.name}.update_every": 1 for role in fields(Optim)}
        every_step |= {f"optim.{role.name}.extra.update_every_from": () for role in fields(Optim)
                       if getattr(run.optim, role.name).extra.update_every_from}
        rows.append(Row("no_slow_adam", run.preset, as_flags(every_step)))
    twin = PRESETS.get(ADAMW_TWINS.get(run.preset, f"{run.preset}_adamw"))
    if type(run.optim.matrix) is Muon and twin:
        rows.append(Row("no_muon", run.preset, _flags_of_twin(twin(), run)))
    return rows


def _flags_of_twin(twin: Run, run: Run) -> str:
    """Return the flags that give the run's matrices the rule of the twin's, with all its settings."""
    target = twin.optim.matrix
    switched = switch_rule(run.optim.matrix, target.rule)  # what --optim.matrix.rule alone gives
    changes = {f"optim.matrix.{f.name}": getattr(target, f.name) for f in fields(target)
               if getattr(target, f.name) != getattr(switched, f.name)}
    return as_flags({"optim.matrix.rule": target.rule} | changes)


def find_row(name: str) -> Row:
    """Return the row of that name. Raises ValueError, with the nearest name, if there is none."""
    rows = {row.name: row for row in ROWS}
    if name not in rows:
        raise ValueError(f"unknown ablation {name!r}{nearest(name, list(rows))}")
    return rows[name]
