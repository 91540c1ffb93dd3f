"""What scripts/speedrun.sh asks: `python -m scripts.lab.race gpus | check | shards PRESET ... | report runs/NAME`."""

import json
import math
import sys
from pathlib import Path

from configs.cli import fail, parse_row
from configs.schema import Run
from scripts.fetch_fineweb import HUB_SHARDS

SHARD_TOKENS = 100_000_000
FEWEST = 9
FOLDER = "data/fineweb10B/"


def check() -> list[str]:
    """Versions, and the kernels that the first accelerator runs. Raises ValueError where PyTorch sees none."""
    import torch

    from kernels import device_paths

    if not torch.cuda.is_available():
        raise ValueError("PyTorch sees no GPU: is the driver older than CUDA "
                         f"{torch.version.cuda or '(this PyTorch is built for CPUs)'}?")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return [f"torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}", device_paths(torch.device("cuda")).line()]


def shards(run: Run) -> int:
    """FineWeb shards that the run reads, at most, before its data repeats; 0 where it does not read them from their folder.

    Orders that clip documents skip part of the stream: twice the run's tokens are taken to be enough.
    """
    from optim.schedule import Schedule

    if run.data.source != "shards" or not all(str(name).startswith(FOLDER) for name in run.data.train_files):
        return 0
    tokens = Schedule(run).tokens_before(run.train.steps) * (2 if run.data.order == "documents" else 1)
    return min(HUB_SHARDS, max(FEWEST, math.ceil(tokens / SHARD_TOKENS)))


def report(folder: Path) -> int:
    """Say what came out, keep it as a record in the run's folder, and verify that record; verify_record's exit status."""
    from scripts.verify_record import Verify, main

    summary = json.loads((folder / "summary.json").read_text())
    target, reached = summary["target_loss_nats"], summary["target_seconds"]
    print(f"validation loss {summary['val_loss_nats']:.4f} after {summary['steps']} steps, "
          f"{summary['train_seconds']:.1f} s of training")
    if target is not None:
        print(f"target {target}: " + ("not reached" if reached is None else f"first reached at {reached:.1f} s"))
    return main(Verify(add=folder / "record.jsonl", runs=(str(folder),), target=target))


def answer(words: list[str]) -> int:
    """Answer one question on standard output; the exit status. Raises ValueError for a question that is none."""
    match words:
        case ["gpus"]:
            import torch

            print(torch.cuda.device_count())  # as CUDA_VISIBLE_DEVICES says
        case ["check"]:
            print(*check(), sep="\n")
        case ["shards", preset, *flags]:
            print(shards(parse_row(preset, flags)))
        case ["report", folder]:
            return report(Path(folder))
        case _:
            raise ValueError(f"asked for {' '.join(words)!r}; questions: gpus, check, shards PRESET, report FOLDER")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(answer(sys.argv[1:]))
    except ValueError as error:
        fail(str(error))
