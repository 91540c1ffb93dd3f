"""Banks: parameters of one group that are updated alike, as views into one buffer, and their gradients into another.

One collective then serves a whole bank, and one call updates all of its parameters, without copying; the model uses its
parameters as before. A bank's first dimension is the shard dimension, which ranks divide among themselves. What it counts
depends on the group's scope, the finest piece that can be updated alone:

    element    (N,)             all elements, in a row; the parameters may have different shapes
    row        (R, n)           the rows of all parameters, of one shape
    matrix     (K b, m / b, n)  the matrices of all parameters, of one shape, each cut into b blocks of rows
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optim.comm import DONE, Comm, SparseRows, Work
from optim.groups import ParamGroup, TensorSpec
from optim.rule import Step

SMALL_BANK_ELEMENTS = 16_384  # below it one all-reduce costs less than a reduce-scatter and an all-gather
ALIGNMENT = 16  # elements: parameters of different shapes start at addresses that kernels can read in whole vectors


@dataclass(slots=True, eq=False)
class Bank:
    """K parameters in one buffer, with their gradients and this rank's shard of the optimizer state."""

    group: ParamGroup
    """Group that the parameters belong to."""
    names: list[str]
    """Names of the K parameters, in the order in which they lie in the buffer."""
    shapes: list[torch.Size]
    """Shape of each parameter."""
    parts: list[slice]
    """Entries of the shard dimension that each parameter has: matrices, rows or elements."""
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
    """Spec of the parameters: they share blocks and lr_factor."""
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
    twin: "Bank | None" = None
    """Bank that this one is tied to in this step: it takes that bank's gradient and weights."""
    used: "UsedRows | None" = None
    """Rows that had gradients, for a sharded bank that exchanges only those; else None."""

    def per_parameter(self, whole: Tensor) -> list[Tensor]:
        """View a whole-bank tensor, shard dimension first, as one part per parameter, without padding."""
        return [whole[part].view(shape) for part, shape in zip(self.parts, self.part_shapes(whole), strict=True)]

    def part_shapes(self, tensor: Tensor) -> list[tuple[int, ...]]:
        """Return the shape of each parameter's part of a bank tensor whose shard dimension is first.

        It is the parameter's shape for tensors with one number per element, as weights and momentum.
        """
        return [self._part_shape(shape, part.stop - part.start, tensor.shape[1:])
                for shape, part in zip(self.shapes, self.parts, strict=True)]

    def _part_shape(self, shape: torch.Size, entries: int, entry_shape: torch.Size) -> tuple[int, ...]:
        """Return the shape of a part of `entries` entries of the shard dimension, for a parameter of shape `shape`."""
        if entries * entry_shape.numel() == shape.numel():
            return tuple(shape)
        return tuple(entry_shape) if entries == 1 and self.group.scope == "matrix" else (entries, *entry_shape)

    def name_at(self, entry: int) -> str:
        """Return the name of the parameter that an entry of the shard dimension belongs to."""
        return next(name for name, part in zip(self.names, self.parts, strict=True) if entry < part.stop)

    def shard_dim_first(self, state: Tensor) -> Tensor:
        """Return a view of a state tensor with the shard dimension first: drop the leading 1 of rows and elements."""
        return state if self.group.scope == "matrix" else state.flatten(0, 1)


class UsedRows:
    """Rows of a bank that have had gradients since the last update, as the host knows them."""

    def __init__(self, bank: Bank) -> None:
        self.mask = torch.zeros(len(bank.weights), dtype=torch.bool)
        self._starts = {name: part.start for name, part in zip(bank.names, bank.parts, strict=True)}
        self._steps = 0
        self.announced: SparseRows | None = None

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Add one step's rows, by parameter name, if each parameter has its own: int64 of any shape, with repetitions."""
        if self._starts.keys() <= rows.keys():
            for name, start in self._starts.items():
                self.mask[rows[name].flatten() + start] = True
            self._steps += 1

    def complete(self, period: int) -> bool:
        """True if the rows of all `period` steps since the last update were added."""
        return self._steps == period

    def clear(self) -> None:
        """Forget the rows, after an update or where other gradients have been loaded."""
        self.mask.zero_()
        self._steps, self.announced = 0, None


