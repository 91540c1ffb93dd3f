"""Causal attention by three kernels, with one signature attend(q, k, v, mask, scale) and one meaning of the mask.

Query i sees key j if j <= i, i - j < window, and both tokens are in the same document. `dense_mask` and `attend_sdpa` are
the plain twin of this rule; `flex_mask` and `varlen_mask` write the same rule in the form that the other two kernels need.
A mask depends on the tokens and the window, not on the layer: layers with the same window share one.

Shapes: B sequences, T tokens each, H heads, D head dimension; N = B T tokens in the packed stream.
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
    """Return the running number of each token's document, from flags that are True where a document opens: (B, T) int64."""
    return starts_BT.cumsum(dim=1)


def dense_mask(tokens: int, window: int | None, document_BT: Tensor | None, device: torch.device) -> Tensor | None:
    """Return the mask for `attend_sdpa`: (B or 1, 1, T, T), True where query i sees key j; None if it is only causal.

    `window` counts the query's own token; None: no window. `document_BT` is from `document_index`; None: one document.
    """
    if window is None and document_BT is None:
        return None
    i = torch.arange(tokens, device=device)
    visible = (i[:, None] >= i) & (i[:, None] - i < (window or tokens))
    if document_BT is not None:
        visible = visible & (document_BT[:, :, None] == document_BT[:, None, :])
    return visible.view(-1, 1, tokens, tokens)


def attend_sdpa(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, mask: Mask, scale: float) -> Tensor:
    """Return softmax(scale q k^T) v over the visible keys, by PyTorch's attention: (B, T, H, D) thrice -> (B, T, H, D).

    Runs on every device. Without a mask it may use FlashAttention; with one it computes all T^2 scores, masked or not.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale).transpose(1, 2)


def flex_mask(tokens: int, window: int | None, document_BT: Tensor | None, device: torch.device) -> BlockMask:
    """Return `dense_mask` as FlexAttention's table of blocks of scores; blocks without a visible pair are skipped (Dong et
    al. 2024, arXiv 2412.05496)."""
    def visible(b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = (i >= j) & (i - j < (window or tokens))
        return near if document_BT is None else near & (document_BT[b, i] == document_BT[b, j])

    # Without documents one table serves all sequences; heads always share one.
    batch = None if document_BT is None else document_BT.size(0)
    return create_block_mask(visible, batch, None, tokens, tokens, device=device)


def attend_flex(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, mask: Mask, scale: float) -> Tensor:
    """Compute `attend_sdpa` by FlexAttention, whose backward pass runs on CUDA only."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    return flex_attention(q, k, v, block_mask=mask, scale=scale).transpose(1, 2)


def varlen_mask(tokens: int, window: int | None, document_BT: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """Return the mask for `attend_varlen`: document boundaries in the packed stream, and the window's keys to the left.

    The boundaries are (documents + 1,) int32: the first token of each document and, at the end, N.
    """
    # Sequences are packed one after another: a sequence's first token always opens a document.
    is_first_N = F.pad(document_BT[:, 1:] != document_BT[:, :-1], (1, 0), value=True).reshape(-1)
    # `window` counts the query's own token, varlen_attn only the tokens before it.
    return F.pad(is_first_N.nonzero()[:, 0], (0, 1), value=is_first_N.numel()).int(), (window or tokens) - 1


def attend_varlen(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, mask: Mask, scale: float) -> Tensor:
    """Compute `attend_sdpa` by FlashAttention on the packed stream of documents; CUDA only."""
    from torch.nn.attention.varlen import varlen_attn

    boundaries, left = mask
    q, k, v = (x.flatten(0, 1) for x in (q_BTHD, k_BTHD, v_BTHD))
    longest = q_BTHD.size(1)  # an upper bound; the longest document itself would have to be fetched from the device
    return varlen_attn(q, k, v, boundaries, boundaries, longest, longest, scale=scale, window_size=(left, 0)).view_as(q_BTHD)


class Kernel(NamedTuple):
    """An attention kernel: the function that makes its mask and the function that attends."""

    mask: Callable[[int, int | None, Tensor | None, torch.device], Mask]
    """(tokens, window, document_BT, device) -> mask."""
    attend: Callable[[Tensor, Tensor, Tensor, Mask, float], Tensor]
    """(q, k, v, mask, scale) -> (B, T, H, D)."""


KERNELS = {"sdpa": Kernel(dense_mask, attend_sdpa), "flex": Kernel(flex_mask, attend_flex),
           "varlen": Kernel(varlen_mask, attend_varlen)}


def choose_kernel(config: Model, on_cuda: bool) -> str:
    """Return the name of the attention kernel. Raises ValueError if the configured one cannot train on this device."""
    if config.attention in ("flex", "varlen") and not on_cuda:
        raise ValueError(f"--model.attention {config.attention} trains on CUDA only; use sdpa here")
    if config.attention != "auto":
        return config.attention
    # sdpa is the fastest for plain causal attention; flex skips the blocks that a window or document mask hides.
    return "flex" if on_cuda and (config.window_tokens is not None or config.document_mask) else "sdpa"


def use_flash(config: Model, on_cuda: bool) -> None:
    """Make PyTorch's attention use the configured version of FlashAttention, for the whole process.

    Raises ValueError if the device, PyTorch or the package for it is missing.
    """
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if not on_cuda or activate is None:
        raise ValueError(f"--model.flash {config.flash} needs {'a newer PyTorch' if on_cuda else 'CUDA'}; use default here")
    try:
        activate(config.flash)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"--model.flash {config.flash}: its package is missing or does not run here ({error}); install it, "
                         "or use default") from error
