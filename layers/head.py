"""From the stream to the loss: bounded logits, and what training may ask beside the next token.

Shapes: N tokens, V padded vocabulary, B sequences, T tokens.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ASYMMETRIC = (23.0, 5.0, 7.5)  # height, shift and width of the speedrun's sigmoid, 2025


def softcap(z: Tensor, kind: str, c: float) -> Tensor:
    """Logits bounded by c in absolute value, with slope 1 at 0; `asymmetric` lies in (0, 23) whatever c."""
    if kind == "tanh":
        return c * torch.tanh(z / c)
    if kind == "rational":
        return c * z * (z * z + c * c).rsqrt()
    if kind == "asymmetric":
        height, shift, width = ASYMMETRIC
        return height * torch.sigmoid((z + shift) / width)
    return 2 * c * torch.sigmoid(2 * z / c) - c if kind == "sigmoid" else z


class Terms(NamedTuple):
    """What training asks beside the next token, as 0-D tensors so that a changing number compiles once."""

    mtp: Tensor
    """How many further tokens are predicted: 1.5 is the next but one, and half of the one after."""
    prefix: Tensor
    """Weight of the prefix loss."""


def further_tokens(logits_BTV: Tensor, targets_BT: Tensor, weights: tuple[float, ...], reach: Tensor) -> Tensor:
    """Multi-token prediction with the same head: sum over k of w_k clamp(reach - k + 1, 0, 1) nats of the k-th token after
    the next, within the row (Gloeckle et al. 2024, arXiv 2404.19737; weights as in the speedrun, Dec 2025). 0-D."""
    total = logits_BTV.new_zeros(())
    for k, weight in enumerate(weights, start=1):
        nats = F.cross_entropy(logits_BTV[:, :-k].flatten(0, 1), targets_BT[:, k:].flatten(), reduction="sum")
        total = total + weight * (reach - k + 1).clamp(0, 1) * nats
    return total


def prefix_nats(logits_NV: Tensor, targets_N: Tensor, prefix_of_V: Tensor) -> Tensor:
    """Nats of each target's longest proper prefix that is itself a token, where there is one: partial credit for the right
    letters (speedrun, Jul 2026). 0-D."""
    return F.cross_entropy(logits_NV, prefix_of_V[targets_N], reduction="sum", ignore_index=-1)


def sampled_nats(hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, count: int, cap: tuple[str, float]) -> Tensor:
    """Nats against `count` classes drawn uniformly without replacement, each standing for V / count of them; summed.

    The target is always there and never counted twice. With all classes it is the full cross-entropy (importance
    sampling: Bengio & Senecal 2003; Jean et al. 2015, arXiv 1412.2007). 0-D.
    """
    classes = weight_VC.size(0)
    drawn_S = torch.randperm(classes, device="cpu")[:count].to(targets_N.device)
    wanted_N = softcap((hidden_NC * F.embedding(targets_N, weight_VC).to(hidden_NC.dtype)).sum(-1).float(), *cap)
    others_NS = softcap(F.linear(hidden_NC, weight_VC[drawn_S].to(hidden_NC.dtype)).float(), *cap)
    others_NS = (others_NS + math.log(classes / count)).masked_fill(drawn_S == targets_N[:, None], -math.inf)
    return (torch.logsumexp(torch.cat((wanted_N[:, None], others_NS), dim=1), dim=1) - wanted_N).sum()
