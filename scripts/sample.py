"""Sample text from a trained model: `python -m scripts.sample runs/tiny --prompt "def main("`.

A file written by scripts.export may stand in place of the run folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from configs.notation import raise_if
from scripts import command
from scripts.lab.models import load_exported, load_trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The model, the prompt and the sampling settings."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run folder, or a file written by scripts.export."""
    prompt: str = ""
    """Text to continue. If empty, the model begins a new document."""
    tokens: int = 200
    """Number of tokens to generate."""
    temperature: float = 0.8
    """The logits are divided by this. Below 1: likely tokens are drawn more often; 0: always the most likely token."""
    top_k: int = 50
    """Draw from this many most likely tokens only; the vocabulary size or more: from all."""
    seed: int = 1
    """Seed of the random draws."""


def sample(args: Sample) -> str:
    """Return the prompt followed by its continuation.

    Raises ValueError if the folder or file holds no model, if its weights do not fit, and if its data have no tokenizer.
    """
    raise_if(args.top_k < 1 or args.temperature < 0,
             f"--top_k must be at least 1 and --temperature at least 0, got {args.top_k} and {args.temperature:g}")
    load = load_exported if args.folder.is_file() else load_trained
    run, source, model = load(args.folder)
    if source.tokenizer is None:
        raise ValueError(f"cannot write text: the data of {args.folder} ({run.data.source}) have no tokenizer")
    # An empty prompt has no last token to predict from; end-of-text is what stands before a document in training.
    start = [source.tokenizer.end_of_text] if not args.prompt else []
    prompt = torch.tensor(start + source.tokenizer.encode(args.prompt).tolist(), dtype=torch.int64)
    # The model has the windows and weights of the last validation, and crops the context to its longest.
    tokens = model.generate(prompt, args.tokens, temperature=args.temperature, top_k=args.top_k,
                            generator=torch.Generator().manual_seed(args.seed))
    # A byte-level token may end within a UTF-8 character: replace the fragment instead of failing.
    return args.prompt + source.tokenizer.decode(tokens[len(prompt):].tolist()).decode("utf-8", "replace")


def main(args: Sample) -> None:
    """Print the sample."""
    print(sample(args))


if __name__ == "__main__":
    command(main, Sample, __doc__)
