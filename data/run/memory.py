"""Memory of a GPU: how many tokens one forward and backward pass may have."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from configs.schema import Run, with_settings

MARGIN_BYTES, MARGIN_SHARE = 1.5 * 2**30, 0.1
"""Left free: temporary tensors of backward pass and update (a table's gradient, Newton-Schulz iterates), and a share of the
free memory for fragments and for the error of the estimate."""
UNMEASURED_TOKENS = 65_536  # tokens of a pass where the free memory is not known


class Portion(Protocol):
    """Sizes of one step: values of the schedule."""

    batch_tokens: int
    sequence_tokens: int


def free_bytes(device: torch.device) -> float:
    """Return the bytes that tensors can still take on a GPU, torch's own unused memory included; inf on other devices."""
    if device.type != "cuda":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def fit_passes(run: Run, shapes: Sequence[Portion], *, world_size: int, free: float,
               activation_bytes: Callable[[int], float]) -> tuple[Run, str]:
    """Return the run with the most `train.micro_tokens` whose activations fit into `free` bytes, and a line for the plan.

    The tokens are a multiple of the longest sequence and divide each rank's batches, so that all passes of a step have one
    shape. `free` is that of the fullest rank, inf where it is not known; `activation_bytes` maps the tokens of a pass to the
    bytes that it stores. Raises ValueError if not even one sequence fits.
    """
    longest = max(shape.sequence_tokens for shape in shapes)
    usable = max(0.0, free * (1 - MARGIN_SHARE) - MARGIN_BYTES)
    batches = [math.ceil(shape.batch_tokens // shape.sequence_tokens / world_size) * shape.sequence_tokens
               for shape in shapes]
    largest = UNMEASURED_TOKENS if free == math.inf else max(batches)
    for micro in range(max(longest, largest // longest * longest), 0, -longest):
        divides = micro == longest or all(batch <= micro or batch % micro == 0 for batch in batches)
        if divides and activation_bytes(micro) <= usable:
            why = "" if free == math.inf else f", as many as fit: weights, gradients and state leave {free / 1e9:.1f} GB"
            return with_settings(run, {"train.micro_tokens": micro}), f"passes of at most {micro:,} tokens{why}"
    raise ValueError(
        f"a pass of {longest:,} tokens stores about {activation_bytes(longest) / 1e9:.1f} GB, but beside weights, gradients "
        f"and optimizer state this GPU has {usable / 1e9:.1f} GB for it; preset speedrun_consumer fits 16 GB, or shorten "
        "--data.sequence_tokens")