def make_bank(group: ParamGroup, names: list[str], comm: Comm) -> Bank:
    """Move the storage of parameters into a new bank, with rank 0's weights, zero gradients and the initial state."""
    bank = empty_bank(group, names, world_size=comm.world_size, rank=comm.rank)
    params = [group.params[name] for name in names]
    for param, weight in zip(params, bank.per_parameter(bank.weights), strict=True):
        weight.copy_(param.detach())
    bank.step.project_start(bank.weights[:bank.parts[-1].stop])  # into the constraint set
    # All ranks start from rank 0's weights, whatever each of them has drawn.
    comm.broadcast(bank.weights)
    # Make parameters and gradients views: backward adds into the bank, and an update in place reaches the model.
    for param, weight, grad in zip(params, bank.per_parameter(bank.weights), bank.per_parameter(bank.grads), strict=True):
        param.data, param.grad = weight, grad
    init_state(bank)
    if bank.sharded and group.config.extra.sparse_rows:
        bank.used = UsedRows(bank)
    return bank


def empty_bank(group: ParamGroup, names: list[str], *, world_size: int = 1, rank: int = 0) -> Bank:
    """Return a bank of zeros for these parameters, on their device, without state."""
    params, spec = [group.params[name] for name in names], group.specs[names[0]]
    entries = [shard_view(param[None], group.scope, spec.blocks) for param in params]
    parts = lay_out([len(x) for x in entries], ALIGNMENT if group.scope == "element" else 1)
    length, entry_shape = parts[-1].stop, entries[0].shape[1:]
    # Pad, because reduce-scatter and all-gather need shards of equal size. Padding has gradient 0 and stays 0.
    sharded = world_size > 1 and length * entry_shape.numel() >= SMALL_BANK_ELEMENTS
    length += -length % world_size if sharded else 0
    share = length // world_size
    shard = slice(rank * share, (rank + 1) * share) if sharded else slice(0, length)
    weights = params[0].detach().new_zeros(length, *entry_shape)
    return Bank(group, names, [param.shape for param in params], parts, weights, torch.zeros_like(weights), shard, sharded,
                group.step_for(spec), spec, group.config.longest_period, as_matrices(weights[shard]))


def lay_out(lengths: Sequence[int], alignment: int) -> list[slice]:
    """Return consecutive slices of these lengths, each of which starts at a multiple of `alignment`."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length + -length % alignment)
    return [slice(start, start + length) for start, length in zip(starts, lengths, strict=False)]


def init_state(bank: Bank) -> None:
    """Give a bank the initial state of this rank's shard, from its weights."""
    is_float32 = bank.group.config.state_dtype == "float32"
    bank.state = bank.step.init_state(bank.matrices)
    bank.state |= bank.group.rule.init_state(bank.matrices.float() if is_float32 else bank.matrices)


def rule_gradient(group: ParamGroup, step: Step, grad: Tensor, matrices: Tensor, state: dict[str, Tensor], *,
                  period: Tensor | None) -> Tensor:
    """Return a shard's gradient, of the shape of a bank, in the form that a rule takes: the mean over `period` steps as
    matrices (k, m, n), clipped, in the state's dtype, projected onto the tangent space if the constraint asks for it."""
    grad = as_matrices(grad)
    if period is not None:
        grad = grad / period
    if group.clip is not None:
        grad = group.clip(grad)
    if group.config.state_dtype == "float32":
        grad = grad.float()
    return grad if step.constraint is None else step.constraint.project_gradient(matrices, grad, state)


def as_matrices(shard: Tensor) -> Tensor:
    """Return a slice of a bank as stacked matrices (k, m, n): rows (r, n) as (1, r, n), elements (e,) as (1, e, 1)."""
    return shard if shard.ndim == 3 else shard.reshape(1, -1, shard.size(-1) if shard.ndim == 2 else 1)


def shard_view(stack: Tensor, scope: str, blocks: int = 1) -> Tensor:
    """View stacked parameters (K, *shape) with the shard dimension first: (N,), (R, n) or (K b, m / b, n), by scope."""
    if scope == "element":
        return stack.reshape(-1)
    matrices = stack.reshape(stack.size(0), -1, stack.size(-1) if stack.ndim > 1 else 1)
    return matrices.flatten(0, 1) if scope == "row" else matrices.reshape(-1, matrices.size(1) // blocks, matrices.size(2))


def group_by_update(group: ParamGroup) -> list[list[str]]:
    """Return the names of a group's parameters that one call can update: one list for each bank, in order.

    They have one dtype, step, number of blocks and lr_factor, and one shape unless the scope is element.
    """
    banks: dict[tuple, list[str]] = {}
    for name, param in group.params.items():
        spec, shape = group.specs[name], None if group.scope == "element" else param.shape
        banks.setdefault((shape, param.dtype, group.step_for(spec), spec.blocks, spec.lr_factor), []).append(name)
    return list(banks.values())
