"""The sharded optimizer: parameters live in banks, and every rank updates its own slice of each.

Parameters of one group, shape and dtype are views into one buffer, their gradients into another, so that collectives
copy nothing and the model knows nothing of it. A bank's first dimension is what its rule allows to cut (elements, rows
or whole matrices), padded to a multiple of the world size. One step: launch every reduce-scatter; for each bank wait,
update the owned slice, launch the all-gather; wait for all. Banks of few elements are all-reduced and updated everywhere.
Rules that need sums over their group first (`Rule.sums`) get them between the two halves.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from optim.bank import Bank, alike, lead_view
from optim.comm import Comm, Work
from optim.finite import AT_ONCE, Watch
from optim.groups import ParamGroup
from optim.lookahead import Lookahead
from optim.measures import Measures, Moments, moments_by_tensor, moments_of, summarise, turn
from optim.memory import Memory
from optim.rules import Hyper, Rule
from optim.schedule import Values
from optim.step import Step
from optim.weight_average import WeightAverage

Launched = dict[int, tuple[Tensor, Work | None]]  # by bank: the gradient to be, and what to wait for, None once waited
SMALL_BANK_ELEMENTS = 16_384  # below this an all-reduce costs less than a scatter and a gather


class ShardedOptimizer:
    """Owns weights, gradients and state of all groups; the only writer of the model's parameters after construction."""

    def __init__(self, groups: list[ParamGroup], comm: Comm, *, compile_updates: bool = False,
                 average: WeightAverage | None = None, lookahead: Lookahead | None = None) -> None:
        """Moves every parameter's storage into a bank and broadcasts rank 0's weights."""
        self.comm = comm
        self.average, self.lookahead = average, lookahead
        self._before: list[Tensor] | None = None
        self.shared = {group.role: {key: tensor.to(comm.device) for key, tensor in group.rule.init_shared().items()}
                       for group in groups}
        self.banks = [self._make_bank(group, names) for group in groups for names in alike(group)]
        self.watch = Watch(self.banks, comm)
        self._memory = Memory(self.banks, self.shared, comm)
        if compile_updates:
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # one graph a bank
        self._update = torch.compile(_update, dynamic=False) if compile_updates else _update

    def _make_bank(self, group: ParamGroup, names: list[str]) -> Bank:
        params = [group.params[name] for name in names]
        kind = group.kinds[names[0]]
        step = group.step_for(kind)
        flat = lead_view(torch.stack([p.detach() for p in params]), group.scope, kind.blocks)
        step.enter(flat)
        sharded = self.comm.world_size > 1 and flat.numel() >= SMALL_BANK_ELEMENTS
        padding = -flat.size(0) % self.comm.world_size if sharded else 0
        weights = torch.cat([flat, flat.new_zeros(padding, *flat.shape[1:])]) if padding else flat.clone()
        self.comm.broadcast(weights)
        own = self.comm.slice_of(weights.size(0)) if sharded else slice(0, weights.size(0))
        bank = Bank(group, names, params[0].shape, weights, torch.zeros_like(weights), own, sharded, step, kind)
        for param, weight, grad in zip(params, bank.stacked(weights), bank.stacked(bank.grads), strict=True):
            param.data, param.grad = weight, grad
        memory = bank.as_matrices(weights[own])
        bank.state = step.init_state(memory)
        bank.state |= group.rule.init_state(memory.float() if group.config.state_dtype == "float32" else memory)
        for kept in filter(None, (self.average, self.lookahead)):
            kept.init(bank)
        return bank

    def zero_grad(self) -> None:
        """Zero the gradients in place: they stay views into the banks. Those that wait for a later step stay, and are zeroed
        by the step that uses them."""
        for bank in self.banks:
            if not bank.waits:
                bank.grads.zero_()

    @property
    def period(self) -> int:
        """Steps after which every group has been updated as often as it should."""
        return math.lcm(*(bank.group.config.update_every for bank in self.banks))

    @torch.no_grad()
    def step(self, values: Values, count: int, *, remember: bool = False) -> None:
        """One update from the gradients' sum over ranks; `count` is 1 at the first. The gradients are spent afterwards.
        Groups with `update_every` k are updated at every k-th, by the mean of k steps; till then they add gradients up.

        With `remember`, the weights before it are kept for `measure`. A gradient that is not finite touches no weight: it
        raises NonFiniteError here, or on CUDA, where that would wait for the device, at the next `refuse_non_finite`.
        """
        launched = {i: self._launch(bank) for i, bank in enumerate(self.banks) if bank.is_due(count)}
        hypers = {self.banks[i].group.role: self._hyper(self.banks[i].group, values, count) for i in launched}
        self._receive_early(launched, hypers, count)
        self._exchange_sums(launched, hypers)
        gathers = []
        self._before = [bank.weights[bank.own].clone() for bank in self.banks] if remember else None
        for index, bank in enumerate(self.banks):
            if index in launched:
                self._receive(index, launched, count)
                self._update_bank(bank, launched[index][0], _of_bank(bank, hypers))
            for kept in filter(None, (self.average, self.lookahead)):
                kept.update(bank, count)
            if index in launched and bank.sharded:
                gathers.append(self.comm.all_gather(bank.weights))
        for gather in gathers:
            gather.wait()

    def _launch(self, bank: Bank) -> tuple[Tensor, Work | None]:
        """Start to sum a bank's gradients over ranks: the owned slice of the sum, and what to wait for."""
        if not bank.sharded:
            return bank.grads, self.comm.all_reduce(bank.grads)
        if bank.group.config.sparse_rows:
            return self.comm.reduce_scatter_rows(bank.grads)
        return self.comm.reduce_scatter(bank.grads)

    def _receive_early(self, launched: Launched, hypers: dict[str, Hyper], count: int) -> None:
        """Wait for the gradients that must be there before any update: all where they are refused at once, else those of
        groups with sums."""
        at_once = self.comm.device.type in AT_ONCE
        for index in launched:
            if at_once or hypers[self.banks[index].group.role].shared:
                self._receive(index, launched, count)
        if at_once:
            self.refuse_non_finite()

    def _receive(self, index: int, launched: Launched, count: int) -> None:
        """Wait for a bank's gradients, once, watch them, and take the mean over the steps that they waited."""
        grad, work = launched[index]
        if work is not None:
            work.wait()
            self.watch.see(index, grad, count)
            if self.banks[index].waits:
                grad.div_(self.banks[index].group.config.update_every)
            launched[index] = grad, None

    def refuse_non_finite(self) -> None:
        """Raise NonFiniteError if any gradient so far was not finite. A collective, which waits for the device."""
        self.watch.refuse()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within, the model has the weights that count: not ahead, and averaged, where that is kept. A collective."""
        with ExitStack() as shown:
            for kept in filter(None, (self.lookahead, self.average)):
                shown.enter_context(kept.shown(self.banks, self.comm))
            yield

    def _hyper(self, group: ParamGroup, values: Values, count: int) -> Hyper:
        return hyper_at(group, values, count)._replace(shared=self.shared[group.role])

    def _exchange_sums(self, launched: Launched, hypers: dict[str, Hyper]) -> None:
        """For rules that need them: sums over all of a group's tensors on all ranks, absorbed into its shared numbers."""
        for role, hyper in hypers.items():
            if not hyper.shared:
                continue
            parts = []
            for bank, grad in ((self.banks[i], grad) for i, (grad, _) in launched.items()):
                if bank.group.role == role:
                    part = bank.group.rule.sums(*self._seen(bank, bank.weights[bank.own], grad), _of_bank(bank, hypers))
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

    def _update_bank(self, bank: Bank, grad: Tensor, hyper: Hyper) -> None:
        own = bank.weights[bank.own]
        if own.numel():
            update = self._update if bank.group.rule.compiles else _update
            update(bank.group.rule, bank.step, *self._seen(bank, own, grad), hyper)
        if bank.waits:
            bank.grads.zero_()

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

    @torch.no_grad()
    def turns(self, role: str) -> Measures:
        """How the last step turned each tensor of a role that was not zero before it, by name, if it was told to remember;
        else nothing. A collective, to be called before `measure`, which forgets."""
        if self._before is None:
            return {}
        kept = [(bank, before) for bank, before in zip(self.banks, self._before, strict=True) if bank.group.role == role]
        found = [(bank, moments_by_tensor(bank, before)) for bank, before in kept]
        mine = [moments if bank.sharded or self.comm.rank == 0 else 0 * moments for bank, moments in found]
        total = self.comm.sum(*(x for moments in mine for x in moments.flatten().tolist()))
        names = [name for bank, _ in found for name in bank.names]
        return {name: turn(*total[3 * i:3 * i + 3]) for i, name in enumerate(names) if total[3 * i + 1]}

    def state_tensors(self) -> dict[str, Tensor]:
        """Weights, state and waiting gradients of every parameter, whole, on the CPU. A collective; see optim/memory.py."""
        return self._memory.tensors()

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Undo `state_tensors`, at any world size. The caller has checked names and shapes (see `state_shapes`)."""
        self._memory.load(tensors)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of `state_tensors`, without communication."""
        return self._memory.shapes()

    def snapshot(self) -> list[Tensor]:
        """Copies of this rank's weights and state, for `restore`."""
        return self._memory.snapshot()

    def restore(self, snapshot: list[Tensor]) -> None:
        """Undo every step since the snapshot was taken."""
        self._memory.restore(snapshot)
        self.watch.reset()


def hyper_at(group: ParamGroup, values: Values, count: int) -> Hyper:
    """The group's numbers at this step, as 0-D tensors."""
    momentum = group.config.momentum if values.momentum is None else values.momentum
    return Hyper(*(torch.tensor(x, dtype=torch.float32) for x in (
        group.config.lr * values.lr, group.config.weight_decay * values.weight_decay, momentum,
        count // group.config.update_every)))


def _of_bank(bank: Bank, hypers: dict[str, Hyper]) -> Hyper:
    """The numbers of its group, lr times its tensors' own factor."""
    hyper = hypers[bank.group.role]
    return hyper if bank.kind.lr_factor == 1 else hyper._replace(lr=hyper.lr * bank.kind.lr_factor)


def _update(rule: Rule, step: Step, own: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> None:
    rule.update(own, grad, state, hyper, step=step)
