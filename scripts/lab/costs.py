"""What a run costs by its configuration: operations, bytes and messages of each stage, and the milliseconds they predict."""

import math
from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from configs.optim import Graft
from configs.schema import Run
from optim.schedule import Schedule, Values
from scripts.lab.models import meta_model

if TYPE_CHECKING:
    from optim.bank import Bank
    from optim.groups import ParamGroup


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


FLOAT, HALF = 4, 2


class BankSize(NamedTuple):
    """Of one of the optimizer's banks, by entries of the dimension that ranks divide: matrices, rows or elements."""

    entries: int
    weight_bytes: int
    """Of one entry; its gradient has as many."""
    state_bytes: float
    """Of one entry."""
    flops: float
    """Of one entry's orthogonalization; what other rules compute is not counted."""
    every: int
    """It is updated at every so-many-th step."""
    small: bool
    """Too small to be divided: every rank keeps and updates it all."""

    def owned(self, gpus: int) -> int:
        """Entries that one rank updates, padding included."""
        return self.entries if self.small else math.ceil(self.entries / gpus)

    def held(self, gpus: int) -> int:
        """Entries of weights that every rank holds, padding included."""
        return self.entries if self.small else gpus * self.owned(gpus)


class Sizes(NamedTuple):
    """Of a model and its optimizer."""

    parameters: int
    matrix_elements: int
    """Of matrices that are orthogonalised."""
    banks: tuple[BankSize, ...]

    def padding(self, gpus: int) -> float:
        """Bytes that filling the banks up to a multiple of the ranks adds, over the weights' own."""
        return sum((bank.held(gpus) - bank.entries) * bank.weight_bytes for bank in self.banks) / sum(
            bank.entries * bank.weight_bytes for bank in self.banks)

    @property
    def newton_schulz_flops(self) -> float:
        """Of one step's orthogonalizations, all ranks together."""
        return sum(bank.flops * bank.entries for bank in self.banks)


