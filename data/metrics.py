"""The names of what metrics.jsonl holds: the reporter writes them, dashboards plot them."""

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


def measure_name(role: str, measure: str) -> str:
    """The metric that holds a measure of the group of one role."""
    return f"optim/{role}/{measure}"
