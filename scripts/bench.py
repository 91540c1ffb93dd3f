"""How fast the parts of a step are, each beside the roofline of the device at hand.

    python -m scripts.bench tiny
    python -m scripts.bench track3 --tokens 8192 --device cuda --json

The roofline is measured, not looked up: operations a second by one large product of matrices, bytes a second by one large
copy. A part's bound is the greater of its operations and its least traffic over those; `reached` is that over its time.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro

from configs.cli import fail, parse_row

if TYPE_CHECKING:
    import torch

    from configs.schema import Run
    from model import GPT


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """What to time."""

    preset: Annotated[str, tyro.conf.Positional] = "tiny"
    tokens: int = 4096
    """Tokens of a pass."""
    repeats: int = 10
    device: str = "cpu"
    """cpu or cuda."""
    json: bool = False


class Part(NamedTuple):
    """One part of a step: how to run it, its operations, and the bytes that it must at least read and write."""

    name: str
    run: Callable[[], object]
    flops: float
    traffic: float


class Timing(NamedTuple):
    """A part's median time and its bound."""

    name: str
    ms: float
    bound_ms: float
    flops: float
    traffic: float

    @property
    def reached(self) -> float:
        """Share of the roofline."""
        return self.bound_ms / self.ms


def median_seconds(run: Callable[[], object], repeats: int, device: "torch.device") -> float:
    """Of `repeats` runs after two that are not counted; waits for the device."""
    import torch

    def once() -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return statistics.median([once() for _ in range(repeats + 2)][2:])


def roofline(device: "torch.device", dtype: "torch.dtype") -> tuple[float, float]:
    """(operations a second, bytes a second), measured: a 2048 or 8192 wide product, a copy of 256 MB."""
    import torch

    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    out, source = torch.empty_like(a), torch.empty(2**26, device=device)
    target = torch.empty_like(source)
    flops = 2 * size**3 / median_seconds(lambda: torch.mm(a, a, out=out), 5, device)
    return flops, 2 * source.nbytes / median_seconds(lambda: target.copy_(source), 5, device)


def parts(run: "Run", model: "GPT", tokens: "torch.Tensor", device: "torch.device") -> Iterator[Part]:
    """Attention, MLP, head and loss, each forward and backward; the whole model; the update; a batch of data."""
    import torch

    from layers.attention import Around
    from optim.comm import Comm
    from optim.groups import build_groups
    from optim.schedule import Schedule
    from optim.sharded import ShardedOptimizer

    values, config = Schedule(run).values(0), run.model
    x = torch.randn(*tokens.shape, config.dim, device=device, dtype=model.dtype, requires_grad=True)
    places, targets = model._where(tokens, None, values.window_tokens, values.long_window_tokens), tokens.roll(-1, 1)
    layer = next(i for i, block in enumerate(model.blocks) if block.attention is not None)
    value = torch.zeros_like(x) if model.blocks[layer].attention.mix_value is not None else None
    around, rows = Around(**places[layer], value_embed=value, x0=x.detach()), tokens.numel()

    def both(function: Callable[[], "torch.Tensor"]) -> Callable[[], None]:
        return lambda: function().sum().backward()

    def weights(module: torch.nn.Module) -> float:
        return sum(p.numel() for p in module.parameters() if p.ndim == 2)

    def part(name: str, module: torch.nn.Module, function: Callable[[], "torch.Tensor"], more_flops: float = 0.0) -> Part:
        return Part(name, both(function), 6 * weights(module) * rows + more_flops, 12 * weights(module) + 3 * x.nbytes)

    attention = model.blocks[layer].attention
    span = tokens.size(1) / 2
    yield part("attention", attention, lambda: attention(x, around), 12 * config.dim * span * rows)
    yield part("MLP", model.blocks[layer].mlp, lambda: model.blocks[layer].mlp(x))
    head = model.head or torch.nn.Linear(config.dim, len(model.embed), bias=False)
    yield part("head and loss", head, lambda: model._nats(x.flatten(0, 1), targets.flatten()))
    whole = model.flops_per_token(tokens.size(1), values.window_tokens, values.long_window_tokens) * rows
    yield Part("model", both(lambda: model(tokens, targets)), whole, 12 * sum(p.numel() for p in model.parameters()))
    optimizer = ShardedOptimizer(build_groups(dict(model.named_parameters()), model.roles(), run.optim, model.axes()),
                                 Comm(device))
    for bank in optimizer.banks:
        bank.grads.normal_()
    held = sum(t.nbytes for bank in optimizer.banks for t in (bank.weights, bank.grads, *bank.state.values()))
    yield Part("update", lambda: optimizer.step(values, 1), update_flops(optimizer), 1.7 * held)


