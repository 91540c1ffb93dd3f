"""Models of runs on whatever machine is at hand: read back from what training left, or as shapes alone, to be counted."""

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from configs.schema import Data, Model, Run
from configs.serialize import config_from_dict
from data.sources import GPT2_VOCAB, Source, open_source
from optim.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from model import GPT

CACHE = Path(__file__).resolve().parent.parent.parent / ".cache"


class Trained(NamedTuple):
    """A run, its data and its final weights in a model."""

    run: Run
    source: Source
    model: "GPT"


def anywhere(config: Model) -> Model:
    """The same function of the weights, without what training alone or one device needs: kernels, 8-bit products, losses."""
    return replace(config, attention="sdpa", flash="default", fp8="none", fp8_scales="dynamic", mtp_weights=(),
                   prefix_loss=0.0, sampled_softmax=0)


def read_config(folder: Path) -> Run:
    """What a run was told to do. Raises ValueError for a folder without a run."""
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no run (config.json is missing); train one with python train_gpt.py")
    return config_from_dict(json.loads((folder / "config.json").read_text()))


def load_trained(folder: Path, *, max_tokens: int = 0) -> Trained:
    """A run's model with the weights that its last validation judged, for contexts of `max_tokens` (0: as in training).

    Raises ValueError for a folder without a run or without a checkpoint, and where learned positions end sooner.
    """
    from data.run.checkpoint import load_checkpoint

    run = read_config(folder)
    tensors, _ = load_checkpoint(folder / "checkpoint.safetensors")
    weights = weights_that_count(tensors, blend=run.train.weight_average_blend)
    return build_trained(run, weights, max_tokens=max_tokens, what=folder)


def weights_that_count(tensors: Mapping[str, "Tensor"], *, blend: float) -> dict[str, "Tensor"]:
    """Of a checkpoint, by parameter: not ahead where the run looked ahead, and averaged, by `blend`, where it averaged."""
    from optim.hooks import AVERAGE, BASE

    found = {}
    for name in (key.removeprefix("weights/") for key in tensors if key.startswith("weights/")):
        weight = tensors[f"weights/{name}"]
        weight = tensors.get(f"{BASE}/{name}", weight).to(weight.dtype)
        average = tensors.get(f"{AVERAGE}/{name}")
        found[name] = weight if average is None else weight.float().lerp(average, blend).to(weight.dtype)
    return found


def load_exported(file: Path, *, max_tokens: int = 0) -> Trained:
    """What scripts.export wrote, as `load_trained` gives it. Raises ValueError for a file that it did not write."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            about, weights = opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        run = config_from_dict(json.loads(about["config"]))
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{file} holds no exported model ({error}); write one with python -m scripts.export") from None
    return build_trained(run, weights, max_tokens=max_tokens, what=file)


def build_trained(run: Run, weights: Mapping[str, "Tensor"], *, max_tokens: int, what: Path) -> Trained:
    """A run's data, and its model with these weights and the windows that its last step had, where nothing else is said.

    Raises ValueError, naming `what`, where the weights are another version's, or learned positions end sooner.
    """
    from model import GPT

    source = open_source(run.data, cache_dir=CACHE)
    learned = len(weights["positions"]) if "positions" in weights else None
    if learned and max_tokens > learned:
        raise ValueError(f"{what} learned {learned} positions: a context of {max_tokens} tokens has none; "
                         "train with --model.position rotary")
    model = GPT(anywhere(run.model), vocab_size=source.vocab_size, document_start=source.document_start,
                max_tokens=learned or max(max_tokens, run.data.sequence_tokens))
    names = set(model.state_dict())
    if names != set(weights):
        strays = sorted(names ^ set(weights))
        raise ValueError(f"{what} was trained by another version: its weights differ in {', '.join(strays[:3])}")
    model.load_state_dict(dict(weights))
    last = Schedule(run).values(run.train.steps - 1)
    model.config = replace(model.config, window_tokens=last.window_tokens, long_window_tokens=last.long_window_tokens)
    return Trained(run, source, model)


# ---- Shapes alone ---------------------------------------------------------------------------------------------------


BYTE_TOKENS = 257  # with end-of-text


def vocabulary(data: Data) -> int:
    """Size of the vocabulary that a source's tokens come from."""
    if data.source == "shards":
        return GPT2_VOCAB
    return {"bpe": data.bpe_vocab_tokens + 1, "bytes": BYTE_TOKENS, "gpt2": GPT2_VOCAB}[data.tokenizer]


def meta_model(run: Run, *, max_tokens: int) -> "GPT":
    """The run's model on the meta device: shapes without numbers, so that nothing is allocated."""
    import torch

    from model import GPT

    with torch.device("meta"):
        return GPT(anywhere(run.model), vocab_size=vocabulary(run.data), max_tokens=max_tokens, document_start=0,
                   dtype=torch.bfloat16)


def count_parameters(run: Run) -> int:
    """Parameters of the run's model."""
    return sum(weight.numel() for weight in meta_model(run, max_tokens=run.data.sequence_tokens).parameters())


def flops_by_step(run: Run, *, parameters: int | None) -> list[float] | None:
    """Operations spent before step 0, 1, ..., and after the last: the sum of batch tokens times model FLOPs per token.

    None where the model that the configuration makes today has not `parameters` parameters, those of the run: another
    version trained it. Without `parameters`, as of a run that has not ended, today's model is taken.
    """
    schedule = Schedule(run)
    values = [schedule.values(step) for step in range(run.train.steps)]
    longest = max(max(now.sequence_tokens for now in values), run.data.val_sequence_tokens or 0)
    model = meta_model(run, max_tokens=longest)
    if parameters is not None and sum(weight.numel() for weight in model.parameters()) != parameters:
        return None
    cost = {now[4:7]: model.flops_per_token(*now[4:7]) for now in values}  # by sequence and windows
    return [0.0, *accumulate(now.batch_tokens * cost[now[4:7]] for now in values)]
