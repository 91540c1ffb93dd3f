"""Banks: the parameters of one group, shape and dtype as views into one buffer, and their gradients into another.

One collective then serves a whole bank, and one batched product updates all of its matrices, without copying; the model
uses its parameters as before. A bank's first dimension is the shard dimension, which ranks divide among themselves. What it
counts depends on the group's scope, the finest piece that can be updated alone:

    element    (N,)             all elements, in a row
    row        (R, n)           the rows of all parameters
    matrix     (K b, m / b, n)  the matrices of all parameters, each cut into b blocks of rows
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from optim.comm import DONE, Comm, Work
from optim.groups import ParamGroup, TensorSpec
from optim.rule import Step

SMALL_BANK_ELEMENTS = 16_384  # below it one all-reduce costs less than a reduce-scatter and an all-gather


@dataclass(slots=True, eq=False)
class Bank:
    """K parameters of one shape in one buffer, with their gradients and this rank's shard of the optimizer state."""

    group: ParamGroup
    """Group that the parameters belong to."""
    names: list[str]
    """Names of the K parameters, in the order in which they lie in the buffer."""
    shape: torch.Size
    """Shape of each parameter."""
    weights: Tensor
    """All weights, shard dimension first, padded with zeros to a multiple of the world size; the parameters are views."""
    grads: Tensor
    """This rank's gradients, of the shape of `weights`; the parameters' `.grad` are views."""
    shard: slice
    """Part of the shard dimension that this rank updates; all of it if the bank is not sharded."""
    sharded: bool
    """True if each rank updates a part; False if every rank updates all."""
    step: Step
    """Update of the weights along a direction, for the parameters' spec."""
    spec: TensorSpec
    """Spec that the K parameters share."""
    update_every: int
    """Most steps over which gradients add up before one update."""
    matrices: Tensor
    """This rank's shard of the weights as stacked matrices (k, m, n), a view: what a rule updates."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """State of this rank's shard as the rule has it: (k, ...) for scope matrix, else (1, rows or elements, ...)."""
    reduced_grad: Tensor | None = None
    """During a step: this rank's shard of the gradients' sum over ranks; valid once `work` was waited for."""
    work: Work = DONE
    """Collective that writes `reduced_grad`."""
    received: bool = False
    """True if this step has waited for `work`."""

    def rule_gradient(self) -> Tensor:
        """Return `reduced_grad` in the form that a rule takes: matrices (k, m, n), clipped, in the state's dtype, projected
        onto the tangent space if the constraint asks for it."""
        grad = as_matrices(self.reduced_grad)
        if self.group.clip is not None:
            grad = self.group.clip(grad)
        if self.group.config.state_dtype == "float32":
            grad = grad.float()
        constraint = self.step.constraint
        return grad if constraint is None else constraint.project_gradient(self.matrices, grad, self.state)

    def per_parameter(self, whole: Tensor) -> Tensor:
        """View a whole-bank tensor, shard dimension first, as (K, *part_shape): one part per parameter, without padding."""
        entries = whole[:len(self.names) * self._entries_per_parameter()]
        return entries.reshape(len(self.names), *self.part_shape(whole))

    def part_shape(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the shape of one parameter's part of a bank tensor whose shard dimension is first.

        It is the parameter's shape for tensors with one number per element, as weights and momentum.
        """
        entries, entry_shape = self._entries_per_parameter(), tensor.shape[1:]
        if entries * entry_shape.numel() == self.shape.numel():
            return tuple(self.shape)
        return tuple(entry_shape) if entries == 1 and self.group.scope == "matrix" else (entries, *entry_shape)

    def _entries_per_parameter(self) -> int:
        """Return how many entries of the shard dimension one parameter has: matrices, rows or elements."""
        return {"matrix": self.spec.blocks, "row": self.shape[:-1].numel(), "element": self.shape.numel()}[self.group.scope]

    def name_at(self, entry: int) -> str:
        """Return the name of the parameter that an entry of the shard dimension belongs to."""
        return self.names[entry // self._entries_per_parameter()]

    def shard_dim_first(self, state: Tensor) -> Tensor:
        """Return a view of a state tensor with the shard dimension first: drop the leading 1 of rows and elements."""
        return state if self.group.scope == "matrix" else state.flatten(0, 1)


def make_bank(group: ParamGroup, names: list[str], comm: Comm) -> Bank:
    """Move the storage of parameters into a new bank, with rank 0's weights, zero gradients and the initial state."""
    # Stack the weights, and bring them into the constraint set.
    params, spec = [group.params[name] for name in names], group.specs[names[0]]
    step = group.step_for(spec)
    stacked = shard_view(torch.stack([p.detach() for p in params]), group.scope, spec.blocks)
    step.project_start(stacked)
    # Pad, because reduce-scatter and all-gather need shards of equal size. Padding has gradient 0 and stays 0.
    sharded = comm.world_size > 1 and stacked.numel() >= SMALL_BANK_ELEMENTS
    padding = -stacked.size(0) % comm.world_size if sharded else 0
    weights = torch.cat([stacked, stacked.new_zeros(padding, *stacked.shape[1:])])
    # All ranks start from rank 0's weights, whatever each of them has drawn.
    comm.broadcast(weights)
    shard = comm.slice_of(weights.size(0)) if sharded else slice(0, weights.size(0))
    bank = Bank(group, names, params[0].shape, weights, torch.zeros_like(weights), shard, sharded, step, spec,
                group.config.longest_period, as_matrices(weights[shard]))
    # Make parameters and gradients views: backward adds into the bank, and an update in place reaches the model.
    for param, weight, grad in zip(params, bank.per_parameter(weights), bank.per_parameter(bank.grads), strict=True):
        param.data, param.grad = weight, grad
    # Initial state, of this rank's shard only.
    bank.state = step.init_state(bank.matrices)
    bank.state |= group.rule.init_state(bank.matrices.float() if group.config.state_dtype == "float32" else bank.matrices)
    return bank


def as_matrices(shard: Tensor) -> Tensor:
    """Return a slice of a bank as stacked matrices (k, m, n): rows (r, n) as (1, r, n), elements (e,) as (1, e, 1)."""
    return shard if shard.ndim == 3 else shard.reshape(1, -1, shard.size(-1) if shard.ndim == 2 else 1)


def shard_view(stack: Tensor, scope: str, blocks: int = 1) -> Tensor:
    """View stacked parameters (K, *shape) with the shard dimension first: (N,), (R, n) or (K b, m / b, n), by scope."""
    if scope == "element":
        return stack.reshape(-1)
    matrices = stack.reshape(stack.size(0), -1, stack.size(-1) if stack.ndim > 1 else 1)
    return matrices.flatten(0, 1) if scope == "row" else matrices.reshape(-1, matrices.size(1) // blocks, matrices.size(2))


def group_by_shape(group: ParamGroup) -> list[list[str]]:
    """Return the names of a group's parameters, by equal shape, dtype and spec: one list for each bank, in order."""
    by_shape: dict[tuple, list[str]] = {}
    for name, param in group.params.items():
        by_shape.setdefault((param.shape, param.dtype, group.specs[name]), []).append(name)
    return list(by_shape.values())
