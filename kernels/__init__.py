"""Fast paths for attention, loss, MLP and matrix products, each beside its plain twin; and the choice between the two.

The plain twin is a few lines of PyTorch that define the result; tests compare both. The choice is made once, when the model
is built, so that a compiled graph has no branch. Triton is optional: it is imported at first use only.
"""

import importlib.util
from typing import NamedTuple

import torch

from configs.model import Model
from kernels import cross_entropy, fp8
from kernels.dynamic_heads import LONGEST_WINDOW
from kernels.mlp import fits

# Compute capabilities with tensor cores for bfloat16 (Ampere) and for 8-bit floats (Ada, Hopper).
TRITON_FROM, FP8_FROM = (8, 0), (8, 9)
KERNEL_DTYPE = torch.bfloat16  # the kernels are correct in float32 too, but slower there than cuBLAS


class Paths(NamedTuple):
    """The path of each operation, `triton` or `plain`."""

    loss: str = "plain"
    """Path of softcap and cross-entropy."""
    relu2: str = "plain"
    """Path of the linear map with ReLU^2."""
    fp8: str = "none"
    """Products in 8-bit floats: `none`, `head` or `head_mlp`; of a device: those that it has."""
    reason: str = "no CUDA device"
    """Properties of the device that decided, for the log."""
    dynamic_heads: str = "plain"
    """Path of dynamic head composition."""

    def line(self) -> str:
        """Return the paths as one line for the log."""
        return (f"kernels: loss {self.loss}, linear + ReLU^2 {self.relu2}, dynamic heads {self.dynamic_heads}, "
                f"8-bit products {self.fp8} ({self.reason})")


def device_paths(device: torch.device) -> Paths:
    """Return the fastest paths that a device can run: `triton` on CUDA with compute capability 8.0 and Triton installed."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return Paths(reason=f"device {device.type}")
    capability = torch.cuda.get_device_capability(device)
    installed = importlib.util.find_spec("triton") is not None
    path = "triton" if installed and capability >= TRITON_FROM else "plain"
    reason = f"compute capability {capability[0]}.{capability[1]}, Triton {'installed' if installed else 'not installed'}"
    has_fp8 = capability >= FP8_FROM and torch.version.hip is None
    return Paths(path, path, "head_mlp" if has_fp8 else "none", reason, path)


def choose_paths(config: Model, device: torch.device, dtype: torch.dtype) -> Paths:
    """Return the paths of a model whose activations have `dtype`: Triton kernels for bfloat16, plain lines otherwise.

    Raises ValueError if the config asks for 8-bit products and the device or the loss cannot compute them.
    """
    here = device_paths(device)
    fused = config.fused == "auto" and dtype is KERNEL_DTYPE
    loss = here.loss if fused else "plain"
    if config.fp8 == "auto":
        wanted = here.fp8 if loss == "triton" and not config.fp8_obstacle() else "none"
    else:
        wanted = config.fp8
    if wanted != "none" and here.fp8 == "none":
        raise ValueError(f"--model.fp8 {config.fp8} needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper), "
                         f"got {here.reason}; use --model.fp8 none here")
    if wanted != "none" and loss == "plain":
        raise ValueError(f"--model.fp8 {config.fp8} needs the fused loss, which writes the 8-bit gradient: Triton, "
                         f"activations in bfloat16 and --model.fused auto; got {config.fused}, {dtype}, {here.reason}")
    # The MLP's kernel takes weight matrices only: no biases, no learned factors of the sphere; of sizes that it can load.
    matrix_only = not config.biases and config.geometry == "euclidean" and fits(config.dim, config.mlp_dim or 4 * config.dim)
    # Sizes that Triton can tile, and a window that fits the registers.
    power_of_2 = config.head_dim & (config.head_dim - 1) == 0
    tiled = config.head_dim >= 16 and power_of_2 and config.dynamic_window <= LONGEST_WINDOW
    return here._replace(loss=loss, fp8=wanted,
                         relu2=here.relu2 if fused and matrix_only and config.activation == "relu2" else "plain",
                         dynamic_heads=here.dynamic_heads if fused and tiled and config.dynamic_heads else "plain")


def define_operators(paths: Paths) -> None:
    """Define the operators of these paths: before a model is compiled, as operators cannot be defined within."""
    if paths.loss == "triton":
        cross_entropy.define_operator()
    if paths.fp8 != "none":
        fp8.define_operator()
