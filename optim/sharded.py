"""The sharded optimizer: parameters live in banks, and every rank updates its own slice of each.

Parameters of one group, shape and dtype are views into one buffer, their gradients into another, so that collectives
copy nothing and the model knows nothing of it. A bank's first dimension is what its rule allows to cut (elements, rows
or whole matrices), padded to a multiple of the world size. One step: launch every reduce-scatter; for each bank wait,
update the owned slice, launch the all-gather; wait for all. Banks of few elements are all-reduced and updated everywhere.
Rules that need sums over their group first (`Rule.sums`) get them between the two halves.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from optim.comm import Comm
from optim.groups import ParamGroup
from optim.measures import Measures, Moments, moments_of, summarise
from optim.rules import Hyper, Rule
from optim.schedule import Values
from optim.step import Step

SMALL_BANK_ELEMENTS = 16_384  # below this an all-reduce costs less than a scatter and a gather


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
    """Of the owned slice, in the form of the rule: the first dimension is K; for rows and elements the second is cut."""

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
        return tuple(rest) if self.group.rule.scope == "matrix" else (units, *rest)

    def _units(self) -> int:
        """First-dimension entries of one parameter: matrices, rows or elements."""
        scope = self.group.rule.scope
        return {"matrix": 1, "row": self.shape[:-1].numel(), "element": self.shape.numel()}[scope]

    def as_matrices(self, lead: Tensor) -> Tensor:
        """Any slice of the bank as stacked matrices (k, m, n), the form that norms and rules expect."""
        return lead if lead.ndim == 3 else lead.reshape(1, -1, lead.size(-1) if lead.ndim == 2 else 1)

    def lead(self, state: Tensor) -> Tensor:
        """A state tensor with the dimension first that ranks divide among them."""
        return state if self.group.rule.scope == "matrix" else state.flatten(0, 1)


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
        self._before: list[Tensor] | None = None
        self.shared = {group.role: group.rule.init_shared() for group in groups}
        self.banks = [self._make_bank(group, names) for group in groups for names in _alike(group)]
        if compile_updates:
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # one graph a bank
        self._update = torch.compile(_update, dynamic=False) if compile_updates else _update

    def _make_bank(self, group: ParamGroup, names: list[str]) -> Bank:
        params = [group.params[name] for name in names]
        flat = _lead_view(torch.stack([p.detach() for p in params]), group.rule.scope)
        sharded = self.comm.world_size > 1 and flat.numel() >= SMALL_BANK_ELEMENTS
        padding = -flat.size(0) % self.comm.world_size if sharded else 0
        weights = torch.cat([flat, flat.new_zeros(padding, *flat.shape[1:])]) if padding else flat.clone()
        self.comm.broadcast(weights)
        own = self.comm.slice_of(weights.size(0)) if sharded else slice(0, weights.size(0))
        bank = Bank(group, names, params[0].shape, weights, torch.zeros_like(weights), own, sharded)
        for param, weight, grad in zip(params, bank.stacked(weights), bank.stacked(bank.grads), strict=True):
            param.data, param.grad = weight, grad
        memory = bank.as_matrices(weights[own])
        bank.state = group.step.init_state(memory)
        bank.state |= group.rule.init_state(memory.float() if group.config.state_dtype == "float32" else memory)
        return bank

    def zero_grad(self) -> None:
        """Zero all gradients in place: they stay views into the banks."""
        for bank in self.banks:
            bank.grads.zero_()

    @torch.no_grad()
    def step(self, values: Values, count: int, *, remember: bool = False) -> None:
        """One update from the gradients' sum over ranks; `count` is 1 at the first. The gradients are spent afterwards.

        With `remember`, the weights before it are kept for `measure`.
        """
        launched = [self.comm.reduce_scatter(b.grads) if b.sharded else (b.grads, self.comm.all_reduce(b.grads))
                    for b in self.banks]
        hypers = {bank.group.role: self._hyper(bank.group, values, count) for bank in self.banks}
        self._exchange_sums(launched, hypers)
        gathers = []
        self._before = [bank.weights[bank.own].clone() for bank in self.banks] if remember else None
        for bank, (grad, work) in zip(self.banks, launched, strict=True):
            work.wait()
            self._update_bank(bank, bank.weights[bank.own], grad, hypers[bank.group.role])
            gathers.append(self.comm.all_gather(bank.weights) if bank.sharded else None)
        for gather in gathers:
            if gather is not None:
                gather.wait()

    def _hyper(self, group: ParamGroup, values: Values, count: int) -> Hyper:
        return hyper_at(group, values, count)._replace(shared=self.shared[group.role])

    def _exchange_sums(self, launched: list, hypers: dict[str, Hyper]) -> None:
        """For rules that need them: sums over all of a group's tensors on all ranks, absorbed into its shared numbers."""
        for role, hyper in hypers.items():
            if not hyper.shared:
                continue
            parts = []
            for bank, (grad, work) in zip(self.banks, launched, strict=True):
                if bank.group.role == role:
                    work.wait()
                    part = bank.group.rule.sums(*self._seen(bank, bank.weights[bank.own], grad), hyper)
                    parts.append(part if bank.sharded or self.comm.rank == 0 else torch.zeros_like(part))
                    rule = bank.group.rule
            total = torch.stack(parts).sum(0)
            self.comm.all_reduce(total).wait()
            rule.absorb(total, hyper)

    def _seen(self, bank: Bank, own: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Weights, gradients and state of the owned slice as the rule sees them."""
        grad = bank.as_matrices(grad)
        wide = bank.group.config.state_dtype == "float32"
        return bank.as_matrices(own), grad.float() if wide else grad, bank.state

    def _update_bank(self, bank: Bank, own: Tensor, grad: Tensor, hyper: Hyper) -> None:
        if own.numel():
            self._update(bank.group.rule, bank.group.step, *self._seen(bank, own, grad), hyper)

    @torch.no_grad()
    def measure(self, values: Values) -> Measures:
        """What the last step did, if it was told to remember; else nothing. A collective: every rank must call it."""
        if self._before is None:
            return {}
        moments: dict[str, list[Moments]] = {}
        for bank, before in zip(self.banks, self._before, strict=True):
            after = bank.weights[bank.own]
            found = moments_of(bank.group.rule.norm, bank.as_matrices(before), bank.as_matrices(after))
            once = bank.sharded or self.comm.rank == 0
            moments.setdefault(bank.group.role, []).append(found if once else found.without_sums())
        self._before = None
        groups = {bank.group.role: bank.group for bank in self.banks}
        return {role: {"lr": groups[role].config.lr * values.lr} | summarise(found, groups[role].elements, self.comm)
                for role, found in moments.items()}

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights and state of every parameter as whole CPU tensors, `weights/NAME` and `NAME`-keyed state: independent
        of the world size. A collective: every rank must call it.
        """
        found = {f"shared/{role}/{key}": tensor.reshape(1).cpu()
                 for role, numbers in self.shared.items() for key, tensor in numbers.items()}
        for bank in self.banks:
            for key, owned in self._owned(bank).items():
                whole = bank.stacked(self._whole(bank, owned)).cpu()
                found |= {f"{key}/{name}": part for name, part in zip(bank.names, whole, strict=True)}
        return found

    def _owned(self, bank: Bank) -> dict[str, Tensor]:
        """What this rank keeps of a bank, the divided dimension first."""
        return {"weights": bank.weights[bank.own]} | {key: bank.lead(tensor) for key, tensor in bank.state.items()}

    def _whole(self, bank: Bank, owned: Tensor) -> Tensor:
        if not bank.sharded:
            return owned.clone()
        whole = owned.new_zeros(bank.weights.size(0), *owned.shape[1:])
        whole[bank.own] = owned
        self.comm.all_gather(whole).wait()
        return whole

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Undo `state_tensors`, at any world size. The caller has checked names and shapes (see `state_shapes`)."""
        for role, numbers in self.shared.items():
            for key, tensor in numbers.items():
                tensor.copy_(tensors[f"shared/{role}/{key}"][0])
        for bank in self.banks:
            for key, owned in self._owned(bank).items():
                whole = owned.new_zeros(bank.weights.size(0), *owned.shape[1:])
                bank.stacked(whole).copy_(torch.stack([tensors[f"{key}/{name}"] for name in bank.names]))
                if key == "weights":
                    bank.weights.copy_(whole)
                else:
                    owned.copy_(whole[bank.own])

    def snapshot(self) -> list[Tensor]:
        """Copies of this rank's weights and state, for `restore`."""
        return [tensor.clone() for tensor in self._all_tensors()]

    @torch.no_grad()
    def restore(self, snapshot: list[Tensor]) -> None:
        """Undo every step since the snapshot was taken."""
        for tensor, saved in zip(self._all_tensors(), snapshot, strict=True):
            tensor.copy_(saved)

    def _all_tensors(self) -> list[Tensor]:
        banks = [tensor for bank in self.banks for tensor in (bank.weights, *bank.state.values())]
        return banks + [tensor for numbers in self.shared.values() for tensor in numbers.values()]

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of `state_tensors`, without communication."""
        shapes = {f"shared/{role}/{key}": (1,) for role, numbers in self.shared.items() for key in numbers}
        for bank in self.banks:
            for key, owned in self._owned(bank).items():
                shapes |= dict.fromkeys((f"{key}/{name}" for name in bank.names), bank.part_shape(owned))
        return shapes


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


def _update(rule: Rule, step: Step, own: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> None:
    rule.update(own, grad, state, hyper, step=step)
