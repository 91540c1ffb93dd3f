"""Time the parts of a training step, and compare each with the roofline of the device.

    python -m scripts.bench tiny
    python -m scripts.bench track3 --tokens 8192 --device cuda --json
    torchrun --standalone --nproc_per_node=2 -m scripts.bench tiny

On CUDA the parts are those that train: with documents, the kernels and losses of the run, compiled. On CPUs they are plain.
The roofline is measured on the device: FLOP/s by a large matrix product, bytes per second by a large copy. The shortest
possible time of a part is the longer of two: its FLOPs at that rate, and its least memory traffic at that rate. Under
torchrun all ranks measure at once; then the update includes its communication, which is also timed alone.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor

from configs.cli import parse_row
from configs.schema import Run
from data.batches import Batches
from data.orders import Position
from data.run.environment import choose_device, describe_environment
from data.sources import Source, open_source, vocabulary
from kernels.attention import document_first
from kernels.cross_entropy import AuxLossWeights
from model import GPT, LayerInputs, mean_span
from optim.comm import Comm, local_rank
from optim.groups import build_groups
from optim.schedule import Schedule, loss_weights
from optim.sharded import ShardedOptimizer
from scripts import command
from scripts.lab.models import CACHE, portable_config
from scripts.lab.workload import bank_flops

WARMUP_RUNS = 2
DOCUMENT_TOKENS = 700  # about the mean of FineWeb
BYTES_PER_TOKEN = 2 * (2 + 8)  # input and target, each read as uint16 and written as int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Run to time, and the device."""

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")] = "tiny"
    """Preset of the run."""
    tokens: int = 4096
    """Tokens of one forward and backward pass."""
    repeats: int = 10
    """Number of timed runs of each part; the median counts."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device to time."""
    json: bool = False
    """Print JSON instead of a table."""


class Part(NamedTuple):
    """One part of a training step."""

    name: str
    run: Callable[[], object]
    flops: float
    traffic: float
    """Bytes that it must at least read and write; for communication, bytes sent."""


def median_seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Return the median time of `repeats` runs, after WARMUP_RUNS that do not count."""
    def seconds() -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":  # kernels run asynchronously
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return statistics.median([seconds() for _ in range(WARMUP_RUNS + repeats)][WARMUP_RUNS:])


def measure_roofline(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return (FLOP/s, bytes per second) of a square matrix product, 2048 or on CUDA 8192 wide, and of a 256 MB copy."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    out, source = torch.empty_like(a), torch.empty(2**26, device=device)
    target = torch.empty_like(source)
    flops = 2 * size**3 / median_seconds(lambda: torch.mm(a, a, out=out), 5, device)
    return flops, 2 * source.nbytes / median_seconds(lambda: target.copy_(source), 5, device)


# ---- The parts ------------------------------------------------------------------------------------------------------


def build_model(run: Run, context: int, device: torch.device) -> GPT:
    """Return the run's model for contexts of so many tokens: on CUDA as it trains, elsewhere on portable kernels."""
    on_cuda, size = device.type == "cuda", vocabulary(run.data)
    config = run.model if on_cuda else replace(portable_config(run.model), document_mask=False)
    return GPT(config, vocab_size=size, max_tokens=context, document_start=size - 1, prefix_of=[-1] * size, on_cuda=on_cuda,
               dtype=torch.bfloat16 if on_cuda else torch.float32).to(device)


def draw_tokens(model: GPT, rows: int, context: int, device: torch.device) -> Tensor:
    """Return random tokens (rows, context); documents, if the model masks them, begin every DOCUMENT_TOKENS tokens."""
    tokens = torch.randint(model.vocab_size, (rows, context), device=device)
    if model.config.document_mask:
        tokens[:, ::DOCUMENT_TOKENS] = model.document_start
    return tokens


