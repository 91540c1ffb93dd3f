"""Records: one JSON line per run that a table rests on, what each must satisfy, and tables made from them alone."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.cli import parse_row
from configs.presets import PRESETS
from configs.schema import Run
from configs.serialize import config_from_dict, config_hash, config_to_dict, flatten, record_hash, unflatten
from data.run.folder import write_text
from data.run.metrics import SUMMARY_KEYS
from scripts.lab.folders import RunFolder, is_number
from scripts.lab.models import count_parameters
from scripts.lab.sweep import Trial

FORMAT = 1
ENVIRONMENT = ("python", "torch", "cuda", "platform", "cpu", "cores", "gpus", "torch_threads", "git")
VALIDATION = {"step": "step", "tokens": "tokens", "train_seconds": "train_seconds", "loss_nats": "val/loss_nats",
              "bits_per_byte": "val/bits_per_byte"}
NUMBERS = ("steps", "tokens", "train_seconds", "val_loss_nats", "best_val_loss_nats", "seed", "parameters")
HASHES = ("config_hash", "code_hash", "data_hash")
LAST = {"val_loss_nats": "loss_nats", "val_bits_per_byte": "bits_per_byte", "tokens": "tokens"}
CLOSING_SECONDS = 1.0  # what the timed loop may take to end after its last validation

BENCHMARKS = ("bench_cpu", "bench_cpu_prose", "bench_gpu", "track3")
"""Presets of the optimization benchmark: fixed model, data and batch; one forward-backward a step."""
FREE = ("preset", "optim.", "schedule.lr", "schedule.momentum", "schedule.weight_decay", "train.steps", "train.micro_tokens",
        "train.val_every_steps", "train.final_val_every_steps", "train.warmup_steps", "train.weight_average",
        "train.lookahead", "model.zero_init_projections", "model.init_gain", "model.embed_std", "run.", "log.")
"""What an entry of the benchmark may choose: settings by name, or by the beginning of their names."""


def record_of(run: RunFolder) -> dict[str, Any]:
    """The record of a run that has ended. Raises ValueError for one that has not."""
    if run.summary is None:
        raise ValueError(f"{run.path} has no summary.json: that run has not ended")
    validations = [{ours: line.get(theirs) for ours, theirs in VALIDATION.items()}
                   for line in run.metrics if line.get("val/loss_nats") is not None]
    return {"format": FORMAT, "name": run.name, "experiment": run.experiment, "preset": run.config["preset"],
            "config": {name: value for name, value in run.config.items() if name not in ("run.name", "run.dir")},
            "summary": {name: run.summary.get(name) for name in SUMMARY_KEYS},
            "environment": {name: run.environment.get(name) for name in ENVIRONMENT}, "validations": validations}


def record_of_failure(trial: Trial, error: str) -> dict[str, Any]:
    """The record of a trial that broke down: what was to be run, and why there is no result, without the machine's paths."""
    run = parse_row(trial.preset, [*trial.flags, "--run.seed", str(trial.seed), "--log.experiment", trial.experiment])
    config = {name: value for name, value in flatten(config_to_dict(run)).items() if name not in ("run.name", "run.dir")}
    summary = dict.fromkeys(SUMMARY_KEYS) | {"seed": trial.seed, "config_hash": config_hash(run)}
    told = re.sub(rf"\S*/(?={re.escape(trial.name)}/)", "", error)
    return {"format": FORMAT, "name": trial.name, "experiment": trial.experiment, "preset": trial.preset, "config": config,
            "summary": summary, "environment": {}, "validations": [], "failed": told}


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file. Raises ValueError naming the file, or the line that is no record."""
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from None
        keys = set(record) if isinstance(record, dict) else set()
        missing = {"format", "name", "experiment", "preset", "config", "summary", "environment", "validations"} - keys
        if missing or record["format"] != FORMAT:
            raise ValueError(f"{path}, line {number}, is no record of format {FORMAT}: lacks {sorted(missing) or 'it'}")
        records.append(record)
    return records


def append_records(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Add the records that the file does not hold yet, all or nothing; how many were added.

    A run is the same where its configuration, seed included, and its name are. Raises ValueError where the file holds
    another run of one's name.
    """
    known = {record["name"]: record for record in (read_records(path) if path.is_file() else [])}
    held = len(known)
    for record in records:
        old = known.setdefault(record["name"], record)
        if old["summary"]["config_hash"] != record["summary"]["config_hash"]:
            raise ValueError(f"{path} holds another run named {record['name']}; rename one of them")
    if len(known) > held:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in known.values()))
    return len(known) - held


def configuration(record: Mapping[str, Any]) -> Run:
    """The run that a record describes. Raises ValueError for settings that the schema refuses."""
    return config_from_dict(unflatten(record["config"]))


