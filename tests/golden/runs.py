"""The golden runs, whose losses must not change: small runs that together cover training, on a text generated from a seed.

Each is described by its command line alone, so that any commit can train it.
"""

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import train_gpt
from configs.cli import parse

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TEXT = "text.txt"  # a relative path: a checkpoint stores it, and can be resumed only with the same path
STEPS = 6  # long enough to reach every jump of the schedules
SAME_ANYWHERE = 2  # this many first losses hardly depend on the machine; in later ones rounding differences grow
LOSSES = ("train/loss_nats", "val/loss_nats")
EVERY_RUN = (f"--data.source text --data.train_files {TEXT} --data.val_bytes 512 --run.device cpu --run.compile off "
             "--log.every_steps 1 --log.wandb disabled --log.sample_tokens 0")


class GoldenRun(NamedTuple):
    """A run, described by its command line. `old_spellings`: pairs (part of `flags`, its spelling in an earlier commit)."""

    name: str
    preset: str
    flags: str
    old_spellings: tuple[tuple[str, str], ...] = ()

    def command(self, *more: str, old: bool = False) -> list[str]:
        """Return the arguments of train_gpt.py, with `more` appended. `old`: in the spelling of the earlier commit."""
        flags = self.flags
        for new_spelling, old_spelling in self.old_spellings if old else ():
            flags = flags.replace(new_spelling, old_spelling)
        return [self.preset, *EVERY_RUN.split(), *flags.split(), *more]


BPE = "--data.tokenizer bpe --data.bpe_vocab_tokens 320"
RUNS = (
    GoldenRun("tiny", "tiny", f"{BPE} --data.sequence_tokens 64 --train.batch_tokens 512 --model.bigram_buckets 1024"),
    GoldenRun("bytes", "bytes", ""),
    GoldenRun("track3", "track3", "--data.tokenizer bytes --data.val_files --data.sequence_tokens 64 "
                                  "--train.batch_tokens 512 --model.layers 2 --model.dim 64 --model.head_dim 32"),
    # Some scalars have gradients of pure rounding error; with a smaller eps Adam would scale them up to full steps.
    GoldenRun("ngpt_bytes", "ngpt_bytes", "--optim.scalar.eps 1e-5"),
    GoldenRun("speedrun_cpu", "speedrun_cpu", f"{BPE} --model.bigram_buckets 1024"),
    # All settings of the rule are given, so that its defaults may change.
    GoldenRun("soap", "bytes", "--model.layers 2 --model.dim 64 --optim.matrix.rule soap --optim.matrix.lr 0.005 "
                               "--optim.matrix.beta1 0.8 --optim.matrix.beta2 0.95 --optim.matrix.eps 1e-8 "
                               "--optim.matrix.gram_beta 0.95 --optim.matrix.every_steps 1"),
)

SMALL = "--model.layers 2 --model.dim 64"
RULES = ("adam", "normuon", "muon2", "muown", "dion", "dion2", "sm3", "prodigy", "agd", "swan", "shampoo", "soap_muon",
         "psgd")
