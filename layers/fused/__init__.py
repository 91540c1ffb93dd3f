"""Fused kernels and 8-bit products: which of them runs is decided here, once, when the model is built.

Each has a plain twin of a few lines, which is what runs everywhere else.
"""

import importlib.util
from typing import NamedTuple

import torch
from torch import nn

from configs.schema import Model
from layers.fused.cross_entropy import KINDS
from layers.fused.fp8 import Fp8Product
from layers.fused.linear_relu2 import relu2_product

TRITON_FROM, FP8_FROM = (8, 0), (8, 9)  # compute capabilities: bfloat16 tensor cores; 8-bit ones
KERNEL_DTYPE = torch.bfloat16  # in float32 the kernels are right, but vendors' products are faster


class Paths(NamedTuple):
    """Which path each piece takes, `triton` or `plain`, and whether there are 8-bit products.

    `loss` is of logits, `head_loss` of the stream: with the head's product inside.
    """

    loss: str
    head_loss: str
    relu2: str
    fp8: bool
    reason: str

    def line(self) -> str:
        """One line to print."""
        return (f"kernels: loss {self.loss}, loss with head {self.head_loss}, linear + ReLU^2 {self.relu2}, "
                f"8-bit products {'yes' if self.fp8 else 'no'} ({self.reason})")


def paths(device: torch.device) -> Paths:
    """What this device has kernels for: `triton` on CUDA from compute capability 8.0 on, where Triton is installed."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return Paths("plain", "plain", "plain", False, f"device {device.type}")
    capability = torch.cuda.get_device_capability(device)
    installed = importlib.util.find_spec("triton") is not None
    path = "triton" if installed and capability >= TRITON_FROM else "plain"
    reason = f"compute capability {capability[0]}.{capability[1]}, Triton {'installed' if installed else 'not installed'}"
    return Paths(path, path, path, capability >= FP8_FROM and torch.version.hip is None, reason)


def choose_paths(config: Model, device: torch.device, dtype: torch.dtype) -> Paths:
    """The paths of a model with activations in `dtype`. The kernels serve bfloat16; other models take the plain twins.

    Raises ValueError where 8-bit products are asked of a device that has none.
    """
    here = paths(device)
    if config.fp8 != "none" and not here.fp8:
        raise ValueError(f"--model.fp8 {config.fp8} needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper), "
                         f"got {here.reason}; use --model.fp8 none here")
    serves = config.fused == "auto" and dtype is KERNEL_DTYPE
    bare = serves and not config.biases and config.geometry == "euclidean"  # maps that are a matrix and nothing else
    capped = config.softcap in KINDS
    whole_head = bare and capped and config.loss_chunk_tokens > 0 and config.fp8 == "none"
    whole_up = bare and config.activation == "relu2" and config.fp8 != "head_mlp"
    return here._replace(loss=here.loss if serves and capped else "plain",
                         head_loss=here.head_loss if whole_head else "plain",
                         relu2=here.relu2 if whole_up else "plain", fp8=config.fp8 != "none")


def equip(model: nn.Module, config: Model, *, device: torch.device, dtype: torch.dtype) -> Paths:
    """Give the linear maps of `model` (its `blocks` and `head`) the products that the device has; the paths chosen.

    Raises as `choose_paths`. Changes no parameter and draws no random number.
    """
    chosen = choose_paths(config, device, dtype)
    for mlp in (block.mlp for block in model.blocks):
        if chosen.relu2 == "triton":
            mlp.up.product, mlp.activation = relu2_product, nn.Identity()
        for linear in (mlp.up, mlp.gate, mlp.down) if config.fp8 == "head_mlp" else ():
            if linear is not None:
                linear.product = Fp8Product(config, gradients=False)
    if config.fp8 != "none":
        model.head.product = Fp8Product(config, gradients=True)
    return chosen
