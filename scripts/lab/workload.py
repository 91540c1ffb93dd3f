"""What one step of a run does: sizes, stages, and work by kernel class.

Work is read from benchmarks/compiled_step.json, which holds the counts of each preset's compiled graphs; without them it is
estimated. benchmarks/record_step.json describes the steps of public scripts in the same form.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from configs.optim import Graft
from configs.presets import PRESETS
from configs.schema import Run
from model import GPT
from optim.bank import SMALL_BANK_ELEMENTS, Bank, empty_bank, group_by_update, init_state
from optim.groups import build_groups
from optim.hooks import build_hooks
from optim.schedule import Schedule, Values
from scripts.lab.costs import Assumptions, Attention, Product, Update, Work, visible_tokens
from scripts.lab.models import meta_model

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"
BFLOAT16_BYTES, FLOAT32_BYTES = 2, 4
BACKWARD_OF_ATTENTION = 2.5  # its operations / those of the forward: five products of the same size instead of two
# Estimates where no graph is recorded.
MOVED_PER_STORED = 3.5  # bytes moved / bytes of stored activations: 3.4 to 3.9 in the graphs of record_step.json
LAUNCHES_PER_LAYER, CALLS_PER_BANK = 40, 15
MICRO_TOKENS = 49_152  # three sequences of the speedrun


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
    banks: tuple[BankSize, ...]

    def padding(self, gpus: int) -> float:
        """Return padding bytes / weight bytes. A bank is padded to a multiple of the number of ranks."""
        return sum((bank.stored(gpus) - bank.entries) * bank.weight_bytes for bank in self.banks) / sum(
            bank.entries * bank.weight_bytes for bank in self.banks)

    def newton_schulz_flops(self, gpus: int = 1) -> float:
        """Return the operations of orthogonalising once every matrix that a rank owns."""
        return sum(bank.flops * bank.owned(gpus) for bank in self.banks)

    def rank_bytes(self, gpus: int) -> tuple[float, float]:
        """Return the bytes of a rank's weights, which its gradients take again, and of its optimizer state."""
        return (sum(bank.stored(gpus) * bank.weight_bytes for bank in self.banks),
                sum(bank.owned(gpus) * bank.state_bytes for bank in self.banks))


