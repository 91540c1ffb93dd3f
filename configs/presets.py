"""Complete runs by name. Each is a function that returns a Run and differs from the defaults only where it says so."""

from collections.abc import Callable
from dataclasses import fields, replace

from configs.groups import Group, Optim
from configs.schema import Data, Identity, Log, Model, Run, Schedule, Train
from configs.speedrun import medium, speedrun, speedrun_1gpu, speedrun_consumer, speedrun_cpu


def every_group(optim: Optim, **changes: object) -> Optim:
    """The same change in every group."""
    return replace(optim, **{f.name: replace(getattr(optim, f.name), **changes) for f in fields(optim)})


SPHERE_ROLES = ("matrix", "embed", "head", "value_embed")  # whose vectors have length 1 on the sphere


def with_lrs(optim: Optim, **lrs: float) -> Optim:
    """Other learning rates, by role."""
    return replace(optim, **{role: replace(getattr(optim, role), lr=lr) for role, lr in lrs.items()})


def tiny() -> Run:
    """The newcomer's run: a BPE model on Python's own source code, in a minute on two CPU cores.

    One layer: in a minute on this hardware more tokens are worth more than more depth; and with offset keys one layer finds
    what followed the present token before, in as long a context as pays.
    """
    return Run(
        preset="tiny",
        data=Data(sequence_tokens=1024),
        model=Model(layers=1, position="half_rotary", key_offset=True, softcap="none", smear=True, value_embeds=1,
                    bigram_buckets=65_536),
        optim=Optim(matrix=Group(rule="steepest", lr=0.02), head=Group(lr=0.01), value_embed=Group(lr=0.15),
                    bigram_embed=Group(lr=0.035)),
        schedule=Schedule(momentum="0=0.85 20%=0.95", batch_tokens="0=0.5 40%=1"),
        train=Train(steps=520, val_every_steps=130, micro_tokens=8192),
    )


def tiny_adamw() -> Run:
    """`tiny` with AdamW for every tensor."""
    run = tiny()
    return replace(run, preset="tiny_adamw", optim=replace(run.optim, matrix=Group(rule="adam", lr=0.003)))


def bytes_() -> Run:
    """nanoGPT's CPU size (4 x 128, context 64, 768 tokens a step, raw bytes), on which optimizers visibly differ."""
    return Run(
        preset="bytes",
        data=Data(tokenizer="bytes", sequence_tokens=64),
        model=Model(layers=4, head_dim=32, attention_scale=0.25, x0_skip=True, smear=True),
        optim=Optim(matrix=Group(rule="steepest", lr=0.03, momentum=0.85), head=Group(lr=0.01)),
        train=Train(steps=240, batch_tokens=768, micro_tokens=8192),
    )


def bytes_adamw() -> Run:
    """`bytes` with AdamW for every tensor."""
    run = bytes_()
    return replace(run, preset="bytes_adamw", optim=replace(run.optim, matrix=Group(rule="adam", lr=0.003)))


def on_sphere(run: Run, *, preset: str) -> Run:
    """`run` with stream and weights on the sphere: no decay of weights, no zero projections, no bound on the logits."""
    optim = replace(run.optim, **{role: replace(getattr(run.optim, role), constraint="sphere", weight_decay=0.0)
                                  for role in SPHERE_ROLES})
    model = replace(run.model, geometry="sphere", zero_init_projections=False, norm_gains=False, norm_embedding=True,
                    qk_norm=True, attention_scale=None, softcap="none")
    return replace(run, preset=preset, model=model, optim=optim)


def ngpt_bytes() -> Run:
    """`bytes` on the sphere, by Muon too; a layer's first step goes 1 / layers of the way."""
    run = on_sphere(bytes_(), preset="ngpt_bytes")
    return replace(run, model=replace(run.model, eigen_lr=0.25, logit_scale=10.0),
                   optim=with_lrs(run.optim, matrix=0.07, embed=0.03))


def ngpt_tiny() -> Run:
    """`tiny` on the sphere, by Muon too."""
    run = on_sphere(tiny(), preset="ngpt_tiny")
    return replace(run, model=replace(run.model, eigen_lr=0.5, logit_scale=10.0),
                   optim=with_lrs(run.optim, matrix=0.05, embed=0.03))


