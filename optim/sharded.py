"""The sharded optimizer: every parameter lives in a bank (optim/bank.py), and each rank updates its own shard of each bank.

A step sums gradients over ranks by reduce-scatter, updates the shard, and sends the new weights to all ranks by all-gather,
as ZeRO does (Rajbhandari et al. 2019, arXiv 1910.02054). State and work per rank shrink with the world size. Small banks are
all-reduced instead and updated on every rank: for them one more collective costs more than the update.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from optim.bank import Bank, group_by_update, make_bank, rule_gradient
from optim.comm import Comm
from optim.groups import ParamGroup
from optim.hooks import Hook, RoleSums
from optim.rule import Hyper, Step
from optim.schedule import Values
from optim.state import OptimizerState

# A bad gradient is noted as one number, step * BAD_STEP + entry, so that the least is the first; NEVER: none was bad.
BAD_STEP, NEVER = 2**40, 2**62
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
        self.banks = [make_bank(group, names, comm) for group in groups for names in group_by_update(group)]
        self.hooks = list(hooks)
        for hook in self.hooks:
            for bank in self.banks:
                hook.init(bank)
        # `shared`: numbers that all banks of a role have in common, for rules that need sums over the role. RoleSums updates
        # them in `before`, first of all hooks. It needs gradients early, so it receives them itself.
        if any(self.shared.values()):
            self.hooks.insert(0, RoleSums(comm, self._receive))
        # For each bank the step of its first bad gradient and the entry of its shard that was bad, as one number. On the
        # device, so that a step can write it without waiting.
        self._bad = torch.full((len(self.banks),), NEVER, device=comm.device)
        self.state = OptimizerState(self.banks, self.shared, comm, also_restored=[self._bad])
        if compile_updates:
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # one graph for each bank
        self._compiled = torch.compile(_update, dynamic=False) if compile_updates else _update

    @property
    def exchanges_rows(self) -> bool:
        """True if some banks exchange only rows with gradients, and `note_rows` saves waiting for the device."""
        return any(bank.used is not None for bank in self.banks)

    def note_rows(self, rows: Mapping[str, Tensor], count: int) -> None:
        """Note the rows of lookup tables that get gradients at step `count`, by parameter name; all that are not noted have
        gradient 0. CPU tensors. Call it before the forward pass of every step: ranks then exchange the numbers of their
        rows while the device computes. Where it was not called, `step` looks for the rows, which waits for the device.
        """
        for bank in self.banks:
            if bank.used is not None:
                bank.used.add(rows)
                period = bank.group.config.period(count)
                if count % period == 0 and bank.used.complete(period):
                    bank.used.announced = self.comm.announce_rows(bank.used.mask)

    @torch.no_grad()
    def step(self, values: Values, count: int, *, tied: tuple[str, str] | None = None) -> None:
        """Update all weights from the gradients' sum over ranks; `count` is 1 at the first step. Overwrites gradients.

        `tied` names two parameters that are one in this step: both take the step of the sum of their gradients. Each is
        alone in its bank; they must be equal in weights, state and settings.

        Groups with `update_every` k are updated at every k-th step, by the mean of k steps' gradients. A gradient that is
        not finite raises NonFiniteError before any weight changes; on CUDA its numbers that are not finite count as 0
        (momentum and decay still act), and the next `check_finite` raises.
        """
        # Launch all reductions first: they run in the background, the later ones while the first banks are updated.
        due = [bank for bank in self.banks if count % bank.group.config.period(count) == 0]
        self._tie(tied, due)
        for bank in due:
            self._launch(bank)
        hypers = {bank.group.role: Hyper.at(bank.group.config, values, count, self.shared[bank.group.role]) for bank in due}
        # Check all gradients before any weight changes, so that an error leaves the weights of the last step. Not on CUDA,
        # where it would wait for the GPU and end the overlap: there each bank's update zeroes and notes what is bad.
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
            if bank in due and bank.sharded and bank.twin is None:
                gathers.append(self.comm.all_gather(bank.weights))
        # Wait for the gathers last: nothing reads the other ranks' weights before the next forward pass.
        for gather in gathers:
            gather.wait()
        for bank in due:
            if bank.twin is not None and bank.sharded:
                bank.weights.copy_(bank.twin.weights)
        zero([bank.grads for bank in due if bank.update_every > 1])

    def _tie(self, tied: tuple[str, str] | None, due: list[Bank]) -> None:
        """Make the second tied parameter's bank the twin of the first's, whose gradient becomes the sum of both."""
        for bank in due:
            bank.twin = None
        if tied is not None:
            by_name = {name: bank for bank in self.banks for name in bank.names}
            first, second = (by_name[name] for name in tied)
            assert first.parts == second.parts and first.weights.shape == second.weights.shape
            if first in due:
                first.grads.add_(second.grads)
                second.twin = first

    def _launch(self, bank: Bank) -> None:
        """Start to sum a bank's gradients over ranks; `bank.reduced_grad` is this rank's shard, once it is received."""
        bank.received = False
        if bank.twin is not None:
            return
        if not bank.sharded:
            bank.reduced_grad, bank.work = bank.grads, self.comm.all_reduce(bank.grads)
        elif bank.used is not None:  # few rows are not zero (n-gram tables): send only those
            bank.reduced_grad, bank.work = self.comm.reduce_scatter_rows(bank.grads, bank.used.announced)
            bank.used.clear()
        else:
            bank.reduced_grad, bank.work = self.comm.reduce_scatter(bank.grads)

    def _receive(self, bank: Bank, count: int) -> None:
        """Wait for a bank's gradient, once a step. Where `_checks_early`, zero and note what is not finite in it."""
        if bank.received:
            return
        bank.received = True
        if bank.twin is not None:
            self._receive(bank.twin, count)
            bank.reduced_grad = bank.twin.reduced_grad
            return
        bank.work.wait()
        if self._checks_early(bank) and bank.reduced_grad.numel():
            # NaN makes both extremes NaN. One pass over memory, in a tenth of the time of the maximum norm on CPUs.
            low, high = torch.aminmax(bank.reduced_grad)
            # `not` reads the result, which on CUDA would wait for the GPU: there always run the masked version.
            if self.comm.device.type not in CHECKED_AT_ONCE or not low.isfinite() & high.isfinite():
                bad = self._bad[self.banks.index(bank)]
                bank.reduced_grad = mask_non_finite(bank.reduced_grad, bad, torch.tensor(count))

    def _checks_early(self, bank: Bank) -> bool:
        """True if a bank's gradient is checked when it is received, False if within its update.

        Early where the check is at once, and for rules that need the gradient before any update, for sums over their role.
        """
        return self.comm.device.type in CHECKED_AT_ONCE or bool(self.shared[bank.group.role])

    def check_finite(self) -> None:
        """Raise NonFiniteError, with parameter and step, if a gradient of any rank so far was not finite.

        A collective that waits for the device.
        """
        noted = [divmod(number, BAD_STEP) for number in self._bad.tolist()]  # (step, entry)
        first_steps = [-x for x in self.comm.max(*(-step for step, _ in noted))]  # the minimum over ranks
        step = min(first_steps, default=NEVER)
        if step >= NEVER // BAD_STEP:
            return
        index = first_steps.index(step)
        bank, (own_step, entry) = self.banks[index], noted[index]
        # Only ranks whose shard was bad know the entry. The maximum over ranks makes all of them name the same parameter.
        entry = int(self.comm.max(bank.shard.start + entry if own_step == step else -1)[0])
        raise NonFiniteError(f"the gradient of {bank.name_at(entry)} is not finite at step {step:.0f}; it was not used. "
                             f"A smaller optim.{bank.group.role}.lr may help")

    def _update_shard(self, bank: Bank, hyper: Hyper) -> None:
        """Update this rank's shard of a bank by its rule, in place."""
        if bank.spec.lr_factor != 1:
            hyper = hyper._replace(lr=hyper.lr * bank.spec.lr_factor)
        update = self._compiled if bank.group.rule.compiles else _update
        bad = None if self._checks_early(bank) else self._bad[self.banks.index(bank)]
        if bank.matrices.numel():  # a rank may own nothing of a bank with fewer matrices than ranks
            update(bank.group, bank.step, bank.reduced_grad, bank.matrices, bank.state, hyper=hyper, bad=bad)

    def zero_grad(self) -> None:
        """Zero the gradients in place, so that they stay views into the banks.

        Gradients that add up for a later step stay; the step that uses them zeroes them.
        """
        zero([bank.grads for bank in self.banks if bank.update_every == 1])

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


