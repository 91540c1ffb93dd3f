"""The sharded optimizer: parameters live in banks, and every rank updates its own slice of each.

Parameters of one group, shape and dtype are views into one buffer, their gradients into another, so that collectives
copy nothing and the model knows nothing of it. A bank's first dimension is what its rule allows to cut (elements, rows
or whole matrices), padded to a multiple of the world size. One step: launch every reduce-scatter; for each bank wait,
update the owned slice, launch the all-gather; wait for all. Banks of few elements are all-reduced and updated everywhere.
Rules that need sums over their group first (`Rule.sums`) get them between the two halves.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from optim.bank import Bank, alike, lead_view
from optim.comm import Comm
from optim.finite import AT_ONCE, Watch
from optim.groups import ParamGroup
from optim.measures import Measures, Moments, moments_of, summarise
from optim.rules import Hyper, Rule
from optim.schedule import Values
from optim.step import Step
from optim.weight_average import WeightAverage

SMALL_BANK_ELEMENTS = 16_384  # below this an all-reduce costs less than a scatter and a gather


class ShardedOptimizer:
    """Owns weights, gradients and state of all groups; the only writer of the model's parameters after construction."""

    def __init__(self, groups: list[ParamGroup], comm: Comm, *, compile_updates: bool = False,
                 average: WeightAverage | None = None) -> None:
        """Moves every parameter's storage into a bank and broadcasts rank 0's weights."""
        self.comm = comm
        self.average = average
        self._before: list[Tensor] | None = None
        self.shared = {group.role: {key: tensor.to(comm.device) for key, tensor in group.rule.init_shared().items()}
                       for group in groups}
        self.banks = [self._make_bank(group, names) for group in groups for names in alike(group)]
        self.watch = Watch(self.banks, comm)
        if compile_updates:
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # one graph a bank
        self._update = torch.compile(_update, dynamic=False) if compile_updates else _update

    def _make_bank(self, group: ParamGroup, names: list[str]) -> Bank:
        params = [group.params[name] for name in names]
        step = group.step.along(group.axes[names[0]])
        flat = lead_view(torch.stack([p.detach() for p in params]), group.scope)
        step.enter(flat)
        sharded = self.comm.world_size > 1 and flat.numel() >= SMALL_BANK_ELEMENTS
        padding = -flat.size(0) % self.comm.world_size if sharded else 0
        weights = torch.cat([flat, flat.new_zeros(padding, *flat.shape[1:])]) if padding else flat.clone()
        self.comm.broadcast(weights)
        own = self.comm.slice_of(weights.size(0)) if sharded else slice(0, weights.size(0))
        bank = Bank(group, names, params[0].shape, weights, torch.zeros_like(weights), own, sharded, step)
        for param, weight, grad in zip(params, bank.stacked(weights), bank.stacked(bank.grads), strict=True):
            param.data, param.grad = weight, grad
        memory = bank.as_matrices(weights[own])
        bank.state = step.init_state(memory)
        bank.state |= group.rule.init_state(memory.float() if group.config.state_dtype == "float32" else memory)
        if self.average:
            self.average.init(bank)
        return bank

    def zero_grad(self) -> None:
        """Zero all gradients in place: they stay views into the banks."""
        for bank in self.banks:
            bank.grads.zero_()

    @torch.no_grad()
    def step(self, values: Values, count: int, *, remember: bool = False) -> None:
        """One update from the gradients' sum over ranks; `count` is 1 at the first. The gradients are spent afterwards.

        With `remember`, the weights before it are kept for `measure`. A gradient that is not finite touches no weight: it
        raises NonFiniteError here, or on CUDA, where that would wait for the device, at the next `refuse_non_finite`.
        """
        launched = [self.comm.reduce_scatter(b.grads) if b.sharded else (b.grads, self.comm.all_reduce(b.grads))
                    for b in self.banks]
        hypers = {bank.group.role: self._hyper(bank.group, values, count) for bank in self.banks}
        self._receive_early(launched, hypers, count)
        self._exchange_sums(launched, hypers)
        gathers = []
        self._before = [bank.weights[bank.own].clone() for bank in self.banks] if remember else None
        for index, (bank, (grad, _)) in enumerate(zip(self.banks, launched, strict=True)):
            self._receive(index, launched, count)
            self._update_bank(bank, bank.weights[bank.own], grad, hypers[bank.group.role])
            if self.average:
                self.average.update(bank, count)
            gathers.append(self.comm.all_gather(bank.weights) if bank.sharded else None)
        for gather in gathers:
            if gather is not None:
                gather.wait()

    def _receive_early(self, launched: list, hypers: dict[str, Hyper], count: int) -> None:
        """Wait for the gradients that must be there before any update: all where they are refused at once, else those of
        groups with sums."""
        at_once = self.comm.device.type in AT_ONCE
        for index, bank in enumerate(self.banks):
            if at_once or hypers[bank.group.role].shared:
                self._receive(index, launched, count)
        if at_once:
            self.refuse_non_finite()

    def _receive(self, index: int, launched: list, count: int) -> None:
        """Wait for a bank's gradients, once, and watch them."""
        grad, work = launched[index]
        if work is not None:
            work.wait()
            self.watch.see(index, grad, count)
            launched[index] = grad, None

    def refuse_non_finite(self) -> None:
        """Raise NonFiniteError if any gradient so far was not finite. A collective, which waits for the device."""
        self.watch.refuse()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within, the model has the averaged weights, where they are kept. A collective."""
        if not self.average:
            yield
            return
        with self.average.shown(self.banks, self.comm):
            yield

    def _hyper(self, group: ParamGroup, values: Values, count: int) -> Hyper:
        return hyper_at(group, values, count)._replace(shared=self.shared[group.role])

    def _exchange_sums(self, launched: list, hypers: dict[str, Hyper]) -> None:
        """For rules that need them: sums over all of a group's tensors on all ranks, absorbed into its shared numbers."""
        for role, hyper in hypers.items():
            if not hyper.shared:
                continue
            parts = []
            for bank, (grad, _) in zip(self.banks, launched, strict=True):
                if bank.group.role == role:
                    part = bank.group.rule.sums(*self._seen(bank, bank.weights[bank.own], grad), hyper)
                    parts.append(part if bank.sharded or self.comm.rank == 0 else torch.zeros_like(part))
                    rule = bank.group.rule
            total = torch.stack(parts).sum(0)
            self.comm.all_reduce(total).wait()
            rule.absorb(total, hyper)

    def _seen(self, bank: Bank, own: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Weights, gradients and state of the owned slice as the rule sees them."""
        grad = bank.as_matrices(grad)
        clip = bank.group.clip
        grad = clip(grad) if clip else grad
        weights, grad = bank.as_matrices(own), grad.float() if bank.group.config.state_dtype == "float32" else grad
        return weights, bank.step.constraint.see(weights, grad, bank.state), bank.state

    def _update_bank(self, bank: Bank, own: Tensor, grad: Tensor, hyper: Hyper) -> None:
        if own.numel():
            update = self._update if bank.group.rule.compiles else _update
            update(bank.group.rule, bank.step, *self._seen(bank, own, grad), hyper)

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
        found = {f"shared/{role}/{key}": tensor.reshape(1).clone().cpu()
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
        self.watch.reset()

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


def hyper_at(group: ParamGroup, values: Values, count: int) -> Hyper:
    """The group's numbers at this step, as 0-D tensors."""
    momentum = group.config.momentum if values.momentum is None else values.momentum
    return Hyper(*(torch.tensor(x, dtype=torch.float32) for x in (
        group.config.lr * values.lr, group.config.weight_decay * values.weight_decay, momentum, count)))


def _update(rule: Rule, step: Step, own: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> None:
    rule.update(own, grad, state, hyper, step=step)
