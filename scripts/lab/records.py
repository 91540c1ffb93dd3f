"""Records: one JSON line per run behind a published table, checks of these lines, and Markdown tables."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.cli import parse_row
from configs.notation import raise_if
from configs.presets import PRESETS
from configs.schema import Run
from configs.serialize import config_from_dict, config_hash, config_to_dict, flatten, record_hash, unflatten
from data.run.folder import write_text
from data.run.metrics import SUMMARY_KEYS
from scripts.lab.folders import RunFolder, is_number
from scripts.lab.models import count_parameters
from scripts.lab.sweep import Trial

FORMAT = 1
RECORD_KEYS = {"format", "name", "experiment", "preset", "config", "summary", "environment", "validations"}
ENVIRONMENT_KEYS = ("python", "torch", "cuda", "platform", "cpu", "cores", "gpus", "torch_threads", "git")
VALIDATION_KEYS = {"step": "step", "tokens": "tokens", "train_seconds": "train_seconds", "loss_nats": "val/loss_nats",
                   "bits_per_byte": "val/bits_per_byte"}
"""Keys of a validation in a record, and their keys in metrics.jsonl."""
REQUIRED_NUMBERS = ("steps", "tokens", "train_seconds", "val_loss_nats", "best_val_loss_nats", "seed", "parameters")
REQUIRED_HASHES = ("config_hash", "code_hash", "data_hash")
FINAL_KEYS = {"val_loss_nats": "loss_nats", "val_bits_per_byte": "bits_per_byte", "tokens": "tokens"}
"""Keys of the summary, and the keys of the last validation that must agree with them."""
MAX_CLOSING_SECONDS = 1.0  # the clock may run this long after the last validation, while the training loop ends

BENCHMARKS = ("bench_cpu", "bench_cpu_prose", "bench_gpu", "track3")
"""Presets of the optimization benchmark: fixed model, data and batch; one forward-backward pass per step."""
FREE_SETTINGS = ("preset", "optim.", "schedule.lr", "schedule.momentum", "schedule.weight_decay", "train.steps",
                 "train.micro_tokens", "train.val_every_steps", "train.final_val_every_steps", "train.warmup_steps",
                 "train.weight_average", "train.lookahead", "model.zero_init_projections", "model.init_gain",
                 "model.embed_std", "run.", "log.")
"""Settings that an entry of the benchmark may choose: beginnings of their names. All others are fixed."""


def record_of(run: RunFolder) -> dict[str, Any]:
    """Return the record of a finished run. Raise ValueError if the run has not ended."""
    raise_if(run.summary is None, f"{run.path} has no summary.json: that run has not ended")
    validations = [{key: line.get(metric) for key, metric in VALIDATION_KEYS.items()}
                   for line in run.metrics if line.get("val/loss_nats") is not None]
    # Only chosen keys of the environment: env.json also lists variables of the machine, which may be private.
    return {"format": FORMAT, "name": run.name, "experiment": run.experiment, "preset": run.config["preset"],
            "config": {name: value for name, value in run.config.items() if name not in ("run.name", "run.dir")},
            "summary": {name: run.summary.get(name) for name in SUMMARY_KEYS},
            "environment": {name: run.environment.get(name) for name in ENVIRONMENT_KEYS}, "validations": validations}


def record_of_failure(trial: Trial, error: str) -> dict[str, Any]:
    """Return the record of a failed trial: its config, and the error message without paths of the machine."""
    run = parse_row(trial.preset, [*trial.flags, "--run.seed", str(trial.seed), "--log.experiment", trial.experiment])
    config = {name: value for name, value in flatten(config_to_dict(run)).items() if name not in ("run.name", "run.dir")}
    summary = dict.fromkeys(SUMMARY_KEYS) | {"seed": trial.seed, "config_hash": config_hash(run)}
    message = re.sub(rf"\S*/(?={re.escape(trial.name)}/)", "", error)
    return {"format": FORMAT, "name": trial.name, "experiment": trial.experiment, "preset": trial.preset, "config": config,
            "summary": summary, "environment": {}, "validations": [], "failed": message}


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of a file. Raise ValueError for a missing file, or with the number of a line that is no record."""
    raise_if(not path.is_file(), f"there is no {path}")
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from None
        missing = RECORD_KEYS - set(record if isinstance(record, dict) else ())
        raise_if(bool(missing), f"{path}, line {number}, is not a record: it lacks {', '.join(sorted(missing))}")
        raise_if(record["format"] != FORMAT, f"{path}, line {number}: format {record['format']!r} is not {FORMAT}")
        records.append(record)
    return records


