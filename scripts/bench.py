"""How fast the parts of a step are, each beside the roofline of the device at hand.

    python -m scripts.bench tiny
    python -m scripts.bench track3 --tokens 8192 --device cuda --json
    torchrun --standalone --nproc_per_node=2 -m scripts.bench tiny

The roofline is measured, not looked up: operations a second by one large product of matrices, bytes a second by one large
copy. A part's bound is the greater of its operations and its least traffic over those; `reached` is that over its time.
Started by torchrun, every rank measures at once, the update includes its communication, and communication alone is a part.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Literal, NamedTuple

import torch
import tyro
from torch import Tensor

from configs.cli import parse_row
from configs.schema import Run
from data.batches import Batches
from data.orders import Position
from data.run.environment import choose_device, describe_environment
from data.sources import Source, open_source
from model import GPT, LayerInputs, mean_span
from optim.comm import Comm, local_rank
from optim.groups import build_groups
from optim.schedule import Schedule
from optim.sharded import ShardedOptimizer
from scripts import command
from scripts.lab.costs import bank_flops
from scripts.lab.models import CACHE, portable_config, vocabulary

BYTES_A_TOKEN = 2 * (2 + 8)
"""Of an input and a target: read as uint16, written as int64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """What to time."""

    preset: Annotated[str, tyro.conf.Positional] = "tiny"
    tokens: int = 4096
    """Tokens of a pass."""
    repeats: int = 10
    device: Literal["cpu", "cuda"] = "cpu"
    json: bool = False


class Part(NamedTuple):
    """One part of a step: how to run it, its operations, and the bytes that it must at least read and write."""

    name: str
    run: Callable[[], object]
    flops: float
    traffic: float


def median_seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Of `repeats` runs after two that are not counted; waits for the device."""
    def once() -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return statistics.median([once() for _ in range(repeats + 2)][2:])


def roofline(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(operations a second, bytes a second), measured: a 2048 or 8192 wide product, a copy of 256 MB."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    out, source = torch.empty_like(a), torch.empty(2**26, device=device)
    target = torch.empty_like(source)
    flops = 2 * size**3 / median_seconds(lambda: torch.mm(a, a, out=out), 5, device)
    return flops, 2 * source.nbytes / median_seconds(lambda: target.copy_(source), 5, device)


def model_parts(run: Run, model: GPT, tokens: Tensor) -> Iterator[Part]:
    """Attention, MLP, head and loss, and the whole model, each forward and backward."""
    values, config = Schedule(run).values(0), run.model
    x = torch.randn(*tokens.shape, config.dim, device=tokens.device, dtype=model.dtype, requires_grad=True)
    windows, targets = model.windows(values.window_tokens, values.long_window_tokens), tokens.roll(-1, 1)
    layer = next(i for i, block in enumerate(model.blocks) if block.attention is not None)
    value = torch.zeros_like(x) if model.blocks[layer].attention.mix_value is not None else None
    mask, rows = model.masks(tokens, None, windows)[layer], tokens.numel()
    inputs = LayerInputs(mask=mask, window=windows[layer], value_embed=value, x0=x.detach())

    def both(function: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: function().sum().backward()

    def weights(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.ndim == 2)

    def part(name: str, elements: int, function: Callable[[], Tensor], more_flops: float = 0.0) -> Part:
        return Part(name, both(function), 6 * elements * rows + more_flops, 12 * elements + 3 * x.nbytes)

    attention, mlp = model.blocks[layer].attention, model.blocks[layer].mlp
    span = mean_span(tokens.size(1), inputs.window or tokens.size(1))
    yield part("attention", weights(attention), lambda: attention(x, inputs), 12 * config.dim * span * rows)
    yield part("MLP", weights(mlp), lambda: mlp(x))
    yield part("head and loss", model.head_weight.numel(), lambda: model.loss(x, targets))
    whole = model.flops_per_token(tokens.size(1), values.window_tokens, values.long_window_tokens) * rows
    yield Part("model", both(lambda: model(tokens, targets)), whole, 12 * sum(p.numel() for p in model.parameters()))


def optimizer_parts(run: Run, model: GPT, comm: Comm) -> Iterator[Part]:
    """The update of all groups, from random gradients; on several ranks also what they say to each other in it."""
    groups = build_groups(dict(model.named_parameters()), model.roles(), run.optim, model.axes())
    optimizer, values, ranks = ShardedOptimizer(groups, comm), Schedule(run).values(0), comm.world_size
    for bank in optimizer.banks:
        bank.grads.normal_()
    owned = [(bank, ranks if bank.sharded else 1) for bank in optimizer.banks]
    flops = sum(bank_flops(bank) * len(bank.names) * bank.spec.blocks / divided for bank, divided in owned)
    traffic = sum((2 * bank.weights.nbytes + bank.grads.nbytes) / divided + 2 * sum(t.nbytes for t in bank.state.values())
                  for bank, divided in owned)
    yield Part("update", lambda: optimizer.step(values, optimizer.period), flops, traffic)
    if ranks > 1:
        sent = 2 * (ranks - 1) / ranks * sum(bank.weights.nbytes for bank in optimizer.banks)
        yield Part("communication", lambda: exchange(optimizer), 0.0, sent)


def exchange(optimizer: ShardedOptimizer) -> None:
    """Sum all gradients over ranks, gather all weights: dense, without the update between."""
    comm, works = optimizer.comm, []
    for bank in optimizer.banks:
        works.append(comm.reduce_scatter(bank.grads)[1] if bank.sharded else comm.all_reduce(bank.grads))
    for work in works + [comm.all_gather(bank.weights) for bank in optimizer.banks if bank.sharded]:
        work.wait()


def data_parts(run: Run, source: Source | None, comm: Comm) -> Iterator[Part]:
    """A rank's batch, made while nothing else runs; nothing without a source."""
    if source is None:
        return
    portions = Schedule(run).portions(0)
    batches = Batches(source.train, order=run.data.order, seed=run.run.seed, document_start=source.document_start,
                      rank=comm.rank, world_size=comm.world_size,
                      plan=lambda step: portions, total_steps=2**62, vocab_size=source.vocab_size)
    batches.start(0, Position())
    try:
        yield Part("data", batches.next, 0.0, BYTES_A_TOKEN * portions[0] / comm.world_size)
    finally:
        batches.close()


