"""Compare nanoGPT's CPU recipe with the presets `tiny` and `bytes`: same text, same validation bytes, same machine.

    python -m benchmarks.beside_nanogpt --peer PATH_OF_A_NANOGPT_CLONE [--repeats 3]

nanoGPT (github.com/karpathy/nanoGPT, MIT) trains on raw bytes with the command of its README for CPUs: 4 layers, 128 wide,
context 64, batch 12, 2000 iterations. All are evaluated on the first 565,000 bytes of the validation split, in windows of
the training context that do not overlap, with a prediction for every byte. Writes beside_nanogpt.json.
"""

import json
import math
import pickle
import re
import statistics
import subprocess
import sys
import time
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
VAL_EVERY_STEPS = {"tiny": 2, "bytes": 20}  # while a run searches for the target: the resolution of `target_step`
PEER_FLAGS = ("config/train_shakespeare_char.py --dataset=stdlib --device=cpu --compile=False --eval_iters=20 "
              "--log_interval=100 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
              "--lr_decay_iters=2000 --dropout=0.0 --eval_interval=2000 --always_save_checkpoint=True "
              "--out_dir=out-stdlib").split()
# Runs inside the clone, with nanoGPT's own `model` module. nanoGPT itself estimates its loss on random batches.
PEER_EVALUATION = """
import math, sys, numpy as np, torch
from model import GPT, GPTConfig
checkpoint = torch.load("out-stdlib/ckpt.pt", map_location="cpu", weights_only=False)
model = GPT(GPTConfig(**checkpoint["model_args"]))
model.load_state_dict(checkpoint["model"])
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


def write_peer_data(peer: Path) -> None:
    """Write the corpus into the clone as raw bytes, in nanoGPT's format: train.bin, val.bin and what is evaluated."""
    folder = peer / "data" / "stdlib"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 256}))
    train, val = split_text(corpus_bytes())
    for name, part in (("train", train), ("val", val), ("judge", val[:VAL_BYTES])):
        np.frombuffer(part, dtype=np.uint8).astype(np.uint16).tofile(folder / f"{name}.bin")


def run_peer(peer: Path, seed: int) -> dict:
    """Train and evaluate nanoGPT once: bits per byte, and the median milliseconds of the steps that it logs."""
    # nanoGPT has no flag for its seed; it stands in the source of train.py.
    source = (peer / "train.py").read_text()
    (peer / "train_seeded.py").write_text(source.replace("torch.manual_seed(1337", f"torch.manual_seed({1337 + seed}"))
    log = subprocess.run([sys.executable, "train_seeded.py", *PEER_FLAGS],
                         cwd=peer, capture_output=True, text=True, check=True).stdout
    score = subprocess.run([sys.executable, "-c", PEER_EVALUATION],
                           cwd=peer, capture_output=True, text=True, check=True).stdout
    times = [float(ms) for ms in re.findall(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", log)]
    return {"bits_per_byte": float(score.split()[-1]), "steps": 2000, "median_step_ms": statistics.median(times)}


def nats_per_token(run: Run, bits_per_byte: float) -> float:
    """Convert validation bits per byte to nats per token: bits * ln 2 * bytes / tokens of the validation text."""
    source = open_source(run.data, cache_dir=ROOT / ".cache")
    return bits_per_byte * math.log(2) * source.validation_bytes / (len(source.validation) - 1)


def run_ours(preset: str, seed: int, *flags: str) -> dict:
    """Train a preset once from the command line, as a user would, and return figures of its summary."""
    name = f"beside_nanogpt_{preset}_{seed}_{time.time():.0f}"
    subprocess.run([sys.executable, ROOT / "train_gpt.py", preset, "--run.name", name, "--run.seed", str(seed),
                    "--log.wandb", "disabled", *flags], check=True, capture_output=True)
    summary = json.loads(Path("runs", name, "summary.json").read_text())
    fields = ("steps", "train_seconds", "target_step", "target_seconds")
    return {"bits_per_byte": summary["val_bits_per_byte"]} | {field: summary[field] for field in fields}


def run_to_target(preset: str, bits_per_byte: float, seed: int) -> dict:
    """Return the step and the training seconds at which a preset first reaches nanoGPT's bits per byte.

    This is a run of its own, because it is validated often; its schedule is the full one, and it stops at the target.
    """
    result = run_ours(preset, seed, "--run.target_loss_nats", str(nats_per_token(PRESETS[preset](), bits_per_byte)),
                      "--run.stop_at_target", "--train.val_every_steps", str(VAL_EVERY_STEPS[preset]),
                      "--log.no_diagnostics")
    return {name: result[name] for name in ("target_step", "target_seconds")}


def main(peer: Path, repeats: int = 3) -> None:
    """Run nanoGPT and the presets in turns, `repeats` times each. Runs that the result file holds are not repeated.

    Args:
        peer: A clone of nanoGPT.
        repeats: Runs of nanoGPT and of each preset, with the seeds 1, 2, ...
    """
    write_peer_data(peer)
    previous = json.loads(RESULT.read_text())["runs"] if RESULT.exists() else {}
    runs = {name: previous.get(name, []) for name in ("nanoGPT", *VAL_EVERY_STEPS)}
    for seed in range(1, repeats + 1):
        # In turns, so that other work on the machine slows all of them alike.
        for name in runs:
            if len(runs[name]) >= seed:
                continue
            if name == "nanoGPT":
                runs[name].append(run_peer(peer, seed))
            else:
                target = runs["nanoGPT"][0]["bits_per_byte"]  # of the first seed, for all runs
                runs[name].append(run_ours(name, seed) | run_to_target(name, target, seed))
            print(name, runs[name][-1], flush=True)
            write_result("beside_nanogpt", "beside_nanogpt --peer nanoGPT",
                         target_bits_per_byte=runs["nanoGPT"][0]["bits_per_byte"], runs=previous | runs)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
