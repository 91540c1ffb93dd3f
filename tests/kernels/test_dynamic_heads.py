"""Dynamic head composition: the kernels equal their plain twin, compile for GPUs, and are used where they fit."""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kernels
from configs.model import Model
from kernels import choose_paths, dynamic_heads
from kernels.dynamic_heads import fused_dynamic_heads
from model import GPT

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Model(layers=2, dim=64, head_dim=16, document_mask=True, dynamic_heads=(1,), dynamic_window=20)
SHARED = {80: 166_912, 89: 101_376, 90: 232_448}  # bytes of shared memory that one program may use, by capability
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_the_kernels_in_tritons_interpreter():
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreted_dynamic_heads.py"]
    process = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
    assert "skipped" not in process.stdout


@needs_triton
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("number", range(3), ids=["forward", "by_queries", "by_keys"])
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_kernels_compile_for_gpus(number, capability, tmp_path, monkeypatch):
    """At the record's sizes, without a GPU: tensor cores, no spilled registers, and shared memory that exists."""
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = dynamic_heads.triton_kernels()[number]
    _, sizes = dynamic_heads.launch_sizes(torch.empty(1, 16_384, 6, 128, device="meta"), 112)
    options = {"num_warps": sizes.pop("num_warps")}
    types = {"first_ptr": "*i32", "T": "i32", "window": "i32", "scale": "fp32"}
    types |= dict.fromkeys(("a_ptr", "logsum_ptr", "da_ptr"), "*fp32")
    signature = {name: "constexpr" if name in sizes else types.get(name, "*bf16") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] in "*i"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=sizes, attrs=aligned)
    binary = compiled(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert "mma" in binary.asm["ptx"] and binary.metadata.shared <= SHARED[capability]
    assert not spilled_bytes(binary.asm["cubin"], tmp_path)
