"""Causal attention by three kernels, with one signature attend(q, k, v, mask, scale) and one meaning of the mask.

Query i sees key j if lo(i) <= j <= i, where lo(i) = max(first token of the query's document, i - window + 1). `dense_mask`
and `attend_sdpa` are the plain twin of this rule; `flex_mask` and `varlen_mask` write the same rule in the form that the
other two kernels need. A mask depends on the tokens and the window, not on the layer: layers with the same window share one.

Queries and keys may be narrower than values. Those of sizes that a kernel cannot take are padded with zeros.

Shapes: B sequences, T tokens each, H heads, D head dimension; N = B T tokens in the packed stream; n = ceil(T / BLOCK)
blocks of queries or keys.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from configs.model import Model

Mask = Tensor | BlockMask | tuple[Tensor, int, int] | None

BLOCK = 128  # queries and keys in a block of FlexAttention's tables
# Documents that varlen_mask has room for: B + FREE_DOCUMENTS + N / DOCUMENT_TOKENS. A fixed number keeps one compiled graph;
# each place costs programs that find an empty document. The speedrun has 64, 96, 128 for 16, 32, 48 thousand tokens (2026).
FREE_DOCUMENTS, DOCUMENT_TOKENS = 32, 256
PROBED = torch.device("cuda")  # where FlashAttention is launched before it is chosen; tests set the CPU


def document_first(starts_BT: Tensor) -> Tensor:
    """Return the position of the first token of each token's document, from flags that are True where a document opens:
    (B, T) int64. What stands before the first flag is a document too."""
    opened_BT = starts_BT.cumsum(dim=1)
    return torch.searchsorted(opened_BT, opened_BT)  # where the number of opened documents became what it is here


def dense_mask(tokens: int, window: int | None, first_BT: Tensor | None, device: torch.device,
               longest: int | None = None) -> Tensor | None:
    """Return the mask for `attend_sdpa`: (B or 1, 1, T, T), True where query i sees key j; None if it is only causal.

    `window` counts the query's own token; None: no window. `first_BT` is from `document_first`; None: one document.
    """
    del longest  # of use to varlen_mask
    if window is None and first_BT is None:
        return None
    i = torch.arange(tokens, device=device)
    visible = (i[:, None] >= i) & (i[:, None] - i < (window or tokens))
    if first_BT is not None:
        visible = visible & (i >= first_BT[:, :, None])
    return visible.view(-1, 1, tokens, tokens)


def attend_sdpa(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, mask: Mask, scale: float) -> Tensor:
    """Return softmax(scale q k^T) v over the visible keys, by PyTorch's attention: (B, T, H, D) thrice -> (B, T, H, D).

    Runs on every device. Without a mask it may use FlashAttention; with one it computes all T^2 scores, masked or not.
    """
    qkv = (q_BTHD, k_BTHD, v_BTHD) if v_BTHD.device.type == "cpu" else of_one_width(q_BTHD, k_BTHD, v_BTHD)
    q, k, v = (x.transpose(1, 2) for x in qkv)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale).transpose(1, 2)


def of_one_width(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad queries and keys with zeros to the dimension of the values, which FlashAttention wants; scores stay the same."""
    missing = v_BTHD.size(-1) - q_BTHD.size(-1)
    return (F.pad(q_BTHD, (0, missing)), F.pad(k_BTHD, (0, missing)), v_BTHD) if missing else (q_BTHD, k_BTHD, v_BTHD)


# ---- FlexAttention -------------------------------------------------------------------------------------------------------


