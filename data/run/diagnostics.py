"""Diagnostics of every layer: RMS of activations, spectra of weights, and the learned factors of the sphere.

Keys are `diag/ROW/MEASURE`, where a row is a layer or a matrix. The report draws each measure as a map of rows over steps.
"""

import math

import torch
from torch import Tensor, nn

Metrics = dict[str, float]


def rms(x: Tensor) -> float:
    """Return the root mean square of all entries. Waits for the device."""
    return x.float().square().mean().sqrt().item()


@torch.no_grad()
def activation_metrics(model: nn.Module, tokens_BT: Tensor, **windows: int | None) -> Metrics:
    """Return the RMS of activations in one forward pass, and the RMS and the largest absolute value of the logits.

    Each block is measured at three places: the residual stream after it, the output of its attention, and of its MLP.
    """
    measures: Metrics = {}
    handles = []
    for i, block in enumerate(model.blocks):
        for name, module in (("stream", block), ("attention", block.attention), ("mlp", block.mlp)):
            if module is not None:
                handles.append(_hook_rms(module, f"diag/block{i}/{name}_rms", measures))
    # Not model(...): a graph that was compiled before the hooks were registered does not call them.
    try:
        logits = model.forward(tokens_BT, **windows)
    finally:
        for handle in handles:
            handle.remove()
    return measures | {"diag/logits/rms": rms(logits), "diag/logits/largest": logits.abs().max().item()}


def _hook_rms(module: nn.Module, key: str, measures: Metrics) -> torch.utils.hooks.RemovableHandle:
    """Write the RMS of every output of the module into `measures[key]`, until the returned handle is removed."""
    def write(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        measures[key] = rms(output)

    return module.register_forward_hook(write)


@torch.no_grad()
def weight_metrics(model: nn.Module) -> Metrics:
    """Return spectral norm, Frobenius norm and condition number of every hidden matrix.

    On the sphere also the mean, smallest and largest absolute value of each learned factor: the eigen learning rates
    alpha, and the scales s_qk, s_u, s_v and s_z (nGPT, Loshchilov et al. 2024, arXiv 2410.01131).

    Cost of the SVD of an (m, n) matrix on the CPU: O(m n min(m, n)), .1 s for 768 x 768 on one core, .2 s for 3072 x 768.
    """
    measures: Metrics = {}
    roles = model.roles()
    for name, parameter in model.named_parameters():
        if roles[name] == "matrix":
            measures |= row_metrics(name, spectrum(parameter))
    for name, factors in model.factors().items():
        sizes = factors.abs()
        measures |= row_metrics(name, {"factor": sizes.mean().item(), "factor_least": sizes.min().item(),
                                       "factor_greatest": sizes.max().item()})
    return measures


def row_metrics(name: str, measures: Metrics) -> Metrics:
    """Return the measures of a parameter or module under their keys: blocks.0.attention.q.weight has row 0.attention.q."""
    row = name.removeprefix("blocks.").removesuffix(".weight")
    return {f"diag/{row}/{measure}": value for measure, value in measures.items()}


def spectrum(W: Tensor) -> Metrics:
    """Return spectral norm, Frobenius norm and condition number of a matrix; NaN if it is not finite.

    The condition number is the largest over the smallest singular value; 0 for a zero matrix.
    """
    exact = W.cpu().double()  # float64: in float32 no condition number beyond about 1e7 can be measured
    # svdvals raises for a matrix with NaN or infinity, but diagnostics must not stop a run.
    values = torch.linalg.svdvals(exact) if exact.isfinite().all() else torch.full((1,), math.nan)
    return {"spectral": values[0].item(), "frobenius": values.norm().item(),
            "condition": (values[0] / values[-1].clamp_min(1e-30)).item()}
