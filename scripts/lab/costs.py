"""Cost model: operations, bytes and messages of each stage of a run, from its config, and the milliseconds they predict."""

import math
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

import torch

from configs.optim import Graft
from configs.schema import Run
from optim.bank import SMALL_BANK_ELEMENTS, Bank, empty_bank, group_by_update, init_state
from optim.groups import build_groups
from optim.hooks import build_hooks
from optim.schedule import Schedule, Values
from scripts.lab.models import meta_model


class Machine(NamedTuple):
    """Peak rates of one accelerator and of its links to other accelerators."""

    name: str
    flops: float
    """Peak bfloat16 operations per second."""
    memory_bytes: float
    memory_bandwidth: float
    """Bytes per second."""
    node_bandwidth: float
    """Bytes per second, in one direction, between two accelerators of a node (the bus bandwidth of a collective)."""
    net_bandwidth: float
    """Bytes per second of the network between nodes, per accelerator."""
    per_node: int = 8
    """Accelerators in a node."""


# From NVIDIA's data sheets of H100 SXM, H200 SXM, A100 SXM 80 GB and RTX 4090 (fp32 accumulation). Links: NVLink 4 and 3 and
# PCIe 4 x16 in a node; between nodes 400 and 200 Gbit/s of InfiniBand per GPU, 25 Gbit/s of Ethernet per four 4090s.
MACHINES = {
    "h100": Machine("H100 SXM", 989e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": Machine("H200 SXM", 989e12, 141e9, 4.8e12, 450e9, 50e9),
    "a100": Machine("A100 SXM", 312e12, 80e9, 2.0e12, 300e9, 25e9),
    "4090": Machine("RTX 4090", 165e12, 24e9, 1.0e12, 16e9, 3e9 / 4, 4),
}


class Efficiency(NamedTuple):
    """Fractions of a machine's peak rates that a run reaches.

    0.40 of the peak operations is what the log of track 3 on one H200 implies (see LOGS): 0.418 PFLOP in 1070 ms. The
    fractions of memory and network bandwidth are assumptions.
    """

    flops: float = 0.40
    memory: float = 0.70
    network: float = 0.70


class LoggedStep(NamedTuple):
    """Step time that a public log reports for a stage of a preset."""

    preset: str
    first: int
    """First step of the stage."""
    machine: str
    """Key of MACHINES."""
    gpus: int
    step_ms: float


# KellerJordan/modded-nanogpt: the reference of track 3 on one H200 (log of its author, May 2026) and on 8 H100s, and the
# stages of the record nearest to `speedrun` (2026, from its log). That record has fp8 products and its own kernels.
LOGS = (
    LoggedStep("track3", 0, "h200", 1, 1070.0),
    LoggedStep("track3", 0, "h100", 8, 154.0),
    LoggedStep("speedrun", 0, "h100", 8, 32.4),
    LoggedStep("speedrun", 423, "h100", 8, 58.1),
    LoggedStep("speedrun", 847, "h100", 8, 84.0),
)


FLOAT32_BYTES, BFLOAT16_BYTES = 4, 2


class BankSize(NamedTuple):
    """Sizes of one bank of the optimizer. An entry is a matrix, a row or an element: the unit that ranks divide."""

    entries: int
    weight_bytes: int
    """Weight bytes of one entry; the gradient takes as many."""
    state_bytes: float
    """Bytes of optimizer state of one entry."""
    flops: float
    """Operations to orthogonalise one entry. The arithmetic of other update rules is not counted."""
    update_every_steps: int
    small: bool
    """True if the bank is too small to shard: every rank keeps and updates all of it."""

    def owned(self, gpus: int) -> int:
        """Return the entries that one rank updates, padding included."""
        return self.entries if self.small else math.ceil(self.entries / gpus)

    def stored(self, gpus: int) -> int:
        """Return the entries whose weights every rank stores, padding included."""
        return self.entries if self.small else gpus * self.owned(gpus)


class Sizes(NamedTuple):
    """Sizes of a model and of its optimizer."""

    parameters: int
    matrix_elements: int
    """Elements of the matrices that are orthogonalised."""
    banks: tuple[BankSize, ...]

    def padding(self, gpus: int) -> float:
        """Return padding bytes / weight bytes. A bank is padded to a multiple of the number of ranks."""
        return sum((bank.stored(gpus) - bank.entries) * bank.weight_bytes for bank in self.banks) / sum(
            bank.entries * bank.weight_bytes for bank in self.banks)

    @property
    def newton_schulz_flops(self) -> float:
        """Operations of orthogonalising every matrix once, summed over all ranks."""
        return sum(bank.flops * bank.entries for bank in self.banks)


class Stage(NamedTuple):
    """Consecutive steps with the same batch, sequence length and attention windows."""

    first: int
    """First step."""
    steps: int
    values: Values
    """Schedule values at the first step."""
    flops: float
    """Operations of one step, forward and backward, summed over all ranks."""
    micro_tokens: int
    """Most tokens of one forward pass; a pass has at least one sequence."""
    activation_bytes: Callable[[int], float]
    """Function from the tokens of a forward pass to the bytes of its stored activations."""

    def portion(self, gpus: int) -> tuple[int, int, int]:
        """Return the numbers of sequences of (the step, the busiest rank, one forward pass). No sequence is split."""
        sequence_tokens = self.values.sequence_tokens
        step_sequences = self.values.batch_tokens // sequence_tokens
        rank_sequences = math.ceil(step_sequences / gpus)
        return step_sequences, rank_sequences, min(rank_sequences, max(1, self.micro_tokens // sequence_tokens))


class Prediction(NamedTuple):
    """Predicted cost of one step on the busiest rank: milliseconds by cause, then bytes."""

    compute_ms: float
    optimizer_ms: float
    memory_ms: float
    network_ms: float
    network_bytes: float
    """Bytes that the rank sends."""
    traffic_bytes: float
    """Bytes that the rank reads from its memory and writes to it."""
    weight_bytes: float
    gradient_bytes: float
    state_bytes: float
    activation_bytes: float

    @property
    def step_ms(self) -> float:
        """Compute time + memory time + the longer of update and communication, which overlap."""
        return self.compute_ms + max(self.optimizer_ms, self.network_ms) + self.memory_ms

    @property
    def rank_bytes(self) -> float:
        """Memory that the rank needs: weights + gradients + optimizer state + activations."""
        return self.weight_bytes + self.gradient_bytes + self.state_bytes + self.activation_bytes


def measure_sizes(run: Run) -> tuple[Sizes, list[Stage]]:
    """Return the sizes of a run's model and optimizer, and its stages.

    Model and banks are built on the meta device, so the sizes are exact and no memory is allocated.
    """
    schedule = Schedule(run)
    values = [schedule.values(step) for step in range(run.train.steps)]

    # Sizes: of the banks that the optimizer makes, at world size 1.
    model = meta_model(run, max_tokens=max(v.sequence_tokens for v in values))
    with torch.device("meta"):
        groups = build_groups(dict(model.named_parameters()), model.roles(), run.optim, model.axes())
        banks = [empty_bank(group, names) for group in groups for names in group_by_update(group)]
        for bank in banks:
            init_state(bank)
            for hook in build_hooks(run):
                hook.init(bank)
    elements = sum(shape.numel() for bank in banks for shape in bank.shapes)
    matrix_elements = sum(shape.numel() for bank in banks if bank_flops(bank) for shape in bank.shapes)

    # Stages: a new one begins where the batch, the sequence length or a window changes.
    stages, first = [], 0
    for _, group in groupby(values, key=lambda v: (v.batch_tokens, v.sequence_tokens, *v.windows.values())):
        start, *others = group
        flops = start.batch_tokens * model.flops_per_token(start.sequence_tokens, **start.windows)
        stages.append(Stage(first, 1 + len(others), start, flops, run.train.micro_tokens, model.activation_bytes))
        first += stages[-1].steps
    return Sizes(elements, matrix_elements, tuple(map(bank_size, banks))), stages


def bank_size(bank: Bank) -> BankSize:
    """Return the sizes of a bank at world size 1, which has no padding for ranks."""
    entries = bank.weights.size(0)
    return BankSize(entries, bank.weights.nbytes // entries, sum(t.nbytes for t in bank.state.values()) / entries,
                    bank_flops(bank), bank.group.config.update_every, bank.weights.numel() < SMALL_BANK_ELEMENTS)


def bank_flops(bank: Bank) -> float:
    """Return the operations to orthogonalise one matrix of a bank; 0 if its rule does not orthogonalise."""
    config = bank.group.config
    if bank.weights.ndim != 3 or len(bank.shapes[0]) != 2:
        return 0.0
    return newton_schulz_flops(*bank.weights.shape[1:], newton_schulz_steps(config) + newton_schulz_steps(config.graft))


def newton_schulz_steps(config: Graft) -> int:
    """Return the number of Newton-Schulz iterations of an update rule; 0 if it does not iterate."""
    iterates = getattr(config, "ns", "svd") != "svd" and getattr(config, "norm", "spectral") in ("spectral", "rms_operator")
    return config.ns_steps if iterates else 0


def newton_schulz_flops(m: int, n: int, steps: int) -> float:
    """steps (4 s^2 l + 2 s^3), with s the shorter and l the longer side of an m x n matrix.

    One quintic iteration multiplies A = X X^T (2 s^2 l operations), A^2 (2 s^3), and (b A + c A^2) X (2 s^2 l).
    """
    short, long = min(m, n), max(m, n)
    return steps * (4 * short * short * long + 2 * short**3)


def predict(stage: Stage, sizes: Sizes, machine: Machine, *, gpus: int, share: Efficiency) -> Prediction:
    """Predict one step of a stage on `gpus` accelerators, as the busiest rank sees it; `share`: the fractions of the peaks.

    - Compute: the rank's part of the stage's operations. If there are fewer sequences than ranks, the other ranks wait.
    - Update: Newton-Schulz on the matrices that the rank owns. Weights and state are read and written, gradients read.
    - Memory: float32 weights are cast to bfloat16 in each forward pass. Activations are written once and read once; they
      count as traffic but not as time, since the fraction of peak operations already includes that time.
    - Network: a ring's reduce-scatter of the gradients and all-gather of the weights (for small banks an all-reduce) send
      2 (g - 1) / g of the bytes, padding included, at the rate of the slower link. Sparse rows are counted as dense, so
      the cost of embedding tables is too high.
    """
    # The rank's part of the batch.
    step_sequences, rank_sequences, pass_sequences = stage.portion(gpus)
    passes = math.ceil(rank_sequences / pass_sequences)
    activations = stage.activation_bytes(pass_sequences * stage.values.sequence_tokens)

    # The optimizer, bank by bank. A bank updated at every k-th step costs 1 / k of an update per step.
    weight_bytes = state_bytes = update_bytes = update_flops = sent_bytes = 0.0
    for bank in sizes.banks:
        owned, stored_bytes = bank.owned(gpus), bank.stored(gpus) * bank.weight_bytes
        weight_bytes += stored_bytes
        state_bytes += owned * bank.state_bytes
        update_bytes += owned * (3 * bank.weight_bytes + 2 * bank.state_bytes) / bank.update_every_steps
        update_flops += owned * bank.flops / bank.update_every_steps
        sent_bytes += 2 * (gpus - 1) / gpus * stored_bytes / bank.update_every_steps
    cast_bytes = passes * sizes.matrix_elements * (FLOAT32_BYTES + BFLOAT16_BYTES)

    # Time: operations and bytes over the rates that are reached.
    link = min(machine.node_bandwidth, machine.net_bandwidth) if gpus > machine.per_node else machine.node_bandwidth
    peak, memory = machine.flops * share.flops, machine.memory_bandwidth * share.memory
    return Prediction(
        compute_ms=1e3 * stage.flops * rank_sequences / step_sequences / peak,
        optimizer_ms=1e3 * (update_flops / peak + update_bytes / memory), memory_ms=1e3 * cast_bytes / memory,
        network_ms=1e3 * sent_bytes / (link * share.network), network_bytes=sent_bytes,
        traffic_bytes=cast_bytes + update_bytes + 2 * passes * activations,
        weight_bytes=weight_bytes, gradient_bytes=weight_bytes, state_bytes=state_bytes, activation_bytes=activations)


def predict_seconds(stages: list[Stage], sizes: Sizes, machine: Machine, *, gpus: int, share: Efficiency) -> float:
    """Return the predicted training seconds of the whole run."""
    return sum(s.steps * predict(s, sizes, machine, gpus=gpus, share=share).step_ms for s in stages) / 1e3
