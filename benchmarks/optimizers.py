"""Table of all optimizers: norm, memory, FLOPs and time of a step, and the difference from a public implementation.

    python -m benchmarks.optimizers [--no-timings] [--only SOAP ...]

Writes optimizers.json and optimizers.md. Times that are not measured again stay as they are in optimizers.json. The public
implementations are in PyTorch and in the packages pytorch_optimizer and prodigyopt.
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
from benchmarks import HERE, describe_machine
from benchmarks.muon_step import SHAPES, build_optimizer
from benchmarks.oracles import ORACLES, relative_difference
from configs.cli import fail
from configs.notation import nearest
from data.run.folder import write_json, write_text
from optim.groups import build_rule
from optim.rule import Hyper
from optim.schedule import Values
from scripts.lab.records import markdown

# ---- Memory and FLOPs, counted on PyTorch's meta device --------------------------------------------------------------


MATRIX = (768, 3072)


def floats_per_parameter(config: rules.RuleConfig, shape: tuple[int, int] = MATRIX) -> float:
    """Return the size of the rule's state for one matrix of `shape`, in numbers per parameter."""
    W = torch.empty(1, *shape, device="meta")
    return sum(tensor.numel() for tensor in build_rule(config).init_state(W).values()) / W.numel()


def eigh_flops(shape: tuple[int, ...], *_: object, **__: object) -> int:
    """9 k^3: all eigenvalues and eigenvectors of a symmetric k x k matrix (Golub & Van Loan, Matrix Computations, 8.3)."""
    return 9 * shape[-1] ** 3 * _num_matrices(shape)


def qr_flops(shape: tuple[int, ...], *_: object, **__: object) -> int:
    """4 (m n^2 - n^3 / 3), m >= n: R by Householder reflections and the explicit thin Q (Golub & Van Loan, 5.2)."""
    n, m = sorted(shape[-2:])
    return 4 * (m * n * n - n**3 // 3) * _num_matrices(shape)


def svd_flops(shape: tuple[int, ...], *_: object, **__: object) -> int:
    """6 m n^2 + 20 n^3, m >= n: thin U, S and V (Golub & Van Loan, 8.6, R-SVD)."""
    n, m = sorted(shape[-2:])
    return (6 * m * n * n + 20 * n**3) * _num_matrices(shape)


def product_flops(_: tuple[int, ...], A: tuple[int, ...], B: tuple[int, ...], **__: object) -> int:
    """2 m k n: C += A B in place, an operation that PyTorch's counter does not know."""
    return 2 * A[-2] * A[-1] * B[-1] * _num_matrices(A)


def _num_matrices(shape: tuple[int, ...]) -> int:
    """Return the number of matrices in a stack (..., m, n)."""
    return torch.Size(shape[:-2]).numel()


DECOMPOSITIONS = {torch.ops.aten._linalg_eigh: eigh_flops, torch.ops.aten.linalg_qr: qr_flops,
                  torch.ops.aten._linalg_svd: svd_flops}
PRODUCTS = {torch.ops.aten.baddbmm_: product_flops}


def flops(config: rules.RuleConfig, shape: tuple[int, int] = MATRIX) -> int:
    """Return the FLOPs of one step on a matrix of `shape`: matrix products and decompositions, no elementwise work."""
    rule = build_rule(config)
    W, grad = (torch.zeros(1, *shape, device="meta") for _ in range(2))
    state = rule.init_state(W)
    shared = {key: tensor.to("meta") for key, tensor in rule.init_shared().items()}
    # Step 2, the last of these numbers: SOAP's first step only initialises its bases.
    hyper = Hyper(*(torch.tensor(float(x)) for x in (0.1, 0, 0.9, 2)), shared)
    with FlopCounterMode(display=False, custom_mapping=DECOMPOSITIONS | PRODUCTS) as counter:
        rule.direction(W, grad, state, hyper)
    return counter.get_total_flops()


# ---- The optimizers -------------------------------------------------------------------------------------------------


RESULT = HERE / "optimizers.json"
LIMIT_SECONDS = 60.0  # a longer step is estimated from one matrix of each shape


@dataclass(frozen=True)
class Entry:
    """A row of the table."""

    name: str
    """The optimizer's usual name; A#B has A's direction and B's length."""
    group: rules.RuleConfig
    norm: str
    """The norm in words."""
    learns: str = ""
    """Estimates that the rule makes from past gradients; empty for a fixed norm."""


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
    Entry("Manifold Muon", rules.Stiefel(dual_steps=6), "spectral, tangent", "the dual variable of the constraint"),
    Entry("PSGD", rules.PSGD(beta1=0.95), "spectral", "a whitening factor on each side"),
    Entry("Muon#AdamW", rules.Muon(**JORDAN, graft=rules.Adam()), "spectral, AdamW's length", "a scale per entry"),
    Entry("Shampoo#AdamW, one-sided", rules.Shampoo(sides="smaller", graft=rules.Adam()), "spectral, AdamW's length",
          "the smaller Gram matrix, a scale per entry"),
]
# A rule without an entry of its own stands in the table with its defaults.
ENTRIES += [Entry(name, config(), "see optim/README.md") for name, config in rules.RULES.items()
            if name not in {entry.group.rule for entry in ENTRIES}]