def flex_mask(tokens: int, window: int | None, first_BT: Tensor | None, device: torch.device,
              longest: int | None = None) -> BlockMask:
    """Return `dense_mask` as FlexAttention's tables of blocks of scores; blocks without a visible pair are skipped, blocks
    that are visible as a whole are not masked (Dong et al. 2024, arXiv 2412.05496).

    The tables are those of `create_block_mask`, which evaluates all T^2 pairs and sorts. As lo never falls, the blocks that
    a block of queries sees are an interval; so are those that it sees as a whole, and those of queries that see a block.
    """
    del longest
    window = window or tokens

    def visible(b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = (i >= j) & (i - j < window)
        return near if first_BT is None else near & (j >= first_BT[b, i])

    seen_Bn, whole_Bn = block_intervals(tokens, window, first_BT, device)
    tables = *key_tables(seen_Bn, whole_Bn), *query_tables(seen_Bn, whole_Bn)
    return BlockMask((tokens, tokens), *tables, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=visible)


def block_intervals(tokens: int, window: int, first_BT: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return seen and whole, (B or 1, n) each: queries of block i see the blocks seen[i] .. i of keys, and whole[i] .. i - 1
    of them as a whole. Neither falls from block to block."""
    i = torch.arange(-(-tokens // BLOCK), device=device)[None]
    # lo of a block's first query, and of its last, plus 1 to divide upwards.
    lowest, highest = (i * BLOCK - window + 1).clamp_min(0), ((i + 1) * BLOCK - window).clamp_min(0)
    if first_BT is not None:
        first = F.pad(first_BT, (0, i.size(1) * BLOCK - tokens))  # padded with 0: the maximum ignores it
        lowest, highest = torch.maximum(lowest, first[:, ::BLOCK]), torch.maximum(highest, first[:, BLOCK - 1::BLOCK])
    whole = torch.minimum((highest + BLOCK - 1) // BLOCK, i)
    if tokens % BLOCK:  # the last block has queries that do not exist, which see nothing
        whole = torch.where(i == i.size(1) - 1, i, whole)
    return lowest // BLOCK, whole


def key_tables(seen_Bn: Tensor, whole_Bn: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return, by block of queries, number (B, 1, n) and indices (B, 1, n, n) of the blocks of keys that it sees in part,
    then of those that it sees as a whole; int32. Indices beyond the number are any blocks."""
    i = torch.arange(seen_Bn.size(1), device=seen_Bn.device)
    row, seen, whole = i[:, None], seen_Bn[..., None], whole_Bn[..., None]
    partial = torch.where(i < whole - seen, seen + i, row)  # seen .. whole - 1, and the diagonal, which never is whole
    return table(whole_Bn - seen_Bn + 1, partial) + table(i - whole_Bn, torch.minimum(whole + i, row))


def query_tables(seen_Bn: Tensor, whole_Bn: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `key_tables` transposed: by block of keys, the blocks of queries that see it in part, and as a whole."""
    j = torch.arange(seen_Bn.size(1), device=seen_Bn.device)
    # The last block of queries that sees block j, and as a whole (at least j: whole[j] <= j), as seen and whole never fall.
    last_seen, last_whole = ((x[:, :, None] <= j).sum(dim=1) - 1 for x in (seen_Bn, whole_Bn))
    later = last_whole[..., None] + j  # partial: the diagonal, then last_whole + 1 .. last_seen
    partial = torch.where(j == 0, j[:, None], later.clamp_max(len(j) - 1))
    return table(last_seen - last_whole + 1, partial) + table(last_whole - j, (j[:, None] + 1 + j).clamp_max(len(j) - 1))


def table(count_Bn: Tensor, index_Bnn: Tensor) -> tuple[Tensor, Tensor]:
    """Return counts (B, n) and indices (B or 1, n, n) in FlexAttention's form: int32, with an axis for heads."""
    return count_Bn[:, None].int(), index_Bnn.expand(len(count_Bn), -1, -1)[:, None].int()


def attend_flex(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, mask: Mask, scale: float) -> Tensor:
    """Compute `attend_sdpa` by FlexAttention, whose backward pass runs on CUDA only."""
    q, k, v = (x.transpose(1, 2) for x in of_one_width(q_BTHD, k_BTHD, v_BTHD))
    return flex_attention(q, k, v, block_mask=mask, scale=scale).transpose(1, 2)


# ---- FlashAttention on packed documents ----------------------------------------------------------------------------------


def varlen_mask(tokens: int, window: int | None, first_BT: Tensor, device: torch.device,
                longest: int | None = None) -> tuple[Tensor, int, int]:
    """Return the mask for `attend_varlen`: document boundaries in the packed stream, the window's keys to the left, and an
    upper bound of a document's tokens, which is `longest` if that is known: the smaller, the fewer programs find no work.

    The boundaries are int32: the first token of each document, then N until there are as many as the shapes allow, so that
    one compiled graph serves any number of documents. More, or longer ones, are an error on the device, unawaited.
    """
    longest = min(longest or tokens, tokens)
    i = torch.arange(tokens, device=device)
    # Sequences are packed one after another: a sequence's first token always opens a document.
    opened_N = (first_BT == i).flatten().cumsum(0)
    stream, capacity = opened_N.numel(), len(first_BT) + FREE_DOCUMENTS + opened_N.numel() // DOCUMENT_TOKENS
    # Document d begins where more than d have been opened; where that never happens, searchsorted answers N.
    boundaries = torch.searchsorted(opened_N, torch.arange(capacity + 1, device=device), right=True).int()
    torch._assert_async(boundaries[-1] == stream, f"more than {capacity} documents in a pass of {stream} tokens, for which "
                        "--model.attention varlen has no room; use --model.attention flex")
    torch._assert_async(boundaries.diff().max() <= longest, f"a document of more than {longest} tokens, the given bound")
    # `window` counts the query's own token, varlen_attn only the tokens before it; -1: all.
    return boundaries, -1 if window is None or window >= longest else window - 1, longest


def attend_varlen(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, mask: Mask, scale: float) -> Tensor:
    """Compute `attend_sdpa` by FlashAttention on the packed stream of documents; CUDA only."""
    from torch.nn.attention.varlen import varlen_attn

    boundaries, left, longest = mask
    q, k, v = (x.flatten(0, 1) for x in of_one_width(q_BTHD, k_BTHD, v_BTHD))
    return varlen_attn(q, k, v, boundaries, boundaries, longest, longest, scale=scale, window_size=(left, 0)).view_as(v_BTHD)


class Kernel(NamedTuple):
    """An attention kernel: the function that makes its mask and the function that attends."""

    mask: Callable[[int, int | None, Tensor | None, torch.device, int | None], Mask]
    """(tokens, window, first_BT, device, longest) -> mask; `longest` bounds a document's tokens, None: the sequence does."""
    attend: Callable[[Tensor, Tensor, Tensor, Mask, float], Tensor]
    """(q, k, v, mask, scale) -> (B, T, H, D)."""


KERNELS = {"sdpa": Kernel(dense_mask, attend_sdpa), "flex": Kernel(flex_mask, attend_flex),
           "varlen": Kernel(varlen_mask, attend_varlen)}


# ---- The choice ----------------------------------------------------------------------------------------------------------


def choose_kernel(config: Model, on_cuda: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[str, str]:
    """Return the name of the attention kernel, and the reason for the log. Raises ValueError if the configured one cannot
    train on this device. `dtype` is that of the activations.

    auto: where there are documents and FlashAttention 3 runs, varlen, which is the fastest on Hopper; else flex, which skips
    the blocks that a mask hides; sdpa for plain causal attention, and on CPUs.
    """
    if config.attention in ("flex", "varlen") and not on_cuda:
        raise ValueError(f"--model.attention {config.attention} trains on CUDA only; use sdpa here")
    if config.attention != "auto":
        return config.attention, "as configured"
    if not on_cuda or (config.window_tokens is None and not config.document_mask):
        return "sdpa", "no window and no document mask" if on_cuda else "no CUDA device"
    if not config.document_mask or dtype is not torch.bfloat16:
        return "flex", "FlashAttention 3 is used for packed documents in bfloat16 only"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "flex", "FlashAttention 3 needs compute capability 9.0"
    try:
        launch_flash("FA3", "varlen", config.head_dim)
    except (ImportError, RuntimeError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        return "flex", f"FlashAttention 3 does not run here ({first_line})"
    return "varlen", "FlashAttention 3 runs here"


def use_flash(config: Model, on_cuda: bool) -> None:
    """Make PyTorch's attention use the configured version of FlashAttention, for the whole process.

    Raises ValueError if the device, PyTorch or the package for it is missing, or if it fails at its first launch.
    """
    if not on_cuda or not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        raise ValueError(f"--model.flash {config.flash} needs {'a newer PyTorch' if on_cuda else 'CUDA'}; use default here")
    try:
        launch_flash(config.flash, config.attention, config.head_dim)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"--model.flash {config.flash}: its package is missing or does not run here ({error}); install it, "
                         "or use default") from error


def launch_flash(version: str, kernel: str, head_dim: int) -> None:
    """Activate a version of FlashAttention for the process, and launch both its passes on a few tokens: a package can be
    installed, and imported, on a card for which it holds no code. Raises what they raise, with PyTorch's own restored."""
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        raise RuntimeError(f"PyTorch {torch.__version__} has no versions of FlashAttention")
    torch.nn.attention.activate_flash_attention_impl(version)
    try:
        q = torch.ones(1, 32, 1, head_dim, dtype=torch.bfloat16, device=PROBED, requires_grad=True)
        first_BT = torch.zeros(1, 32, dtype=torch.int64, device=PROBED)
        mask = None if kernel == "sdpa" else KERNELS[kernel].mask(32, 16, first_BT, PROBED)
        KERNELS[kernel].attend(q, q, q, mask, 1.0).sum().backward()
        torch.cuda.synchronize()  # only then are errors of the launch known
    except RuntimeError:
        torch.nn.attention.restore_flash_attention_impl()
        raise
