"""Complete runs by name. Each is a function that returns a Run, or a few settings that differ from another preset's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from configs.optim import Adam, Muon, Optim
from configs.schema import Data, Identity, Log, Model, Run, Schedule, Train, with_settings
from configs.speedrun import medium, speedrun, speedrun_cpu

SPHERE_ROLES = ("matrix", "embed", "head", "value_embed")  # whose vectors have length 1 on the sphere


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
        optim=Optim(matrix=Muon(lr=0.02), embed=Adam(lr=0.3), head=Adam(lr=0.01), value_embed=Adam(lr=0.15),
                    bigram_embed=Adam(lr=0.035)),
        schedule=Schedule(momentum="0=0.85 20%=0.95", batch_tokens="0=0.5 40%=1"),
        train=Train(steps=520, val_every_steps=130, micro_tokens=8192),
    )


def bytes_() -> Run:
    """nanoGPT's CPU size (4 x 128, context 64, 768 tokens a step, raw bytes), on which optimizers visibly differ."""
    return Run(
        preset="bytes",
        data=Data(tokenizer="bytes", sequence_tokens=64),
        model=Model(layers=4, head_dim=32, attention_scale=0.25, x0_skip=True, smear=True),
        optim=Optim(matrix=Muon(lr=0.03, momentum=0.85), embed=Adam(lr=0.3), head=Adam(lr=0.01)),
        train=Train(steps=240, batch_tokens=768, micro_tokens=8192),
    )


def on_sphere(run: Run) -> Run:
    """`run` with stream and weights on the sphere: no decay of weights, no zero projections, no bound on the logits."""
    weights = {f"optim.{role}.{name}": value for role in SPHERE_ROLES
               for name, value in (("constraint", "sphere"), ("weight_decay", 0.0))}
    return with_settings(run, weights | {
        "model.geometry": "sphere", "model.zero_init_projections": False, "model.norm_gains": False,
        "model.norm_embedding": True, "model.qk_norm": True, "model.attention_scale": None, "model.softcap": "none"})


def ngpt_bytes() -> Run:
    """`bytes` on the sphere, by Muon too; a layer's first step goes 1 / layers of the way."""
    return with_settings(on_sphere(bytes_()), {
        "preset": "ngpt_bytes", "model.eigen_lr": 0.25, "model.logit_scale": 10.0,
        "optim.matrix.lr": 0.07, "optim.embed.lr": 0.03})


def ngpt_tiny() -> Run:
    """`tiny` on the sphere, by Muon too."""
    return with_settings(on_sphere(tiny()), {
        "preset": "ngpt_tiny", "model.eigen_lr": 0.5, "model.logit_scale": 10.0,
        "optim.matrix.lr": 0.05, "optim.embed.lr": 0.03})


