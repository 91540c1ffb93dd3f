"""The names of what metrics.jsonl and summary.json hold, and reading metrics.jsonl back.

Every line of metrics.jsonl has METRICS_KEYS; its other keys are those below, `optim/ROLE/MEASURE` and `diag/ROW/MEASURE`.
"""

import json
from pathlib import Path
from typing import Any

METRICS_KEYS = ("step", "tokens", "train_seconds")
SUMMARY_KEYS = (
    "val_loss_nats", "val_bits_per_byte", "best_val_loss_nats", "steps", "tokens", "train_seconds", "wall_seconds",
    "target_loss_nats", "target_step", "target_seconds", "peak_memory_bytes", "parameters", "seed", "config_hash",
    "code_hash", "data_hash", "device", "world_size",
)

TRAIN_LOSS = "train/loss_nats"
VAL_LOSS = "val/loss_nats"
VAL_BITS = "val/bits_per_byte"
STEP_MS = "time/step_ms"
TOKENS_PER_SECOND = "time/tokens_per_second"
MFU = "time/mfu_frac"
MEASURES = ("lr", "update_rms", "weight_rms", "weight_size", "angle")
"""What the optimizer measures of each group, at each validation."""
EQUILIBRIUM = "equilibrium_angle"
"""Beside a group's angle, where layers are measured and weights decay: the angle of rotational equilibrium."""
LAYER_MEASURES = ("stream_rms", "attention_rms", "mlp_rms", "rms", "largest", "spectral", "frobenius", "condition", "angle",
                  "update_ratio", "factor", "factor_least", "factor_greatest")
"""What is measured of layers, matrices and factors: `diag/ROW/MEASURE`."""


def metric_name(role: str, measure: str) -> str:
    """The metric that holds a measure of the group of one role."""
    return f"optim/{role}/{measure}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl; a last line that is still being written, or was cut by a kill, is left out.

    Raises ValueError naming a missing file, or the line that is not a JSON object.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path}; the run's folder, as in runs/NAME, holds it once the run has begun")
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}, is not a JSON object: {line[:60].decode()}")
        records.append(record)
    return records
