"""Dynamic head composition: plain lines, and Triton kernels that store no attention weights.

Attention weights A_g(t, s) of all heads g, over the last w tokens of the document, are mixed with weights of the query's
token before they meet the values (Xiao et al. 2024, arXiv 2405.08553, in the speedrun's form of 2026):

    M(t, s) = sum_g a_g(t) A_g(t, s),    u_h(t) = sum_s M(t, s) v_h(s),    y_h(t) = b_h(t) u_h(t).

A program of the forward kernel has ROWS queries and the SPAN keys that they can see. It adds up M over the heads, in
registers, and multiplies it by each head's values. The backward pass computes A again from its logsumexp, which the forward
pass stores. A first kernel gives the gradients by q and a: with G = sum_h dL/du_h v_h^T, the gradient by M,

    dL/da_g(t) = sum_s A_g G,    dL/dscores_g = a_g A_g (G - dL/da_g).

A second has ROWS keys and the SPAN queries that can see them, for the gradients by k and v: each is a sum over queries, so
that no two programs add to one place, and no result depends on their order.

Shapes: B sequences, T tokens, H heads, D head dimension; N blocks of w tokens; t queries and s keys of a block.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import of_one_width

ROWS = 16  # queries, or keys, of a program: with w = 112 they meet 127 of the other kind, which just fit 128
LONGEST_WINDOW = 241  # SPAN is 256 then; more would spill registers


# ---- Plain ---------------------------------------------------------------------------------------------------------------


def dynamic_heads(qkv_BTHD: tuple[Tensor, Tensor, Tensor], ab_BTH: tuple[Tensor, Tensor], *, first_BT: Tensor | None,
                  window: int, scale: float) -> Tensor:
    """Return y above, (B, T, H, D), of queries, keys and values, (B, T, H, D) each, and a and b, (B, T, H) each.

    `first_BT` is from `document_first`, None: one document; `scale` multiplies q . k. Computed in float32, in blocks of w
    queries, each of which sees its own block and the one before: B H T 2w attention weights are stored, not B H T^2.
    """
    a_BTH, b_BTH = ab_BTH
    T, w = a_BTH.size(1), min(window, a_BTH.size(1))
    q, k, v = (in_blocks(x.float(), w) for x in qkv_BTHD)  # (B, N, w, H, D)
    scores_BNHts = torch.einsum("bnthd,bnshd->bnhts", q, with_previous(k)) * scale
    attention = scores_BNHts.masked_fill(~local_mask(T, w, first_BT, q.device), -torch.inf).softmax(-1)
    mixed = torch.einsum("bnth,bnhts->bnts", in_blocks(a_BTH, w), attention)
    u = torch.einsum("bnts,bnshd->bnthd", mixed, with_previous(v)).flatten(1, 2)[:, :T]
    return (u * b_BTH[..., None]).type_as(qkv_BTHD[2])


def in_blocks(x_BT: Tensor, size: int) -> Tensor:
    """Cut into blocks of `size` tokens, padded with zeros at the end: (B, T, ...) -> (B, N, size, ...)."""
    missing = -x_BT.size(1) % size
    return F.pad(x_BT, (0, 0) * (x_BT.ndim - 2) + (0, missing)).unflatten(1, (-1, size))


def with_previous(x_BNw: Tensor) -> Tensor:
    """Prepend to each block the block before it, zeros to the first: (B, N, w, ...) -> (B, N, 2w, ...)."""
    return torch.cat((torch.cat((torch.zeros_like(x_BNw[:, :1]), x_BNw[:, :-1]), dim=1), x_BNw), dim=2)


def local_mask(tokens: int, window: int, first_BT: Tensor | None, device: torch.device) -> Tensor:
    """Return the mask of blockwise attention, (B or 1, N, 1, w, 2w): true where query i sees key j of its own block or the
    one before, that is max(first_BT, i - window + 1) <= j <= i."""
    i = in_blocks(torch.arange(-(-tokens // window) * window, device=device)[None], window)[..., None]
    j = torch.cat((i - window, i), dim=2).transpose(2, 3)
    visible = (j <= i) & (i - j < window) & (j >= 0)
    if first_BT is not None:
        visible = visible & (j >= in_blocks(first_BT, window)[..., None])
    return visible[:, :, None]


# ---- Fused ---------------------------------------------------------------------------------------------------------------


def fused_dynamic_heads(qkv_BTHD: tuple[Tensor, Tensor, Tensor], ab_BTH: tuple[Tensor, Tensor], *, first_BT: Tensor | None,
                        window: int, scale: float) -> Tensor:
    """Compute `dynamic_heads` by the kernels: on CUDA, or in Triton's interpreter. Products are in the dtype of q, k, v with
    sums in float32; D of the values is a power of 2, at least 16, and the window at most LONGEST_WINDOW."""
    q, k, v = (x.contiguous() for x in of_one_width(*qkv_BTHD))
    a_BTH, b_BTH = ab_BTH
    first_BT = torch.zeros_like(a_BTH, dtype=torch.int32)[..., 0] if first_BT is None else first_BT.int()
    u_BTHD, _ = mixed_heads(q, k, v, a_BTH.float().contiguous(), first_BT.contiguous(), window, scale)
    return (u_BTHD * b_BTH[..., None]).type_as(v)


# triton_op: torch.compile traces the launch, so that Inductor plans its buffers and launches it without a detour.
@torch.library.triton_op("steepest::dynamic_heads", mutates_args=())
def mixed_heads(q: Tensor, k: Tensor, v: Tensor, a: Tensor, first: Tensor, window: int,
                scale: float) -> tuple[Tensor, Tensor]:
    """Return u, (B, T, H, D), and the logsumexp of each head's scores, (B, T, H) float32, of contiguous tensors: queries,
    keys, values, a in float32 (B, T, H), and first tokens in int32 (B, T)."""
    u, logsum = torch.empty_like(v), torch.empty_like(a)
    grid, sizes = launch_sizes(q, window)
    torch.library.wrap_triton(triton_kernels()[0])[grid](q, k, v, a, first, u, logsum, q.size(1), window, scale, **sizes)
    return u, logsum


@torch.library.triton_op("steepest::dynamic_heads_backward", mutates_args=())
def mixed_heads_backward(du: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, first: Tensor, logsum: Tensor, window: int,
                         scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients by q, k, v, (B, T, H, D) each, and by a, (B, T, H), from that by u."""
    (dq, dk, dv), da = (torch.empty_like(x) for x in (q, k, v)), torch.empty_like(a)
    grid, sizes = launch_sizes(q, window)
    _, by_queries, by_keys = (torch.library.wrap_triton(kernel) for kernel in triton_kernels())
    by_queries[grid](du, q, k, v, a, first, logsum, dq, da, q.size(1), window, scale, **sizes)
    by_keys[grid](du, q, k, v, a, first, logsum, da, dk, dv, q.size(1), window, scale, **sizes)
    return dq, dk, dv, da


