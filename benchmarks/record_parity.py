"""Compare with the public record's script by value, in float32 on a CPU, at reduced width.

    python -m benchmarks.record_parity --script PATH/train_gpt.py [--section optimizer]

The script is modded-nanogpt's train_gpt.py at commit f411b3d3 (MIT), fetched by the user; record_script.py tells how it is
loaded. Each section gives both implementations the same inputs and returns rows of the page. Writes record_parity.json and
record_parity.md; a section that is not run keeps its rows.

- optimizer: ten steps of the record's optimizer and of `configs.speedrun.record_optim()` on the same gradients, at the start
  of the run and around the step at which the head is untied.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro
from torch import Tensor, nn

from benchmarks import HERE, write_result
from benchmarks.record_model import model_section
from benchmarks.record_script import load_record
from configs.optim import Optim
from configs.speedrun import record_optim, speedrun
from data.run.folder import write_text
from optim.comm import Comm
from optim.groups import build_groups
from optim.schedule import Schedule, is_due
from optim.sharded import ShardedOptimizer
from scripts.lab.records import markdown

DIM, VOCAB, BUCKETS = 96, 256, 250
STEPS = 10
FIRST_STEPS = {"start": 0, "untying": 842}  # the record unties after step 847
APART = 1e-3
Row = dict[str, str | float]
Rows = list[Row]

# ---- The optimizer ------------------------------------------------------------------------------------------------------


def as_ours(record: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return views of the record's tensors under our names and in our shapes; its banks also have padding, left out here."""
    ours = {"head": record["lm_head.weight"].T, "embed": record["embed.weight"], "table": record["bigram_embed.weight"],
            "smear.gate": record["smear_gate.weight"], "value_gates": record["ve_gate_bank"]}
    ours |= {f"value_embeds.{i}": table for i, table in enumerate(record["value_embeds"].chunk(5))}
    # Three blocks of queries, then three of keys, for each attention layer; a block is a pair of heads.
    query_key = record["qk_bank"].view(10, 2, -1, DIM)
    for layer in range(10):
        value, out = record["vo_bank"][2 * layer:2 * layer + 2]
        ours |= {f"{layer}.attention.q": query_key[layer, 0], f"{layer}.attention.k": query_key[layer, 1],
                 f"{layer}.attention.v": value, f"{layer}.attention.out": out}
    for layer in range(11):
        ours |= {f"{layer}.mlp.up": record["mlp_bank"][layer, 0], f"{layer}.mlp.down": record["mlp_bank"][layer, 1].T}
    rest = ("scalars", "resid_lambdas", "post_lambdas", *(name for name in record if "mudd" in name))
    return ours | {name.lstrip("_"): record[name] for name in rest}


def role_of(name: str) -> str:
    """Return the role of a tensor in `as_ours`; gain and bias stand for settings that our preset does not have."""
    known = {"head": "head", "embed": "embed", "table": "bigram_embed", "scalars": "scalar", "resid_lambdas": "gain",
             "post_lambdas": "bias"}
    if "gate" in name or "mudd" in name:
        return "gate"
    return known.get(name, "value_embed" if name.startswith("value_embeds") else "matrix")


