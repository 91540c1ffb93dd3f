"""What a trained model is worth: validation loss at one or more contexts, and HellaSwag.

    python -m scripts.evaluate runs/tiny
    python -m scripts.evaluate runs/tiny --context 1x,2x,4x,8x
    python -m scripts.evaluate runs/NAME --hellaswag hellaswag_val.jsonl --json

The referee is training's: every validation token is predicted exactly once. 2x is twice the training context.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

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
    """What to evaluate."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run's folder."""
    context: str = "1x"
    """Contexts, by commas: multiples of the training context (2x) or tokens (512)."""
    hellaswag: Path | None = None
    """A file of HellaSwag (Zellers et al. 2019, arXiv 1905.07830), one JSON object a line: ctx, endings, label."""
    micro_tokens: int = 8192
    """Tokens in one forward pass."""
    device: Literal["cpu", "cuda", "mps", "auto"] = "cpu"
    """auto: the first of cuda, mps and cpu that is there. On CUDA activations are bfloat16, as in training there."""
    json: bool = False
    """Print JSON instead of a table."""


def contexts(text: str, trained_tokens: int) -> list[int]:
    """Contexts in tokens. Raises ValueError, quoting the offending word."""
    found = []
    for word in text.split(","):
        number = word.strip().removesuffix("x")
        if not number.isdigit() or int(number) < 1:
            raise ValueError(f"--context takes words like 2x or 512, by commas; got {word!r}")
        found.append(int(number) * (trained_tokens if word.strip().endswith("x") else 1))
    return found


def validation_losses(trained: Trained, tokens: list[int], micro_tokens: int) -> list[dict]:
    """Loss at each context, with the windows of the end of training."""
    rows = []
    with torch.no_grad():
        for context in tokens:
            score = evaluate(trained.model, trained.source, sequence_tokens=context, micro_tokens=max(micro_tokens, context),
                             rank=0, world_size=1, device=trained.model.embed.device, sum_over_ranks=float)
            rows.append({"context_tokens": context, "val_loss_nats": score.nats_per_token,
                         "val_bits_per_byte": score.bits_per_byte})
    return rows


class Question(NamedTuple):
    """One of HellaSwag: a context, four endings, the number of the right one."""

    context: str
    endings: list[str]
    label: int


def questions(file: Path) -> Iterator[Question]:
    """All questions of a file. Raises ValueError, naming the line, for one that is none."""
    if not file.exists():
        raise ValueError(f"{file} does not exist; HellaSwag's validation file has one JSON object a line")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            yield Question(row["ctx"], list(row["endings"]), int(row["label"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: no question with ctx, endings and label ({error!r})") from None


def nats_of_ending(trained: Trained, context: str, ending: str) -> Tensor:
    """Mean nats of the ending's tokens after the context, 0-D; the context is cropped to the model's."""
    tokenizer = trained.source.tokenizer
    before, after = ([tokenizer.end_of_text, *tokenizer.encode(context)], list(tokenizer.encode(" " + ending)))
    tokens = torch.tensor([int(t) for t in (*before, *after)], device=trained.model.embed.device)
    tokens = tokens[-trained.model.max_tokens - 1:]
    logits = trained.model(tokens[None, :-1])[0]
    return F.cross_entropy(logits[-len(after):], tokens[1:][-len(after):])


def hellaswag(trained: Trained, file: Path) -> dict:
    """Share of questions whose right ending has the least mean nats a token (build-nanogpt's acc_norm, Karpathy 2024; the
    Language Model Evaluation Harness divides by bytes instead), and how many."""
    if trained.source.tokenizer is None:
        raise ValueError(f"the data of this run ({trained.run.data.source}) has no tokenizer: it cannot read {file}")
    with torch.no_grad():
        right = [min(range(len(q.endings)), key=lambda i, q=q: nats_of_ending(trained, q.context, q.endings[i])) == q.label
                 for q in questions(file)]
    if not right:
        raise ValueError(f"{file} holds no question")
    return {"hellaswag_accuracy": sum(right) / len(right), "hellaswag_questions": len(right)}


def main(args: Arguments) -> None:
    """Evaluate, print."""
    wanted = contexts(args.context, read_config(args.folder).data.sequence_tokens)
    trained = load_trained(args.folder, max_tokens=max(wanted))
    device = choose_device(args.device, 0)
    trained.model.to(device).dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # as in training
    found = {"folder": str(args.folder), "contexts": validation_losses(trained, wanted, args.micro_tokens)}
    found |= hellaswag(trained, args.hellaswag) if args.hellaswag else {}
    if args.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{'context':>8} {'nats a token':>13} {'bits a byte':>12}")
    for row in found["contexts"]:
        bits = "-" if row["val_bits_per_byte"] is None else f"{row['val_bits_per_byte']:.4f}"
        print(f"{row['context_tokens']:>8} {row['val_loss_nats']:>13.4f} {bits:>12}")
    if args.hellaswag:
        print(f"HellaSwag: {found['hellaswag_accuracy']:.1%} of {found['hellaswag_questions']}")


if __name__ == "__main__":
    command(main, Arguments, __doc__)