def launch_sizes(q: Tensor, window: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid, a program for each block of ROWS tokens of each sequence, and the kernels' sizes."""
    B, T, H, D = q.shape
    span = max(16, 1 << (ROWS + window - 2).bit_length())  # tl.arange needs a power of two
    launch = {"num_warps": 8 if span > 128 else 4, "num_stages": 2}  # no spilled registers, a test says
    return (-(-T // ROWS), B), {"H": H, "D": D, "ROWS": ROWS, "SPAN": span, **launch}


def save_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Save what the backward pass needs; nothing of it grows with T w."""
    q, k, v, a, first, ctx.window, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, a, first, output[1])


def backward(ctx: torch.autograd.function.FunctionCtx, du: Tensor, _dlogsum: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients by the inputs of `mixed_heads`; its logsumexp has none."""
    return *mixed_heads_backward(du.contiguous(), *ctx.saved_tensors, ctx.window, ctx.scale), None, None, None


mixed_heads.register_autograd(backward, setup_context=save_for_backward)


@functools.cache
def triton_kernels() -> tuple[Callable, Callable, Callable]:
    """Return the kernels of the forward pass, of the gradients by queries and of those by keys. Defined at first use: Triton
    is optional."""
    # Triton looks up the names in a kernel among the globals of its module.
    global tl, visible_pairs, head_numbers, head_rows, store_rows, attention_weights
    import triton
    import triton.language as tl

    # `base` is the index of the sequence's first token, int64: B T H D may exceed 2^31. Offsets from there are int32:
    # half of the registers would hold addresses otherwise.

    @triton.jit
    def visible_pairs(first_ptr, base, i, j, T, window):
        """True where query i sees key j; both have two axes. Queries beyond T see some key too, so that no sum is empty."""
        lowest = tl.maximum(tl.load(first_ptr + base + i, mask=i < T, other=0), i - window + 1)
        return (j <= i) & (j >= lowest)

    @triton.jit
    def head_numbers(ptr, base, tokens, head, T, H: tl.constexpr):
        """Numbers of one head of (B, T, H), 0 beyond the sequence."""
        return tl.load(ptr + base * H + (tokens * H + head), mask=tokens < T, other=0.0)

    @triton.jit
    def head_rows(ptr, base, tokens, head, T, H: tl.constexpr, D: tl.constexpr):
        """Rows of one head of (B, T, H, D) at tokens (rows, 1), zeros outside of the sequence."""
        at = (tokens * H + head) * D + tl.arange(0, D)[None, :]
        return tl.load(ptr + base * H * D + at, mask=(tokens >= 0) & (tokens < T), other=0.0)

    @triton.jit
    def store_rows(ptr, base, tokens, head, T, rows, H: tl.constexpr, D: tl.constexpr):
        """Write what `head_rows` reads."""
        at = (tokens * H + head) * D + tl.arange(0, D)[None, :]
        tl.store(ptr + base * H * D + at, rows.to(ptr.dtype.element_ty), mask=tokens < T)

    @triton.jit
    def attention_weights(left, right, logsum, visible, scale):
        """A, or its transpose, from rows of queries and keys in either order."""
        scores = tl.dot(left, tl.trans(right), input_precision="ieee") * scale  # no TF32: float32 inputs stay exact
        return tl.exp(tl.where(visible, scores - logsum, float("-inf")))

    @triton.jit
    def dynamic_forward(q_ptr, k_ptr, v_ptr, a_ptr, first_ptr, u_ptr, logsum_ptr, T, window, scale: tl.constexpr,
                        H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr):
        """u and the logsumexp of ROWS queries; the SPAN keys end with the last query."""
        base = tl.program_id(1).to(tl.int64) * T
        i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        keys = (tl.program_id(0) + 1) * ROWS - SPAN + tl.arange(0, SPAN)[:, None]
        visible = visible_pairs(first_ptr, base, i, tl.trans(keys), T, window)
        mixed = tl.zeros((ROWS, SPAN), dtype=tl.float32)
        for h in range(H):
            q, k = head_rows(q_ptr, base, i, h, T, H, D), head_rows(k_ptr, base, keys, h, T, H, D)
            scores = tl.where(visible, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
            top = tl.max(scores, 1, keep_dims=True)
            weights = tl.exp(scores - top)
            total = tl.sum(weights, 1, keep_dims=True)
            tl.store(logsum_ptr + base * H + (i * H + h), top + tl.log(total), mask=i < T)
            mixed += weights * (head_numbers(a_ptr, base, i, h, T, H) / total)
        mixed = mixed.to(v_ptr.dtype.element_ty)
        for h in range(H):
            u = tl.dot(mixed, head_rows(v_ptr, base, keys, h, T, H, D), input_precision="ieee")
            store_rows(u_ptr, base, i, h, T, u, H, D)

    @triton.jit
    def dynamic_by_queries(du_ptr, q_ptr, k_ptr, v_ptr, a_ptr, first_ptr, logsum_ptr, dq_ptr, da_ptr, T, window,
                           scale: tl.constexpr, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr):
        """Gradients by q and a of ROWS queries; keys as in `dynamic_forward`."""
        base = tl.program_id(1).to(tl.int64) * T
        i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        keys = (tl.program_id(0) + 1) * ROWS - SPAN + tl.arange(0, SPAN)[:, None]
        visible = visible_pairs(first_ptr, base, i, tl.trans(keys), T, window)
        dmixed = tl.zeros((ROWS, SPAN), dtype=tl.float32)
        for h in range(H):
            du, v = head_rows(du_ptr, base, i, h, T, H, D), head_rows(v_ptr, base, keys, h, T, H, D)
            dmixed = tl.dot(du, tl.trans(v), dmixed, input_precision="ieee")
        for h in range(H):
            q, k = head_rows(q_ptr, base, i, h, T, H, D), head_rows(k_ptr, base, keys, h, T, H, D)
            weights = attention_weights(q, k, head_numbers(logsum_ptr, base, i, h, T, H), visible, scale)
            da = tl.sum(weights * dmixed, 1, keep_dims=True)
            tl.store(da_ptr + base * H + (i * H + h), da, mask=i < T)
            dscores = (head_numbers(a_ptr, base, i, h, T, H) * scale) * weights * (dmixed - da)
            store_rows(dq_ptr, base, i, h, T, tl.dot(dscores.to(k.dtype), k, input_precision="ieee"), H, D)

    @triton.jit
    def dynamic_by_keys(du_ptr, q_ptr, k_ptr, v_ptr, a_ptr, first_ptr, logsum_ptr, da_ptr, dk_ptr, dv_ptr, T, window,
                        scale: tl.constexpr, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr):
        """Gradients by k and v of ROWS keys; the SPAN queries begin with the first key. Tiles are keys x queries."""
        base = tl.program_id(1).to(tl.int64) * T
        j = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        queries = tl.program_id(0) * ROWS + tl.arange(0, SPAN)[:, None]
        i = tl.trans(queries)
        visible = visible_pairs(first_ptr, base, i, j, T, window)
        # M again, for the gradient by v. Queries beyond T have a = 0.
        mixed = tl.zeros((ROWS, SPAN), dtype=tl.float32)
        for h in range(H):
            q, k = head_rows(q_ptr, base, queries, h, T, H, D), head_rows(k_ptr, base, j, h, T, H, D)
            weights = attention_weights(k, q, head_numbers(logsum_ptr, base, i, h, T, H), visible, scale)
            mixed += head_numbers(a_ptr, base, i, h, T, H) * weights
        mixed = mixed.to(v_ptr.dtype.element_ty)
        for h in range(H):
            dv = tl.dot(mixed, head_rows(du_ptr, base, queries, h, T, H, D), input_precision="ieee")
            store_rows(dv_ptr, base, j, h, T, dv, H, D)
        # The gradient by M, then by k.
        dmixed = tl.zeros((ROWS, SPAN), dtype=tl.float32)
        for h in range(H):
            du, v = head_rows(du_ptr, base, queries, h, T, H, D), head_rows(v_ptr, base, j, h, T, H, D)
            dmixed = tl.dot(v, tl.trans(du), dmixed, input_precision="ieee")
        for h in range(H):
            q, k = head_rows(q_ptr, base, queries, h, T, H, D), head_rows(k_ptr, base, j, h, T, H, D)
            weights = attention_weights(k, q, head_numbers(logsum_ptr, base, i, h, T, H), visible, scale)
            dweights = dmixed - head_numbers(da_ptr, base, i, h, T, H)
            dscores = (head_numbers(a_ptr, base, i, h, T, H) * scale) * weights * dweights
            store_rows(dk_ptr, base, j, h, T, tl.dot(dscores.to(q.dtype), q, input_precision="ieee"), H, D)

    return dynamic_forward, dynamic_by_queries, dynamic_by_keys
