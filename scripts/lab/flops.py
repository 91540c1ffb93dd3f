"""Floating-point operations that a run has spent, from its configuration alone."""

from collections.abc import Iterable
from itertools import accumulate

from configs.schema import Data, Run
from data.sources import GPT2_VOCAB
from optim.schedule import Schedule

BYTE_TOKENS = 257  # with end-of-text


def vocabulary(data: Data) -> int:
    """Size of the vocabulary that a source's tokens come from."""
    if data.source in ("shards", "random"):
        return GPT2_VOCAB
    return {"bpe": data.bpe_vocab_tokens + 1, "bytes": BYTE_TOKENS, "gpt2": GPT2_VOCAB}[data.tokenizer]


def flops_by_step(run: Run, *, parameters: int | None) -> list[float] | None:
    """Operations spent before step 0, 1, ..., and after the last: the sum of batch tokens times model FLOPs per token.

    None where the model that the configuration makes today has not `parameters` parameters, those of the run: another
    version trained it. Without `parameters`, as of a run that has not ended, today's model is taken.
    """
    import torch

    from model import GPT
    from scripts.lab.models import anywhere

    schedule = Schedule(run)
    values = [schedule.values(step) for step in range(run.train.steps)]
    longest = max(max(now.sequence_tokens for now in values), run.data.val_sequence_tokens or 0)
    with torch.device("meta"):  # shapes without numbers: nothing is allocated
        model = GPT(anywhere(run.model), vocab_size=vocabulary(run.data), max_tokens=longest,
                    document_start=0)
    if parameters is not None and sum(weight.numel() for weight in model.parameters()) != parameters:
        return None
    cost = {shape: model.flops_per_token(*shape) for shape in _shapes(values)}
    return [0.0, *accumulate(now.batch_tokens * cost[now[4:7]] for now in values)]


def _shapes(values: Iterable) -> set[tuple[int, int | None, int | None]]:
    return {now[4:7] for now in values}  # sequence and windows
