"""Evaluate a trained model: validation loss at one or more context lengths, and HellaSwag.

    python -m scripts.evaluate runs/tiny
    python -m scripts.evaluate runs/tiny --context 1x,2x,4x,8x
    python -m scripts.evaluate runs/NAME --hellaswag hellaswag_val.jsonl --json

The validation is the one of training: every validation token is predicted exactly once.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from data.evaluate import evaluate
from data.run.environment import choose_device
from scripts import command
from scripts.lab.models import Trained, load_trained, read_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Run to evaluate, and on what."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of the run."""
    context: str = "1x"
    """Context lengths, separated by commas: multiples of the training context (2x) or numbers of tokens (512)."""
    hellaswag: Path | None = None
    """HellaSwag file (Zellers et al. 2019, arXiv 1905.07830): one JSON object per line, with ctx, endings and label."""
    micro_tokens: int = 8192
    """Tokens in one forward pass."""
    device: Literal["cpu", "cuda", "mps", "auto"] = "cpu"
    """auto: the first available of cuda, mps and cpu. On CUDA activations are bfloat16, as in training there."""
    json: bool = False
    """Print JSON instead of a table."""


# ---- Validation loss ------------------------------------------------------------------------------------------------


def parse_contexts(text: str, trained_tokens: int) -> list[int]:
    """Return the context lengths of --context in tokens. Raises ValueError, quoting the part that is not valid.

    trained_tokens: the context length of training.
    """
    lengths_tokens = []
    for part in text.split(","):
        number = part.strip().removesuffix("x")
        if not number.isdigit() or int(number) < 1:
            raise ValueError(f"--context takes lengths like 2x or 512, separated by commas; got {part!r}")
        lengths_tokens.append(int(number) * (trained_tokens if part.strip().endswith("x") else 1))
    return lengths_tokens


def validation_losses(trained: Trained, contexts_tokens: list[int], micro_tokens: int) -> list[dict[str, Any]]:
    """Return one row of losses for each context length. Attention windows are those of the last training step."""
    rows = []
    with torch.no_grad():
        for context in contexts_tokens:
            # A forward pass takes at least one whole sequence. On one rank there is nothing to sum.
            score = evaluate(trained.model, trained.source, sequence_tokens=context, micro_tokens=max(micro_tokens, context),
                             rank=0, world_size=1, device=trained.model.embed.device, sum_over_ranks=float)
            rows.append({"context_tokens": context, "val_loss_nats": score.nats_per_token,
                         "val_bits_per_byte": score.bits_per_byte})
    return rows


# ---- HellaSwag ------------------------------------------------------------------------------------------------------


class Question(NamedTuple):
    """A question of HellaSwag: choose the ending that continues the context."""

    context: str
    endings: list[str]
    label: int
    """Index of the right ending."""


def read_questions(file: Path) -> Iterator[Question]:
    """Yield the questions of a HellaSwag file. Raises ValueError naming a line that holds no question."""
    if not file.exists():
        raise ValueError(f"{file} does not exist; HellaSwag's validation file has one JSON object per line")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            yield Question(row["ctx"], list(row["endings"]), int(row["label"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: no question with ctx, endings and label ({error!r})") from None


def ending_cross_entropy(trained: Trained, context: str, ending: str) -> Tensor:
    """Return the mean cross-entropy in nats of an ending's tokens after the context, 0-D.

    The start of the context is cut off if the text is longer than the model's context.
    """
    tokenizer = trained.source.tokenizer
    # A document begins with end-of-text; GPT-2's tokens carry the space before a word.
    before, after = [tokenizer.end_of_text, *tokenizer.encode(context)], list(tokenizer.encode(" " + ending))
    tokens = torch.tensor([int(t) for t in (*before, *after)], device=trained.model.embed.device)
    tokens = tokens[-trained.model.max_tokens - 1:]
    logits = trained.model(tokens[None, :-1])[0]
    return F.cross_entropy(logits[-len(after):], tokens[1:][-len(after):])


def is_right(trained: Trained, question: Question) -> bool:
    """Return True if the right ending has the lowest mean cross-entropy."""
    losses = [float(ending_cross_entropy(trained, question.context, ending)) for ending in question.endings]
    return losses.index(min(losses)) == question.label


def evaluate_hellaswag(trained: Trained, file: Path) -> dict[str, Any]:
    """Return the share of questions answered right, and their number. Raises ValueError without a tokenizer or questions.

    The endings' losses are means per token, as in build-nanogpt (acc_norm, Karpathy 2024); the Language Model Evaluation
    Harness divides by bytes instead.
    """
    if trained.source.tokenizer is None:
        raise ValueError(f"the data of this run ({trained.run.data.source}) has no tokenizer, so {file} cannot be tokenized")
    with torch.no_grad():
        right = [is_right(trained, question) for question in read_questions(file)]
    if not right:
        raise ValueError(f"{file} holds no question")
    return {"hellaswag_accuracy": sum(right) / len(right), "hellaswag_questions": len(right)}


# ---- The command line -----------------------------------------------------------------------------------------------


def main(args: Arguments) -> None:
    """Evaluate the run and print the results."""
    contexts_tokens = parse_contexts(args.context, read_config(args.folder).data.sequence_tokens)
    trained = load_trained(args.folder, max_tokens=max(contexts_tokens))
    device = choose_device(args.device, 0)
    trained.model.to(device).dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # as in training
    results = {"folder": str(args.folder), "contexts": validation_losses(trained, contexts_tokens, args.micro_tokens)}
    if args.hellaswag:
        results |= evaluate_hellaswag(trained, args.hellaswag)
    if args.json:
        print(json.dumps(results, indent=2))
        return
    print(f"{'context (tokens)':>16} {'loss (nats per token)':>22} {'bits per byte':>14}")
    for row in results["contexts"]:
        bits = "-" if row["val_bits_per_byte"] is None else f"{row['val_bits_per_byte']:.4f}"
        print(f"{row['context_tokens']:>16,} {row['val_loss_nats']:>22.4f} {bits:>14}")
    if args.hellaswag:
        print(f"HellaSwag accuracy: {results['hellaswag_accuracy']:.1%} of {results['hellaswag_questions']:,} questions")


if __name__ == "__main__":
    command(main, Arguments, __doc__)
