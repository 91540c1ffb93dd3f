"""Trained models read back from their run folders, on whatever machine is at hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from configs.schema import Model, Run

if TYPE_CHECKING:
    from data.sources import Source
    from model import GPT

CACHE = Path(__file__).resolve().parent.parent.parent / ".cache"


class Trained(NamedTuple):
    """A run, its data and its final weights in a model."""

    run: Run
    source: "Source"
    model: "GPT"


def anywhere(config: Model) -> Model:
    """The same function of the weights, without what training alone or one device needs: kernels, 8-bit products, losses."""
    return replace(config, attention="sdpa", fp8="none", fp8_scales="dynamic", mtp_weights=(), prefix_loss=0.0,
                   sampled_softmax=0)


def load_trained(folder: Path, *, max_tokens: int = 0) -> Trained:
    """A run's model with its last weights, for contexts of `max_tokens` (0: as in training).

    Raises ValueError for a folder without a run or without a checkpoint, and where learned positions end sooner.
    """
    from data.checkpoint import load_checkpoint
    from data.runs import config_from_dict
    from data.sources import open_source
    from model import GPT

    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no run (config.json is missing); train one with python train_gpt.py")
    run = config_from_dict(json.loads((folder / "config.json").read_text()))
    source = open_source(run.data, cache_dir=CACHE, seed=run.run.seed)
    tensors, _ = load_checkpoint(folder / "checkpoint.safetensors")
    weights = {name.removeprefix("weights/"): tensor for name, tensor in tensors.items() if name.startswith("weights/")}
    learned = len(weights["positions"]) if "positions" in weights else None
    if learned and max_tokens > learned:
        raise ValueError(f"{folder} learned {learned} positions: a context of {max_tokens} tokens has none; "
                         "train with --model.position rotary")
    model = GPT(anywhere(run.model), vocab_size=source.vocab_size, document_start=source.document_start,
                max_tokens=learned or max(max_tokens, run.data.sequence_tokens))
    names = set(model.state_dict())
    if names != set(weights):
        strays = sorted(names ^ set(weights))
        raise ValueError(f"{folder} was trained by another version: its weights differ in {', '.join(strays[:3])}")
    model.load_state_dict(weights)
    return Trained(run, source, model)
