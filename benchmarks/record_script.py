"""Load the public record's script on a CPU: its definitions, in float32, with plain formulas in place of its kernels.

The script (modded-nanogpt's train_gpt.py, commit f411b3d3) stands outside this repository. It is read as text, changed by
`SUBSTITUTIONS`, and its definitions are executed. What is left out: imports, devices, FP8, data files, and every statement
that acts. What comes in its place: one rank, torch.compile as the identity, and the functions of `STAND_INS` below.

    record = load_record(Path("train_gpt.py"), dim=96, vocab_tokens=256, bigram_buckets=250)
    record.GPT, record.TrainingManager, record.training_schedule, ...
"""

import ast
import copy
import math
import re
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.notation import raise_if

HEADS, LAYERS = 6, 11  # fixed in the script
LAST_DEFINITION = "TrainingManager"
# Definitions that need a GPU (FP8 operators) or files (the data loader).
LEFT_OUT = ("mm_t_op", "mm_t_backward_op", "backward_t", "setup_context_t", "_", "Shard", "_load_data_shard",
            "distributed_data_generator")
CONSTANTS = ("polar_express_coeffs", "args", "TRAINING_STAGES", "training_schedule")
# (pattern, replacement, reason). Each must fit, so that another version of the script is refused.
SUBSTITUTIONS = (
    (r"@torch\.compile.*\n", "\n", "eager"),
    (r"torch\.bfloat16\b", "torch.float32", "float32 in place of bfloat16"),
    (r"\.bfloat16\(\)", ".float()", "float32 in place of bfloat16"),
    (r", pin_memory=True", "", "no GPU to copy to"),
    (r"torch\.cuda\.get_device_properties\(.*?\)\)?\.multi_processor_count", "1", "size of a buffer of the FP8 path"),
    # A copy between overlapping slices: compiled code reads the old values, eager code might read new ones.
    (r"(k\[:, :-1, :, self\.head_dim // 2:\])", r"\1.clone()", "overlapping copy"),
    # The update of matrices: weights are float32 themselves, not bfloat16 with the missing 16 bits beside them.
    (r"\.view\(torch\.uint16\)", "", "float32 weights"),
    (r"assert p\.dtype == mantissa\.dtype == torch\.uint16", "", "float32 weights"),
    (r"p_precise_raw = \(p\..*\n", "\n", "float32 weights"),
    (r"p_precise = p_precise_raw\.view\(torch\.float32\)", "p_precise = p", "float32 weights"),
    (r"(?m)^ +(p|mantissa)\.copy_\(.*p_precise_raw.*\n", "\n", "float32 weights"),
)