def changed_settings(record: Mapping[str, Any]) -> list[str]:
    """What a benchmark's record changed of that which is fixed there; nothing for other presets."""
    if record["preset"] not in BENCHMARKS:
        return []
    fixed = flatten(config_to_dict(PRESETS[record["preset"]]()))
    mine = flatten(config_to_dict(configuration(record)))
    return [f"{name} is {mine[name]!r}, fixed at {value!r}" for name, value in fixed.items()
            if not name.startswith(FREE) and mine[name] != value]


def holes(record: Mapping[str, Any]) -> list[str]:
    """Entries that are missing or of another kind than a record's; nothing where all that is judged is there, or where the
    run failed and there is nothing to judge."""
    if record.get("failed"):
        return []
    summary, validations = record["summary"], record["validations"]
    found = [f"summary has no number {name}" for name in NUMBERS if not is_number(summary.get(name))]
    found += [f"summary has no {name}" for name in HASHES if not isinstance(summary.get(name), str)]
    found += ["no validations"] if not validations else []
    return found + [f"validation {index} has no number {name}" for index, line in enumerate(validations)
                    for name in VALIDATION if not is_number(line.get(name)) and name != "bits_per_byte"]


def faults(record: Mapping[str, Any]) -> list[str]:
    """All that is wrong with one record; nothing if it holds together."""
    try:
        run = configuration(record)
    except ValueError as error:
        return [str(error)]
    if found := holes(record):
        return found
    found, summary = changed_settings(record), record["summary"]
    if (own := record_hash(record["config"])) != summary["config_hash"]:
        found.append(f"config_hash is {summary['config_hash']}, its settings give {own}")
    if record.get("failed"):
        return found if summary["val_loss_nats"] is None else [*found, "failed, yet has a loss"]
    if run.preset != record["preset"] or run.run.seed != summary["seed"]:
        found.append(f"preset and seed are {record['preset']} and {summary['seed']}, its settings say {run.preset} and "
                     f"{run.run.seed}")
    found += curve_faults(record["validations"], summary)
    return found + (benchmark_faults(run, summary) if record["preset"] in BENCHMARKS else [])


def curve_faults(validations: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[str]:
    """Where the summary says other than the validations, or these do not run forwards to the last step."""
    last = validations[-1]
    if last["step"] != summary["steps"]:
        return [f"the last validation is not at the last step, {summary['steps']}"]
    found = [f"{name} is {summary.get(name)}, the last validation {last.get(key)}"
             for name, key in LAST.items() if summary.get(name) != last.get(key)]
    if summary["best_val_loss_nats"] != (best := min(line["loss_nats"] for line in validations)):
        found.append(f"best_val_loss_nats is {summary['best_val_loss_nats']}, the validations say {best}")
    if not last["train_seconds"] <= summary["train_seconds"] <= last["train_seconds"] + CLOSING_SECONDS:
        found.append(f"train_seconds is {summary['train_seconds']}, the last validation {last['train_seconds']}")
    for key in ("step", "tokens", "train_seconds"):
        values = [line[key] for line in validations]
        if any(late <= early for early, late in zip(values, values[1:], strict=False)):
            found.append(f"{key} does not rise from validation to validation")
    if not all(math.isfinite(line["loss_nats"]) for line in validations):
        found.append("a loss is not finite")
    return found


def benchmark_faults(run: Run, summary: Mapping[str, Any]) -> list[str]:
    """What the optimization benchmark asks beyond: one batch a step, to the end of the run's own schedule; the model."""
    found = []
    if summary["steps"] != run.train.steps:
        found.append(f"ended at step {summary['steps']}, its schedule at {run.train.steps}")
    if summary["tokens"] != summary["steps"] * run.train.batch_tokens:
        found.append(f"{summary['tokens']} tokens are not {summary['steps']} steps of {run.train.batch_tokens}")
    if summary["parameters"] != (wanted := count_parameters(run)):
        found.append(f"{summary['parameters']} parameters, the model has {wanted}")
    return found


def shared_faults(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is wrong between records: runs given twice, and runs of one preset that were not judged on the same data.

    A run of the same settings and seed with the very same losses is no second sample, whatever its name.
    """
    found, seen, data, curves = [], set(), {}, {}
    for record in records:
        if record.get("failed"):
            continue
        losses = tuple(line.get("loss_nats") for line in record["validations"])
        twin = curves.setdefault((record["summary"].get("config_hash"), losses), record["name"])
        if twin != record["name"]:
            found.append(f"{record['name']} is {twin} under another name: same settings, seed and losses")
        if record["name"] in seen:
            found.append(f"{record['name']} is there twice")
        seen.add(record["name"])
        first = data.setdefault(record["preset"], record)
        mine, theirs = (one["summary"].get("data_hash") for one in (record, first))
        if mine != theirs:
            found.append(f"{record['name']} has data {mine}, {first['name']} {theirs}")
    return found


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    first, *others = ("| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows))
    return [first, "|---" * len(head) + "|", *others]
