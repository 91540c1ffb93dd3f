"""Banks: parameters of one group, shape and dtype as views into one buffer, their gradients into another."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from optim.groups import Kind, ParamGroup
from optim.step import Step


@dataclass(slots=True)
class Bank:
    """K tensors of one shape, stacked: `weights` and `grads` are (lead, ...), lead padded for the world size."""

    group: ParamGroup
    names: list[str]
    shape: torch.Size
    weights: Tensor
    grads: Tensor
    own: slice
    sharded: bool
    step: Step
    kind: Kind = Kind()
    state: dict[str, Tensor] = field(default_factory=dict)
    """Of the owned slice, in the form of the rule: the first dimension is K; for rows and elements the second is cut."""

    @property
    def waits(self) -> bool:
        """Whether gradients add up over several steps before they are used."""
        return self.group.config.update_every > 1

    def is_due(self, count: int) -> bool:
        """Whether step `count`, 1 at the first, uses the gradients."""
        return count % self.group.config.update_every == 0

    def stacked(self, lead: Tensor) -> Tensor:
        """A whole-bank tensor (lead, ...) without its padding, as one part per parameter: (K, *part_shape)."""
        units = self._units()
        parts = lead[:len(self.names) * units]
        return parts.reshape(len(self.names), *self.part_shape(lead))

    def part_shape(self, lead: Tensor) -> tuple[int, ...]:
        """What one parameter has of a bank tensor (lead, ...): its own shape, if it is a number per element."""
        units, rest = self._units(), lead.shape[1:]
        if units * rest.numel() == self.shape.numel():
            return tuple(self.shape)
        return tuple(rest) if units == 1 and self.group.scope == "matrix" else (units, *rest)

    def _units(self) -> int:
        """First-dimension entries of one parameter: matrices, rows or elements."""
        scope = self.group.scope
        return {"matrix": self.kind.blocks, "row": self.shape[:-1].numel(), "element": self.shape.numel()}[scope]

    def name_at(self, lead: int) -> str:
        """The parameter that a first-dimension entry belongs to."""
        return self.names[lead // self._units()]

    def as_matrices(self, lead: Tensor) -> Tensor:
        """Any slice of the bank as stacked matrices (k, m, n), the form that norms and rules expect."""
        return lead if lead.ndim == 3 else lead.reshape(1, -1, lead.size(-1) if lead.ndim == 2 else 1)

    def lead(self, state: Tensor) -> Tensor:
        """A state tensor with the dimension first that ranks divide among them."""
        return state if self.group.scope == "matrix" else state.flatten(0, 1)


def lead_view(stack: Tensor, scope: str, blocks: int = 1) -> Tensor:
    """(K, *shape) with the dimension that may be cut first: elements (N,), rows (R, n) or matrices (K b, m / b, n), each cut
    into b blocks of rows."""
    if scope == "element":
        return stack.reshape(-1)
    matrices = stack.reshape(stack.size(0), -1, stack.size(-1) if stack.ndim > 1 else 1)
    return matrices.flatten(0, 1) if scope == "row" else matrices.reshape(-1, matrices.size(1) // blocks, matrices.size(2))


def alike(group: ParamGroup) -> list[list[str]]:
    """Names of a group's parameters, by equal shape, dtype and kind, in order."""
    kinds: dict[tuple, list[str]] = {}
    for name, param in group.params.items():
        kinds.setdefault((param.shape, param.dtype, group.kinds[name]), []).append(name)
    return list(kinds.values())
