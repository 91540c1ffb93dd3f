"""Presets of the speedrun's record recipe, for eight H100s down to a laptop.

The record is KellerJordan/modded-nanogpt's number 89 of 17 July 2026: loss 3.28 in 73.8 s on 8 H100s. The model, its losses
and the optimizer are the record's by value (benchmarks/record_parity.md names what differs).
"""

from collections.abc import Sequence
from dataclasses import replace

from configs.optim import Adam, Extra, NorMuon, Optim
from configs.schema import Data, Identity, Log, Model, Run, Schedule, Train, with_settings

STEPS, STAGES = 1285, (423, 847, 1270)  # the record's steps, and the first step of its stages 2 to 4
# The record multiplies lr by 1, 1.52 and 1.73 in stages 1 to 3, as the batch grows to two and three times its first size,
# and from step 508 to 1270 mixes linearly towards 0.15, which is the lr of stage 4: 1.52 (1 - t) + 0.15 t with
# t = 338 / 762 at step 846, 1.73 (1 - t) + 0.15 t with t = 339 / 762 at step 847.
LR = "0=1 hold 423=1.52 508=1.52 846=0.91230971 hold 847=1.0270866 1270=0.15 100%=0.15"

# Of presets whose head has other sizes: the record's scales are made for its own.
NO_FP8 = {"model.fp8": "none", "model.fp8_scales": "dynamic", "model.fp8_grad_max": 0.0}


# Settings of presets that store all weights in float32.
IN_FLOAT32 = {f"model.{name}_dtype": "float32" for name in ("matrix", "embed", "head", "table")} | {
    f"optim.{role}.{name}": value for role in ("embed", "head")
    for name, value in (("rounding", "nearest"), ("state_dtype", "same"))}


def stages(first: float, *later: float, at: Sequence[int | str] = STAGES) -> str:
    """Return a curve that jumps to the next value at each of the positions `at`."""
    return " ".join([f"0={first:g}", *(f"hold {knot}={value:.8g}" for knot, value in zip(at, later, strict=False))])


def record_optim() -> Optim:
    """Return the record's optimizers: NorMuon for matrices, and Adam at every second step for all other roles.

    Weight decay is cautious and falls with the square of lr: its curve is that of lr, which multiplies it too.
    """
    # bfloat16 alone loses the updates that are below its rounding, which the record found harmful.
    exact = {"rounding": "remainder", "state_dtype": "float32"}
    # The record has weight decay 0.005 x 150 (embedding, head) and 0.005 x 5 (tables), multiplied by lr twice: by the peak
    # here (0.005 x 150 x 0.008 = 0.006; 0.005 x 5 x 0.6 = 0.015; for matrices 1.2 x 0.023 = 0.0276) and by the optimizer.
    adam = Adam(lr=0.008, beta1=0.5, beta2=0.95, eps=1e-10, weight_decay=0.006, decay="cautious", update_every=2)
    small = replace(adam, lr=0.008, beta1=0.9, beta2=0.99, weight_decay=0.0)
    gate = replace(small, extra=Extra(lr_factors=("smear.gate?=0.01", "streams.inputs?=0.25", "token_gates?=0.1")))
    adam = replace(adam, **exact)  # `small` are float32, and need no remainder
    table = replace(adam, lr=0.6, beta1=0.75, weight_decay=0.015)
    # The record multiplies lr by (m/n)^.5 = 2 for mlp.up and for mlp.down, which it stores in the same shape, and by 2 again
    # for mlp.down. As factors of lr these act on the decay too; a unit of the step would not. Queries and keys are
    # orthogonalised in 3 blocks, one per pair of heads.
    matrix = NorMuon(unit="spectral", normalise="longer", lr=0.023, beta2=0.9, eps=1e-10, weight_decay=0.0276,
                     decay="cautious", **exact,
                     extra=Extra(blocks=("attention.q=3", "attention.k=3"), lr_factors=("mlp.up=2", "mlp.down=4")))
    return Optim(matrix=matrix, embed=adam, head=adam, value_embed=table,
                 bigram_embed=replace(table, extra=Extra(sparse_rows=True)), gate=gate, scalar=replace(small, lr=0.04),
                 gain=small, bias=small)


