"""Operators of PyTorch that launch Triton kernels.

torch.compile takes such an operator as one node of its graph and, except in Triton's interpreter, looks inside: Inductor
then launches the kernel itself and plans the memory of its outputs. Define an operator before the first compile, not within.
"""

import os
from collections.abc import Callable

import torch

DEFINED: set[str] = set()


def interpreted() -> bool:
    """True if kernels run in Triton's interpreter, on the CPU; chosen before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def wrap_triton(kernel: Callable) -> Callable:
    """Return the kernel in the form that a compiler can see, for the call kernel[grid](...). torch.library finds the kernels
    of an operator, whose source must be a part of the keys of compiled graphs, by this name and that of its argument."""
    return kernel if interpreted() else torch.library.wrap_triton(kernel)


def triton_operator(name: str, launch: Callable, *, shapes: Callable, mutates: tuple[str, ...] = ()) -> None:
    """Define torch.ops.<name>, unless it is defined. `launch` allocates the outputs, launches kernels by `wrap_triton` and
    changes only the arguments named in `mutates`; `shapes`, of the same signature, only allocates: all that a compiler can
    run of an interpreted kernel."""
    if name in DEFINED:
        return
    DEFINED.add(name)
    if interpreted():
        torch.library.custom_op(name, launch, mutates_args=mutates).register_fake(shapes)
    else:
        torch.library.triton_op(name, launch, mutates_args=mutates)


def compile_options(joined: bool) -> dict[str, object]:
    """Return options of torch.compile; if `joined`, kernels that do not depend on each other share launches, as many as this
    PyTorch allows to choose."""
    from torch._inductor import config  # slow, and only compiled runs need it

    options = {"combo_kernels": True, "combo_kernel_max_num_nodes": 64} if joined else {}
    return {name: value for name, value in options.items() if hasattr(config, name)}
