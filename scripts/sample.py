"""Text from a trained model: `python -m scripts.sample runs/tiny --prompt "def main("`, or from an exported file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from scripts import command
from scripts.lab.models import load_exported, load_trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What to continue, and how boldly."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run's folder, or a file of scripts.export."""
    prompt: str = ""
    """Text to continue; empty: the model begins a document."""
    tokens: int = 200
    """Length of the continuation."""
    temperature: float = 0.8
    """Below 1: more likely tokens; 0: always the likeliest."""
    top_k: int = 50
    """Only the so many likeliest tokens are drawn."""
    seed: int = 1


def sample(args: Sample) -> str:
    """The prompt and its continuation. Raises ValueError for a folder without a run, or one that does not fit."""
    run, source, model = (load_exported if args.folder.is_file() else load_trained)(args.folder)
    if source.tokenizer is None:
        raise ValueError(f"the data of {args.folder} ({run.data.source}) has no tokenizer: nothing to write with")
    start = [source.tokenizer.end_of_text] if not args.prompt else []
    prompt = torch.tensor(start + source.tokenizer.encode(args.prompt).tolist(), dtype=torch.int64)
    tokens = model.generate(prompt, args.tokens, temperature=args.temperature, top_k=args.top_k,
                            generator=torch.Generator().manual_seed(args.seed))
    return args.prompt + source.tokenizer.decode(tokens[len(prompt):].tolist()).decode("utf-8", "replace")


def main(args: Sample) -> None:
    """Print the sample."""
    print(sample(args))


if __name__ == "__main__":
    command(main, Sample, __doc__)