def speedrun() -> Run:
    """The record's recipe on FineWeb to loss 3.28, 1285 steps.

    338.8 M tokens (record 89, July 2026), meant for 8 H100s; it runs on any number of GPUs.
    """
    return Run(
        preset="speedrun",
        run=Identity(target_loss_nats=3.28),
        data=Data(source="shards", tokenizer="gpt2", order="documents", sequence_tokens=16_384, max_document_tokens=2048,
                  val_sequence_tokens=262_144,
                  train_files=("data/fineweb10B/fineweb_train_*.bin",), val_files=("data/fineweb10B/fineweb_val_*.bin",)),
        # Layers, their windows and techniques are the record's. init_gain 0.25 is its standard deviation 0.5 / sqrt(768).
        model=Model(layers=11, dim=768, head_dim=128, position="half_rotary", attention_scale=0.1, softcap="asymmetric",
                    embed_std=0.005, init_gain=0.25, zero_attention_out=False, smear=True, smear_first=True,
                    document_mask=True, value_embeds=5, value_embed_layers=(1, 2, 8, 9, 10), value_embed_std=0.01,
                    value_gates=True, bigram_buckets=377_280, bigram_signs=8192, inject=True, window_tokens=128,
                    long_window_tokens=384, full_attention_layers=(3, 10), yarn=True, yarn_windows=(384, 896, 1408, 1664),
                    paired_heads=(0, 2, 5, 9), key_offset=True, gate_layers=(0, 4), xsa=True, xsa_layers=(1, 3, 4, 7),
                    head_gates=True, head_gate_layers=(3, 10), attention_free=(6,), shared_attention_input=7,
                    projection_gains=True, residual_growth=1.1, skips=("3>6",), skip_weight=0.09, dynamic_heads=(10,),
                    dense="mudd",
                    dense_skips=("in>10", "7>10", "in>11", "7>11=-0.5", "9>11", "ve0>11", "3>11"), dense_gates=(10,),
                    mtp_weights=(0.5, 0.25), prefix_loss=0.25, matrix_dtype="bfloat16", embed_dtype="bfloat16",
                    head_dtype="bfloat16", table_dtype="bfloat16", fp8="auto", fp8_scales="static", fp8_grad_max=96.0),
        optim=record_optim(),
        # Per stage, as in the record: batches of 131,072, 262,144 and 393,216 tokens; windows 128/384, 384/896, 640/1408 and
        # 768/1664; documents of up to 896 tokens, then 2048. The auxiliary losses fade out until stage 3.
        schedule=Schedule(lr=LR, weight_decay=LR, momentum="0=0.85 300=0.95 -50=0.95 100%=0.85",
                          batch_tokens=stages(1, 2, 3), window_tokens=stages(1, 3, 5, 6),
                          long_window_tokens=stages(1, 896 / 384, 1408 / 384, 1664 / 384),
                          mtp="0=2 423=1 847=0", prefix_loss="0=1 423=1 847=0",
                          max_document_tokens=stages(896 / 2048, 1)),
        train=Train(steps=STEPS, batch_tokens=131_072, micro_tokens=49_152, val_every_steps=250,
                    val_long_window_tokens=2560,
                    tied_until_frac=(STAGES[1] + 1) / STEPS),  # the first Adam step of stage 3 is the last tied one
        log=Log(every_steps=25),
    )


FRONTIER_STEPS, FRONTIER_STAGES = 1140, (309, 656, 1054, 1119)


