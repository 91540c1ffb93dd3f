"""A kernel against its plain twin: inputs to both, and how far one is from the other."""

import torch
from torch import Tensor


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(result: Tensor, twin: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return ((result.double() - twin.double()).norm() / twin.double().norm()).item()