def model_parts(run: Run, model: GPT, tokens: Tensor) -> Iterator[Part]:
    """Yield attention, MLP, head and loss, and the whole model, each forward and backward on tokens (B, T).

    Attention and MLP are those of the first layer that has attention, with the windows of the first step.
    """
    values, config, on_cuda = Schedule(run).values(0), run.model, tokens.device.type == "cuda"
    x = torch.randn(*tokens.shape, config.dim, device=tokens.device, dtype=model.dtype, requires_grad=True)
    windows, targets = model.windows(values.window_tokens, values.long_window_tokens), tokens.roll(-1, 1)
    layer = next(i for i, block in enumerate(model.blocks) if block.attention is not None)
    attention, mlp = model.blocks[layer].attention, model.blocks[layer].mlp
    value_embed = torch.zeros_like(x) if attention.mix_value is not None else None
    starts = tokens == model.document_start if model.config.document_mask else None
    first, longest = (None, None) if starts is None else (document_first(starts), DOCUMENT_TOKENS)
    inputs = LayerInputs(mask=model.masks(tokens, first, windows, longest)[layer], yarn_window=windows[layer],
                         value_embed=value_embed, x0=x.detach(), starts=starts, first=first)
    # The losses of training; plain models have none but the cross-entropy.
    aux = AuxLossWeights.of(*loss_weights(values, config), tokens.device) if on_cuda else None

    def with_backward(function: Callable[..., Tensor], *args: object) -> Callable[[], None]:
        compiled = torch.compile(function, dynamic=False) if on_cuda else function
        return lambda: compiled(*args).sum().backward()

    def matrix_elements(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.ndim == 2)

    def part(name: str, elements: int, run: Callable[[], None], more_flops: float = 0.0) -> Part:
        # FLOPs per token and weight: 2 forward, 4 backward. Least traffic: float32 weights read in both passes and their
        # gradients written, and three tensors of the size of x.
        return Part(name, run, 6 * elements * tokens.numel() + more_flops, 12 * elements + 3 * x.nbytes)

    span = mean_span(tokens.size(1), windows[layer] or tokens.size(1))
    scores = 12 * config.dim * span * tokens.numel()  # queries times keys, weights times values: 2 products, 6 FLOPs each
    yield part("attention", matrix_elements(attention), with_backward(attention, x, inputs), scores)
    yield part("MLP", matrix_elements(mlp), with_backward(mlp, x))
    yield part("head and loss", model.head_weight.numel(), with_backward(model.loss, x, targets, aux))
    flops = model.flops_per_token(tokens.size(1), values.window_tokens, values.long_window_tokens) * tokens.numel()
    parameters = sum(p.numel() for p in model.parameters())
    whole = partial(model, aux_weights=aux, longest_document=longest, **values.windows)
    yield Part("model", with_backward(whole, tokens, targets), flops, 12 * parameters)


def optimizer_parts(run: Run, model: GPT, comm: Comm) -> Iterator[Part]:
    """Yield the update of all groups from random gradients and, on several ranks, its communication alone."""
    groups = build_groups(dict(model.named_parameters()), model.roles(), run.optim, model.axes())
    optimizer = ShardedOptimizer(groups, comm, compile_updates=comm.device.type == "cuda")
    values, ranks = Schedule(run).values(0), comm.world_size
    flops = traffic = 0.0
    for bank in optimizer.banks:
        bank.grads.normal_()
        share = 1 / ranks if bank.sharded else 1.0  # of the bank's matrices, those that this rank updates
        flops += share * bank_flops(bank) * len(bank.names) * bank.spec.blocks
        # Weights are read and written, gradients read, the state (this rank's alone) read and written.
        traffic += share * (2 * bank.weights.nbytes + bank.grads.nbytes) + 2 * sum(t.nbytes for t in bank.state.values())
    # The last step of a period updates every group, also those with update_every above 1.
    yield Part("update", lambda: optimizer.step(values, optimizer.period), flops, traffic)
    if ranks > 1:
        # A ring sends (W - 1) / W of the gradients and as much of the weights.
        sent = 2 * (ranks - 1) / ranks * sum(bank.weights.nbytes for bank in optimizer.banks)
        yield Part("communication", lambda: communicate(optimizer), 0.0, sent)


def communicate(optimizer: ShardedOptimizer) -> None:
    """Sum all gradients over the ranks and all-gather all weights, densely and without the update between."""
    comm, banks = optimizer.comm, optimizer.banks
    works = [comm.reduce_scatter(bank.grads)[1] if bank.sharded else comm.all_reduce(bank.grads) for bank in banks]
    for work in works + [comm.all_gather(bank.weights) for bank in banks if bank.sharded]:
        work.wait()


