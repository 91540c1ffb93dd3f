"""Metrics: the keys of metrics.jsonl and summary.json, and a reader of metrics.jsonl.

Every line of metrics.jsonl has METRICS_KEYS. Its other keys are those below, `optim/ROLE/MEASURE` and `diag/ROW/MEASURE`.
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
"""Model FLOPs utilisation: floating-point operations per second, as a fraction of the GPUs' bfloat16 peak."""
MEASURES = ("lr", "update_rms", "weight_rms", "weight_size", "angle")
"""Measures of each optimizer group, at each validation: `optim/ROLE/MEASURE`."""
EQUILIBRIUM = "equilibrium_angle"
"""Angle of rotational equilibrium, beside the group's angle; only where layers are measured and weights decay."""
LAYER_MEASURES = ("stream_rms", "attention_rms", "mlp_rms", "rms", "largest", "spectral", "frobenius", "condition", "angle",
                  "update_ratio", "factor", "factor_least", "factor_greatest")
"""Measures of layers, matrices and factors: `diag/ROW/MEASURE`."""


def metric_name(role: str, measure: str) -> str:
    """Return the key of a measure of the optimizer group with this role."""
    return f"optim/{role}/{measure}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all records of a metrics.jsonl.

    Raises ValueError if the file is missing, or a line is no JSON object.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path}; give the folder of a run that has begun, as runs/NAME")
    records = []
    # The part after the last line end is left out: it is being written, or was cut by a kill.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}, is not a JSON object: {line[:60].decode()}")
        records.append(record)
    return records