def averaging(config: rules.RuleConfig) -> str:
    """Return the average of gradients that the rule turns into a step, in words."""
    if isinstance(config, rules.Averaged):
        ahead = ", Nesterov" if config.nesterov and config.averaging != "none" else ""
        return config.averaging.replace("_", " ") + ahead
    if config.rule in ("dion", "dion2"):
        return "error feedback"  # the momentum keeps the part of the gradients that no step has used
    return "ema" if hasattr(config, "beta1") else "none"


# ---- Times ---------------------------------------------------------------------------------------


def step_seconds(group: rules.RuleConfig, shapes: list[tuple[int, int]]) -> float:
    """Return the median seconds of one to five steps after a first one, on new matrices; none begins after two seconds."""
    torch.manual_seed(0)
    params = {f"w{i}": torch.nn.Parameter(torch.randn(shape) * 0.02) for i, shape in enumerate(shapes)}
    optimizer = build_optimizer(params, group)
    times: list[float] = []
    while len(times) < 2 or (len(times) < 6 and sum(times[1:]) < 2):
        for param in params.values():
            param.grad.normal_()
        began = time.perf_counter()
        optimizer.step(Values(1, 1, None, 1, 1, None), len(times) + 1)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])  # the first step allocates, and builds roots and bases


# ---- The table -----------------------------------------------------------------------------------


def describe(entry: Entry) -> dict[str, object]:
    """Return an optimizer's row without its time."""
    oracle = ORACLES.get(entry.name)
    return {"name": entry.name, "rule": entry.group.rule, "norm": entry.norm, "learns": entry.learns,
            "averaging": averaging(entry.group), "floats_per_parameter": floats_per_parameter(entry.group),
            "flops": flops(entry.group), "oracle": oracle.name if oracle else None,
            "difference": relative_difference(entry.group, oracle) if oracle else None}


def measure_time(entry: Entry) -> dict[str, object]:
    """Return the seconds of an optimizer's step and the load average of the machine, and print the seconds.

    The estimate adds up one matrix of each shape times their number; it is returned if it exceeds the limit.
    """
    estimate = sum(SHAPES.count(shape) * step_seconds(entry.group, [shape]) for shape in dict.fromkeys(SHAPES))
    estimated = estimate > LIMIT_SECONDS
    seconds = estimate if estimated else step_seconds(entry.group, SHAPES)
    print(f"{entry.name:>28}: {seconds:8.2f} s{' (estimated)' if estimated else ''}", flush=True)
    return {"seconds": seconds, "estimated": estimated, "load_average": os.getloadavg()[0]}


def page(result: dict) -> str:
    """Return the text of optimizers.md."""
    timings = result["timings"]
    adamw_seconds = timings["optimizers"].get("AdamW", {}).get("seconds")
    rows = [_cells(row, timings["optimizers"].get(row["name"]), adamw_seconds) for row in result["optimizers"]]
    head = ("optimizer", "norm", "estimated", "average", "state", "GFLOP", "time", "public code", "difference")
    return PREFACE.format(machine=_machine(timings)) + "\n".join(markdown(head, rows)) + "\n"


