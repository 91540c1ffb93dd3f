"""nanoGPT's CPU recipe and ours, on the same text, the same validation bytes and the same machine, taken in turns.

    python -m benchmarks.beside_nanogpt --peer PATH_OF_A_NANOGPT_CLONE [--repeats 3]

nanoGPT (github.com/karpathy/nanoGPT, MIT) is trained on raw bytes by the command of its README for CPUs: 4 layers x 128,
context 64, batch 12, 2000 iterations. Its checkpoint and our runs are judged on the first 565,000 bytes of the validation
split: non-overlapping windows of the training context, every byte predicted. Writes beside_nanogpt.json.
"""

import json
import math
import pickle
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks import HERE, write_result
from configs.presets import PRESETS
from configs.schema import Run
from data.sources import corpus_bytes, open_source, split_text

ROOT = HERE.parent
RESULT = HERE / "beside_nanogpt.json"
VAL_BYTES = 565_000
SIGHT_EVERY_STEPS = {"tiny": 2, "bytes": 20}
RECIPE = ("config/train_shakespeare_char.py --dataset=stdlib --device=cpu --compile=False --eval_iters=20 "
          "--log_interval=100 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
          "--lr_decay_iters=2000 --dropout=0.0 --eval_interval=2000 --always_save_checkpoint=True "
          "--out_dir=out-stdlib").split()
JUDGE = """
import math, sys, numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load("out-stdlib/ckpt.pt", map_location="cpu", weights_only=False)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
model.eval()
data = torch.from_numpy(np.fromfile("data/stdlib/judge.bin", dtype=np.uint16).astype(np.int64))
inputs, targets, total = data[:-1], data[1:], math.log(256)  # the first byte has no context: 8 bits
whole = len(inputs) // 64 * 64
windows = zip(inputs[:whole].view(-1, 64).split(256), targets[:whole].view(-1, 64).split(256))
with torch.no_grad():
    for x, y in (*windows, (inputs[None, whole:], targets[None, whole:])):
        if x.numel():
            total += model(x, y)[1].item() * x.numel()
print("BITS", total / math.log(2) / len(data))
"""


@dataclass
class Compare:
    """Arguments of the comparison."""

    peer: Path
    """A clone of nanoGPT."""
    repeats: int = 3


def prepare(peer: Path) -> None:
    """The corpus as raw bytes in nanoGPT's layout."""
    folder = peer / "data" / "stdlib"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 256}))
    train, val = split_text(corpus_bytes())
    for name, part in (("train", train), ("val", val), ("judge", val[:VAL_BYTES])):
        np.frombuffer(part, dtype=np.uint8).astype(np.uint16).tofile(folder / f"{name}.bin")


def run_peer(peer: Path, seed: int) -> dict:
    """Train and judge nanoGPT once: seconds of its loop (its own evaluations excluded) and bits per byte."""
    source = (peer / "train.py").read_text()
    (peer / "train_seeded.py").write_text(source.replace("torch.manual_seed(1337", f"torch.manual_seed({1337 + seed}"))
    done = subprocess.run([sys.executable, "train_seeded.py", *RECIPE], cwd=peer, capture_output=True, text=True, check=True)
    judged = subprocess.run([sys.executable, "-c", JUDGE], cwd=peer, capture_output=True, text=True, check=True).stdout
    times = [float(ms) for ms in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", done.stdout)]
    return {"bits_per_byte": float(judged.split()[-1]), "steps": 2000, "median_step_ms": statistics.median(times)}


def nats_of(run: Run, bits_per_byte: float) -> float:
    """The validation loss in nats per token that equals so many bits per byte."""
    source = open_source(run.data, cache_dir=ROOT / ".cache")
    return bits_per_byte * math.log(2) * source.validation_bytes / (len(source.validation) - 1)


def run_ours(preset: str, seed: int, *flags: str) -> dict:
    """Train a preset once, as a user would: its summary's figures."""
    name = f"beside_nanogpt_{preset}_{seed}_{time.time():.0f}"
    subprocess.run([sys.executable, ROOT / "train_gpt.py", preset, "--run.name", name, "--run.seed", str(seed),
                    "--log.wandb", "disabled", *flags], check=True, capture_output=True)
    summary = json.loads(Path("runs", name, "summary.json").read_text())
    kept = ("steps", "train_seconds", "target_step", "target_seconds")
    return {"bits_per_byte": summary["val_bits_per_byte"]} | {name: summary[name] for name in kept}


def sight_target(preset: str, bits_per_byte: float, seed: int) -> dict:
    """A run of the same schedule, validated often and stopped where it first reaches the peer's bits per byte."""
    found = run_ours(preset, seed, "--run.target_loss_nats", str(nats_of(PRESETS[preset](), bits_per_byte)),
                     "--run.stop_at_target", "--train.val_every_steps", str(SIGHT_EVERY_STEPS[preset]),
                     "--log.no_diagnostics")
    return {name: found[name] for name in ("target_step", "target_seconds")}


def main(args: Compare) -> None:
    """Alternate the peer and our presets up to `repeats` runs of each; what the result file holds is not run again."""
    prepare(args.peer)
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"runs": {}}
    runs = {name: found["runs"].get(name, []) for name in ("nanoGPT", *SIGHT_EVERY_STEPS)}
    for seed in range(1, args.repeats + 1):
        for name in runs:
            if len(runs[name]) < seed:
                bits = runs["nanoGPT"][0]["bits_per_byte"] if runs["nanoGPT"] else None  # the first run's, for all
                runs[name].append(run_peer(args.peer, seed) if name == "nanoGPT"
                                  else run_ours(name, seed) | sight_target(name, bits, seed))
                print(name, runs[name][-1], flush=True)
                write_result("beside_nanogpt", "beside_nanogpt --peer nanoGPT",
                             target_bits_per_byte=runs["nanoGPT"][0]["bits_per_byte"], runs=found["runs"] | runs)


if __name__ == "__main__":
    main(tyro.cli(Compare, description=__doc__))
