"""Presets: complete runs by name, each a function that returns a Run or a Variant of another preset.

The first line of a preset's docstring, or the Variant's title, is its line in `--help`. The speedrun's own presets stand in
configs/speedrun.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from configs.optim import Adam, Muon, Optim
from configs.schema import Data, Identity, Log, Model, Run, Schedule, Train, with_settings
from configs.speedrun import IN_FLOAT32, medium, speedrun, speedrun_cpu, speedrun_frontier

SPHERE_ROLES = ("matrix", "embed", "head", "value_embed")  # roles with vectors along the model dimension (nGPT)


def tiny() -> Run:
    """BPE model on Python's source code, a minute on two cores.

    One layer, since in a minute on two CPU cores more tokens lower the loss more than more depth. With key_offset this one
    layer can attend to what followed earlier occurrences of the current token, so that a context of 1024 tokens pays.
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
    """nanoGPT's CPU size on raw bytes of Python code, 240 steps.

    4 layers of width 128, context 64 and 768 tokens per step are nanoGPT's Shakespeare run for CPUs. On this size optimizers
    differ visibly within a minute.
    """
    return Run(
        preset="bytes",
        data=Data(tokenizer="bytes", sequence_tokens=64),
        model=Model(layers=4, head_dim=32, attention_scale=0.25, x0_skip=True, smear=True),
        optim=Optim(matrix=Muon(lr=0.03, momentum=0.85), embed=Adam(lr=0.3), head=Adam(lr=0.01)),
        train=Train(steps=240, batch_tokens=768, micro_tokens=8192),
    )


def on_sphere(run: Run) -> Run:
    """Return `run` with geometry sphere: stream and weights of length 1, no weight decay, no zero init, no softcap."""
    weights = {f"optim.{role}.{name}": value for role in SPHERE_ROLES
               for name, value in (("constraint", "sphere"), ("weight_decay", 0.0))}
    return with_settings(run, weights | {
        "model.geometry": "sphere", "model.zero_init_projections": False, "model.norm_gains": False,
        "model.norm_embedding": True, "model.qk_norm": True, "model.attention_scale": None, "model.softcap": "none"})


def ngpt_bytes() -> Run:
    """`bytes` as an nGPT, on the sphere, trained by Muon.

    eigen_lr starts at 1 / layers, as in the paper; logits start as cosines times 10.
    """
    return with_settings(on_sphere(bytes_()), {
        "preset": "ngpt_bytes", "model.eigen_lr": 0.25, "model.logit_scale": 10.0,
        "optim.matrix.lr": 0.07, "optim.embed.lr": 0.03})


def ngpt_tiny() -> Run:
    """`tiny` as an nGPT, on the sphere, trained by Muon."""
    return with_settings(on_sphere(tiny()), {
        "preset": "ngpt_tiny", "model.eigen_lr": 0.5, "model.logit_scale": 10.0,
        "optim.matrix.lr": 0.05, "optim.embed.lr": 0.03})


def gpt_paper() -> Run:
    """GPT baseline of the nGPT paper, FineWeb, track 3's size.

    As in Loshchilov et al. 2024 (arXiv 2410.01131): rotary, SwiGLU, RMS norms with gains, AdamW with warm-up and a cosine to
    0, everything in float32. Size, data and steps are those of `track3`.
    """
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
    """nGPT as in its paper, on FineWeb at track 3's size.

    One learning rate for all roles; no warm-up, weight decay or softcap (arXiv 2410.01131).
    """
    return with_settings(on_sphere(gpt_paper()), {"preset": "ngpt", "schedule.lr": "0=1 cos 100%=0"})


def bench_gpu() -> Run:
    """Optimizer benchmark on one GPU: FineWeb, 750 steps.

    `track3` with 6 layers of width 512, 65,536 tokens per step and a tenth of the validation tokens, meant for five minutes
    on a consumer GPU.
    """
    return with_settings(track3(), {
        "preset": "bench_gpu", "run": Identity(), "data.val_tokens": 1_048_576,
        "model.layers": 6, "model.dim": 512, "model.head_dim": 64,
        "train.steps": 750, "train.batch_tokens": 65_536, "train.micro_tokens": 32_768, "train.val_every_steps": 125,
        "train.final_val_every_steps": 25})