def speedrun_frontier() -> Run:
    """`speedrun` with what open pull requests add, 1140 steps.

    Record 89 and, of modded-nanogpt's pull requests: narrow queries and keys (344), a tail average of the weights (347),
    optimizer, stages and schedules of ANVIL (349), and a sampled softmax (360). None of it was run as a whole: which numbers
    are published and which are assumed stands beside each. Aim: 50 s on 8 H100s. Pull request 360 also has larger hashed
    tables, which make 40 s the aim: `--model.bigram_buckets 2000000 --model.ngram_orders 3` take 26 of 80 GB by
    scripts.plan, and 30 s more, as all rows are gathered after an update.
    """
    run, at = speedrun(), FRONTIER_STAGES
    # Cooldown over the last 80 % of the scheduled steps, to a lr of .20 (ANVIL). Its stages have 336, 378, 433 and 71 steps,
    # and 23 more: here they are shortened in proportion to 1,140 of 1,241 steps. 1,140 is that of pull request 366, on other
    # changes: an assumption. The last 89 steps have a smaller batch (16, then 8 times 16,384 tokens; ANVIL).
    lr = cooldown((1, 1.52, 1.73, 1.73 * (2 / 3) ** 0.5), at=at, first=at[-1] // 5, floor=0.2)
    # Average of the last 298 steps, half of the matrices and .65 of embedding and head (349, 347). Their average takes a
    # weight of 2 / (298 / 4 + 1) at every fourth step; this is the same for every step.
    average = {"train.weight_average": (1 - 2 / (298 / 4 + 1)) ** 0.25, "train.weight_average_blend": 0.0,
               "train.weight_average_start": 1 - 298 / FRONTIER_STEPS}
    blends = {f"optim.{role}.extra.average_blend": blend
              for role, blend in (("matrix", 0.5), ("embed", 0.65), ("head", 0.65))}
    # Tables: lr 70 x .008, an update at every fourth step from step 336 (349). Its betas are squared and its decay doubled
    # there; here they stay.
    tables = {f"optim.{role}.{name}": value for role in ("value_embed", "bigram_embed")
              for name, value in (("lr", 0.56), ("extra.update_every_from", ("336=4",)))}
    return with_settings(run, {
        "preset": "speedrun_frontier",
        # Width 96 is that of 344, in all layers (349: 64, in 8 layers of 10). The scale is .085 at width 128 and .12 at 64
        # in 349, about .96 / sqrt(width): .098 at 96.
        "model.qk_head_dim": 96, "model.attention_scale": 0.098,
        # The number of classes in 360 is unpublished: 8,192 is an assumption, as is that it stays the same in all stages. A
        # sampled softmax has no logits for further losses.
        "model.sampled_softmax": 8192, "model.mtp_weights": (), "model.prefix_loss": 0.0,
        # Momentum of two averages from step 514, one of .98 (339, 349); six maps; decay 1.5 times the record's .0276 (349).
        "optim.matrix.kernel": ("0.85=0.4385", "0.98=0.5615"), "optim.matrix.kernel_from": 514,
        "optim.matrix.ns": "anvil", "optim.matrix.ns_steps": 6, "optim.matrix.weight_decay": 1.5 * 0.0276,
        # ANVIL masks what lies 2,048 tokens back in documents of up to 3,072; windows of at most 1,664 do so anyway.
        "data.max_document_tokens": 3072,
        "schedule": Schedule(lr=lr, weight_decay=lr, momentum="0=0.85 240=0.93 -50=0.93 100%=0.85",
                             batch_tokens=stages(1, 2, 3, 2, 1, at=at), window_tokens=stages(1, 3, 5, 5, 6, at=at),
                             long_window_tokens=stages(1, 896 / 384, 1408 / 384, 1408 / 384, 1664 / 384, at=at),
                             max_document_tokens=stages(896 / 3072, 2048 / 3072, 1, at=at)),
        # Embedding and head are one until the last stage (349).
        "train.steps": FRONTIER_STEPS, "train.tied_until_frac": (at[-1] + 1) / FRONTIER_STEPS,
        **average, **blends, **tables})


def cooldown(factors: Sequence[float], *, at: Sequence[int], first: int, floor: float) -> str:
    """Return the lr curve of stages with these factors, which begin at step 0 and at each of `at` but the last: from step
    `first`, which lies in stage 1, to the last of `at` they mix linearly towards `floor`, (1 - t) factor + t floor."""
    def mixed(step: int, factor: float) -> str:
        t = max(0, step - first) / (at[-1] - first)
        return f"{step}={(1 - t) * factor + t * floor:.8g}"

    knots = [f"0={factors[0]:g}", f"{first}={factors[0]:g}"]
    for step, before, after in zip(at, factors, factors[1:], strict=False):
        knots += [mixed(step - 1, before), f"hold {mixed(step, after)}"]
    return " ".join([*knots, mixed(at[-1], factors[-1]), f"100%={floor:g}"])


def medium() -> Run:
    """350 M GPT on FineWeb to loss 2.92, 4740 steps (track 2).

    Size, batches, windows, learning rates and the untying at 2/12 of the run follow the speedrun's track 2 of December 2025.
    Value embeddings and hashed tables are left out.
    """
    lr = "0=1 30%=1 100%=0.1"
    # Windows in blocks of 128 tokens, held as long as they are nearest to straight lines from 3 to 9 and from 3 to 23: each
    # pair is compiled. The first three changes are those of the batch, which is compiled anew as well.
    at = ("8.3333%", "16.6667%", "25%", "45%", "63%", "77%", "93%")
    windows, long_windows = (3, 4, 4, 5, 6, 7, 8, 9), (3, 5, 7, 10, 14, 17, 20, 23)
    return with_settings(speedrun(), {
        "preset": "medium", "run": Identity(target_loss_nats=2.92), "data.val_sequence_tokens": None,
        "train.micro_tokens": 16_384,
        "model.layers": 16, "model.dim": 1024, **IN_FLOAT32,
        "model.value_embeds": 0, "model.value_embed_layers": (), "model.value_gates": False,
        "model.bigram_buckets": 0, "model.bigram_signs": 0,
        "model.window_tokens": 384, "model.long_window_tokens": 384, "model.full_attention_layers": (3, 7, 11, 15),
        "model.paired_heads": (), "model.attention_free": (), "model.dynamic_heads": (),
        "model.shared_attention_input": None, "model.skips": (), "model.skip_weight": 0.18, "model.backout": 11,
        "model.dense": "denseformer",
        "model.dense_skips": ("3>8=0.18",), "model.dense_gates": (), "model.gate_layers": (0,), "model.xsa_layers": (),
        "model.head_gate_layers": (), "model.value_embed_std": None, "model.yarn_windows": (),
        "model.mtp_weights": (), "model.prefix_loss": 0.0, **NO_FP8,
        # 0.018 is the record's 1.2 times lr, as in `record_optim`.
        "optim.matrix.lr": 0.015, "optim.matrix.weight_decay": 0.018, "optim.matrix.extra.blocks": (),
        "schedule": Schedule(lr=lr, weight_decay=lr, momentum="0=0.85 300=0.95 -50=0.95 100%=0.85",
                             batch_tokens=stages(1, 2, 3, 4, at=at),
                             window_tokens=stages(*(blocks / 3 for blocks in windows), at=at),
                             long_window_tokens=stages(*(blocks / 3 for blocks in long_windows), at=at)),
        "train.steps": 4740, "train.val_long_window_tokens": None, "train.tied_until_frac": 2 / 12})


def speedrun_cpu() -> Run:
    """The record's recipe on a laptop: Python code, 320 steps.

    Every technique of `speedrun` is on, at sizes and with a schedule that fit a CPU.
    """
    # The record's stages, at a third and two thirds of the run.
    lr = "0=1 hold 33%=1.52 40%=1.52 66%=0.91 hold 67%=1.03 100%=0.15"
    token_optim = {"lr": 0.06, "weight_decay": 0.0}
    return with_settings(speedrun(), {
        "preset": "speedrun_cpu", "run": Identity(), "data": Data(sequence_tokens=128, val_bytes=65_536),
        "model.layers": 5, "model.dim": 64, "model.head_dim": 16, "model.embed_std": 0.05,
        **IN_FLOAT32,
        "model.value_embeds": 2, "model.value_embed_layers": (1, 4), "model.value_embed_std": None,
        "model.bigram_buckets": 16_384, "model.bigram_signs": 256, "model.ngram_orders": (3,),
        "model.window_tokens": 32, "model.long_window_tokens": 64, "model.full_attention_layers": (1, 4),
        "model.attention_scale": 0.5, "model.paired_heads": (0, 2), "model.attention_free": (3,),
        "model.shared_attention_input": 3, "model.skips": ("1>3",), "model.yarn_windows": (),
        "model.gate_layers": (0, 2), "model.xsa_layers": (1,), "model.head_gate_layers": (1, 4),
        # Connected as the record, 1.599 ± .022 bits per byte (n = 6) in place of 1.583 ± .015 (n = 8): no gain at this size.
        "model.dense_skips": (), "model.dense_gates": (), "model.backout": 2,
        "model.dynamic_heads": (4,), "model.dynamic_window": 16, **NO_FP8,
        "optim.matrix.extra.blocks": ("attention.q=2", "attention.k=2"), "optim.bigram_embed.extra.sparse_rows": False,
        "optim.gate.extra.lr_factors": ("network=0.25",),
        **{f"optim.{role}.{name}": value for role in ("embed", "head") for name, value in token_optim.items()},
        "schedule": Schedule(
            lr=lr, weight_decay=lr, momentum="0=0.85 25%=0.95 95%=0.95 100%=0.85",
            batch_tokens="0=1 hold 33%=2 hold 67%=3", window_tokens="0=1 hold 33%=2 hold 67%=3",
            long_window_tokens="0=1 hold 33%=1.5 hold 67%=2", mtp="0=2 33%=1 67%=0", prefix_loss="0=1 33%=1 67%=0"),
        "train": Train(steps=320, batch_tokens=512, micro_tokens=8192, val_every_steps=80, tied_until_frac=0.66)})