def _cells(row: dict, timing: dict | None, adamw_seconds: float | None) -> tuple[str, ...]:
    ratio = timing["seconds"] / adamw_seconds if timing else 0
    relative = f"{'~ ' if timing['estimated'] else ''}{ratio:.{0 if ratio >= 10 else 1}f}" if timing else ""
    difference = "" if row["difference"] is None else f"{row['difference']:.0e}"
    return (row["name"], row["norm"], row["learns"] or "-", row["averaging"], f"{row['floats_per_parameter']:.3g}",
            f"{row['flops'] / 1e9:.3g}", relative, row["oracle"] or "", difference)


def _machine(timings: dict) -> str:
    machine = timings["environment"]
    loads = [timing["load_average"] for timing in timings["optimizers"].values() if timing["load_average"] is not None]
    load = f"; load average {min(loads):.1f} to {max(loads):.1f}, other work included" if loads else ""
    return f"{machine['cpu']}, {machine['torch_threads']} thread(s), PyTorch {machine['torch']}{load}"


PREFACE = f"""# Every optimizer in one table

`python -m benchmarks.optimizers` makes this page; with `--no-timings` the times stay as they are. `optim/README.md` derives
the optimizers; `optimizer_parity.md` compares with code that is only in a repository.

| column | meaning |
|---|---|
| norm | the norm under which the rule, without averages, is steepest descent |
| estimated | what the rule estimates from past gradients; "-": nothing, the norm is fixed |
| average | the average of gradients that the rule turns into a step; Nesterov looks one step ahead |
| state | numbers in the state per parameter of a {MATRIX[0]} x {MATRIX[1]} matrix; AdamW has 2 |
| GFLOP | matrix products and decompositions of one step on that matrix |
| time | seconds of a step on track 3's 72 matrices / those of AdamW; "~": over {LIMIT_SECONDS:.0f} s, estimated |
| public code | a public implementation of the same rule |
| difference | distance of the final weights, ours to the public ones, / distance that the public ones moved |

- **GFLOP**: eigh counts 9 k^3, QR 4 (m n^2 - n^3 / 3), SVD 6 m n^2 + 20 n^3. Roots and bases are refreshed in every step;
  `every_steps` k divides their part by k.
- **Time**: median of one to five steps after a first one. An estimate adds up one matrix of each shape. AdamW is PyTorch's
  fused kernel, one pass over memory.
- **Machine**: {{machine}}.
- **Difference**: the largest of three matrices, 24 x 40, 40 x 24 and 32 x 32, after 20 steps. SOAP is compared on 32 x 32
  only: the Gram matrix of the first gradient of the other two is singular, so that its eigenbasis is not unique.
- A#B has A's direction and B's length.

"""


def save(rows: list[dict], timings: dict[str, object]) -> None:
    """Write optimizers.json and optimizers.md, times in the order of `rows`. Times of removed optimizers are dropped."""
    known = timings["optimizers"]
    ordered = {row["name"]: known[row["name"]] for row in rows if row["name"] in known}
    write_json(RESULT, {"command": "python -m benchmarks.optimizers", "matrix": list(MATRIX), "optimizers": rows,
                        "timings": timings | {"optimizers": ordered}})
    write_text(RESULT.with_suffix(".md"), page(json.loads(RESULT.read_text())))


def main(timings: bool = True, only: tuple[str, ...] = ()) -> None:
    """Count and compare all optimizers, then time them. The files are written after every optimizer.

    Args:
        timings: Measure the times of the steps: a quarter of an hour on two cores. Without, the times in optimizers.json
            stay.
        only: Measure only the times of these optimizers, by their names in the table.
    """
    names = [entry.name for entry in ENTRIES]
    for name in set(only) - set(names):
        fail(f"no optimizer {name!r}{nearest(name, names)}")
    times = json.loads(RESULT.read_text())["timings"]
    rows = [describe(entry) for entry in ENTRIES]
    save(rows, times)
    for entry in ENTRIES:
        if timings and (not only or entry.name in only):
            times |= {"environment": describe_machine(), "matrices": len(SHAPES), "limit_seconds": LIMIT_SECONDS}
            times["optimizers"][entry.name] = measure_time(entry)
            save(rows, times)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
