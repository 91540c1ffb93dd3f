"""Bytes that our own kernels move, for the count of a compiled step; of its own kernels Inductor knows them.

The rule is that a kernel reads or writes each tensor that it is handed or returns once. A kernel that does otherwise (adds
into a tensor, reads a few rows of a table) says so beside its definition, by `declare_bytes`.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

Rule = Callable[[Sequence[Tensor]], int]
"""From all tensors of a call, arguments first and results last, to the bytes read and written."""

RULES: dict[str, Rule] = {}


def declare_bytes(name: str, rule: Rule) -> None:
    """Declare the bytes of an operator (`steepest::name`) or of a Triton kernel (its function's name), once for each."""
    assert name not in RULES, f"the bytes of {name} are declared twice"
    RULES[name] = rule


def bytes_moved(name: str, tensors: Sequence[Tensor]) -> int:
    """Return the bytes of one call: the declared ones, else those of each tensor once."""
    return RULES[name](tensors) if name in RULES else sum(tensor_bytes(tensor) for tensor in tensors)


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's entries, each place in memory once: an expanded dimension counts as one entry."""
    extent = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        extent *= size if stride else min(size, 1)
    return extent * tensor.element_size()
