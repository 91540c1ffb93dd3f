"""What happens inside a model, layer by layer: sizes of features, spectra of weights, learned factors of the sphere.

Keys are `diag/ROW/MEASURE`, a row being a layer or a matrix, which the report draws as maps of rows over steps.
"""

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
    """RMS of the stream after each layer and of what its attention and MLP say; RMS and largest size of the logits."""
    found: Measures = {}

    def keep(row: str, measure: str) -> Callable:
        return lambda _module, _inputs, output: found.__setitem__(f"diag/{row}/{measure}", rms(output))

    watched = {(f"block{i}", name): part for i, block in enumerate(model.blocks)
               for name, part in (("stream_rms", block), ("attention_rms", block.attention), ("mlp_rms", block.mlp))
               if part is not None}
    with hooked({part: keep(*key) for key, part in watched.items()}):
        logits = model(tokens_BT, **windows)
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
    """Spectral and Frobenius norm and condition number of every hidden matrix, by SVD in float64; and on the sphere the
    means of the factors as they act: eigen learning rates |alpha|, s_qk, s_u, s_z."""
    found: Measures = {}
    for name, parameter in model.named_parameters():
        if model.roles()[name] == "matrix":
            values = torch.linalg.svdvals(parameter.cpu().double())
            row = f"diag/{name.removeprefix('blocks.').removesuffix('.weight')}"
            found[f"{row}/spectral"] = values[0].item()
            found[f"{row}/frobenius"] = values.square().sum().sqrt().item()
            found[f"{row}/condition"] = (values[0] / values[-1].clamp_min(1e-30)).item()
    for name, module in model.named_modules():
        if isinstance(module, Scale):
            found[f"diag/{name.removeprefix('blocks.')}/factor"] = module().abs().mean().item()
    return found
