"""Kernels compiled for GPUs on a machine without one: what the machine code needs of the GPU."""

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

SHARED_BYTES = {80: 166_912, 89: 101_376, 90: 232_448}  # of one block, by compute capability: A100, RTX 40, H100
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


class MachineCode(NamedTuple):
    """A kernel compiled for one compute capability."""

    ptx: str
    """Assembly, with the names of the instructions."""
    spilled_bytes: int
    """Registers that did not fit and went to memory, by thread."""
    shared_bytes: int
    """Shared memory of a program."""


def compile_kernel(kernel, capability: int, types: dict[str, str], constants: dict, **options: int) -> MachineCode:
    """Compile a Triton kernel; `types` of its arguments as Triton writes them, pointers and integers divisible by 16."""
    import triton
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] in "*i"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=aligned)
    binary = compiled(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    file = Path(triton.knobs.cache.dir) / "kernel.cubin"
    file.write_bytes(binary.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    spilled = sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    assert "REG:" in usage
    return MachineCode(binary.asm["ptx"], spilled, binary.metadata.shared)
