"""The fast paths, each under the few plain lines that define it, and the choice between the two, made once per model."""

import importlib.util
from typing import NamedTuple

import torch

from configs.model import Model

TRITON_FROM, FP8_FROM = (8, 0), (8, 9)  # compute capabilities: bfloat16 tensor cores; 8-bit ones
KERNEL_DTYPE = torch.bfloat16  # in float32 the kernels are right too, but the vendors' products are faster


class Paths(NamedTuple):
    """Which path each piece takes, `triton` or `plain`, and whether there are 8-bit products."""

    loss: str = "plain"
    relu2: str = "plain"
    fp8: bool = False
    reason: str = "no CUDA device"

    def line(self) -> str:
        """One line to print."""
        return (f"kernels: loss {self.loss}, linear + ReLU^2 {self.relu2}, "
                f"8-bit products {'yes' if self.fp8 else 'no'} ({self.reason})")


def device_paths(device: torch.device) -> Paths:
    """The kernels that a device can run: `triton` on CUDA from compute capability 8.0 on, where Triton is installed."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return Paths(reason=f"device {device.type}")
    capability = torch.cuda.get_device_capability(device)
    installed = importlib.util.find_spec("triton") is not None
    path = "triton" if installed and capability >= TRITON_FROM else "plain"
    reason = f"compute capability {capability[0]}.{capability[1]}, Triton {'installed' if installed else 'not installed'}"
    return Paths(path, path, capability >= FP8_FROM and torch.version.hip is None, reason)


def choose_paths(config: Model, device: torch.device, dtype: torch.dtype) -> Paths:
    """The paths of a model with activations in `dtype`: the kernels serve bfloat16, other models take the plain lines.

    Raises ValueError where 8-bit products are asked of a device that has none.
    """
    here = device_paths(device)
    if config.fp8 != "none" and not here.fp8:
        raise ValueError(f"--model.fp8 {config.fp8} needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper), "
                         f"got {here.reason}; use --model.fp8 none here")
    fused = config.fused == "auto" and dtype is KERNEL_DTYPE
    # The MLP's kernel multiplies by a matrix alone: no bias, no factors of the sphere, no 8-bit product.
    matrix_alone = not config.biases and config.geometry == "euclidean" and config.fp8 != "head_mlp"
    return here._replace(loss=here.loss if fused else "plain",
                         relu2=here.relu2 if fused and matrix_alone and config.activation == "relu2" else "plain",
                         fp8=config.fp8 != "none")
