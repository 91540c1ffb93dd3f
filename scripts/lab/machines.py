"""What machines promise: peaks of the vendors' data sheets, dense (without sparsity), and links between them."""

from typing import NamedTuple


class Machine(NamedTuple):
    """One accelerator and how it talks to others."""

    name: str
    flops: float
    """bfloat16 operations a second."""
    memory_bytes: float
    memory_bandwidth: float
    """Bytes a second."""
    node_bandwidth: float
    """Bytes a second in one direction between two in a node, of the collectives' bus."""
    net_bandwidth: float
    """Bytes a second of each one's share of the network between nodes."""
    per_node: int = 8


# NVIDIA's data sheets of H100 SXM, H200 SXM, A100 SXM 80 GB and RTX 4090 (fp32 accumulation); NVLink 4 and 3, PCIe 4 x16;
# 400 and 200 Gbit/s InfiniBand a GPU, 25 Gbit/s Ethernet a machine of 4090s.
MACHINES = {
    "h100": Machine("H100 SXM", 989e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": Machine("H200 SXM", 989e12, 141e9, 4.8e12, 450e9, 50e9),
    "a100": Machine("A100 SXM", 312e12, 80e9, 2.0e12, 300e9, 25e9),
    "4090": Machine("RTX 4090", 165e12, 24e9, 1.0e12, 16e9, 3e9 / 4, 4),
}


class Efficiency(NamedTuple):
    """Shares of the peaks that are reached. That of operations is what LOGS imply for one accelerator of track 3."""

    flops: float = 0.40
    memory: float = 0.70
    network: float = 0.70


class Log(NamedTuple):
    """Milliseconds of a step that a public log says."""

    preset: str
    first: int
    """Where the stage begins, in steps."""
    machine: str
    gpus: int
    step_ms: float


# KellerJordan/modded-nanogpt: track 3's reference on one H200 (its author's log of May 2026) and on 8 H100s; the stages of
# the record nearest to `speedrun`, computed from its log (2026; products in 8 bits, kernels of its own).
LOGS = (
    Log("track3", 0, "h200", 1, 1070.0),
    Log("track3", 0, "h100", 8, 154.0),
    Log("speedrun", 0, "h100", 8, 32.4),
    Log("speedrun", 423, "h100", 8, 58.1),
    Log("speedrun", 847, "h100", 8, 84.0),
)