def time_part(part: Part, repeats: int, device: torch.device, line: tuple[float, float]) -> dict[str, object]:
    """A part's median time, its bound by the roofline (operations a second, bytes a second), and their ratio."""
    ms, bound_ms = 1e3 * median_seconds(part.run, repeats, device), 1e3 * max(part.flops / line[0], part.traffic / line[1])
    return {"name": part.name, "ms": ms, "bound_ms": bound_ms, "flops": part.flops, "traffic": part.traffic,
            "reached": bound_ms / ms}


def bench(args: Arguments, flags: list[str]) -> dict:
    """Time every part. Raises ValueError for a device that is not there."""
    run, comm = parse_row(args.preset, flags), Comm(choose_device(args.device, local_rank()))
    device, notes = comm.device, []
    context = min(run.data.sequence_tokens, args.tokens)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = replace(portable_config(run.model), document_mask=False)
    model = GPT(config, vocab_size=vocabulary(run.data), max_tokens=context, on_cuda=device.type == "cuda",
                dtype=dtype).to(device)
    tokens = torch.randint(vocabulary(run.data), (max(1, args.tokens // context), context), device=device)
    try:
        source = open_source(run.data, cache_dir=CACHE)
    except ValueError as error:
        source, notes = None, [f"no time of the data: {error}"]
    line, timed = roofline(device, dtype), (model_parts(run, model, tokens), optimizer_parts(run, model, comm),
                                            data_parts(run, source, comm))
    parts = [time_part(part, args.repeats, device, line) for part in chain(*timed)]
    comm.close()
    environment = {name: value for name, value in describe_environment().items() if name != "variables"}
    return {"preset": args.preset, "tokens": tokens.numel(), "context": context, "device": args.device,
            "ranks": comm.world_size, "rank": comm.rank, "flops_per_second": line[0], "bytes_per_second": line[1],
            "environment": environment, "notes": notes, "parts": parts}


def table(found: dict) -> str:
    """The parts, one a line."""
    lines = [f"{found['preset']}, {found['tokens']:,} tokens in contexts of {found['context']:,} on {found['ranks']} x "
             f"{found['device']}: {found['flops_per_second'] / 1e9:,.0f} GFLOP/s, "
             f"{found['bytes_per_second'] / 1e9:,.1f} GB/s at best", "",
             f"{'part':>14} {'ms':>9} {'bound ms':>9} {'reached':>8} {'GFLOP':>9} {'MB':>9}"]
    lines += [f"{p['name']:>14} {p['ms']:>9.3f} {p['bound_ms']:>9.3f} {p['reached']:>8.0%} {p['flops'] / 1e9:>9.2f} "
              f"{p['traffic'] / 1e6:>9.1f}" for p in found["parts"]]
    return "\n".join([*lines, *found["notes"]])


def main(args: Arguments, flags: list[str]) -> None:
    """Time every part; rank 0 prints."""
    found = bench(args, flags)
    if found["rank"] == 0:
        print(json.dumps(found, indent=2) if args.json else table(found))


if __name__ == "__main__":
    command(main, Arguments, __doc__, flags=True)
