"""The sharded optimizer: parameters live in banks, and every rank updates its own slice of each.

Parameters of one group, shape and dtype are views into one buffer, their gradients into another, so that collectives
copy nothing and the model knows nothing of it. A bank's first dimension is what its rule allows to cut (elements, rows
or whole matrices), padded to a multiple of the world size. One step: launch every reduce-scatter; for each bank wait,
update the owned slice, launch the all-gather; wait for all. Banks of few elements are all-reduced and updated everywhere.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from optim.comm import Comm
from optim.groups import ParamGroup
from optim.rules import Decay, Hyper, Rule
from optim.schedule import Values

SMALL_BANK_ELEMENTS = 16_384  # below this an all-reduce costs less than a scatter and a gather
Measures = dict[str, dict[str, float]]


class Moments(NamedTuple):
    """Of an owned slice: squared length of the step, of the old and the new weights, their inner product, the size."""

    moved: float
    old: float
    new: float
    inner: float
    size: float


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
    state: dict[str, Tensor] = field(default_factory=dict)

    def stacked(self, lead: Tensor) -> Tensor:
        """A whole-bank tensor (lead, ...) without its padding, as (K, *shape)."""
        count = len(self.names) * self.shape.numel()
        return lead.reshape(-1)[:count].view(len(self.names), *self.shape)

    def as_matrices(self, lead: Tensor) -> Tensor:
        """Any slice of the bank as stacked matrices (k, m, n), the form that norms and rules expect."""
        return lead if lead.ndim == 3 else lead.reshape(1, -1, lead.size(-1) if lead.ndim == 2 else 1)


def _lead_view(stack: Tensor, scope: str) -> Tensor:
    """(K, *shape) with the dimension that may be cut first: elements (N,), rows (R, n) or matrices (K, m, n)."""
    if scope == "element":
        return stack.reshape(-1)
    matrices = stack.reshape(stack.size(0), -1, stack.size(-1) if stack.ndim > 1 else 1)
    return matrices.flatten(0, 1) if scope == "row" else matrices


class ShardedOptimizer:
    """Owns weights, gradients and state of all groups; the only writer of the model's parameters after construction."""

    def __init__(self, groups: list[ParamGroup], comm: Comm, *, compile_updates: bool = False) -> None:
        """Moves every parameter's storage into a bank and broadcasts rank 0's weights."""
        self.comm = comm
        self.banks = [self._make_bank(group, names) for group in groups for names in _alike(group)]
        if compile_updates:
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # one graph a bank
        self._update = torch.compile(_update, dynamic=False) if compile_updates else _update

    def _make_bank(self, group: ParamGroup, names: list[str]) -> Bank:
        params = [group.params[name] for name in names]
        flat = _lead_view(torch.stack([p.detach() for p in params]), group.rule.norm.scope)
        sharded = self.comm.world_size > 1 and flat.numel() >= SMALL_BANK_ELEMENTS
        padding = -flat.size(0) % self.comm.world_size if sharded else 0
        weights = torch.cat([flat, flat.new_zeros(padding, *flat.shape[1:])]) if padding else flat.clone()
        self.comm.broadcast(weights)
        own = self.comm.slice_of(weights.size(0)) if sharded else slice(0, weights.size(0))
        bank = Bank(group, names, params[0].shape, weights, torch.zeros_like(weights), own, sharded)
        for param, weight, grad in zip(params, bank.stacked(weights), bank.stacked(bank.grads), strict=True):
            param.data, param.grad = weight, grad
        bank.state = group.rule.init_state(bank.weights[own])
        return bank

    def zero_grad(self) -> None:
        """Zero all gradients in place: they stay views into the banks."""
        for bank in self.banks:
            bank.grads.zero_()

    @torch.no_grad()
    def step(self, values: Values, count: int, *, measure: bool = False) -> Measures:
        """One update from the gradients' sum over ranks; `count` is 1 at the first. The gradients are spent afterwards.

        Returns, if `measure`, for each group lr, update_rms, weight_rms, weight_size (the largest, in the rule's norm)
        and the step's angle in radians.
        """
        reduced = [self.comm.reduce_scatter(b.grads) if b.sharded else (b.grads, self.comm.all_reduce(b.grads))
                   for b in self.banks]
        gathers, moments = [], []
        for bank, (grad, work) in zip(self.banks, reduced, strict=True):
            work.wait()
            own = bank.weights[bank.own]
            before = own.clone() if measure else None
            self._update_bank(bank, own, grad, hyper_at(bank.group, values, count))
            if before is not None:
                moments.append(_moments(bank, before, own))
            gathers.append(self.comm.all_gather(bank.weights) if bank.sharded else None)
        for gather in gathers:
            if gather is not None:
                gather.wait()
        return self._summarise(moments, values) if measure else {}

    def _update_bank(self, bank: Bank, own: Tensor, grad: Tensor, hyper: Hyper) -> None:
        config = bank.group.config
        decay = Decay(config.decay if config.weight_decay else "none", config.lr)
        state = {name: bank.as_matrices(tensor) for name, tensor in bank.state.items()}
        self._update(bank.group.rule, bank.as_matrices(own), bank.as_matrices(grad), state, hyper, decay)

    def _summarise(self, moments: list[Moments], values: Values) -> Measures:
        """Moments of banks and ranks, as figures per group."""
        found: Measures = {}
        for role in dict.fromkeys(bank.group.role for bank in self.banks):
            banks = [(b, m) for b, m in zip(self.banks, moments, strict=True) if b.group.role == role]
            mine = [m for b, m in banks if b.sharded or self.comm.rank == 0]
            moved, old, new, inner = self.comm.sum(*(sum(m[i] for m in mine) for i in range(4)))
            elements = sum(len(b.names) * b.shape.numel() for b, _ in banks)
            found[role] = {
                "lr": banks[0][0].group.config.lr * values.lr,
                "update_rms": (moved / elements) ** 0.5,
                "weight_rms": (new / elements) ** 0.5,
                "weight_size": self.comm.max(max(m.size for _, m in banks))[0],
                "angle": math.acos(max(-1.0, min(1.0, inner / max((old * new) ** 0.5, 1e-300)))),
            }
        return found

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights and state of every parameter as whole CPU tensors, `weights/NAME` and `NAME`-keyed state: independent
        of the world size. A collective: every rank must call it.
        """
        found = {}
        for bank in self.banks:
            for key, tensor in {"weights": bank.weights[bank.own], **bank.state}.items():
                whole = bank.stacked(self._whole(bank, tensor)).cpu()
                found |= {f"{key}/{name}": part for name, part in zip(bank.names, whole, strict=True)}
        return found

    def _whole(self, bank: Bank, owned: Tensor) -> Tensor:
        if not bank.sharded:
            return owned.clone()
        whole = torch.zeros_like(bank.weights, dtype=owned.dtype)
        whole[bank.own] = owned
        self.comm.all_gather(whole).wait()
        return whole

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Undo `state_tensors`, at any world size. The caller has checked names and shapes (see `state_shapes`)."""
        for bank in self.banks:
            for key in ("weights", *bank.state):
                whole = torch.zeros_like(bank.weights, dtype=tensors[f"{key}/{bank.names[0]}"].dtype)
                bank.stacked(whole).copy_(torch.stack([tensors[f"{key}/{name}"] for name in bank.names]))
                if key == "weights":
                    bank.weights.copy_(whole)
                else:
                    bank.state[key].copy_(whole[bank.own])

    def snapshot(self) -> list[list[Tensor]]:
        """Copies of this rank's weights and state, for `restore`."""
        return [[tensor.clone() for tensor in (bank.weights, *bank.state.values())] for bank in self.banks]

    @torch.no_grad()
    def restore(self, snapshot: list[list[Tensor]]) -> None:
        """Undo every step since the snapshot was taken."""
        for bank, tensors in zip(self.banks, snapshot, strict=True):
            for tensor, saved in zip((bank.weights, *bank.state.values()), tensors, strict=True):
                tensor.copy_(saved)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of `state_tensors`, without communication."""
        return {f"{key}/{name}": tuple(bank.shape)
                for bank in self.banks for key in ("weights", *bank.state) for name in bank.names}


def _alike(group: ParamGroup) -> list[list[str]]:
    """Names of a group's parameters, by equal shape and dtype, in order."""
    kinds: dict[tuple, list[str]] = {}
    for name, param in group.params.items():
        kinds.setdefault((param.shape, param.dtype), []).append(name)
    return list(kinds.values())


def hyper_at(group: ParamGroup, values: Values, count: int) -> Hyper:
    """The group's numbers at this step, as 0-D tensors."""
    momentum = group.config.momentum if values.momentum is None else values.momentum
    return Hyper(*(torch.tensor(x, dtype=torch.float32) for x in (
        group.config.lr * values.lr, group.config.weight_decay * values.weight_decay, momentum, count)))


def _update(rule: Rule, own: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper, decay: Decay) -> None:
    rule.update(own, grad, state, hyper, decay=decay)


def _moments(bank: Bank, before: Tensor, after: Tensor) -> Moments:
    if after.device.type == "mps":  # which has neither float64 nor eigenvalues
        before, after = before.cpu(), after.cpu()
    old, new = before.double(), after.double()
    sums = torch.stack([(new - old).square().sum(), old.square().sum(), new.square().sum(), (old * new).sum()])
    size = bank.group.rule.norm.size(bank.as_matrices(after).float()).max().item() if after.numel() else 0.0
    return Moments(*sums.tolist(), size)
