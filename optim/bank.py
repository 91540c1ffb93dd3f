"""Banks: parameters of one group, shape and dtype as views into one buffer, their gradients into another."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from optim.comm import DONE, Comm, Work
from optim.groups import ParamGroup, TensorSpec
from optim.rule import Step

SMALL_BANK_ELEMENTS = 16_384  # below this an all-reduce costs less than a scatter and a gather


@dataclass(slots=True, eq=False)
class Bank:
    """K tensors of one shape, stacked: `weights` and `grads` are (lead, ...), lead padded for the world size."""

    group: ParamGroup
    names: list[str]
    shape: torch.Size
    weights: Tensor
    grads: Tensor
    own: slice
    """This rank's part of the first dimension; all of it where the bank is not sharded."""
    sharded: bool
    step: Step
    spec: TensorSpec
    update_every: int
    """Steps over which gradients add up before they are used."""
    matrices: Tensor
    """The owned weights as stacked matrices (k, m, n), a view."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """Of the owned slice, in the form of the rule: the first dimension is K; for rows and elements the second is cut."""
    gradient: Tensor | None = None
    """During a step: the owned slice of the gradients' sum over ranks, once `work` is waited for."""
    work: Work = DONE
    received: bool = False

    def rule_gradient(self) -> Tensor:
        """The received gradient as the rule gets it: matrices (k, m, n), clipped, in the state's dtype, tangent where the
        constraint says so."""
        grad = as_matrices(self.gradient)
        if self.group.clip is not None:
            grad = self.group.clip(grad)
        if self.group.config.state_dtype == "float32":
            grad = grad.float()
        constraint = self.step.constraint
        return grad if constraint is None else constraint.project_gradient(self.matrices, grad, self.state)

    def stacked(self, lead: Tensor) -> Tensor:
        """A whole-bank tensor (lead, ...) without its padding, as one part per parameter: (K, *part_shape)."""
        parts = lead[:len(self.names) * self._units()]
        return parts.reshape(len(self.names), *self.part_shape(lead))

    def part_shape(self, lead: Tensor) -> tuple[int, ...]:
        """The shape of one parameter's part of a bank tensor (lead, ...): its own shape, if it is a number per element."""
        units, rest = self._units(), lead.shape[1:]
        if units * rest.numel() == self.shape.numel():
            return tuple(self.shape)
        return tuple(rest) if units == 1 and self.group.scope == "matrix" else (units, *rest)

    def _units(self) -> int:
        """First-dimension entries of one parameter: matrices, rows or elements."""
        scope = self.group.scope
        return {"matrix": self.spec.blocks, "row": self.shape[:-1].numel(), "element": self.shape.numel()}[scope]

    def name_at(self, lead: int) -> str:
        """The parameter that a first-dimension entry belongs to."""
        return self.names[lead // self._units()]

    def lead(self, state: Tensor) -> Tensor:
        """A state tensor with the dimension first that ranks divide among them."""
        return state if self.group.scope == "matrix" else state.flatten(0, 1)


def make_bank(group: ParamGroup, names: list[str], comm: Comm) -> Bank:
    """Move the storage of a group's parameters `names` into a bank: rank 0's weights, zero gradients, first state."""
    params, spec = [group.params[name] for name in names], group.specs[names[0]]
    step = group.step_for(spec)
    flat = shard_view(torch.stack([p.detach() for p in params]), group.scope, spec.blocks)
    step.project_start(flat)
    sharded = comm.world_size > 1 and flat.numel() >= SMALL_BANK_ELEMENTS
    padding = -flat.size(0) % comm.world_size if sharded else 0
    weights = torch.cat([flat, flat.new_zeros(padding, *flat.shape[1:])]) if padding else flat.clone()
    comm.broadcast(weights)
    own = comm.slice_of(weights.size(0)) if sharded else slice(0, weights.size(0))
    bank = Bank(group, names, params[0].shape, weights, torch.zeros_like(weights), own, sharded, step, spec,
                group.config.update_every, as_matrices(weights[own]))
    for param, weight, grad in zip(params, bank.stacked(weights), bank.stacked(bank.grads), strict=True):
        param.data, param.grad = weight, grad
    bank.state = step.init_state(bank.matrices)
    bank.state |= group.rule.init_state(bank.matrices.float() if group.config.state_dtype == "float32" else bank.matrices)
    return bank


def as_matrices(lead: Tensor) -> Tensor:
    """Any slice of a bank as stacked matrices (k, m, n), the form that norms and rules expect."""
    return lead if lead.ndim == 3 else lead.reshape(1, -1, lead.size(-1) if lead.ndim == 2 else 1)


def shard_view(stack: Tensor, scope: str, blocks: int = 1) -> Tensor:
    """(K, *shape) with the dimension that may be cut first: elements (N,), rows (R, n) or matrices (K b, m / b, n), each cut
    into b blocks of rows."""
    if scope == "element":
        return stack.reshape(-1)
    matrices = stack.reshape(stack.size(0), -1, stack.size(-1) if stack.ndim > 1 else 1)
    return matrices.flatten(0, 1) if scope == "row" else matrices.reshape(-1, matrices.size(1) // blocks, matrices.size(2))


def group_by_shape(group: ParamGroup) -> list[list[str]]:
    """Names of a group's parameters, by equal shape, dtype and spec, in order."""
    by_shape: dict[tuple, list[str]] = {}
    for name, param in group.params.items():
        by_shape.setdefault((param.shape, param.dtype, group.specs[name]), []).append(name)
    return list(by_shape.values())