# Spelling in commits whose configurations have format 1, where one class holds the fields of all optimizers.
FORMAT_1 = ((".extra.", "."), (".graft.rule", ".graft"))
# More runs, for comparing with another commit on one machine; too many to train in every test run.
OTHER_RUNS = (
    *(GoldenRun(rule, "bytes", f"{SMALL} --optim.matrix.rule {rule}") for rule in RULES),
    GoldenRun("shampoo_adam", "bytes", f"{SMALL} --optim.matrix.rule shampoo --optim.matrix.graft.rule adam",
              FORMAT_1),
    GoldenRun("scion", "bytes", f"{SMALL} --optim.embed.rule steepest --optim.embed.norm row --optim.embed.lr 0.03 "
                                "--optim.head.rule steepest --optim.head.norm sign --optim.head.lr 0.004"),
    GoldenRun("averages", "bytes", f"{SMALL} --train.lookahead 0.6 --train.lookahead_gamma 0.9 --train.weight_average 0.5 "
                                   "--optim.matrix.averages 3"),
    GoldenRun("bfloat16", "bytes", f"{SMALL} --model.matrix_dtype bfloat16 --optim.matrix.rounding stochastic "
                                   "--model.embed_dtype bfloat16 --optim.embed.rounding remainder "
                                   "--optim.embed.state_dtype float32"),
    GoldenRun("constraints", "bytes", f"{SMALL} --model.no_zero_init_projections --optim.matrix.constraint radial "
                                      "--optim.matrix.extra.row_floor 0.3825 --optim.matrix.extra.radial_brake 0.5 "
                                      "--optim.matrix.extra.clip 0.05 --optim.matrix.extra.clip_norm spectral "
                                      "--optim.embed.update_every 2 --optim.head.weight_decay 0.1 "
                                      "--optim.head.decay cautious", FORMAT_1),
    GoldenRun("stiefel", "bytes", f"{SMALL} --model.no_zero_init_projections --optim.matrix.rule stiefel"),
    GoldenRun("hyperball", "bytes", f"{SMALL} --model.no_zero_init_projections --optim.matrix.constraint hyperball"),
    GoldenRun("geodesic", "ngpt_bytes", f"{SMALL} --optim.matrix.extra.retraction geodesic "
                                        "--optim.matrix.extra.tangent dual", FORMAT_1),
    GoldenRun("sparse", "speedrun_cpu", f"{BPE} --model.bigram_buckets 1024 --data.order contiguous "
                                        "--model.sampled_softmax 64 --model.prefix_loss 0 --model.mtp_weights "
                                        "--optim.bigram_embed.extra.sparse_rows --optim.value_embed.extra.sparse_rows",
              FORMAT_1),
)


def write_text(folder: Path, length: int = 60_000) -> None:
    """Write TEXT into a folder: sentences of frequent and rare invented words, the same on every machine.

    Only random.random() is used: Python promises the same numbers in every version for that method alone.
    """
    rng = random.Random(20240520)

    def draw(choices: Sequence[str]) -> str:
        return choices[int(rng.random() * rng.random() * len(choices))]

    syllables = [consonant + vowel for vowel in "aeiou" for consonant in "tnslrdmkpbgvfzh"]
    words = ["".join(draw(syllables) for _ in range(1 + int(3 * rng.random()))) for _ in range(400)]
    text = ""
    while len(text) < length:
        sentence = " ".join(draw(words) for _ in range(3 + int(9 * rng.random())))
        text += sentence.capitalize() + (".\n" if rng.random() < 0.25 else ". ")
    (folder / TEXT).write_bytes(text[:length].encode())


def machine() -> dict[str, str]:
    """Describe what decides the last bits of a loss: PyTorch's version, its instruction set, and a hash of some results.

    The hash is needed because CPUs with the same instruction set may still sum in different orders.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((192, 128), (128, 512)))
    outputs = [a @ b, a[:16] @ b, a[:, :32] @ b[:32, :48], (a @ b).softmax(-1), torch.nn.functional.gelu(a),
               *torch.linalg.qr(a)]
    digest = hashlib.sha256(b"".join(output.contiguous().numpy().tobytes() for output in outputs))
    return {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(),
            "arithmetic": digest.hexdigest()[:16]}


def train(commands: Sequence[list[str]], *, folder: Path, ranks: int, tree: Path = ROOT) -> None:
    """Train the command lines one after another in `folder`, with the code in `tree` and one process per rank.

    Raises RuntimeError with the end of the output if training fails.
    """
    (folder / "commands.json").write_text(json.dumps(commands))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    result = subprocess.run([sys.executable, *launcher, str(HERE / "driver.py"), "commands.json"], cwd=folder,
                          env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"training on {ranks} ranks by {tree} failed:\n{result.stdout[-1000:]}\n{result.stderr[-4000:]}")


def train_here(commands: Sequence[list[str]], *, folder: Path) -> None:
    """Train the command lines one after another in `folder`, in this process and on one thread."""
    torch.set_num_threads(1)
    with contextlib.chdir(folder):
        for command in commands:
            train_gpt.main(parse(command))


def losses(run_folder: Path) -> list[float]:
    """Return the training and validation losses of a run, in nats, in the order of metrics.jsonl."""
    records = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [record[key] for record in records for key in LOSSES if key in record]
