"""What may happen to heads beside softmax(q k) v: gates, exclusions, pairs, offsets, mixtures. All start as the identity.

Shapes: B sequences, T tokens, C model dimension, H heads, D head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Model
from layers.basic import parameter, rms_norm
from layers.kernels import document_index

GATE_DIMS = 12  # gates of heads read so many leading dimensions of the layer's input (speedrun, Aug 2025)
VALUE_GATE_DIMS = 6  # gates of value embeddings read so many of the input and of the embedding (speedrun, Jan 2026)


class HeadGates(nn.Module):
    """y_h <- 2 sigmoid(w_h . x) y_h: a head can say that it found nothing (speedrun, Aug 2025)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.dims = min(GATE_DIMS, config.dim)
        self.weight = parameter(torch.zeros(config.dim // config.head_dim, self.dims), "gate")

    def forward(self, y_BTHD: Tensor, x_BTC: Tensor) -> Tensor:
        """(B, T, H, D), (B, T, C) -> (B, T, H, D)."""
        gate_BTH = 2 * F.linear(x_BTC[..., :self.dims], self.weight.to(x_BTC.dtype)).sigmoid()
        return y_BTHD * gate_BTH[..., None]


class ExclusiveHeads(nn.Module):
    """XSA: y_h loses the share tanh(alpha_h) of its component along the token's own value, which the stream has already.

    arXiv 2603.09078, with a learned share (speedrun, 2026).
    """

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.alpha = parameter(torch.zeros(config.dim // config.head_dim), "scalar")

    def forward(self, y_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
        """(B, T, H, D) twice -> (B, T, H, D)."""
        along = (y_BTHD * v_BTHD).sum(-1, keepdim=True) / v_BTHD.square().sum(-1, keepdim=True).clamp_min(1e-8)
        return y_BTHD - self.alpha.tanh()[:, None].to(y_BTHD.dtype) * along * v_BTHD


class ValueGates(nn.Module):
    """v_h + 2 sigmoid(w_h . [x, e]) e_h: a value embedding e, as each head wants it for this token (speedrun, Jan 2026)."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.dims = min(VALUE_GATE_DIMS, config.dim)
        self.weight = parameter(torch.zeros(config.dim // config.head_dim, 2 * self.dims), "gate")

    def forward(self, v_BTHD: Tensor, embed_BTC: Tensor, x_BTC: Tensor) -> Tensor:
        """(B, T, H, D), (B, T, C), (B, T, C) -> (B, T, H, D)."""
        read = torch.cat((x_BTC[..., :self.dims], embed_BTC[..., :self.dims]), dim=-1)
        gate_BTH = 2 * F.linear(read, self.weight.to(read.dtype)).sigmoid()
        return v_BTHD + gate_BTH[..., None] * embed_BTC.view_as(v_BTHD)


class ValueMix(nn.Module):
    """a v + b e of a value embedding e, a and b learned from 1/2 (speedrun, Dec 2024)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = parameter(torch.tensor([0.5, 0.5]), "scalar")

    def forward(self, v_BTHD: Tensor, embed_BTC: Tensor, x_BTC: Tensor) -> Tensor:
        """(B, T, H, D), (B, T, C), (B, T, C) -> (B, T, H, D)."""
        del x_BTC
        own, embed = self.weight.to(v_BTHD.dtype)
        return own * v_BTHD + embed * embed_BTC.view_as(v_BTHD)


class DynamicHeads(nn.Module):
    """Heads read through each other's eyes: with A_h(t, s) the attention of head h, y_h(t) gains

        b_h(t) sum_s [sum_g a_g(t) A_g(t, s)] v_h(s),    a = rms_norm(1 + W_a x), b = W_b x, starting at b = 0.

    Dynamic head composition (Xiao et al. 2024, arXiv 2405.08553) in the speedrun's form of 2026: rank one, by the query's
    token alone, over the last `dynamic_window` tokens w, whose attention is normalised among themselves. Queries in blocks
    of w see their own block and the one before, so that B H T 2w attention is materialised.
    """

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.window = config.dynamic_window
        self.weight = parameter(torch.zeros(2 * config.dim // config.head_dim, config.dim), "gate")

    def forward(self, qkv_BTHD: tuple[Tensor, Tensor, Tensor], x_BTC: Tensor, starts_BT: Tensor | None,
                scale: float) -> Tensor:
        """Queries, keys, values (B, T, H, D) and the layer's input (B, T, C) -> what y gains, (B, T, H, D)."""
        T, w = x_BTC.size(1), min(self.window, x_BTC.size(1))
        q, k, v = (in_blocks(x.float(), w) for x in qkv_BTHD)  # (B, N, w, H, D)
        read, write = F.linear(x_BTC, self.weight.to(x_BTC.dtype)).float().chunk(2, dim=-1)
        scores_BNHts = torch.einsum("bnthd,bnshd->bnhts", q, with_previous(k)) * scale
        attention = scores_BNHts.masked_fill(~near_mask(T, w, starts_BT, q.device), -torch.inf).softmax(-1)
        mixed = torch.einsum("bnth,bnhts->bnts", in_blocks(rms_norm(1 + read), w), attention)
        y = torch.einsum("bnts,bnshd->bnthd", mixed, with_previous(v)).flatten(1, 2)[:, :T]
        return (y * write[..., None]).type_as(qkv_BTHD[2])


def in_blocks(x_BT: Tensor, size: int) -> Tensor:
    """(B, T, ...) -> (B, N, size, ...), zeros after the end."""
    missing = -x_BT.size(1) % size
    return F.pad(x_BT, (0, 0) * (x_BT.ndim - 2) + (0, missing)).unflatten(1, (-1, size))


def with_previous(x_BNw: Tensor) -> Tensor:
    """Each block behind the one before it, the first behind zeros: (B, N, w, ...) -> (B, N, 2w, ...)."""
    return torch.cat((torch.cat((torch.zeros_like(x_BNw[:, :1]), x_BNw[:, :-1]), dim=1), x_BNw), dim=2)


def near_mask(tokens: int, window: int, starts_BT: Tensor | None, device: torch.device) -> Tensor:
    """True where a block's query i may see key j of its own block or the one before: i - window < j <= i, j >= 0, same
    document. (B or 1, N, 1, w, 2w)."""
    i = in_blocks(torch.arange(-(-tokens // window) * window, device=device)[None], window)[..., None]
    j = torch.cat((i - window, i), dim=2).transpose(2, 3)
    seen = (j <= i) & (i - j < window) & (j >= 0)
    if starts_BT is not None:
        document = in_blocks(document_index(starts_BT), window)
        seen = seen & (document[..., None] == with_previous(document)[:, :, None])
    return seen[:, :, None]


def pair_heads(x_BTHD: Tensor) -> Tensor:
    """Heads h and h + H/2 as one of twice the length, tokens t of both next to each other: (B, T, H, D) -> (B, 2T, H/2, D).

    So a query sees the keys of both: those of earlier tokens, and of its own token the first head's, or both (speedrun,
    Dec 2025).
    """
    B, T, H, D = x_BTHD.shape
    return x_BTHD.reshape(B, 2 * T, H // 2, D)


def unpair_heads(x_BTHD: Tensor) -> Tensor:
    """The inverse: (B, 2T, H/2, D) -> (B, T, H, D)."""
    B, T, H, D = x_BTHD.shape
    return x_BTHD.reshape(B, T // 2, 2 * H, D)


def offset_keys(k_BTHD: Tensor, still_D: Tensor, starts_BT: Tensor | None) -> Tensor:
    """The dimensions of keys that rotary embedding leaves alone (`still_D`) taken from the token before, within a document:
    what followed the present token earlier is found in one layer (speedrun, Dec 2025)."""
    previous = torch.cat((k_BTHD[:, :1], k_BTHD[:, :-1]), dim=1)
    take = still_D if starts_BT is None else still_D & ~starts_BT[:, :, None, None]
    return torch.where(take, previous, k_BTHD)
