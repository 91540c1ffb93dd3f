"""Every optimizer in one table: its norm, what it remembers, what a step costs, and how near it is to public code.

    python -m benchmarks.optimizers [--no-timings] [--only SOAP ...]

Writes optimizers.json and optimizers.md. Times are of a step on track 3's 72 matrices, after one that is not counted, and
relative to AdamW's; those not measured stay as the file has them. The oracles' packages are pytorch_optimizer and
prodigyopt.
"""

import json
import os
import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

import configs.optim as rules
from benchmarks import HERE, machine
from benchmarks.muon_step import SHAPES, optimizer_of
from benchmarks.oracles import ORACLES, parity
from configs.cli import fail
from configs.notation import nearest
from data.run.folder import write_json, write_text
from optim.groups import build_rule
from optim.rule import Hyper
from optim.schedule import Values
from scripts.lab.records import markdown

# ---- Counts, on PyTorch's meta device -------------------------------------------------------------------------------


MATRIX = (768, 3072)


def floats_per_parameter(config: rules.RuleConfig, shape: tuple[int, int] = MATRIX) -> float:
    """Numbers that the rule remembers of a matrix, over its own."""
    W = torch.empty(1, *shape, device="meta")
    return sum(tensor.numel() for tensor in build_rule(config).init_state(W).values()) / W.numel()


def eigh_flops(shape: tuple[int, ...], *_: object, **__: object) -> int:
    """9 k^3: all eigenvalues and vectors of a symmetric matrix (Golub & Van Loan, Matrix Computations, 8.3)."""
    return 9 * shape[-1] ** 3 * _stacked(shape)


