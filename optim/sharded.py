"""The sharded optimizer: every parameter lives in a bank (optim/bank.py), and each rank updates its own shard of each bank.

A step sums gradients over ranks by reduce-scatter, updates the shard, and sends the new weights to all ranks by all-gather,
as ZeRO does (Rajbhandari et al. 2019, arXiv 1910.02054). State and work per rank shrink with the world size. Small banks are
all-reduced instead and updated on every rank: for them one more collective costs more than the update.
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

NEVER = 2.0**30  # value of `_bad_step` while no gradient was bad; exact in float32
CHECKED_AT_ONCE = ("cpu", "mps")  # devices where the check of gradients is cheap; on CUDA it would wait for the GPU


class NonFiniteError(RuntimeError):
    """A gradient contains NaN or infinity."""


class ShardedOptimizer:
    """Optimizer of all groups. It owns weights, gradients and state; after construction nothing else writes parameters."""

    def __init__(self, groups: list[ParamGroup], comm: Comm, *, compile_updates: bool = False,
                 hooks: Sequence[Hook] = ()) -> None:
        """Move all parameters into banks, with rank 0's weights. `hooks` act in every step, in their order."""
        self.comm = comm
        self.shared = {group.role: {key: tensor.to(comm.device) for key, tensor in group.rule.init_shared().items()}
                       for group in groups}
        self.banks = [make_bank(group, names, comm) for group in groups for names in group_by_shape(group)]
        self.hooks = list(hooks)
        for hook in self.hooks:
            for bank in self.banks:
                hook.init(bank)
        # `shared`: numbers that all banks of a role have in common, for rules that need sums over the role. RoleSums updates
        # them in `before`, first of all hooks. It needs gradients early, so it receives them itself.
        if any(self.shared.values()):
            self.hooks.insert(0, RoleSums(comm, self._receive))
        # For each bank the step of its first bad gradient, and the entry of its shard that was bad. On the device, so that a
        # step can write them without waiting for it.
        self._bad_step = torch.full((len(self.banks),), NEVER, device=comm.device)
        self._bad_entry = torch.zeros(len(self.banks), dtype=torch.int64, device=comm.device)
        self.state = OptimizerState(self.banks, self.shared, comm, also_restored=[self._bad_step, self._bad_entry])
        if compile_updates:
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # one graph for each bank
        self._compiled = torch.compile(_update, dynamic=False) if compile_updates else _update

    @torch.no_grad()
    def step(self, values: Values, count: int) -> None:
        """Update all weights from the gradients' sum over ranks; `count` is 1 at the first step. Overwrites gradients.

        Groups with `update_every` k are updated at every k-th step, by the mean of k steps' gradients. A gradient that is
        not finite raises NonFiniteError before any weight changes; on CUDA it counts as 0 (momentum and decay still act),
        and the next `check_finite` raises.
        """
        # Launch all reductions first: they run in the background, the later ones while the first banks are updated.
        due = [bank for bank in self.banks if count % bank.group.config.period(count) == 0]
        for bank in due:
            self._launch(bank)
        hypers = {bank.group.role: Hyper.at(bank.group.config, values, count, self.shared[bank.group.role]) for bank in due}
        # Check all gradients before any weight changes, so that an error leaves the weights of the last step. Not on CUDA,
        # where it would wait for the GPU and end the overlap: there `_receive` zeroes a bad gradient and notes it.
        if self.comm.device.type in CHECKED_AT_ONCE:
            for bank in due:
                self._receive(bank, count)
            self.check_finite()
        # Hooks: sums over a role need its gradients, and must be known before its first update.
        for hook in self.hooks:
            hook.before(self.banks, due, hypers, count)
        # Bank by bank: wait for its gradient, update this rank's shard, and launch the all-gather of the new weights, which
        # runs while the next bank is updated.
        gathers = []
        for bank in self.banks:
            if bank in due:
                self._receive(bank, count)
                self._update_shard(bank, hypers[bank.group.role])
            # Hooks see every bank at every step, and before the gather, because they may change this rank's shard.
            for hook in self.hooks:
                hook.after_update(bank, count)
            if bank in due and bank.sharded:
                gathers.append(self.comm.all_gather(bank.weights))
        # Wait for the gathers last: nothing reads the other ranks' weights before the next forward pass.
        for gather in gathers:
            gather.wait()

    def _launch(self, bank: Bank) -> None:
        """Start to sum a bank's gradients over ranks; `bank.reduced_grad` is this rank's shard, once it is received."""
        bank.received = False
        if not bank.sharded:
            bank.reduced_grad, bank.work = bank.grads, self.comm.all_reduce(bank.grads)
        elif bank.group.config.extra.sparse_rows:  # few rows are not zero (n-gram tables): send only those
            bank.reduced_grad, bank.work = self.comm.reduce_scatter_rows(bank.grads)
        else:
            bank.reduced_grad, bank.work = self.comm.reduce_scatter(bank.grads)

    def _receive(self, bank: Bank, count: int) -> None:
        """Wait for a bank's gradient, once a step. Zero and note it if it is not finite; divide it by `update_every`."""
        if bank.received:
            return
        bank.work.wait()
        bank.received = True
        if bank.reduced_grad.numel():
            # NaN makes both extremes NaN. One pass over memory, in a tenth of the time of the maximum norm on CPUs.
            low, high = torch.aminmax(bank.reduced_grad)
            finite = low.isfinite() & high.isfinite()
            # `not finite` reads the result, which on CUDA would wait for the GPU: there always run the masked version.
            if self.comm.device.type not in CHECKED_AT_ONCE or not finite:
                self._note_non_finite(bank, finite, count)
        if bank.update_every > 1:
            bank.reduced_grad.div_(bank.group.config.period(count))

    def _note_non_finite(self, bank: Bank, finite: Tensor, count: int) -> None:
        """Note the step and entry of a bank's first gradient that is not finite, and zero the gradient.

        Does nothing if 0-D `finite` is True. Masked arithmetic without a branch, so that it never waits for the device.
        """
        index, grad = self.banks.index(bank), bank.reduced_grad
        is_first = ~finite & (self._bad_step[index] == NEVER)
        entry = grad.isfinite().logical_not().reshape(grad.size(0), -1).any(1).int().argmax()
        self._bad_entry[index] = torch.where(is_first, entry, self._bad_entry[index])
        self._bad_step[index] = torch.where(is_first, float(count), self._bad_step[index])
        grad.masked_fill_(~finite, 0)

    def check_finite(self) -> None:
        """Raise NonFiniteError, with parameter and step, if a gradient of any rank so far was not finite.

        A collective that waits for the device.
        """
        first_steps = [-x for x in self.comm.max(*(-self._bad_step).tolist())]  # the minimum over ranks
        step = min(first_steps, default=NEVER)
        if step == NEVER:
            return
        index = first_steps.index(step)
        bank, is_here = self.banks[index], self._bad_step[index].item() == step
        # Only ranks whose shard was bad know the entry. The maximum over ranks makes all of them name the same parameter.
        entry = bank.shard.start + int(self._bad_entry[index]) if is_here else -1
        name = bank.name_at(int(self.comm.max(entry)[0]))
        raise NonFiniteError(f"the gradient of {name} is not finite at step {step:.0f}; it was not used. "
                             f"A smaller optim.{bank.group.role}.lr may help")

    def _update_shard(self, bank: Bank, hyper: Hyper) -> None:
        """Update this rank's shard of a bank by its rule, in place."""
        if bank.spec.lr_factor != 1:
            hyper = hyper._replace(lr=hyper.lr * bank.spec.lr_factor)
        update = self._compiled if bank.group.rule.compiles else _update
        if bank.matrices.numel():  # a rank may own nothing of a bank with fewer matrices than ranks
            update(bank.group.rule, bank.step, bank.matrices, bank.rule_gradient(), bank.state, hyper)
        if bank.update_every > 1:
            bank.grads.zero_()

    def zero_grad(self) -> None:
        """Zero the gradients in place, so that they stay views into the banks.

        Gradients that add up for a later step stay; the step that uses them zeroes them.
        """
        for bank in self.banks:
            if bank.update_every == 1:
                bank.grads.zero_()

    @property
    def period(self) -> int:
        """Number of steps after which every group has had a whole number of updates."""
        return math.lcm(*(bank.update_every for bank in self.banks))

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Give the model its evaluation weights within the context: without look-ahead, and averaged, if hooks do so.

        A collective. Hooks enter in reverse order: look-ahead first gives the weights that are not ahead, then averaging
        blends its average with those. On exit the training weights are back.
        """
        with ExitStack() as stack:
            for hook in reversed(self.hooks):
                stack.enter_context(hook.evaluation_weights(self.banks, self.comm))
            yield


def _update(rule: Rule, step: Step, matrices: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> None:
    """Do one rule's update: the function that torch.compile compiles."""
    rule.update(matrices, grad, state, hyper, step=step)