def settings(record: SimpleNamespace) -> Optim:
    """Return our preset's optimizers, with the record's settings of tensors that our model does not have as such, and with
    all digits of its coefficients: our six decimals alone change an update by 1.2e-5."""
    optim = record_optim()
    table = ";".join(["safety=1.02", *(",".join(map(repr, triple)) for triple in record.polar_express_coeffs)])
    factors = ("smear.gate=0.01", "mudd_w1=0.25", "mudd_w2=0.25", "mudd_b2=0.25", "mudd_gate_w1=0.1", "mudd_gate_w2=0.1",
               "mudd_gate_b2=0.1", "mudd_gate_scale=0.1")
    extra = replace(optim.gate.extra, lr_factors=factors)
    return replace(optim, matrix=replace(optim.matrix, ns=table), gate=replace(optim.gate, extra=extra),
                   gain=replace(optim.scalar, beta2=0.95), bias=replace(optim.bias, beta2=0.95))


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    """Return Gaussian gradients of the record's parameters, for a rank's summed loss: of the size of hundreds, not of 1e-3.
    Every third row of the tables and every fifth of the embeddings have none, as for tokens that do not occur."""
    generator = torch.Generator().manual_seed(step)
    grads = {name: 100 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    for name, every in (("bigram_embed.weight", 3), ("value_embeds", 3), ("embed.weight", 5)):
        grads[name][::every] = 0
    return grads


def record_path(record: SimpleNamespace, first_step: int) -> list[dict[str, Tensor]]:
    """Return the weights, as ours, before the first and after each of STEPS steps of the record's optimizer."""
    model = start_model(record)
    manager = record.TrainingManager(model)
    path = [copy_of(as_ours(state_of(model)))]
    for step in range(first_step, first_step + STEPS):
        for name, grad in gradients(model, step).items():
            param = model.get_parameter(name)  # between Adam's steps gradients add up, as in backward
            param.grad = grad if param.grad is None else param.grad + grad
        manager.step_optimizers(step)
        path.append(copy_of(as_ours(state_of(model))))
    return path


def our_path(record: SimpleNamespace, first_step: int) -> list[dict[str, Tensor]]:
    """Return the same for our optimizer, which sees the same gradients."""
    model, run = start_model(record), speedrun()
    params = {name: nn.Parameter(value) for name, value in copy_of(as_ours(state_of(model))).items()}
    groups = build_groups(params, {name: role_of(name) for name in params}, settings(record))
    optimizer, schedule = ShardedOptimizer(groups, Comm()), Schedule(run)
    path = [copy_of(params)]
    for count, step in enumerate(range(first_step, first_step + STEPS), 1):
        for name, grad in as_ours(gradients(model, step)).items():
            params[name].grad.add_(grad)
        # As Trainer.step does for a tied head.
        if step < run.train.tied_until_frac * run.train.steps and is_due(step + 1, 2):
            params["head"].grad.copy_(params["embed"].grad.add_(params["head"].grad))
        optimizer.step(schedule.values(step), count)
        optimizer.zero_grad()
        path.append(copy_of(params))
    return path


def start_model(record: SimpleNamespace) -> nn.Module:
    """Return the record's model with weights that are nowhere zero, the embedding equal to the head."""
    torch.manual_seed(0)
    model = record.new_model(16)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.02 * torch.randn_like(param))
        model.embed.weight.copy_(model.lm_head.weight.T)
    return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters by name, detached."""
    return {name: param.detach() for name, param in model.named_parameters()}


def copy_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies."""
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Return |ours - theirs| / |theirs|, Frobenius norms in float64; 0 if both are zero."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-300)).item()


def optimizer_section(record: SimpleNamespace) -> Rows:
    """Return a row for each kind of tensor: the largest difference of one step's update, the number of entries left out of
    it, and the largest difference of the weights after STEPS."""
    rows: dict[str, Row] = {}
    for window, first_step in FIRST_STEPS.items():
        theirs, ours = record_path(record, first_step), our_path(record, first_step)
        for name in theirs[0]:
            row = rows.setdefault(f"{window} {kind_of(name)}", {"steps": window, "tensor": kind_of(name), "entries": 0,
                                                                "apart": 0, "update": 0.0, "weights": 0.0})
            for (a, b), (c, d) in zip(pairwise(ours), pairwise(theirs), strict=True):
                apart, update = compare_moves(b[name] - a[name], d[name] - c[name])
                row["apart"] += apart
                row["update"] = max(row["update"], update)
            row["entries"] += STEPS * theirs[0][name].numel()
            row["weights"] = max(row["weights"], distance(ours[-1][name], theirs[-1][name]))
    return list(rows.values())


def compare_moves(ours: Tensor, theirs: Tensor) -> tuple[int, float]:
    """Return how many entries of an update are apart by more than APART of its RMS, and the distance of all others."""
    apart = (ours - theirs).abs() > APART * theirs.square().mean().sqrt()
    return int(apart.sum()), distance(ours.masked_fill(apart, 0), theirs.masked_fill(apart, 0))


def kind_of(name: str) -> str:
    """Return a tensor's name without its layer's or table's number."""
    return ".".join(word for word in name.split(".") if not word.isdigit())


# ---- The page -----------------------------------------------------------------------------------------------------------