def update_flops(optimizer: object) -> float:
    """Operations of the update's orthogonalizations."""
    from configs.groups import acting_fields
    from scripts.lab.costs import newton_schulz_flops

    return sum(newton_schulz_flops(*bank.shape[-2:], bank.group.config.ns_steps) * len(bank.names)
               for bank in optimizer.banks if len(bank.shape) == 2 and "ns_steps" in acting_fields(bank.group.config))


def bench(args: Arguments, flags: list[str]) -> dict:
    """Time every part. Raises ValueError for a device that is not there."""
    import torch

    from data.environment import describe_environment
    from model import GPT
    from scripts.lab.flops import vocabulary
    from scripts.lab.models import anywhere

    if args.device not in ("cpu", "cuda") or (args.device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device is cpu, or cuda where there is one; got {args.device!r}")
    run, device = parse_row(args.preset, flags), torch.device(args.device)
    context = min(run.data.sequence_tokens, args.tokens)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = replace(anywhere(run.model), document_mask=False)
    model = GPT(config, vocab_size=vocabulary(run.data), max_tokens=context, on_cuda=device.type == "cuda",
                dtype=dtype).to(device)
    tokens = torch.randint(vocabulary(run.data), (max(1, args.tokens // context), context), device=device)
    flops, bandwidth = roofline(device, dtype)
    found = []
    for part in parts(run, model, tokens, device):
        bound = max(part.flops / flops, part.traffic / bandwidth)
        found.append(Timing(part.name, 1e3 * median_seconds(part.run, args.repeats, device), 1e3 * bound, part.flops,
                            part.traffic))
    environment = describe_environment()
    environment.pop("variables")
    return {"preset": args.preset, "tokens": tokens.numel(), "context": context, "device": args.device,
            "flops_per_second": flops, "bytes_per_second": bandwidth, "environment": environment,
            "parts": [timing._asdict() | {"reached": timing.reached} for timing in found]}


def table(found: dict) -> str:
    """The parts, one a line."""
    lines = [f"{found['preset']}, {found['tokens']:,} tokens in contexts of {found['context']:,} on {found['device']}: "
             f"{found['flops_per_second'] / 1e9:,.0f} GFLOP/s, {found['bytes_per_second'] / 1e9:,.1f} GB/s at best", "",
             f"{'part':>14} {'ms':>9} {'bound ms':>9} {'reached':>8} {'GFLOP':>9} {'MB':>9}"]
    lines += [f"{p['name']:>14} {p['ms']:>9.3f} {p['bound_ms']:>9.3f} {p['reached']:>8.0%} {p['flops'] / 1e9:>9.2f} "
              f"{p['traffic'] / 1e6:>9.1f}" for p in found["parts"]]
    return "\n".join(lines)


if __name__ == "__main__":
    import sys

    OWN, FLAGS = (sys.argv[1:], []) if "--" not in sys.argv else (
        sys.argv[1:sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1:])
    try:
        ARGUMENTS = tyro.cli(Arguments, description=__doc__, args=OWN, use_underscores=True)
        FOUND = bench(ARGUMENTS, FLAGS)
        print(json.dumps(FOUND, indent=2) if ARGUMENTS.json else table(FOUND))
    except ValueError as error:
        fail(str(error))