def track3() -> Run:
    """124 M GPT on FineWeb to loss 3.28, 3250 steps (track 3).

    The speedrun's optimizer benchmark, result 36, tuned Muon: 3250 steps of 524,288 tokens, mean loss 3.2787 over 10 seeds.
    124 M are the matrix weights that a token meets; with the token embedding there are 162 M.
    """
    # AdamW of the other roles, as tuned in result 36.
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
            # `convergent` with 12 steps is the reference's (2, -1.5, 0.5), nearly an exact orthogonalisation.
            matrix=Muon(lr=0.025, weight_decay=0.05, unit="at_least_one", ns="convergent", ns_steps=12),
            embed=replace(adam, lr=0.7), head=replace(adam, lr=0.004), gain=vector, bias=vector),
        schedule=Schedule(lr="0=1 30%=1 100%=0"),
        train=Train(steps=3250, batch_tokens=524_288, loss_reduction="sum", val_every_steps=125, final_val_every_steps=25),
        log=Log(every_steps=25),
    )


def track3_adamw() -> Run:
    """`track3` with AdamW for the matrices, 5625 steps.

    The speedrun's track 3, result 2, one seed; its author calls it "most likely undertuned".
    """
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
    """Name of the other preset."""
    title: str
    """Line of the preset in `--help`."""
    settings: Mapping[str, object] = field(hash=False)
    """Settings that differ, by dotted name."""

    def __call__(self) -> Run:
        """Return the run, with the name of this variant as its `preset`."""
        name = next(name for name, preset in PRESETS.items() if preset is self)
        return with_settings(PRESETS[self.base](), {"preset": name, **self.settings})


PRESETS: dict[str, Callable[[], Run]] = {
    "tiny": tiny,
    "tiny_adamw": Variant("tiny", "`tiny` with AdamW for every tensor, a baseline.", {"optim.matrix": Adam(lr=0.003)}),
    "bytes": bytes_,
    "bytes_adamw": Variant("bytes", "`bytes` with AdamW for every tensor, a baseline.", {"optim.matrix": Adam(lr=0.003)}),
    "bench_cpu": Variant("bytes", "Optimizer benchmark on a laptop: `bytes`, 240 steps.", {
        "data.val_bytes": 131_072, "train.val_every_steps": 60,
        "log.wandb": "disabled", "log.diagnostics": False, "log.sample_tokens": 0}),
    "bench_cpu_prose": Variant("bench_cpu", "Optimizer benchmark on a laptop, on English prose.", {
        "data.corpus": "prose", "data.val_bytes": 46_000}),
    "bench_gpu": bench_gpu,
    "track3": track3,
    "track3_adamw": track3_adamw,
    "speedrun": speedrun,
    "speedrun_frontier": speedrun_frontier,
    "speedrun_1gpu": Variant(
        "speedrun", "`speedrun` on one GPU of 24 to 141 GB.",
        # One rank exchanges nothing: bfloat16 weights would halve no communication. Validation in shorter rows, whose
        # activations fit into 24 GB; they cut 120 documents more in two.
        IN_FLOAT32 | {"train.micro_tokens": None, "data.val_sequence_tokens": 65_536}),
    "speedrun_b200": Variant(
        "speedrun_1gpu", "`speedrun` on one B200 or H200, 3 passes a step.",
        # 66 GB of activations; 393,216 tokens at once would take 199 GB.
        {"train.micro_tokens": 131_072, "data.val_sequence_tokens": 262_144}),
    "speedrun_consumer": Variant(
        "speedrun_1gpu",
        "`speedrun` on a GPU of 16 GB.",
        # 9.9 GB of weights, gradients and state; 2 GB of activations for 4096 tokens, in shorter rows; 2.3 GB of temporary
        # gradients of tables. Diagnostics would keep a copy of the weights, 2.6 GB.
        {"data.sequence_tokens": 2048, "train.micro_tokens": 4096, "data.val_sequence_tokens": 16_384,
         "log.diagnostics": False}),
    "speedrun_cpu": speedrun_cpu,
    "medium": medium,
    "ngpt_tiny": ngpt_tiny,
    "ngpt_bytes": ngpt_bytes,
    "ngpt": ngpt,
    "gpt_paper": gpt_paper,
}


def preset_title(name: str) -> str:
    """Return the line that describes a preset."""
    preset = PRESETS[name]
    return preset.title if isinstance(preset, Variant) else " ".join(preset.__doc__.split("\n\n")[0].split())