class Stage(NamedTuple):
    """Consecutive steps with the same batch, sequence length and attention windows."""

    first: int
    """First step."""
    steps: int
    values: Values
    """Schedule values at the first step."""
    micro_tokens: int
    """Most tokens of one forward pass; a pass has at least one sequence."""
    pass_tokens: int
    """Tokens of the pass that `work` describes."""
    work: Work
    """Of one pass: forward, backward and adding gradients."""

    def portion(self, gpus: int) -> tuple[int, int, int]:
        """Return the numbers of sequences of (the step, the busiest rank, one forward pass). No sequence is split."""
        sequence_tokens = self.values.sequence_tokens
        step_sequences = self.values.batch_tokens // sequence_tokens
        rank_sequences = math.ceil(step_sequences / gpus)
        return step_sequences, rank_sequences, min(rank_sequences, max(1, self.micro_tokens // sequence_tokens))

    def passes(self, gpus: int) -> tuple[int, Work]:
        """Return the number of passes of the busiest rank, and the work of one of mean size."""
        _, rank_sequences, pass_sequences = self.portion(gpus)
        passes = math.ceil(rank_sequences / pass_sequences)
        tokens = rank_sequences * self.values.sequence_tokens / passes
        return passes, self.work.scaled(tokens / self.pass_tokens)


class Workload(NamedTuple):
    """A run, as the cost model needs it."""

    parameters: int
    stages: list[Stage]
    updates: Callable[[int], list[Update]]
    """Function from the number of ranks to the updates of one period of steps."""
    source: str
    """Where the counts come from, one line."""
    sizes: Sizes | None = None
    """None for a public script, whose memory is not planned."""
    activation_bytes: Callable[[int], float] = lambda tokens: 0.0
    """Function from the tokens of a forward pass to the bytes of its stored activations."""
    logs: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    """Public logs of a public script by number of GPUs."""


# ---- From recorded counts -------------------------------------------------------------------------------------------


@cache
def recorded(file: str) -> dict[str, Any]:
    """Return the presets of a file of counts in benchmarks/, {} if there is no such file."""
    path = BENCHMARKS / file
    return json.loads(path.read_text())["presets"] if path.exists() else {}


def public_workload(name: str, assume: Assumptions) -> Workload:
    """Return the workload of a public script, described in record_step.json."""
    entry, stages = recorded("record_step.json")[name], []
    for stage in entry["stages"]:
        windows, cap = stage["windows"], stage["max_document_tokens"]
        values = Values(1, 1, None, stage["batch_tokens"], stage["sequence_tokens"], min(windows), max(windows),
                        max_document_tokens=cap)
        work = recorded_pass(stage, windows, cap, assume)
        stages.append(Stage(stage["first_step"], stage["steps"], values, stage["pass_tokens"], stage["pass_tokens"], work))
    return Workload(entry["parameters"], stages, lambda gpus: recorded_updates(entry, gpus),
                    f"counted by hand and by Inductor, see record_step.json ({entry['source']})", logs=entry["logs"])


def recorded_pass(stage: dict[str, Any], windows: Sequence[int | None], document_cap: int | None, assume: Assumptions, *,
                  mlp: tuple[int, int] | None = None) -> Work:
    """Return the work of one recorded pass. `windows`: of the layers that attend; `mlp`: its input and hidden dimensions."""
    seen = [visible_tokens(window, stage["sequence_tokens"], document_cap, assume) for window in windows]
    tallies = {name: tally for name, tally in stage["training"].items() if isinstance(tally, dict)}
    eager = tallies.pop("eager", None)
    shape = (stage["pass_tokens"], *mlp) if mlp else None
    return join_tallies(tallies.values(), eager, keys=sum(seen) / len(seen) + assume.block_tokens, mlp=shape)


def join_tallies(compiled: Iterable[dict[str, Any]], eager: dict[str, Any] | None, *, keys: float = 0.0,
                 mlp: tuple[int, int, int] | None = None) -> Work:
    """Return the work of the tallies of graphs and of eager code (benchmarks/compiled_step.py has their schema).

    keys: that a query attends to, on average; mlp: tokens, input and hidden dimension. Attention and the MLP's products
    within our own kernels are taken out of the bytes, because their operations may take longer than their bytes.
    """
    compiled, products, attention = list(compiled), [], []
    tallies = [*compiled, eager] if eager else compiled
    moved = sum(tally["bytes"] + tally["other_bytes"] for tally in tallies)
    for tally in tallies:
        products += [Product(p["flops"], p["bytes"], p["dtype"], p["count"]) for p in tally["products"]]
        for own in (own for own in tally["own"] if mlp and "relu2" in own["name"]):
            # Their dtype is that of the other products of the MLP in the same direction.
            dtypes = [p["dtype"] for p in tally["products"] if mlp[2] in (p["m"], p["n"], p["k"])]
            flops = own["count"] * 2 * math.prod(mlp)
            products.append(Product(flops, own["bytes"], dtypes[0] if dtypes else "bfloat16", own["count"]))
            moved -= own["bytes"]
        for call in tally["attention"]:
            queries = call["count"] * call["batch"] * call["heads"] * call["tokens"] * call["head_dim"]
            flops = 4 * queries * keys * (BACKWARD_OF_ATTENTION if call["backward"] else 1)
            attention.append(Attention({"varlen": "fa3"}.get(call["kernel"], call["kernel"]), flops, call["bytes"]))
            moved -= call["bytes"]
    waits = bool(eager) and any(other["name"] in ("nonzero", "_local_scalar_dense") for other in eager["other"])
    return Work(moved, sum(tally["launches"] for tally in compiled), eager["launches"] if eager else 0, tuple(products),
                tuple(attention), waits)


def recorded_updates(entry: dict[str, Any], gpus: int, newton_schulz_flops: float = 0.0) -> list[Update]:
    """Return the updates of a period. A world size that is not recorded shares out the work of the largest recorded one.

    newton_schulz_flops: of a rank's matrices. What the recorded products lack of them is in our kernels for symmetric
    products, which compute half of it.
    """
    world = str(gpus) if str(gpus) in entry["update"] else max(entry["update"], key=int)
    updates = []
    for step in entry["update"][world]:
        work = join_tallies([step["inference"]], step["eager"]).scaled(int(world) / gpus)
        symmetric = [own for own in step["inference"]["own"] if "symmetric" in own["name"] or "tile" in own["name"]]
        if symmetric and newton_schulz_flops > work.flops:
            count = sum(own["count"] for own in symmetric)
            half = Product((newton_schulz_flops - work.flops) / 2, 0.0, "bfloat16", count)
            work = work._replace(products=(*work.products, half))
        updates.append(Update(work, tuple((name, size) for name, size in step["collectives"])))
    return updates


# ---- Of a run -------------------------------------------------------------------------------------------------------


def workload(run: Run, assume: Assumptions) -> Workload:
    """Return the workload of a run: from recorded counts if its preset has them and no flag changes model or optimizer."""
    sizes, model, spans = measure_sizes(run)
    preset, entry = PRESETS[run.preset](), recorded("compiled_step.json").get(run.preset)
    # A table of fewer layers, or without updates, is of a quick look.
    usable = entry and entry["layers"] == run.model.layers and entry["update"]
    same = usable and (run.model, run.optim) == (preset.model, preset.optim)
    counts = [find_stage(entry, values) if same else None for _, _, values in spans]
    counted, stages = all(counts), []
    for (first, steps, values), count in zip(spans, counts, strict=True):
        tokens = count["pass_tokens"] if counted else micro_batch(run, values)
        work = recorded_stage(count, run, model, values, assume) if counted else estimate_pass(run, model, values, assume)
        stages.append(Stage(first, steps, values, micro_tokens(run), tokens, work))
    source = ("bytes, launches and products are those of the graphs compiled for capability "
              f"{entry['capability']} (benchmarks/compiled_step.json)" if counted else
              f"no compiled graph is recorded for this run: bytes are estimated as {MOVED_PER_STORED:g} times the stored "
              f"activations; python -m benchmarks.compiled_step {run.preset} --save records those of a preset")

    def updates(gpus: int) -> list[Update]:
        return recorded_updates(entry, gpus, sizes.newton_schulz_flops(gpus)) if counted else estimate_updates(sizes, gpus)

    def activation_bytes(tokens: int) -> float:
        peaks = [count["training"]["peak_bytes"] / count["pass_tokens"] for count in counts if counted]
        return tokens * max(peaks) if peaks else model.activation_bytes(tokens)

    return Workload(sizes.parameters, stages, updates, source, sizes, activation_bytes)


def micro_tokens(run: Run) -> int:
    """Return the most tokens of a forward pass; where a run leaves them to the memory that is free, a default."""
    return run.train.micro_tokens or MICRO_TOKENS


def micro_batch(run: Run, values: Values) -> int:
    """Return the tokens of a full forward pass."""
    return max(1, micro_tokens(run) // values.sequence_tokens) * values.sequence_tokens


def find_stage(entry: dict[str, Any], values: Values) -> dict[str, Any] | None:
    """Return the recorded stage with the same sequence length and shortest window, None if there is none."""
    for stage in entry["stages"]:
        windows = [window for window in stage["windows"] if window]
        shortest = min(windows) if windows else None
        if "training" in stage and (stage["sequence_tokens"], shortest) == (values.sequence_tokens, values.window_tokens):
            return stage
    return None


def attending_windows(run: Run, model: GPT, values: Values) -> list[int | None]:
    """Return the windows of the layers that attend."""
    windows = model.windows(**values.windows)
    return [windows[layer] for layer in range(run.model.layers) if layer not in run.model.attention_free]


def document_cap(run: Run, values: Values) -> int | None:
    """Return the length to which documents are clipped; None if attention does not end at documents."""
    return values.max_document_tokens if run.model.document_mask else None


def recorded_stage(stage: dict[str, Any], run: Run, model: GPT, values: Values, assume: Assumptions) -> Work:
    """Return the work of a recorded pass of a run."""
    windows, cap = attending_windows(run, model, values), document_cap(run, values)
    mlp = (run.model.dim, run.model.mlp_dim or 4 * run.model.dim)
    return recorded_pass(stage, windows, cap, assume, mlp=mlp)


def estimate_pass(run: Run, model: GPT, values: Values, assume: Assumptions) -> Work:
    """Estimate the work of a full pass: activations by MOVED_PER_STORED, float32 matrices cast, gradients added, all
    matrices multiplied thrice in bfloat16."""
    tokens, config = micro_batch(run, values), run.model
    windows, cap = attending_windows(run, model, values), document_cap(run, values)
    keys = sum(visible_tokens(window, values.sequence_tokens, cap, assume) + assume.block_tokens for window in windows)
    kernel = "flex" if cap or any(windows) else "sdpa"
    attention = Attention(kernel, 4 * (1 + BACKWARD_OF_ATTENTION) * tokens * config.dim * keys, 0.0)
    products = Product(tokens * model.flops_per_token(1), 0.0, "bfloat16", 18 * config.layers + 3)
    casts = sum(weight.numel() for weight in model.parameters() if weight.ndim == 2 and weight.dtype == torch.float32)
    added = 3 * sum(weight.nbytes for weight in model.parameters())
    moved = MOVED_PER_STORED * model.activation_bytes(tokens) + casts * (FLOAT32_BYTES + BFLOAT16_BYTES) + added
    return Work(moved, LAUNCHES_PER_LAYER * config.layers, 0, (products,), (attention,))


def estimate_updates(sizes: Sizes, gpus: int) -> list[Update]:
    """Estimate the updates of a period: weights and state read and written, gradients read; Newton-Schulz on owned matrices.

    Sparse rows are counted as dense, so the communication of embedding tables is too high.
    """
    updates = []
    for step in range(1, 1 + math.lcm(*(bank.update_every_steps for bank in sizes.banks))):
        due = [bank for bank in sizes.banks if step % bank.update_every_steps == 0]
        moved = sum(bank.owned(gpus) * (3 * bank.weight_bytes + 2 * bank.state_bytes) for bank in due)
        products = tuple(Product(bank.owned(gpus) * bank.flops, 0.0, "bfloat16", 15) for bank in due if bank.flops)
        buffers = [(bank.small, bank.stored(gpus) * bank.weight_bytes) for bank in due]
        collectives = [("all_reduce" if small else "reduce_scatter", size) for small, size in buffers]
        collectives += [("all_gather", size) for small, size in buffers if not small]
        updates.append(Update(Work(moved, 0, CALLS_PER_BANK * len(due), products), tuple(collectives)))
    return updates


def measure_sizes(run: Run) -> tuple[Sizes, GPT, list[tuple[int, int, Values]]]:
    """Return the sizes of a run's model and optimizer, the model, and its stages: (first step, steps, values).

    Model and banks are built on the meta device, so the sizes are exact and no memory is allocated.
    """
    schedule = Schedule(run)
    values = [schedule.values(step) for step in range(run.train.steps)]
    model = meta_model(run, max_tokens=max(v.sequence_tokens for v in values))
    with torch.device("meta"):
        groups = build_groups(dict(model.named_parameters()), model.roles(), run.optim, model.axes())
        banks = [empty_bank(group, names) for group in groups for names in group_by_update(group)]
        for bank in banks:
            init_state(bank)
            for hook in build_hooks(run):
                hook.init(bank)
    # A new stage begins where the batch, the sequence length or a window changes.
    stages, first = [], 0
    for _, group in groupby(values, key=lambda v: (v.batch_tokens, v.sequence_tokens, *v.windows.values())):
        start, *others = group
        stages.append((first, 1 + len(others), start))
        first += 1 + len(others)
    parameters = sum(weight.numel() for weight in model.parameters())
    return Sizes(parameters, tuple(map(bank_size, banks))), model, stages


def bank_size(bank: Bank) -> BankSize:
    """Return the sizes of a bank at world size 1, which has no padding."""
    entries = bank.weights.size(0)
    return BankSize(entries, bank.weights.nbytes // entries, sum(t.nbytes for t in bank.state.values()) / entries,
                    bank_flops(bank), bank.group.config.update_every, bank.weights.numel() < SMALL_BANK_ELEMENTS)


def bank_flops(bank: Bank) -> float:
    """Return the operations to orthogonalise one matrix of a bank; 0 if its rule does not orthogonalise."""
    config = bank.group.config
    if bank.weights.ndim != 3 or bank.group.params[bank.names[0]].ndim != 2:
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
