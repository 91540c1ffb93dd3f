"""From the stream to the loss."""

import torch
from torch import Tensor


def softcap(z: Tensor, kind: str, c: float) -> Tensor:
    """Logits bounded by c in absolute value, with slope 1 at 0."""
    if kind == "tanh":
        return c * torch.tanh(z / c)
    if kind == "rational":
        return c * z * (z * z + c * c).rsqrt()
    return 2 * c * torch.sigmoid(2 * z / c) - c if kind == "sigmoid" else z
