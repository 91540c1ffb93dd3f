"""What a run costs by its configuration: operations, bytes and messages of each stage, and the milliseconds they predict."""

import math
from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

from configs.schema import Run
from optim.schedule import Schedule, Values
from scripts.lab.flops import vocabulary
from scripts.lab.machines import Efficiency, Machine

FLOAT, HALF = 4, 2


class Sizes(NamedTuple):
    """Of a model and its optimizer."""

    parameters: int
    matrix_elements: int
    """Of matrices that are orthogonalised."""
    newton_schulz_flops: float
    """Of one step for all of them."""
    state_elements: int
    sent_elements: float
    """Gradients that travel in a step, and as many weights back: of a group that updates every k-th step, one k-th."""


class Stage(NamedTuple):
    """Steps of one shape."""

    first: int
    steps: int
    values: Values
    flops: float
    """Of one step, forward and backward, all ranks together."""
    activation_bytes: float
    """Kept by one rank's largest forward pass."""
    micro_tokens: int
    """Tokens of that pass, at most."""


class Prediction(NamedTuple):
    """Milliseconds of one step on one rank, by cause, and bytes."""

    compute_ms: float
    optimizer_ms: float
    memory_ms: float
    network_ms: float
    network_bytes: float
    rank_bytes: float

    @property
    def step_ms(self) -> float:
        """Compute, then update, then what communication the update does not hide."""
        return self.compute_ms + max(self.optimizer_ms, self.network_ms) + self.memory_ms


def measure_sizes(run: Run) -> tuple[Sizes, list[Stage]]:
    """Sizes of the model and its stages, without allocating it (on the meta device)."""
    import torch

    from configs.groups import acting_fields
    from model import GPT
    from optim.groups import build_groups
    from scripts.lab.models import anywhere

    schedule = Schedule(run)
    values = [schedule.values(step) for step in range(run.train.steps)]
    with torch.device("meta"):
        model = GPT(anywhere(run.model), vocab_size=vocabulary(run.data), max_tokens=max(v.sequence_tokens for v in values),
                    document_start=0, dtype=torch.bfloat16)
    groups = build_groups(dict(model.named_parameters()), model.roles(), run.optim, model.axes())
    state = matrix = 0
    sent = ns = 0.0
    for group in groups:
        for param in group.params.values():
            sent += param.numel() / group.config.update_every
            state += param.numel() * (2 if group.config.rule == "adam" else 1)
            if "ns_steps" in acting_fields(group.config) and param.ndim == 2:
                matrix += param.numel()
                ns += newton_schulz_flops(*param.shape, group.config.ns_steps)
    sizes = Sizes(sum(p.numel() for p in model.parameters()), matrix, ns, state, sent)
    return sizes, [make_stage(model, run, first, part) for first, part in stage_parts(values)]


def newton_schulz_flops(m: int, n: int, steps: int) -> float:
    """Operations of the quintic iteration on an m x n matrix: A = X X^T, A^2, and the product with X; s the shorter side."""
    s, long = min(m, n), max(m, n)
    return steps * (4 * s * s * long + 2 * s**3)


def stage_parts(values: Iterable[Values]) -> list[tuple[int, list[Values]]]:
    """Runs of steps of one shape, with the number of their first."""
    first, found = 0, []
    for _, part in groupby(values, key=lambda v: v[3:7]):
        steps = list(part)
        found.append((first, steps))
        first += len(steps)
    return found


def make_stage(model: "object", run: Run, first: int, part: list[Values]) -> Stage:
    """Costs of one shape."""
    now = part[0]
    micro = min(run.train.micro_tokens, now.batch_tokens)
    return Stage(first, len(part), now, now.batch_tokens * model.flops_per_token(*now[4:7]),
                 model.activation_bytes(max(micro, now.sequence_tokens)), micro)


def predict(stage: Stage, sizes: Sizes, machine: Machine, *, gpus: int, share: Efficiency) -> Prediction:
    """One step of a stage on so many accelerators.

    Compute: the stage's operations over all of them. Update: Newton-Schulz, divided by matrices, plus weights, gradients
    and state of a rank's slice read and written once. Memory: float32 weights cast to bfloat16 at each forward pass.
    Network: gradients are reduce-scattered and weights gathered in float32, (g - 1) / g of the bytes each, at the slower
    link's rate; that sparse rows travel alone is not counted, so tables cost too much here.
    """
    nodes = math.ceil(gpus / machine.per_node)
    passes = math.ceil(stage.values.batch_tokens / gpus / stage.micro_tokens)
    link = (machine.node_bandwidth if nodes == 1 else min(machine.node_bandwidth, machine.net_bandwidth)) * share.network
    moved = 2 * FLOAT * (gpus - 1) / gpus * sizes.sent_elements
    update_bytes = FLOAT * (2 * sizes.parameters + 2 * sizes.state_elements) / gpus
    rank_bytes = FLOAT * (2 * sizes.parameters + sizes.state_elements / gpus) + stage.activation_bytes
    peak, memory = machine.flops * share.flops, machine.memory_bandwidth * share.memory
    return Prediction(
        compute_ms=1e3 * stage.flops / gpus / peak,
        optimizer_ms=1e3 * (sizes.newton_schulz_flops / gpus / peak + update_bytes / memory),
        memory_ms=1e3 * passes * sizes.matrix_elements * (FLOAT + HALF) / memory,
        network_ms=1e3 * moved / link if gpus > 1 else 0.0, network_bytes=moved if gpus > 1 else 0.0, rank_bytes=rank_bytes)


def seconds_of(stages: list[Stage], sizes: Sizes, machine: Machine, *, gpus: int, share: Efficiency) -> float:
    """Predicted training seconds of the whole run."""
    return sum(s.steps * predict(s, sizes, machine, gpus=gpus, share=share).step_ms for s in stages) / 1e3
