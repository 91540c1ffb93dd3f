"""The sharded optimizer: parameters live in banks, and every rank updates its own slice of each.

Parameters of one group, shape and dtype are views into one buffer, their gradients into another (optim/bank.py), so that
collectives copy nothing and the model knows nothing of it. A bank's first dimension is what its rule allows to cut
(elements, rows or whole matrices), padded to a multiple of the world size. Banks of few elements are all-reduced and updated
on every rank.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from optim.bank import Bank, group_by_shape, make_bank
from optim.comm import Comm
from optim.groups import ParamGroup
from optim.hooks import Hook, RoleSums
from optim.rule import Hyper, Rule, Step
from optim.schedule import Values
from optim.state import OptimizerState

NEVER = 2.0**30
AT_ONCE = ("cpu", "mps")  # devices whose gradients are checked before any weight is touched: there it waits for nothing


class NonFiniteError(RuntimeError):
    """A gradient holds a NaN or an infinity."""


class ShardedOptimizer:
    """Owns weights, gradients and state of all groups; the only writer of the model's parameters after construction."""

    def __init__(self, groups: list[ParamGroup], comm: Comm, *, compile_updates: bool = False,
                 hooks: Sequence[Hook] = ()) -> None:
        """Moves every parameter's storage into a bank and broadcasts rank 0's weights. `hooks` act in every step."""
        self.comm = comm
        self.shared = {group.role: {key: tensor.to(comm.device) for key, tensor in group.rule.init_shared().items()}
                       for group in groups}
        self.banks = [make_bank(group, names, comm) for group in groups for names in group_by_shape(group)]
        self.hooks = list(hooks)
        for hook in self.hooks:
            for bank in self.banks:
                hook.init(bank)
        if any(self.shared.values()):
            self.hooks.insert(0, RoleSums(comm, self._receive))
        # On the device, so that noting a bad gradient waits for nothing: the step of each bank's first, and where it was.
        self._bad_step = torch.full((len(self.banks),), NEVER, device=comm.device)
        self._bad_entry = torch.zeros(len(self.banks), dtype=torch.int64, device=comm.device)
        self.state = OptimizerState(self.banks, self.shared, comm, also_restored=[self._bad_step, self._bad_entry])
        if compile_updates:
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # one graph a bank
        self._compiled = torch.compile(_update, dynamic=False) if compile_updates else None

    @torch.no_grad()
    def step(self, values: Values, count: int) -> None:
        """One update from the gradients' sum over ranks; `count` is 1 at the first. The gradients are spent afterwards.
        Groups with `update_every` k are updated at every k-th, by the mean of k steps; till then they add gradients up.

        A gradient that is not finite touches no weight: it raises NonFiniteError here, or on CUDA, where that would wait for
        the device, at the next `check_finite`.
        """
        # Launch all sums over ranks: the network works while the first banks are updated.
        due = [bank for bank in self.banks if count % bank.update_every == 0]
        for bank in due:
            self._launch(bank)
        hypers = {bank.group.role: Hyper.at(bank.group.config, values, count, self.shared[bank.group.role]) for bank in due}
        # Check that gradients are finite before any weight is touched, where that costs no waiting for the device.
        if self.comm.device.type in AT_ONCE:
            for bank in due:
                self._receive(bank, count)
            self.check_finite()
        for hook in self.hooks:
            hook.before(self.banks, due, hypers, count)
        # Bank by bank: wait for its sum, update the owned slice, launch the all-gather of the new weights.
        gathers = []
        for bank in self.banks:
            if bank in due:
                self._receive(bank, count)
                self._update_own(bank, hypers[bank.group.role])
            for hook in self.hooks:
                hook.after_update(bank, count)
            if bank in due and bank.sharded:
                gathers.append(self.comm.all_gather(bank.weights))
        # Wait until every rank has all weights.
        for gather in gathers:
            gather.wait()

    def _launch(self, bank: Bank) -> None:
        """Start to sum a bank's gradients over ranks; `bank.gradient` is the owned slice of the sum, once it is received."""
        bank.received = False
        if not bank.sharded:
            bank.gradient, bank.work = bank.grads, self.comm.all_reduce(bank.grads)
        elif bank.group.config.extra.sparse_rows:
            bank.gradient, bank.work = self.comm.reduce_scatter_rows(bank.grads)
        else:
            bank.gradient, bank.work = self.comm.reduce_scatter(bank.grads)

    def _receive(self, bank: Bank, count: int) -> None:
        """Wait for a bank's gradient, once a step; one that is not finite is noted and counts as zero; then take the mean
        over the steps whose gradients added up."""
        if bank.received:
            return
        bank.work.wait()
        bank.received = True
        if bank.gradient.numel():
            low, high = torch.aminmax(bank.gradient)  # NaN is both; one pass, a tenth of the maximum norm's time on CPUs
            finite = low.isfinite() & high.isfinite()
            if self.comm.device.type not in AT_ONCE or not finite:
                self._note_non_finite(bank, finite, count)
        if bank.update_every > 1:
            bank.gradient.div_(bank.update_every)

    def _note_non_finite(self, bank: Bank, finite: Tensor, count: int) -> None:
        """Note a bank's gradient where it is not finite, and zero it; without waiting for the device."""
        index, grad = self.banks.index(bank), bank.gradient
        fresh = ~finite & (self._bad_step[index] == NEVER)
        entry = grad.isfinite().logical_not().reshape(grad.size(0), -1).any(1).int().argmax()
        self._bad_entry[index] = torch.where(fresh, entry, self._bad_entry[index])
        self._bad_step[index] = torch.where(fresh, float(count), self._bad_step[index])
        grad.masked_fill_(~finite, 0)

    def check_finite(self) -> None:
        """Raise NonFiniteError, naming a parameter and the step, if a gradient of any rank so far was not finite. A
        collective, which waits for the device."""
        first = [-x for x in self.comm.max(*(-self._bad_step).tolist())]
        step = min(first, default=NEVER)
        if step == NEVER:
            return
        index = first.index(step)
        here = self._bad_step[index].item() == step  # only the ranks that saw it know where; all name the same parameter
        entry = self.banks[index].own.start + int(self._bad_entry[index]) if here else -1
        name = self.banks[index].name_at(int(self.comm.max(entry)[0]))
        raise NonFiniteError(f"the gradient of {name} is not finite at step {step:.0f}; no weight has seen it")

    def _update_own(self, bank: Bank, hyper: Hyper) -> None:
        """Update the owned slice of a bank by its rule."""
        if bank.spec.lr_factor != 1:
            hyper = hyper._replace(lr=hyper.lr * bank.spec.lr_factor)
        rule, own = bank.group.rule, bank.matrices
        if own.numel() and self._compiled is not None and rule.compiles:
            self._compiled(rule, bank.step, own, bank.rule_gradient(), bank.state, hyper)
        elif own.numel():
            rule.update(own, bank.rule_gradient(), bank.state, hyper, step=bank.step)
        if bank.update_every > 1:
            bank.grads.zero_()

    def zero_grad(self) -> None:
        """Zero the gradients in place: they stay views into the banks. Those that add up for a later step stay, and are
        zeroed by the step that uses them."""
        for bank in self.banks:
            if bank.update_every == 1:
                bank.grads.zero_()

    @property
    def period(self) -> int:
        """Steps after which every group has been updated as often as it should."""
        return math.lcm(*(bank.update_every for bank in self.banks))

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Within, the model has the weights that count: not ahead, and averaged, where a hook says so. A collective."""
        with ExitStack() as stack:
            for hook in reversed(self.hooks):
                stack.enter_context(hook.evaluation_weights(self.banks, self.comm))
            yield


def _update(rule: Rule, step: Step, own: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> None:
    rule.update(own, grad, state, hyper, step=step)