class Stage(NamedTuple):
    """Steps of one shape."""

    first: int
    steps: int
    values: Values
    flops: float
    """Of one step, forward and backward, all ranks together."""
    micro_tokens: int
    """Tokens of one forward pass, at most, but at least one sequence."""
    activation_bytes: Callable[[int], float]
    """Kept by a forward pass of so many tokens."""

    def portion(self, gpus: int) -> tuple[int, int, int]:
        """(sequences in the step, of them the busiest rank's, its sequences in one pass): ranks divide no sequence."""
        tokens = self.values.sequence_tokens
        count = self.values.batch_tokens // tokens
        mine = math.ceil(count / gpus)
        return count, mine, min(mine, max(1, self.micro_tokens // tokens))


class Prediction(NamedTuple):
    """One step on the busiest rank: milliseconds by cause, then bytes."""

    compute_ms: float
    optimizer_ms: float
    memory_ms: float
    network_ms: float
    network_bytes: float
    """Sent by the rank."""
    traffic_bytes: float
    """Read from its memory and written to it."""
    weight_bytes: float
    gradient_bytes: float
    state_bytes: float
    activation_bytes: float

    @property
    def step_ms(self) -> float:
        """Compute, then update, then what communication the update does not hide."""
        return self.compute_ms + max(self.optimizer_ms, self.network_ms) + self.memory_ms

    @property
    def rank_bytes(self) -> float:
        """Memory that the rank holds."""
        return self.weight_bytes + self.gradient_bytes + self.state_bytes + self.activation_bytes


def measure_sizes(run: Run) -> tuple[Sizes, list[Stage]]:
    """Sizes of the model and its stages. Model and banks are built on the meta device: exact, and nothing is allocated."""
    import torch

    from optim.bank import group_by_shape
    from optim.groups import build_groups

    schedule = Schedule(run)
    values = [schedule.values(step) for step in range(run.train.steps)]
    model = meta_model(run, max_tokens=max(v.sequence_tokens for v in values))
    with torch.device("meta"):
        groups = build_groups(dict(model.named_parameters()), model.roles(), run.optim, model.axes())
        banks = [empty_bank(run, group, names) for group in groups for names in group_by_shape(group)]
    elements = sum(bank.shape.numel() * len(bank.names) for bank in banks)
    matrix_elements = sum(bank.shape.numel() * len(bank.names) for bank in banks if bank_flops(bank))
    stages, first = [], 0
    for _, part in groupby(values, key=lambda v: v[3:7]):
        now, *others = part
        stages.append(Stage(first, 1 + len(others), now, now.batch_tokens * model.flops_per_token(*now[4:7]),
                            run.train.micro_tokens, model.activation_bytes))
        first += stages[-1].steps
    return Sizes(elements, matrix_elements, tuple(map(bank_size, banks))), stages


def empty_bank(run: Run, group: "ParamGroup", names: list[str]) -> "Bank":
    """The bank that an optimizer at world size 1 makes of these parameters: shapes and types, whatever the values."""
    import torch

    from optim.bank import Bank, as_matrices, shard_view
    from optim.hooks import build_hooks

    spec = group.specs[names[0]]
    weights = shard_view(torch.stack([group.params[name].detach() for name in names]), group.scope, spec.blocks)
    bank = Bank(group, names, group.params[names[0]].shape, weights, weights, slice(None), False,
                group.step_for(spec), spec, group.config.update_every, as_matrices(weights))
    bank.state = bank.step.init_state(bank.matrices)
    bank.state |= group.rule.init_state(bank.matrices.float() if group.config.state_dtype == "float32" else bank.matrices)
    for hook in build_hooks(run):
        hook.init(bank)
    return bank


def bank_size(bank: "Bank") -> BankSize:
    """Of a bank at world size 1, where nothing is padded yet."""
    from optim.bank import SMALL_BANK_ELEMENTS

    entries = bank.weights.size(0)
    return BankSize(entries, bank.weights.nbytes // entries, sum(t.nbytes for t in bank.state.values()) / entries,
                    bank_flops(bank), bank.group.config.update_every, bank.weights.numel() < SMALL_BANK_ELEMENTS)


def bank_flops(bank: "Bank") -> float:
    """Operations of orthogonalizing one of a bank's matrices; 0 where they are not."""
    config = bank.group.config
    if bank.weights.ndim != 3 or len(bank.shape) != 2:
        return 0.0
    return newton_schulz_flops(*bank.weights.shape[1:], newton_schulz_steps(config) + newton_schulz_steps(config.graft))


def newton_schulz_steps(config: Graft) -> int:
    """Iterations that a rule orthogonalises with; 0 where it does not."""
    iterates = getattr(config, "ns", "svd") != "svd" and getattr(config, "norm", "spectral") in ("spectral", "rms_operator")
    return config.ns_steps if iterates else 0


def newton_schulz_flops(m: int, n: int, steps: int) -> float:
    """Operations of the quintic iteration on an m x n matrix: A = X X^T, A^2, and the product with X; s the shorter side."""
    s, long = min(m, n), max(m, n)
    return steps * (4 * s * s * long + 2 * s**3)


def predict(stage: Stage, sizes: Sizes, machine: Machine, *, gpus: int, share: Efficiency) -> Prediction:
    """One step of a stage on so many accelerators, by the busiest of them.

    Compute: its sequences' part of the stage's operations; where there are fewer sequences than ranks, the rest wait.
    Update: Newton-Schulz on the matrices it owns; their weights read and written, gradients read, state read and written.
    Memory: float32 weights cast to bfloat16 at each forward pass; activations, written once and read once, count as traffic
    but not as time, since the share of the peak that the compute reaches has it already. Network: a ring's reduce-scatter
    of gradients and all-gather of weights, or all-reduce of small banks, is 2 (g - 1) / g of the bytes, padding included, at
    the slower link's rate; that sparse rows travel alone is not counted, so tables cost too much here.
    """
    count, mine, rows = stage.portion(gpus)
    passes = math.ceil(mine / rows)
    activations = stage.activation_bytes(rows * stage.values.sequence_tokens)
    held = owned_state = update_bytes = update_flops = sent = 0.0
    for bank in sizes.banks:
        owned, weights = bank.owned(gpus), bank.held(gpus) * bank.weight_bytes
        held += weights
        owned_state += owned * bank.state_bytes
        update_bytes += owned * (3 * bank.weight_bytes + 2 * bank.state_bytes) / bank.every
        update_flops += owned * bank.flops / bank.every
        sent += 2 * (gpus - 1) / gpus * weights / bank.every
    casts = passes * sizes.matrix_elements * (FLOAT + HALF)
    link = min(machine.node_bandwidth, machine.net_bandwidth) if gpus > machine.per_node else machine.node_bandwidth
    peak, memory = machine.flops * share.flops, machine.memory_bandwidth * share.memory
    return Prediction(
        compute_ms=1e3 * stage.flops * mine / count / peak,
        optimizer_ms=1e3 * (update_flops / peak + update_bytes / memory), memory_ms=1e3 * casts / memory,
        network_ms=1e3 * sent / (link * share.network), network_bytes=sent,
        traffic_bytes=casts + update_bytes + 2 * passes * activations,
        weight_bytes=held, gradient_bytes=held, state_bytes=owned_state, activation_bytes=activations)


def seconds_of(stages: list[Stage], sizes: Sizes, machine: Machine, *, gpus: int, share: Efficiency) -> float:
    """Predicted training seconds of the whole run."""
    return sum(s.steps * predict(s, sizes, machine, gpus=gpus, share=share).step_ms for s in stages) / 1e3
