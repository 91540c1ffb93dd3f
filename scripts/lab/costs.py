"""Cost model: the milliseconds of a training step on its busiest rank, from the kernels that it launches.

A step is some equal passes (forward, backward, adding gradients) and one update of the weights. Kernels fall into classes:
matrix products, attention, and all others, which only move bytes. Each class reaches a rate that `Assumptions` names, with
its source. Gradients are reduced after the last pass; the update overlaps all collectives but the first and the last.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, NamedTuple


class Machine(NamedTuple):
    """Peak rates of one accelerator and of its links to other accelerators."""

    name: str
    flops: float
    """Peak bfloat16 operations per second, without sparsity."""
    fp8_flops: float
    """Peak 8-bit operations per second; the bfloat16 rate where there is no such unit."""
    memory_bytes: float
    memory_bandwidth: float
    """Bytes per second."""
    node_bandwidth: float
    """Bytes per second, in one direction, between two accelerators of a node (the bus bandwidth of a collective)."""
    net_bandwidth: float
    """Bytes per second of the network between nodes, per accelerator."""
    per_node: int = 8
    """Accelerators in a node."""


# From NVIDIA's data sheets of H100 SXM, H200 SXM, B200 SXM, A100 SXM 80 GB and RTX 4090 (fp32 accumulation). Links in a
# node: NVLink 4, 4, 5, 3 and PCIe 4 x16; between nodes InfiniBand of 400 Gbit/s (A100: 200) per GPU, Ethernet of 25
# per four 4090s.
MACHINES = {
    "h100": Machine("H100 SXM", 989e12, 1979e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": Machine("H200 SXM", 989e12, 1979e12, 141e9, 4.8e12, 450e9, 50e9),
    "b200": Machine("B200 SXM", 2250e12, 4500e12, 180e9, 8.0e12, 900e9, 50e9),
    "a100": Machine("A100 SXM", 312e12, 312e12, 80e9, 2.0e12, 300e9, 25e9),
    "4090": Machine("RTX 4090", 165e12, 330e12, 24e9, 1.0e12, 16e9, 3e9 / 4, 4),
}


def assumed(value: float, unit: str, source: str) -> Any:
    """Return a dataclass field with a default, its unit and where the number is from."""
    return field(default=value, metadata={"unit": unit, "source": source})


GENERAL = "general experience, not fitted"


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What the plan assumes; `assumption_lines` prints each with unit and source. None was fitted to a public log."""

    product_frac: float = assumed(0.65, "of peak bfloat16 FLOP/s", "cuBLAS on H100 at 700 W: 600 to 680 TFLOP/s when large")
    fp8_frac: float = assumed(0.55, "of peak 8-bit FLOP/s", "cuBLAS on H100, inner sizes of 768 to 3072: 1.0 to 1.2 PFLOP/s")
    product_ramp_us: float = assumed(10.0, "us a product", "450 TFLOP/s at 16,384 x 768 x 768, fill and last wave of tiles")
    memory_frac: float = assumed(0.78, "of peak bandwidth", "2.6 of 3.35 TB/s: copies on H100")
    fa3_frac: float = assumed(0.40, "of peak bfloat16 FLOP/s", "Shah et al. 2024, arXiv 2407.08608, short sequences")
    flex_frac: float = assumed(0.25, "of peak bfloat16 FLOP/s", "FlexAttention's authors: 85 to 90 % of FlashAttention 2")
    sdpa_frac: float = assumed(0.30, "of peak bfloat16 FLOP/s", "FlashAttention 2 on H100, as Shah et al. measure it")
    block_tokens: float = assumed(128, "keys a query", "blocks of 128 at the edges of a mask are computed whole")
    document_tokens: float = assumed(690, "tokens, mean", "1.45 M documents of FineWeb, GPT-2 tokens")
    median_document_tokens: float = assumed(403, "tokens", "the same; a log-normal law is assumed between")
    gap_us: float = assumed(1.5, "us a kernel", "end of one kernel to the start of the next: " + GENERAL)
    launch_us: float = assumed(4.0, "us a launch", "host time of a compiled graph's launch: " + GENERAL)
    eager_us: float = assumed(10.0, "us a call", "host time of an operator outside graphs: " + GENERAL)
    network_frac: float = assumed(0.80, "of peak link bandwidth", "nccl-tests on 8 H100s: 360 of 450 GB/s from 100 MB on")
    collective_us: float = assumed(25.0, "us a collective", "nccl-tests on 8 H100s, small messages")
    stall_ms: float = assumed(0.0, "ms a step", "the next batch is copied while a step runs")


class Product(NamedTuple):
    """Matrix products of one shape."""

    flops: float
    """Operations of all of them."""
    moved_bytes: float
    """Operands read once and results written once."""
    dtype: str
    count: int = 1


class Attention(NamedTuple):
    """Attention calls of one kernel and direction."""

    kernel: str
    """fa3 (also varlen), flex or sdpa."""
    flops: float
    moved_bytes: float