def _update(group: ParamGroup, step: Step, grad: Tensor, matrices: Tensor, state: dict[str, Tensor], *, hyper: Hyper,
            bad: Tensor | None) -> None:
    """Do the whole update of a bank's shard, in place: the function that torch.compile compiles.

    `grad` is the sum over ranks, of the shape of the bank. `bad`, see `mask_non_finite`; None: `grad` was checked before.
    """
    if bad is not None:
        grad = mask_non_finite(grad, bad, hyper.step)
    grad = rule_gradient(group, step, grad, matrices, state, period=hyper.period)
    group.rule.update(matrices, grad, state, hyper, step=step)


def mask_non_finite(grad: Tensor, bad: Tensor, step: Tensor) -> Tensor:
    """Return a bank's gradient with 0 for each number that is not finite; note the first entry of the bank that has one.

    0-D `bad` is step * BAD_STEP + entry of the first bad gradient so far, updated in place; `step` is 0-D, on the CPU.
    Arithmetic without a branch, so that it never waits for the device; compiled, it is part of the update's own passes.
    """
    finite = grad.isfinite()
    entries = torch.arange(grad.size(0), device=grad.device).view(-1, *[1] * (grad.ndim - 1))
    first = torch.where(finite, NEVER, entries).amin() + step.to(torch.int64) * BAD_STEP
    bad.copy_(torch.minimum(bad, first))
    return grad.masked_fill(~finite, 0)


def zero(tensors: list[Tensor]) -> None:
    """Zero tensors in place, with one launch for each of their dtypes."""
    for dtype in {tensor.dtype for tensor in tensors}:
        torch._foreach_zero_([tensor for tensor in tensors if tensor.dtype == dtype])