def qr_flops(shape: tuple[int, ...], *_: object, **__: object) -> int:
    """4 (m n^2 - n^3 / 3), m >= n: Householder's R and explicit thin Q (Golub & Van Loan, 5.2)."""
    n, m = sorted(shape[-2:])
    return 4 * (m * n * n - n**3 // 3) * _stacked(shape)


def svd_flops(shape: tuple[int, ...], *_: object, **__: object) -> int:
    """6 m n^2 + 20 n^3, m >= n: thin U, S and V (Golub & Van Loan, 8.6, R-SVD)."""
    n, m = sorted(shape[-2:])
    return (6 * m * n * n + 20 * n**3) * _stacked(shape)


def product_flops(_: tuple[int, ...], A: tuple[int, ...], B: tuple[int, ...], **__: object) -> int:
    """2 m k n: C += A B in place, which the counter does not know."""
    return 2 * A[-2] * A[-1] * B[-1] * _stacked(A)


def _stacked(shape: tuple[int, ...]) -> int:
    return torch.Size(shape[:-2]).numel()


DECOMPOSITIONS = {torch.ops.aten._linalg_eigh: eigh_flops, torch.ops.aten.linalg_qr: qr_flops,
                  torch.ops.aten._linalg_svd: svd_flops}
PRODUCTS = {torch.ops.aten.baddbmm_: product_flops}


def flops(config: rules.RuleConfig, shape: tuple[int, int] = MATRIX) -> int:
    """Operations of matrix products and decompositions in the second step on one matrix; elementwise work is not counted."""
    rule = build_rule(config)
    W, grad = (torch.zeros(1, *shape, device="meta") for _ in range(2))
    state = rule.init_state(W)
    shared = {key: tensor.to("meta") for key, tensor in rule.init_shared().items()}
    numbers = Hyper(*(torch.tensor(float(x)) for x in (0.1, 0, 0.9, 2)), shared)
    with FlopCounterMode(display=False, custom_mapping=DECOMPOSITIONS | PRODUCTS) as counter:
        rule.direction(W, grad, state, numbers)
    return counter.get_total_flops()


# ---- The optimizers -------------------------------------------------------------------------------------------------


RESULT = HERE / "optimizers.json"
LIMIT_SECONDS = 60.0


@dataclass(frozen=True)
class Entry:
    """A row: an optimizer by its usual name."""

    name: str
    group: rules.RuleConfig
    norm: str
    learns: str = ""


@dataclass
class Arguments:
    """Arguments of the benchmark."""

    timings: bool = True
    """Measure the steps' times, which takes a quarter of an hour on two cores; else keep those in the file."""
    only: tuple[str, ...] = ()
    """Measure these optimizers' times alone, by their names in the table."""


JORDAN = dict(unit="at_least_one")
ENTRIES = [
    Entry("AdamW", rules.Adam(), "largest entry", "a scale per entry"),
    Entry("normalised SGD", rules.Steepest(norm="frobenius", nesterov=False), "Frobenius"),
    Entry("Signum", rules.Steepest(norm="sign", nesterov=False), "largest entry"),
    Entry("Scion, head", rules.Steepest(norm="sign", unit="fan_in", nesterov=False), "n x largest entry"),
    Entry("Scion, embedding", rules.Steepest(norm="row", nesterov=False), "largest row RMS"),
    Entry("Scion, first layer", rules.Steepest(norm="column", nesterov=False), "largest column RMS"),
    Entry("Scion, hidden", rules.Steepest(norm="rms_operator", nesterov=False), "RMS > RMS"),
    Entry("Muon", rules.Muon(**JORDAN, ns="quintic"), "spectral, Jordan's unit"),
    Entry("Muon, Moonlight's", rules.Muon(unit="match_adam", averaging="heavy_ball"), "spectral, Moonlight's unit"),
    Entry("Muon, equilibrated", rules.Muon(**JORDAN, equilibrate=True), "spectral, Jordan's unit"),
    Entry("steepest, Schatten 4", rules.Steepest(norm="schatten"), "Schatten 4"),
    Entry("NorMuon", rules.NorMuon(**JORDAN), "spectral, Jordan's unit", "a scale per row"),
    Entry("Muon^2", rules.Muon2(**JORDAN), "spectral, Jordan's unit", "a scale per entry"),
    Entry("Muown", rules.Muown(unit="match_adam"), "spectral, Moonlight's unit", "a length per row"),
    Entry("Dion", rules.Dion(), "RMS > RMS", "the leading subspace"),
    Entry("Dion2", rules.Dion2(), "RMS > RMS"),
    Entry("SM3", rules.SM3(), "largest entry", "a scale per row and per column"),
    Entry("Prodigy", rules.Prodigy(lr=1.0), "largest entry", "a scale per entry, and the step's length"),
    Entry("AGD", rules.AGD(lr=1.0), "Frobenius, by layer", "the step's length"),
    Entry("SWAN", rules.SWAN(), "spectral, of standardised rows"),
    Entry("Shampoo", rules.Shampoo(), "spectral", "both Gram matrices"),
    Entry("Shampoo, one-sided", rules.Shampoo(sides="smaller"), "spectral", "the smaller Gram matrix"),
    Entry("SOAP", rules.SOAP(), "spectral", "both eigenbases, and a scale per entry there"),
    Entry("SOAP-Muon", rules.SOAPMuon(**JORDAN), "spectral, Jordan's unit", "as SOAP"),
    Entry("Manifold Muon", rules.Stiefel(dual_steps=6), "spectral, tangent", "none: the constraint does it"),
    Entry("PSGD", rules.PSGD(beta1=0.95), "spectral", "a whitening factor on each side"),
    Entry("Muon#AdamW", rules.Muon(**JORDAN, graft=rules.Adam()), "spectral, AdamW's length", "a scale per entry"),
    Entry("Shampoo#AdamW, one-sided", rules.Shampoo(sides="smaller", graft=rules.Adam()), "spectral, AdamW's length",
          "the smaller Gram matrix, a scale per entry"),
]


def averaging(config: rules.RuleConfig) -> str:
    """What the rule steps along."""
    if isinstance(config, rules.Averaged):
        ahead = ", Nesterov" if config.nesterov and config.averaging != "none" else ""
        return config.averaging.replace("_", " ") + ahead
    if config.rule in ("dion", "dion2"):
        return "what was not stepped along yet"
    return "ema" if hasattr(config, "beta1") else "none"


# ---- Times ---------------------------------------------------------------------------------------


def seconds(group: rules.RuleConfig) -> tuple[float, bool]:
    """Of one step on all matrices; or, where that would take longer than the limit, estimated from one matrix of each
    shape: then True comes with it."""
    guess = sum(SHAPES.count(shape) * step_seconds(group, [shape]) for shape in dict.fromkeys(SHAPES))
    return (guess, True) if guess > LIMIT_SECONDS else (step_seconds(group, SHAPES), False)


def step_seconds(group: rules.RuleConfig, shapes: list[tuple[int, int]]) -> float:
    """Median time of the steps after the first, on fresh matrices: up to five, until two seconds are full."""
    torch.manual_seed(0)
    params = {f"w{i}": torch.nn.Parameter(torch.randn(shape) * 0.02) for i, shape in enumerate(shapes)}
    optimizer = optimizer_of(params, group)
    found: list[float] = []
    while len(found) < 2 or (len(found) < 6 and sum(found[1:]) < 2):
        for param in params.values():
            param.grad.normal_()
        began = time.perf_counter()
        optimizer.step(Values(1, 1, None, 1, 1, None), len(found) + 1)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


# ---- The table -----------------------------------------------------------------------------------


def row(entry: Entry) -> dict[str, object]:
    """Everything of an optimizer but its time."""
    oracle = ORACLES.get(entry.name)
    return {"name": entry.name, "rule": entry.group.rule, "norm": entry.norm, "learns": entry.learns,
            "averaging": averaging(entry.group), "floats_per_parameter": floats_per_parameter(entry.group),
            "flops": flops(entry.group), "oracle": oracle.name if oracle else None,
            "difference": parity(entry.group, oracle) if oracle else None}


def timed(entry: Entry) -> dict[str, object]:
    """Its time, and the machine's load when it was taken."""
    found, estimated = seconds(entry.group)
    print(f"{entry.name:>28}: {found:8.2f} s{' (estimated)' if estimated else ''}", flush=True)
    return {"seconds": found, "estimated": estimated, "load_average": os.getloadavg()[0]}


def page(result: dict) -> str:
    """optimizers.md."""
    times = result["timings"]
    unit = times["optimizers"].get("AdamW", {}).get("seconds")
    rows = [_cells(row, times["optimizers"].get(row["name"]), unit) for row in result["optimizers"]]
    head = ("optimizer", "norm", "learned", "average", "state", "GFLOP", "time", "oracle", "difference")
    return PREFACE.format(machine=_machine(times)) + "\n".join(markdown(head, rows)) + "\n"


def _cells(row: dict, timing: dict | None, unit: float | None) -> tuple[str, ...]:
    ratio = timing["seconds"] / unit if timing else 0
    relative = f"{'~ ' if timing['estimated'] else ''}{ratio:.{0 if ratio >= 10 else 1}f}" if timing else ""
    difference = "" if row["difference"] is None else f"{row['difference']:.0e}"
    return (row["name"], row["norm"], row["learns"] or "given", row["averaging"], f"{row['floats_per_parameter']:.3g}",
            f"{row['flops'] / 1e9:.3g}", relative, row["oracle"] or "", difference)


def _machine(times: dict) -> str:
    place = times["environment"]
    loads = [timing["load_average"] for timing in times["optimizers"].values() if timing["load_average"] is not None]
    load = f"; load average {min(loads):.1f} to {max(loads):.1f} (beyond the threads: other work)" if loads else ""
    return f"{place['cpu']}, {place['torch_threads']} threads, PyTorch {place['torch']}{load}"


PREFACE = f"""# Every optimizer in one table

Made by `python -m benchmarks.optimizers`, from the code. The page that derives them is `optim/README.md`; oracles that
only a repository holds are in `optimizer_parity.md`.

- **norm**: the one whose steepest descent it is without averages; **learned**: what it reads off past gradients.
- **state**: numbers remembered per parameter of a {MATRIX[0]} x {MATRIX[1]} matrix. AdamW has 2.
- **GFLOP**: of one step on that matrix, matrix products and decompositions alone (eigh 9 k^3, QR 4 (m n^2 - n^3 / 3), SVD
  6 m n^2 + 20 n^3), with roots and bases refreshed in every step; `every_steps` k divides those by k.
- **time**: of a step on track 3's 72 matrices, over AdamW's; "~": over {LIMIT_SECONDS:.0f} s, and so estimated from one
  matrix of each shape. AdamW's is PyTorch's fused kernel, one pass over memory.
- Measured on {{machine}}.
- **oracle**, **difference**: a public implementation, and the largest distance from it after 20 steps on matrices of
  24 x 40, 40 x 24 and 32 x 32, as a share of the distance moved; SOAP's on 32 x 32 alone, as the first gradient's singular
  Gram matrix has no eigenbasis of its own that two programs could agree on. A#B is A's direction at B's length.

"""


def save(rows: list[dict], times: dict[str, object]) -> None:
    """Both files; times in the order of the table, those of optimizers that are no more left out."""
    known = times["optimizers"]
    write_json(RESULT, {"command": "python -m benchmarks.optimizers", "matrix": list(MATRIX), "optimizers": rows,
                        "timings": times | {"optimizers": {row["name"]: known[row["name"]] for row in rows
                                                           if row["name"] in known}}})
    write_text(RESULT.with_suffix(".md"), page(json.loads(RESULT.read_text())))


def main(args: Arguments) -> None:
    """Measure, and write both files after every optimizer."""
    names = [entry.name for entry in ENTRIES]
    for name in set(args.only) - set(names):
        fail(f"no optimizer {name!r}{nearest(name, names)}")
    times = json.loads(RESULT.read_text())["timings"]
    rows = [row(entry) for entry in ENTRIES]
    save(rows, times)
    for entry in ENTRIES:
        if args.timings and (not args.only or entry.name in args.only):
            times |= {"environment": machine(), "matrices": len(SHAPES), "limit_seconds": LIMIT_SECONDS}
            times["optimizers"][entry.name] = timed(entry)
            save(rows, times)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