def data_parts(run: Run, source: Source | None, comm: Comm) -> Iterator[Part]:
    """Yield the making of one rank's batch, while nothing else runs; nothing without a source."""
    if source is None:
        return
    portions = Schedule(run).portions(0)
    batches = Batches(source.train, order=run.data.order, seed=run.run.seed, document_start=source.document_start,
                      rank=comm.rank, world_size=comm.world_size, plan=lambda step: portions,
                      total_steps=2**62, vocab_size=source.vocab_size)  # so many steps that timing never reaches the last
    batches.start(0, Position())
    try:
        yield Part("data", batches.next, 0.0, BYTES_PER_TOKEN * portions[0] / comm.world_size)
    finally:
        batches.close()


# ---- The measurement ------------------------------------------------------------------------------------------------


def time_part(part: Part, repeats: int, device: torch.device, roofline: tuple[float, float]) -> dict[str, object]:
    """Return a part's median time, its shortest possible time by the roofline, and the quotient, as JSON values."""
    ms = 1e3 * median_seconds(part.run, repeats, device)
    bound_ms = 1e3 * max(part.flops / roofline[0], part.traffic / roofline[1])
    return {"name": part.name, "ms": ms, "bound_ms": bound_ms, "flops": part.flops, "traffic": part.traffic,
            "reached": bound_ms / ms}


def bench(args: Arguments, flags: list[str]) -> dict[str, Any]:
    """Time every part; flags are those of the run. Raises ValueError for a device that is not there."""
    run, comm = parse_row(args.preset, flags), Comm(choose_device(args.device, local_rank()))
    device, notes = comm.device, []
    # The model, on random tokens
    context = min(run.data.sequence_tokens, args.tokens)
    model = build_model(run, context, device)
    tokens = draw_tokens(model, max(1, args.tokens // context), context, device)
    # The data; a run whose data are not on this machine is timed without them
    try:
        source = open_source(run.data, cache_dir=CACHE)
    except ValueError as error:
        source, notes = None, [f"note: data loading is not timed: {error}"]
    # The generators build a part only when the part before it is timed: batches, say, are not loaded beside the model.
    roofline = measure_roofline(device, model.dtype)
    parts = chain(model_parts(run, model, tokens), optimizer_parts(run, model, comm), data_parts(run, source, comm))
    rows = [time_part(part, args.repeats, device, roofline) for part in parts]
    comm.close()
    environment = {name: value for name, value in describe_environment().items() if name != "variables"}
    return {"preset": args.preset, "tokens": tokens.numel(), "context": context, "device": args.device,
            "ranks": comm.world_size, "rank": comm.rank, "flops_per_second": roofline[0], "bytes_per_second": roofline[1],
            "environment": environment, "notes": notes, "parts": rows}


def table_lines(result: dict[str, Any]) -> list[str]:
    """Return what was measured, and a table with one line per part."""
    lines = [f"{result['preset']} on {result['ranks']} x {result['device']}: {result['tokens']:,} tokens in sequences of "
             f"{result['context']:,}",
             f"roofline: {result['flops_per_second'] / 1e9:,.0f} GFLOP/s, {result['bytes_per_second'] / 1e9:,.1f} GB/s", "",
             f"{'part':>14} {'time (ms)':>10} {'at roofline (ms)':>17} {'of roofline':>11} {'GFLOP':>9} {'MB moved':>9}"]
    lines += [f"{part['name']:>14} {part['ms']:>10.3f} {part['bound_ms']:>17.3f} {part['reached']:>11.0%} "
              f"{part['flops'] / 1e9:>9.2f} {part['traffic'] / 1e6:>9.1f}" for part in result["parts"]]
    return [*lines, *result["notes"]]


def main(args: Arguments, flags: list[str]) -> None:
    """Time every part; rank 0 prints."""
    result = bench(args, flags)
    if result["rank"] == 0:
        print("\n".join([json.dumps(result, indent=2)] if args.json else table_lines(result)))


if __name__ == "__main__":
    command(main, Arguments, __doc__, flags=True)
