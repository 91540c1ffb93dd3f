"""What happens inside a model, layer by layer: sizes of features, spectra of weights, learned factors of the sphere.

Keys are `diag/ROW/MEASURE`, a row being a layer or a matrix, which the report draws as maps of rows over steps.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from layers.sphere import Scale

Measures = dict[str, float]


def rms(x: Tensor) -> float:
    """Root mean square of all entries."""
    return x.float().square().mean().sqrt().item()


@torch.no_grad()
def feature_measures(model: nn.Module, tokens_BT: Tensor, **windows: int | None) -> Measures:
    """RMS of the stream after each layer and of what its attention and MLP say; RMS and largest size of the logits.

    The pass is run plainly even where the model is compiled: a graph made before does not see hooks.
    """
    found: Measures = {}

    def keep(row: str, measure: str) -> Callable:
        return lambda _module, _inputs, output: found.__setitem__(f"diag/{row}/{measure}", rms(output))

    watched = {(f"block{i}", name): part for i, block in enumerate(model.blocks)
               for name, part in (("stream_rms", block), ("attention_rms", block.attention), ("mlp_rms", block.mlp))
               if part is not None}
    with hooked({part: keep(*key) for key, part in watched.items()}):
        logits = model.forward(tokens_BT, **windows)
    return found | {"diag/logits/rms": rms(logits), "diag/logits/largest": logits.abs().max().item()}


@contextmanager
def hooked(hooks: dict[nn.Module, Callable]) -> Iterator[None]:
    """Within, each module calls its hook with what it returns."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def weight_measures(model: nn.Module) -> Measures:
    """Spectral and Frobenius norm and condition number of every hidden matrix; and on the sphere mean, least and greatest
    size of the factors as they act: eigen learning rates |alpha|, s_qk, s_u, s_v, s_z.

    By SVD in float64 on the CPU, O(m n min(m, n)) a matrix: .1 s for 768 x 768 on one core, .2 s for 3072 x 768.
    """
    found: Measures = {}
    roles = model.roles()
    for name, parameter in model.named_parameters():
        if roles[name] == "matrix":
            found |= in_row(name, spectrum(parameter))
    for name, module in model.named_modules():
        if isinstance(module, Scale):
            sizes = module().abs()
            found |= in_row(name, {"factor": sizes.mean().item(), "factor_least": sizes.min().item(),
                                   "factor_greatest": sizes.max().item()})
    return found


def in_row(name: str, measures: Measures) -> Measures:
    """The measures under the keys of a parameter's or module's row: that of blocks.0.attention.q.weight is 0.attention.q."""
    row = name.removeprefix("blocks.").removesuffix(".weight")
    return {f"diag/{row}/{measure}": value for measure, value in measures.items()}


def spectrum(W: Tensor) -> Measures:
    """Spectral and Frobenius norm and condition number of a matrix: 0 if it is zero, NaN if it is not finite."""
    exact = W.cpu().double()
    values = torch.linalg.svdvals(exact) if exact.isfinite().all() else torch.full((1,), math.nan)
    return {"spectral": values[0].item(), "frobenius": values.norm().item(),
            "condition": (values[0] / values[-1].clamp_min(1e-30)).item()}