def append_records(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Add the records that the file does not have yet, all or none of them. Return how many were added.

    Two records are the same run if their names and their configs, seed included, are equal. Raise ValueError if the file
    has another run of the same name.
    """
    by_name = {record["name"]: record for record in (read_records(path) if path.is_file() else [])}
    old_count = len(by_name)
    for record in records:
        same_name = by_name.setdefault(record["name"], record)
        raise_if(same_name["summary"]["config_hash"] != record["summary"]["config_hash"],
                 f"{path} has another run named {record['name']}; rename one of them")
    if len(by_name) > old_count:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in by_name.values()))
    return len(by_name) - old_count


def changed_settings(record: Mapping[str, Any]) -> list[str]:
    """Return a message for each fixed setting that a benchmark's record changes; none for a preset that is no benchmark."""
    if record["preset"] not in BENCHMARKS:
        return []
    fixed = flatten(config_to_dict(PRESETS[record["preset"]]()))
    config = flatten(config_to_dict(config_from_dict(unflatten(record["config"]))))
    return [f"{name} is {config[name]!r}, fixed at {value!r}" for name, value in fixed.items()
            if not name.startswith(FREE_SETTINGS) and config[name] != value]


def missing_fields(record: Mapping[str, Any]) -> list[str]:
    """Return a message for each required field that is missing or of a wrong type. A failed run needs none of them."""
    if record.get("failed"):
        return []
    summary, validations = record["summary"], record["validations"]
    errors = [f"summary has no number {name}" for name in REQUIRED_NUMBERS if not is_number(summary.get(name))]
    errors += [f"summary has no {name}" for name in REQUIRED_HASHES if not isinstance(summary.get(name), str)]
    if not validations:
        errors.append("no validations")
    return errors + [f"validation {index} has no number {name}" for index, line in enumerate(validations)
                     for name in VALIDATION_KEYS if not is_number(line.get(name)) and name != "bits_per_byte"]


def record_errors(record: Mapping[str, Any]) -> list[str]:
    """Return a message for each contradiction within one record."""
    # Fields that the checks below read.
    try:
        run = config_from_dict(unflatten(record["config"]))  # raises for a setting that the schema refuses
    except ValueError as error:
        return [str(error)]
    if errors := missing_fields(record):
        return errors

    # The settings: those that the benchmark fixes, and the hash of all.
    errors, summary = changed_settings(record), record["summary"]
    if (own := record_hash(record["config"])) != summary["config_hash"]:
        errors.append(f"config_hash is {summary['config_hash']}, its settings give {own}")
    if record.get("failed"):
        return errors if summary["val_loss_nats"] is None else [*errors, "failed, but has a loss"]
    if run.preset != record["preset"] or run.run.seed != summary["seed"]:
        errors.append(f"preset and seed are {record['preset']} and {summary['seed']}, its settings say {run.preset} and "
                      f"{run.run.seed}")

    # The results.
    errors += validation_errors(record["validations"], summary)
    return errors + (benchmark_errors(run, summary) if record["preset"] in BENCHMARKS else [])


def validation_errors(validations: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[str]:
    """Return a message for each contradiction between summary and validations, and for validations out of order."""
    last = validations[-1]
    if last["step"] != summary["steps"]:
        return [f"the last validation is not at the last step, {summary['steps']}"]
    errors = [f"{name} is {summary.get(name)}, the last validation has {last.get(key)}"
              for name, key in FINAL_KEYS.items() if summary.get(name) != last.get(key)]
    if summary["best_val_loss_nats"] != (best := min(line["loss_nats"] for line in validations)):
        errors.append(f"best_val_loss_nats is {summary['best_val_loss_nats']}, the validations say {best}")
    if not last["train_seconds"] <= summary["train_seconds"] <= last["train_seconds"] + MAX_CLOSING_SECONDS:
        errors.append(f"train_seconds is {summary['train_seconds']}, the last validation has {last['train_seconds']}")
    for key in ("step", "tokens", "train_seconds"):
        values = [line[key] for line in validations]
        if any(late <= early for early, late in zip(values, values[1:], strict=False)):
            errors.append(f"{key} does not rise from validation to validation")
    if not all(math.isfinite(line["loss_nats"]) for line in validations):
        errors.append("a loss is not finite")
    return errors


def benchmark_errors(run: Run, summary: Mapping[str, Any]) -> list[str]:
    """Check the further rules of the optimization benchmark: a whole schedule, one batch per step, the preset's model.

    A run that stops early in a longer schedule is no result: its learning rate has not decayed.
    """
    errors = []
    if summary["steps"] != run.train.steps:
        errors.append(f"ended at step {summary['steps']}, its schedule at {run.train.steps}")
    if summary["tokens"] != summary["steps"] * run.train.batch_tokens:
        errors.append(f"{summary['tokens']} tokens are not {summary['steps']} steps of {run.train.batch_tokens}")
    if summary["parameters"] != (expected := count_parameters(run)):
        errors.append(f"{summary['parameters']} parameters, the model has {expected}")
    return errors


def file_errors(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a message for each error of the records of one file: within a record, and between records."""
    errors = [f"{record['name']}: {error}" for record in records for error in record_errors(record)]
    return errors + cross_record_errors(records)


def cross_record_errors(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a message for each run that appears twice, and for runs of one preset with different data.

    Two runs with the same settings, seed and losses are one sample, even under different names: counting both would make
    the standard deviation too small.
    """
    errors, names, first_of_preset, name_by_losses = [], set(), {}, {}
    for record in records:
        if record.get("failed"):
            continue
        losses = tuple(line.get("loss_nats") for line in record["validations"])
        twin = name_by_losses.setdefault((record["summary"].get("config_hash"), losses), record["name"])
        if twin != record["name"]:
            errors.append(f"{record['name']} is {twin} under another name: same settings, seed and losses")
        if record["name"] in names:
            errors.append(f"{record['name']} is there twice")
        names.add(record["name"])
        first = first_of_preset.setdefault(record["preset"], record)
        data_hash, first_hash = record["summary"].get("data_hash"), first["summary"].get("data_hash")
        if data_hash != first_hash:
            errors.append(f"{record['name']} has data {data_hash}, {first['name']} has {first_hash}")
    return errors


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table."""
    first, *others = ("| " + " | ".join(map(str, cells)) + " |" for cells in (head, *rows))
    return [first, "|---" * len(head) + "|", *others]