def gpt_paper() -> Run:
    """The baseline of the nGPT paper (Loshchilov et al. 2024, arXiv 2410.01131) at track 3's size: rotary, SwiGLU, RMS norms
    with gains, AdamW with warm-up and cosine to 0; everything in float32."""
    group = Adam(lr=0.0015, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    vector = replace(group, weight_decay=0.0)
    return with_settings(track3(), {
        "preset": "gpt_paper",
        "model": Model(layers=12, dim=768, head_dim=64, rotary_base=10_000.0, qk_norm=False, activation="swiglu",
                       norm_gains=True, norm_embedding=False, zero_init_projections=False, embed_std=0.02, softcap="none"),
        "optim": Optim(matrix=group, embed=group, head=group, gain=vector, scale=vector),
        "schedule": Schedule(lr="0=0 10%=1 cos 100%=0"),
        "train.loss_reduction": "mean"})


def ngpt() -> Run:
    """nGPT as in the paper, at track 3's size: one lr for all, without warm-up, decay of weights or bound on the logits."""
    return with_settings(on_sphere(gpt_paper()), {"preset": "ngpt", "schedule.lr": "0=1 cos 100%=0"})


def bench_gpu() -> Run:
    """The optimization benchmark on one consumer GPU, meant for some five minutes: 6 x 512, 65,536 tokens a step."""
    return with_settings(track3(), {
        "preset": "bench_gpu", "run": Identity(), "data.val_tokens": 1_048_576,
        "model.layers": 6, "model.dim": 512, "model.head_dim": 64,
        "train.steps": 750, "train.batch_tokens": 65_536, "train.micro_tokens": 32_768, "train.val_every_steps": 125,
        "train.final_val_every_steps": 25})


def track3() -> Run:
    """The speedrun's optimization benchmark (track 3, result 36): 124 M active parameters, 3250 steps to 3.28 nats."""
    adam = Adam(beta1=0.8, beta2=0.95, eps=1e-10, weight_decay=0.001)
    vector = replace(adam, lr=0.015)
    return Run(
        preset="track3",
        run=Identity(target_loss_nats=3.28),
        data=Data(source="shards", tokenizer="gpt2", order="contiguous", sequence_tokens=1024,
                  train_files=("data/fineweb10B/fineweb_train_*.bin",), val_files=("data/fineweb10B/fineweb_val_*.bin",)),
        model=Model(layers=12, dim=768, head_dim=128, position="half_rotary", attention_scale=0.12, norm_gains=True,
                    biases=True, softcap="rational", embed_dtype="bfloat16"),
        optim=Optim(
            matrix=Muon(lr=0.025, weight_decay=0.05, unit="at_least_one", ns="convergent", ns_steps=12),
            embed=replace(adam, lr=0.7), head=replace(adam, lr=0.004), gain=vector, bias=vector),
        schedule=Schedule(lr="0=1 30%=1 100%=0"),
        train=Train(steps=3250, batch_tokens=524_288, loss_reduction="sum", val_every_steps=125, final_val_every_steps=25),
        log=Log(every_steps=25),
    )


def track3_adamw() -> Run:
    """Track 3 with AdamW for the hidden matrices (result 2: 5625 steps, "most likely undertuned")."""
    aux = Adam(beta1=0.8, beta2=0.95, eps=1e-10)
    vector = replace(aux, lr=0.01)
    return with_settings(track3(), {
        "preset": "track3_adamw",
        "optim": Optim(matrix=Adam(lr=0.0015, beta1=0.9, beta2=0.95, eps=1e-10, weight_decay=0.1),
                       embed=replace(aux, lr=0.3), head=replace(aux, lr=1 / 320), gain=vector, bias=vector),
        "schedule": Schedule(lr="0=0 250=1 30%=1 100%=0"), "train.steps": 5625})


@dataclass(frozen=True, slots=True)
class Variant:
    """A preset that differs from another one by a few settings."""

    base: str
    title: str
    """What it is, in one line."""
    settings: Mapping[str, object] = field(hash=False)

    def __call__(self) -> Run:
        """The run; its `preset` is its name."""
        name = next(name for name, preset in PRESETS.items() if preset is self)
        return with_settings(PRESETS[self.base](), {"preset": name, **self.settings})


PRESETS: dict[str, Callable[[], Run]] = {
    "tiny": tiny,
    "tiny_adamw": Variant("tiny", "`tiny` with AdamW for every tensor.", {"optim.matrix": Adam(lr=0.003)}),
    "bytes": bytes_,
    "bytes_adamw": Variant("bytes", "`bytes` with AdamW for every tensor.", {"optim.matrix": Adam(lr=0.003)}),
    "bench_cpu": Variant("bytes", "The optimization benchmark on a laptop: `bytes`, judged on 131,072 bytes.", {
        "data.val_bytes": 131_072, "train.val_every_steps": 60,
        "log.wandb": "disabled", "log.diagnostics": False, "log.sample_tokens": 0}),
    "bench_cpu_prose": Variant("bench_cpu", "`bench_cpu` on another text: English.", {
        "data.corpus": "prose", "data.val_bytes": 46_000}),
    "bench_gpu": bench_gpu,
    "track3": track3,
    "track3_adamw": track3_adamw,
    "speedrun": speedrun,
    "speedrun_1gpu": Variant(
        "speedrun", "`speedrun` on one GPU of 24 to 141 GB: the same tokens and updates by accumulation, in float32.",
        {"model.matrix_dtype": "float32", "model.table_dtype": "float32"}),
    "speedrun_consumer": Variant(
        "speedrun_1gpu",
        "`speedrun` for an RTX 3090 or 4090: rows of 2048 tokens, small portions, no kernel that needs Hopper.",
        {"data.sequence_tokens": 2048, "train.micro_tokens": 4096}),
    "speedrun_cpu": speedrun_cpu,
    "medium": medium,
    "ngpt_tiny": ngpt_tiny,
    "ngpt_bytes": ngpt_bytes,
    "ngpt": ngpt,
    "gpt_paper": gpt_paper,
}


def preset_title(name: str) -> str:
    """What a preset is, in one line."""
    preset = PRESETS[name]
    return preset.title if isinstance(preset, Variant) else " ".join(preset.__doc__.split("\n\n")[0].split())
