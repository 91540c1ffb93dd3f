"""What a step did to a group of tensors, from the weights before and after it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from optim.comm import Comm
from optim.norms import Norm

Measures = dict[str, dict[str, float]]  # role > name > value


class Moments(NamedTuple):
    """Of a stack: squared length of the step, of the old and the new weights, their inner product; and the largest size
    in the rule's norm."""

    moved: float
    old: float
    new: float
    inner: float
    size: float

    def without_sums(self) -> "Moments":
        """For a stack that another rank counts already."""
        return Moments(0, 0, 0, 0, self.size)


def moments_of(norm: Norm, before_Kmn: Tensor, after_Kmn: Tensor) -> Moments:
    """The moments of a step, summed in float64."""
    if after_Kmn.device.type == "mps":  # which has neither float64 nor eigenvalues
        before_Kmn, after_Kmn = before_Kmn.cpu(), after_Kmn.cpu()
    old, new = before_Kmn.double(), after_Kmn.double()
    sums = torch.stack([(new - old).square().sum(), old.square().sum(), new.square().sum(), (old * new).sum()])
    size = norm.size(after_Kmn.float()).max().item() if after_Kmn.numel() else 0.0
    return Moments(*sums.tolist(), size)


def summarise(moments: list[Moments], elements: int, comm: Comm) -> dict[str, float]:
    """Over a group's stacks and all ranks, `elements` in all: update_rms, weight_rms, weight_size (the largest), and angle,
    in radians, between the weights before and after. A collective."""
    moved, old, new, inner = comm.sum(*(sum(m[i] for m in moments) for i in range(4)))
    return {"update_rms": (moved / elements) ** 0.5, "weight_rms": (new / elements) ** 0.5,
            "weight_size": comm.max(max(m.size for m in moments))[0],
            "angle": math.acos(max(-1.0, min(1.0, inner / max((old * new) ** 0.5, 1e-300))))}