class Work(NamedTuple):
    """What a pass or an update launches on one rank."""

    memory_bytes: float
    """Bytes of kernels other than products and attention."""
    launches: float
    """Kernels launched by compiled graphs."""
    eager: float
    """Operators called outside of graphs."""
    products: tuple[Product, ...] = ()
    attention: tuple[Attention, ...] = ()
    waits: bool = False
    """True if the host waits for the device in between, so that later launches hide behind nothing."""

    def scaled(self, factor: float) -> "Work":
        """Return the work with bytes and operations times `factor` and as many launches."""
        return self._replace(
            memory_bytes=factor * self.memory_bytes,
            products=tuple(p._replace(flops=factor * p.flops, moved_bytes=factor * p.moved_bytes) for p in self.products),
            attention=tuple(a._replace(flops=factor * a.flops, moved_bytes=factor * a.moved_bytes) for a in self.attention))

    @property
    def flops(self) -> float:
        """Operations of products and attention."""
        return sum(part.flops for part in (*self.products, *self.attention))


class Update(NamedTuple):
    """Update of the weights after one step: work of a rank, and collectives (name, bytes of the whole buffer) in order."""

    work: Work
    collectives: tuple[tuple[str, float], ...] = ()


class Prediction(NamedTuple):
    """Milliseconds of one step on the busiest rank; they add up."""

    products_ms: float
    attention_ms: float
    memory_ms: float
    """Kernels of the passes that only move bytes."""
    gaps_ms: float
    """Between kernels of the passes."""
    update_ms: float
    network_ms: float
    """Communication that the update does not hide."""
    host_ms: float
    """Idle device: launches that come too late, and stalls of the data."""

    @property
    def step_ms(self) -> float:
        """Sum of all parts."""
        return sum(self)


def predict(work: Work, updates: Iterable[Update], machine: Machine, *, passes: float, gpus: int,
            assume: Assumptions) -> Prediction:
    """Predict one step of `passes` passes and an update, the mean over `updates`: one for each step of a period."""
    parts = [passes * part for part in device_ms(work, machine, assume)]
    means = [0.0, 0.0, 0.0]
    updates = list(updates)
    for update in updates:
        compute = sum(device_ms(update.work, machine, assume))
        network = exposed_ms(update.collectives, compute, machine, gpus, assume)
        # The host runs ahead of the device, unless it has to wait for it before the update.
        late = passes * host_ms(work, assume) - sum(parts)
        late = host_ms(update.work, assume) - compute - network + (0.0 if update.work.waits else late)
        for index, value in enumerate((compute, network, max(0.0, late) + assume.stall_ms)):
            means[index] += value / len(updates)
    return Prediction(*parts, *means)


def device_ms(work: Work, machine: Machine, assume: Assumptions) -> tuple[float, float, float, float]:
    """Return the milliseconds of products, attention, other kernels and gaps; each kernel at the slower of its two rates."""
    bandwidth = machine.memory_bandwidth * assume.memory_frac
    products = sum(max(p.flops / product_rate(p.dtype, machine, assume), p.moved_bytes / bandwidth)
                   + p.count * assume.product_ramp_us * 1e-6 for p in work.products)
    attention = sum(max(a.flops / (machine.flops * getattr(assume, f"{a.kernel}_frac")), a.moved_bytes / bandwidth)
                    for a in work.attention)
    return (1e3 * products, 1e3 * attention, 1e3 * work.memory_bytes / bandwidth,
            1e-3 * assume.gap_us * (work.launches + work.eager))


def product_rate(dtype: str, machine: Machine, assume: Assumptions) -> float:
    """Return the FLOP/s that large products of a dtype reach; float32 runs at half the bfloat16 rate, as TF32."""
    if "float8" in dtype:
        return max(machine.fp8_flops * assume.fp8_frac, machine.flops * assume.product_frac)
    return machine.flops * assume.product_frac / (2 if dtype == "float32" else 1)


def host_ms(work: Work, assume: Assumptions) -> float:
    """Return the milliseconds that the host needs to launch everything."""
    return 1e-3 * (work.launches * assume.launch_us + work.eager * assume.eager_us)


def exposed_ms(collectives: Iterable[tuple[str, float]], compute_ms: float, machine: Machine, gpus: int,
               assume: Assumptions) -> float:
    """Return the communication that `compute_ms` of update does not hide.

    A ring sends (g - 1) / g of a buffer, an all-reduce twice that, at the rate of the slower link. Nothing hides the first
    reduction, which the update waits for, and the last gather, which the next pass waits for.
    """
    if gpus == 1 or not (collectives := list(collectives)):
        return 0.0
    link = min(machine.node_bandwidth, machine.net_bandwidth) if gpus > machine.per_node else machine.node_bandwidth
    rate = link * assume.network_frac * gpus / (gpus - 1)
    times = [1e3 * size * (2 if name == "all_reduce" else 1) / rate + 1e-3 * assume.collective_us
             for name, size in collectives]
    return times[0] + times[-1] + max(0.0, sum(times[1:-1]) - compute_ms)


def visible_tokens(window: int | None, sequence: int, document_cap: int | None, assume: Assumptions) -> float:
    """Return the mean number of positions that a token attends to within a causal window and its document.

    Documents have log-normal lengths, clipped at `document_cap`; without documents (None) the whole sequence is one.
    """
    window = min(window or sequence, sequence)
    if document_cap is None:
        lengths = [float(sequence)]
    else:  # 99 equally likely lengths
        spread = math.sqrt(2 * math.log(assume.document_tokens / assume.median_document_tokens))
        quantiles = (NormalDist().inv_cdf((i + 0.5) / 99) for i in range(99))
        lengths = [min(assume.median_document_tokens * math.exp(spread * q), document_cap, sequence) for q in quantiles]
    inside = [min(window, length) for length in lengths]
    pairs = sum(w * w / 2 + (length - w) * w for w, length in zip(inside, lengths, strict=True))
    return pairs / sum(lengths)