# Name of a section > function that returns its rows. The page lists their columns as they come.
SECTIONS: dict[str, Callable[[SimpleNamespace], Rows]] = {"model": model_section, "optimizer": optimizer_section}
INTRODUCTIONS = {
    "model": """The largest difference |ours - theirs| / |theirs| (Euclidean norms): of the logits, of the summed loss with
further tokens and prefixes, of the gradients of all tensors together, of the tensor with the largest difference, and of
tensors of one or two numbers, whose gradients are sums over all tokens that cancel. Four documents in a row of 128 tokens;
windows, YaRN and loss weights as in the stages of the run, the last case with the final validation's longer window.""",
    "optimizer": f"""The largest difference |ours - theirs| / |theirs| (Frobenius norms) over {STEPS} steps from step 0 and
from step 842: of one step's update, and of the weights afterwards. Cautious decay acts where update and weight agree in
sign. Where an update is 0 up to rounding, one of the two may decay an entry and the other not: entries that differ by more
than {APART:g} of the update's RMS are counted in `apart`, of `entries` in all steps, and left out of `update` but not of
`weights`.""",
}
PREFACE = """# Ours and the public record's script, by value

`python -m benchmarks.record_parity --script PATH` makes this page. Both run in float32 on a CPU, {dim} wide, with the same
weights and inputs; record_script.py says what is changed in the script (modded-nanogpt's train_gpt.py, commit f411b3d3).
"""
DIFFERENCES = """
## What differs, and why

| | record | ours |
|---|---|---|
| gradient of a step | sum over a rank's tokens, grows with the batch | mean; grows with `train.loss_reduction sum` |
| Adam at every second step | sum of both gradients | their mean: the same step, but for eps |
| Adam's eps 1e-10 | added to sqrt(v) | added to sqrt(v / (1 - b2^t)) |
| NorMuon's eps | sqrt(v) at least 1e-5 | 1e-10 added to sqrt(v): differs for slices of RMS below 1e-5 |
| coefficients of Newton-Schulz | 16 digits | six decimals, at most 1.2e-5 of an update; all digits above |
| scaling before Newton-Schulz | norm x 1.02 + 1e-6 | largest entry first, then norm x 1.02: no eps, any gradient scale |
| bfloat16 matrices, with the missing bits beside them | cut towards 0 | rounded to nearest; both are exact in float32 |
| decay of gates | 0.005 lr^2, at most 3e-7 a step | none |
| residual factors, before and after each layer | lr 0.04 and 0.008, b2 0.95 | one tensor `add`, lr 0.04, b2 0.99 |
| window of w tokens | w keys before one's own | w with one's own |
| smear, bigrams, key offset, further tokens | across document starts | within a document; across in the table above |
| rotary positions of paired heads | head h at 2 t + h mod 2 | h < H/2 at 2 t, others at 2 t + 1, as they are attended |
| bigram of a row's second token | hash of the reserved row's number | hash of both tokens |
| scale of the gate networks; factor of the skip's gate | one for both; learned | one each; part of the gate |
| value gates, MUDD | stored in bfloat16 | float32 |
"""


def table_of(rows: Rows) -> str:
    """Return rows as a Markdown table: numbers in scientific notation."""
    cells = [[f"{value:.1e}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    return "\n".join(markdown(tuple(rows[0]), cells))


def page(result: dict) -> str:
    """Return the text of record_parity.md."""
    parts = [f"## {name.capitalize()}\n\n{INTRODUCTIONS[name]}\n\n{table_of(rows)}\n"
             for name, rows in result["sections"].items()]
    return "\n".join([PREFACE.format(dim=DIM), *parts]) + DIFFERENCES


def main(script: Path, section: str | None = None) -> None:
    """Run all sections, or one, and write both files. `script` is the path of the public train_gpt.py."""
    record = load_record(script, dim=DIM, vocab_tokens=VOCAB, bigram_buckets=BUCKETS)
    file = HERE / "record_parity.json"
    sections = json.loads(file.read_text())["sections"] if section and file.exists() else {}
    for name in SECTIONS if section is None else (section,):
        sections[name] = SECTIONS[name](record)
    write_result("record_parity", "record_parity --script train_gpt.py", sections=sections)
    write_text(HERE / "record_parity.md", page(json.loads(file.read_text())))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
