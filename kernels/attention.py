"""Causal attention: three kernels, one signature attend(q, k, v, mask, scale), one meaning of the mask.

Query i sees key j where j <= i, i - j < window, and both are of one document. `dense_mask` and `attend_sdpa` say so in plain
lines; the other kernels have their own form of the same mask.

Shapes: B sequences, T tokens, H heads, D head dimension. N = B T tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from configs.model import Model

Mask = Tensor | BlockMask | tuple[Tensor, int] | None


def document_index(starts_BT: Tensor) -> Tensor:
    """Running number of each token's document, from the flags of the tokens that open one: (B, T) -> (B, T)."""
    return starts_BT.cumsum(dim=1)


def dense_mask(tokens: int, window: int | None, document_BT: Tensor | None, device: torch.device) -> Tensor | None:
    """True where query i sees key j: (B or 1, 1, T, T); None if the mask is causal and no more."""
    if window is None and document_BT is None:
        return None
    i = torch.arange(tokens, device=device)
    visible = (i[:, None] >= i) & (i[:, None] - i < (window or tokens))
    if document_BT is not None:
        visible = visible & (document_BT[:, :, None] == document_BT[:, None, :])
    return visible.view(-1, 1, tokens, tokens)


def attend_sdpa(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, mask: Mask, scale: float) -> Tensor:
    """softmax(scale q k^T + mask) v by PyTorch's fused attention; runs everywhere."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale).transpose(1, 2)


def flex_mask(tokens: int, window: int | None, document_BT: Tensor | None, device: torch.device) -> BlockMask:
    """`dense_mask` for FlexAttention, which skips blocks that are masked whole (Dong et al. 2024, arXiv 2412.05496)."""
    def visible(b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = (i >= j) & (i - j < (window or tokens))
        return near if document_BT is None else near & (document_BT[b, i] == document_BT[b, j])

    batch = None if document_BT is None else document_BT.size(0)
    return create_block_mask(visible, batch, None, tokens, tokens, device=device)


def attend_flex(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, mask: Mask, scale: float) -> Tensor:
    """The same by FlexAttention; trains on CUDA only."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    return flex_attention(q, k, v, block_mask=mask, scale=scale).transpose(1, 2)


def varlen_mask(tokens: int, window: int | None, document_BT: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """Documents as boundaries in the packed stream of N tokens, and the window to the left: for `varlen_attn`."""
    first = F.pad(document_BT[:, 1:] != document_BT[:, :-1], (1, 0), value=True).reshape(-1)
    return F.pad(first.nonzero()[:, 0], (0, 1), value=first.numel()).int(), (window or tokens) - 1


def attend_varlen(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, mask: Mask, scale: float) -> Tensor:
    """The same by packed FlashAttention; CUDA only."""
    from torch.nn.attention.varlen import varlen_attn

    boundaries, left = mask
    q, k, v = (x.flatten(0, 1) for x in (q_BTHD, k_BTHD, v_BTHD))
    longest = q_BTHD.size(1)
    return varlen_attn(q, k, v, boundaries, boundaries, longest, longest, scale=scale, window_size=(left, 0)).view_as(q_BTHD)


class Kernel(NamedTuple):
    """How a kernel writes the mask, from (tokens, window, document, device), and how it attends."""

    mask: Callable[[int, int | None, Tensor | None, torch.device], Mask]
    attend: Callable[[Tensor, Tensor, Tensor, Mask, float], Tensor]


KERNELS = {"sdpa": Kernel(dense_mask, attend_sdpa), "flex": Kernel(flex_mask, attend_flex),
           "varlen": Kernel(varlen_mask, attend_varlen)}


def choose_kernel(config: Model, on_cuda: bool) -> str:
    """The attention kernel by name. Raises ValueError where the asked-for one cannot train on this device."""
    if config.attention in ("flex", "varlen") and not on_cuda:
        raise ValueError(f"--model.attention {config.attention} trains on CUDA only; use sdpa here")
    if config.attention != "auto":
        return config.attention
    return "flex" if on_cuda and (config.window_tokens is not None or config.document_mask) else "sdpa"


def use_flash(config: Model, on_cuda: bool) -> None:
    """Make PyTorch's attention call the asked-for FlashAttention, in the whole process. Raises ValueError where there is
    none."""
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if not on_cuda or activate is None:
        raise ValueError(f"--model.flash {config.flash} needs {'a newer PyTorch' if on_cuda else 'CUDA'}; use default here")
    try:
        activate(config.flash)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"--model.flash {config.flash}: its package is missing or does not run here ({error}); install it, "
                         "or use default") from error