def load_record(path: Path, *, dim: int, vocab_tokens: int, bigram_buckets: int) -> SimpleNamespace:
    """Return the script's definitions, patched, as attributes; `dim` is the model dimension, a multiple of 48.

    Raises ValueError for a script of another version. `build_prefix_table` needs tiktoken, all else does not.
    """
    raise_if(dim % (8 * HEADS) != 0, f"dim must be a multiple of {8 * HEADS}, got {dim}")
    text = path.read_text()
    for pattern, replacement, _ in SUBSTITUTIONS:
        text, count = re.subn(pattern, replacement, text)
        raise_if(count == 0, f"{path} is another version of the script: {pattern!r} does not occur")
    tree = ast.parse(text)
    names = [getattr(node, "name", "") for node in tree.body]
    raise_if(LAST_DEFINITION not in names, f"{path} is another script: it does not define {LAST_DEFINITION}")
    tree.body = [node for node in tree.body[:names.index(LAST_DEFINITION) + 1] if is_definition(node)]
    namespace = surroundings()
    exec(compile(tree, str(path), "exec"), namespace)
    namespace["args"].bigram_vocab_size, namespace["args"].bigram_dim = bigram_buckets, dim
    namespace["new_model"] = lambda max_tokens: namespace["GPT"](vocab_tokens, LAYERS, HEADS, dim // HEADS, dim, max_tokens)
    namespace |= {"dim": dim, "vocab_tokens": vocab_tokens, "bigram_buckets": bigram_buckets}
    return SimpleNamespace(**namespace)


def is_definition(node: ast.stmt) -> bool:
    """True for functions, classes and constants that run on a CPU."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name not in LEFT_OUT
    return isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in CONSTANTS


def surroundings() -> dict[str, object]:
    """Return the global names that the definitions use: modules, one rank, and the stand-ins of the kernels."""
    # Sizes of the run do not matter here, only that the paths and names are strings.
    system = SimpleNamespace(environ={"DISABLE_FP8": "1"}, path=SimpleNamespace(join=lambda *parts: "/".join(parts)))
    one_rank = SimpleNamespace(is_initialized=lambda: False, get_world_size=lambda: 1, get_rank=lambda: 0)
    try:
        import tiktoken
    except ImportError:
        tiktoken = None
    return {
        "__name__": "record", "torch": torch, "nn": nn, "F": F, "Tensor": Tensor, "math": math, "copy": copy,
        "dataclass": dataclass, "Path": Path, "accumulate": accumulate, "pairwise": pairwise, "tiktoken": tiktoken,
        "os": system, "dist": one_rank, "uuid": SimpleNamespace(uuid4=lambda: ""), "device": torch.device("cpu"),
        "rank": 0, "world_size": 1, "grad_accum_steps": 1, "grad_scale": 1.0, **STAND_INS}


# ---- Plain formulas in place of the kernels -----------------------------------------------------------------------------


def write_product(A: Tensor, B: Tensor, out: Tensor) -> None:
    """Write A B into `out`."""
    out.copy_(A @ B)


def write_gram_polynomial(A: Tensor, alpha: float, beta: float, out: Tensor) -> None:
    """Write beta A + alpha A^2 into `out`."""
    out.copy_(beta * A + alpha * A @ A)


def in_reach(seqlens: Tensor, tokens: int, reach: int) -> Tensor:
    """Return (T, T): True where query i may see key j: of the same document, not later, at most `reach` earlier."""
    position = torch.arange(tokens)
    document = torch.searchsorted(seqlens[1:].contiguous().long(), position, right=True)
    distance = position[:, None] - position
    return (document[:, None] == document) & (distance >= 0) & (distance <= reach)


def attention_weights(q: Tensor, k: Tensor, scale: float, visible: Tensor) -> Tensor:
    """Return the softmax over visible keys, (H, T, T), of queries and keys (T, H, D)."""
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    return scores.masked_fill(~visible, -math.inf).softmax(-1)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, softmax_scale: float,
                     window_size: tuple[int, int], **_: object) -> Tensor:
    """Return causal attention within documents, (T, H, D); of FlashAttention's window: so many keys before one's own."""
    weights = attention_weights(q, k, softmax_scale, in_reach(cu_seqlens_q, len(q), window_size[0]))
    return torch.einsum("hij,jhd->ihd", weights, v).contiguous()


def add_dynamic_composition(base: Tensor, q: Tensor, k: Tensor, v: Tensor, dc_weights: tuple[Tensor, Tensor], _: object, *,
                            scaling: float, window: int, seq_lens: Tensor) -> Tensor:
    """Return `base` plus w2_ih sum_j A_ij v_jh, where A = sum_h w1_ih P_h and P_h are a head's attention weights over the
    last `window` keys. q, k, v are (1, T, H, D), w1 and w2 (1, T, H), the result (1, T, H, D)."""
    w1, w2 = dc_weights
    weights = attention_weights(q[0], k[0], scaling, in_reach(seq_lens, q.size(1), window - 1))
    mixed = torch.einsum("ih,hij->ij", w1[0], weights)
    return base.view_as(v) + w2[..., None] * torch.einsum("ij,jhd->ihd", mixed, v[0])


def relu2_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return relu(x up^T)^2 down, both matrices (hidden, C)."""
    return (x @ up.T).relu().square() @ down


class SoftcappedCrossEntropy:
    """Loss of each token with softcap 23 sigmoid((z + 5) / 7.5): weighted sum over further targets, and the prefix term."""

    @staticmethod
    def apply(x: Tensor, targets: Tensor, mtp_weights: Tensor, prefix_targets: Tensor, prefix_weight: Tensor, head: Tensor,
              *_: float) -> Tensor:
        """Return the losses (N,) of x (N, C), with the head (C, V); targets beyond the end, or below 0, do not count."""
        log_p = (23 * ((x @ head + 5) / 7.5).sigmoid()).log_softmax(-1)
        losses = prefix_weight * nll(log_p, prefix_targets)
        for k, weight in enumerate(mtp_weights):
            losses = losses + weight * nll(log_p, F.pad(targets[k:], (0, k), value=-1))
        return losses


def nll(log_p: Tensor, targets: Tensor) -> Tensor:
    """Return -log p of each row's target, 0 where it is negative."""
    return F.nll_loss(log_p, targets, ignore_index=-1, reduction="none")


STAND_INS = {
    "XXT": lambda A, out: write_product(A, A.mT, out), "XTX": lambda A, out: write_product(A.mT, A, out),
    "ba_plus_cAA": write_gram_polynomial, "ReLUSqrdMLP": relu2_mlp, "FusedSoftcappedCrossEntropy": SoftcappedCrossEntropy,
    "flash_attn_interface": SimpleNamespace(flash_attn_varlen_func=varlen_attention),
    "dc_attention_postonly_nodd_correction_add_base_triton": add_dynamic_composition,
    "transpose_add": lambda src, dst: dst.add_(src.T), "transpose_copy": lambda src, dst: dst.copy_(src.T),
}
