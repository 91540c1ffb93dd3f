"""Models of runs: rebuilt with their trained weights, or as shapes alone, to count parameters and FLOPs."""

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from configs.notation import raise_if
from configs.schema import Model, Run
from configs.serialize import config_from_dict
from data.sources import Source, open_source, vocabulary
from optim.schedule import Schedule

if TYPE_CHECKING:
    from torch import Tensor

    from model import GPT

CACHE = Path(__file__).resolve().parent.parent.parent / ".cache"


class Trained(NamedTuple):
    """A run's config, its data source, and its model with the final weights."""

    run: Run
    source: Source
    model: "GPT"


def portable_config(config: Model) -> Model:
    """Return the config of a model that computes the same function of its weights on any device.

    Fused attention kernels, fp8 products and losses that only training uses are switched off.
    """
    return replace(config, attention="sdpa", flash="default", fp8="none", fp8_scales="dynamic", mtp_weights=(),
                   prefix_loss=0.0, sampled_softmax=0)


def read_config(folder: Path) -> Run:
    """Return the config of the run in a folder. Raise ValueError if the folder has no run."""
    raise_if(not (folder / "config.json").exists(),
             f"{folder} holds no run (config.json is missing); train one with python train_gpt.py")
    return config_from_dict(json.loads((folder / "config.json").read_text()))


def load_trained(folder: Path, *, max_tokens: int = 0) -> Trained:
    """Load a run's model with the weights of its last validation.

    max_tokens: longest context that the model must accept; 0: the context length of training.
    Raise ValueError if the folder has no run or no checkpoint, or if its learned positions are fewer than max_tokens.
    """
    from data.run.checkpoint import load_checkpoint

    run = read_config(folder)
    tensors, _ = load_checkpoint(folder / "checkpoint.safetensors")
    weights = evaluation_weights(tensors, average_blends(run) if run.train.weight_average else {})
    return build_trained(run, weights, max_tokens=max_tokens, origin=folder)


def average_blends(run: Run) -> dict[str, float]:
    """Return each parameter's share of the average in its validated weights."""
    from optim.hooks import WeightAverage

    hook, roles = WeightAverage.build(run.train), meta_model(run, max_tokens=run.data.sequence_tokens).roles()
    return {name: hook.blend_of(getattr(run.optim, role)) for name, role in roles.items()}


def evaluation_weights(tensors: Mapping[str, "Tensor"], blends: Mapping[str, float]) -> dict[str, "Tensor"]:
    """Return the weights that validation uses, by parameter name, from the tensors of a checkpoint.

    With look-ahead they are the weights before the extrapolation. With weight averaging they are
    blend average + (1 - blend) weight, computed in float32, with the blend of `blends`.
    """
    from optim.hooks import AVERAGE, BASE

    weights = {}
    for name in (key.removeprefix("weights/") for key in tensors if key.startswith("weights/")):
        weight = tensors[f"weights/{name}"]
        weight = tensors.get(f"{BASE}/{name}", weight).to(weight.dtype)
        average = tensors.get(f"{AVERAGE}/{name}")
        weights[name] = weight if average is None else weight.float().lerp(average, blends.get(name, 1.0)).to(weight.dtype)
    return weights


def load_exported(file: Path, *, max_tokens: int = 0) -> Trained:
    """Load a model from a file of scripts.export; `max_tokens` as in load_trained. Raise ValueError for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        run = config_from_dict(json.loads(metadata["config"]))
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{file} holds no exported model ({error}); write one with python -m scripts.export") from None
    return build_trained(run, weights, max_tokens=max_tokens, origin=file)


def build_trained(run: Run, weights: Mapping[str, "Tensor"], *, max_tokens: int, origin: Path) -> Trained:
    """Open a run's data and build its model with these weights. `origin`: the file or folder that error messages name.

    Raise ValueError if the weights are those of another version, or if learned positions are fewer than max_tokens.
    """
    from model import GPT

    # Learned positions fix the context length; other models get the length that is asked for.
    source = open_source(run.data, cache_dir=CACHE)
    learned = len(weights["positions"]) if "positions" in weights else None
    if learned and max_tokens > learned:
        raise ValueError(f"{origin} has {learned} learned positions, fewer than the {max_tokens} tokens of this context; "
                         "train with --model.position rotary")
    model = GPT(portable_config(run.model), vocab_size=source.vocab_size, document_start=source.document_start,
                max_tokens=learned or max(max_tokens, run.data.sequence_tokens))
    mismatched = sorted(set(model.state_dict()) ^ set(weights))
    raise_if(bool(mismatched), f"{origin} was trained by another version: its weights differ in {', '.join(mismatched[:3])}")
    model.load_state_dict(dict(weights))
    # Windows may grow over a run. Evaluation uses those of the last validation, unless the caller passes its own.
    last = Schedule(run).validation_values(run.train.steps)
    model.config = replace(model.config, window_tokens=last.window_tokens, long_window_tokens=last.long_window_tokens)
    return Trained(run, source, model)


# ---- Shapes alone ---------------------------------------------------------------------------------------------------


def meta_model(run: Run, *, max_tokens: int) -> "GPT":
    """Build the run's model on the meta device: shapes without values, so no memory is allocated."""
    import torch

    from model import GPT

    with torch.device("meta"):
        return GPT(portable_config(run.model), vocab_size=vocabulary(run.data), max_tokens=max_tokens, document_start=0,
                   dtype=torch.bfloat16)


def count_parameters(run: Run) -> int:
    """Return the number of parameters of the run's model."""
    return sum(weight.numel() for weight in meta_model(run, max_tokens=run.data.sequence_tokens).parameters())


def flops_by_step(run: Run, *, parameters: int | None) -> list[float] | None:
    """Return the operations spent before step 0, 1, ..., and after the last: sums of batch_tokens * flops_per_token.

    parameters: the run's own number of parameters. If the model built from the config has another number, another version
    trained the run and None is returned. None: not known, as before a run has ended; no check is made.
    """
    schedule = Schedule(run)
    values = [schedule.values(step) for step in range(run.train.steps)]
    longest = max(max(v.sequence_tokens for v in values), run.data.val_sequence_tokens or 0)
    model = meta_model(run, max_tokens=longest)
    if parameters is not None and sum(weight.numel() for weight in model.parameters()) != parameters:
        return None
    return [0.0, *accumulate(v.batch_tokens * model.flops_per_token(v.sequence_tokens, **v.windows) for v in values)]
