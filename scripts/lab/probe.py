"""Measure the rates that `Assumptions` assumes, on the machine at hand; later plans for the same device read them."""

import json
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from scripts.lab.costs import Assumptions, Machine

REPEATS = 10


def probe(machine: Machine, *, device: str = "cuda", size: int = 8192) -> dict[str, float]:
    """Return measured values of fields of Assumptions: rates of products, copies and attention, times of launches.

    size: rows and columns of the square product; copies move 64 size^2 bytes, attention has `size` queries.
    """
    on_cuda = device == "cuda"
    square = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    block = torch.empty(16 * size * size, device=device, dtype=torch.bfloat16)
    heads = torch.randn(1, 6, size, 128, device=device, dtype=torch.bfloat16)
    one = torch.zeros(1, device=device)

    def calls(count: int = 100) -> None:
        for _ in range(count):
            one.add_(1)

    seconds = {
        "product": timed(lambda: square @ square, on_cuda=on_cuda),
        "copy": timed(lambda: block[:block.numel() // 2].copy_(block[block.numel() // 2:]), on_cuda=on_cuda),
        "attention": timed(lambda: F.scaled_dot_product_attention(heads, heads, heads, is_causal=True), on_cuda=on_cuda),
        "calls": timed(calls, on_cuda=on_cuda) / 100}
    return {"product_frac": 2 * size**3 / seconds["product"] / machine.flops,
            "memory_frac": block.nbytes / seconds["copy"] / machine.memory_bandwidth,
            "sdpa_frac": 2 * heads.numel() * size / seconds["attention"] / machine.flops,
            "eager_us": 1e6 * seconds["calls"]}


def timed(call: Callable[[], object], *, on_cuda: bool) -> float:
    """Return the median seconds of a call, device included, after one that warms up."""
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        call()
        if on_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def write_rates(file: Path, device: str, rates: dict[str, float]) -> None:
    """Write what `read_rates` reads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"device": device, "rates": rates}, indent=2) + "\n")


def read_rates(file: Path, device: str, assume: Assumptions) -> tuple[Assumptions, list[str]]:
    """Return the assumptions with measured values, if the file holds those of this device, and the names of these fields.

    Fields that differ from their default are the user's, and stay.
    """
    stored = json.loads(file.read_text()) if file.exists() else {"device": None}
    if stored["device"] != device:
        return assume, []
    free = {f.name for f in fields(Assumptions) if getattr(assume, f.name) == f.default}
    rates = {name: value for name, value in stored["rates"].items() if name in free}
    return replace(assume, **rates), sorted(rates)