def gpt_paper() -> Run:
    """The baseline of the nGPT paper (Loshchilov et al. 2024, arXiv 2410.01131) at track 3's size: rotary, SwiGLU, RMS norms
    with gains, AdamW with warm-up and cosine to 0; everything in float32."""
    run = track3()
    group = Group(lr=0.0015, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    model = Model(layers=12, dim=768, head_dim=64, rotary_base=10_000.0, qk_norm=False, activation="swiglu", norm_gains=True,
                  norm_embedding=False, zero_init_projections=False, embed_std=0.02, softcap="none")
    plain = replace(group, weight_decay=0.0)
    return replace(run, preset="gpt_paper", model=model,
                   optim=Optim(matrix=group, embed=group, head=group, gain=plain, scale=plain),
                   schedule=Schedule(lr="0=0 10%=1 cos 100%=0"), train=replace(run.train, loss_reduction="mean"))


def ngpt() -> Run:
    """nGPT as in the paper, at track 3's size: one lr for all, without warm-up, decay of weights or bound on the logits."""
    return replace(on_sphere(gpt_paper(), preset="ngpt"), schedule=Schedule(lr="0=1 cos 100%=0"))


def bench_cpu() -> Run:
    """The optimization benchmark on a laptop: `bytes`, judged on 131,072 bytes."""
    run = bytes_()
    return replace(run, preset="bench_cpu", data=replace(run.data, val_bytes=131_072),
                   train=replace(run.train, val_every_steps=60),
                   log=Log(wandb="disabled", diagnostics=False, sample_tokens=0))


def bench_cpu_prose() -> Run:
    """`bench_cpu` on another text: English."""
    run = bench_cpu()
    return replace(run, preset="bench_cpu_prose", data=replace(run.data, corpus="prose", val_bytes=46_000))


def bench_gpu() -> Run:
    """The optimization benchmark on one consumer GPU, meant for some five minutes: 6 x 512, 65,536 tokens a step."""
    run = track3()
    return replace(
        run, preset="bench_gpu", run=Identity(),
        data=replace(run.data, val_tokens=1_048_576),
        model=replace(run.model, layers=6, dim=512, head_dim=64),
        train=replace(run.train, steps=750, batch_tokens=65_536, micro_tokens=32_768, val_every_steps=125,
                      final_val_every_steps=25))


def track3() -> Run:
    """The speedrun's optimization benchmark (track 3, result 36): 124 M active parameters, 3250 steps to 3.28 nats."""
    adam = Group(beta1=0.8, beta2=0.95, eps=1e-10, weight_decay=0.001)
    vector = replace(adam, lr=0.015)
    return Run(
        preset="track3",
        run=Identity(target_loss_nats=3.28),
        data=Data(source="shards", tokenizer="gpt2", order="contiguous", sequence_tokens=1024,
                  train_files=("data/fineweb10B/fineweb_train_*.bin",), val_files=("data/fineweb10B/fineweb_val_*.bin",)),
        model=Model(layers=12, dim=768, head_dim=128, position="half_rotary", attention_scale=0.12, norm_gains=True,
                    biases=True, softcap="rational", embed_dtype="bfloat16"),
        optim=Optim(
            matrix=Group(rule="steepest", lr=0.025, weight_decay=0.05, norm="spectral", unit="at_least_one",
                         ns="convergent", ns_steps=12),
            embed=replace(adam, lr=0.7), head=replace(adam, lr=0.004), gain=vector, bias=vector),
        schedule=Schedule(lr="0=1 30%=1 100%=0"),
        train=Train(steps=3250, batch_tokens=524_288, loss_reduction="sum", val_every_steps=125, final_val_every_steps=25),
        log=Log(every_steps=25),
    )


def track3_adamw() -> Run:
    """Track 3 with AdamW for the hidden matrices (result 2: 5625 steps, "most likely undertuned")."""
    run = track3()
    aux = Group(beta1=0.8, beta2=0.95, eps=1e-10)
    vector = replace(aux, lr=0.01)
    matrix = Group(lr=0.0015, beta1=0.9, beta2=0.95, eps=1e-10, weight_decay=0.1)
    optim = Optim(matrix=matrix, embed=replace(aux, lr=0.3), head=replace(aux, lr=1 / 320), gain=vector, bias=vector)
    return replace(run, preset="track3_adamw", optim=optim, train=replace(run.train, steps=5625),
                   schedule=Schedule(lr="0=0 250=1 30%=1 100%=0"))


PRESETS: dict[str, Callable[[], Run]] = {
    "tiny": tiny, "tiny_adamw": tiny_adamw, "bytes": bytes_, "bytes_adamw": bytes_adamw,
    "bench_cpu": bench_cpu, "bench_cpu_prose": bench_cpu_prose, "bench_gpu": bench_gpu,
    "track3": track3, "track3_adamw": track3_adamw,
    "speedrun": speedrun, "speedrun_1gpu": speedrun_1gpu, "speedrun_consumer": speedrun_consumer,
    "speedrun_cpu": speedrun_cpu, "medium": medium,
    "ngpt_tiny": ngpt_tiny, "ngpt_bytes": ngpt_bytes, "ngpt": ngpt, "gpt_paper": gpt_paper,
}
