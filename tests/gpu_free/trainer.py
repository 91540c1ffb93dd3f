"""The real Trainer on a pretended GPU, whose tensors have shapes only; import it after `pretend`."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import optim.comm
import train_gpt
from configs.schema import Run
from data.sources import GPT2_END_OF_TEXT, GPT2_VOCAB, Source
from optim.comm import DONE, Comm, Work
from optim.rule import Step
from train_gpt import Trainer


def pretended_source() -> Source:
    """Return a source with GPT-2's numbers of tokens, and no tokens."""
    nothing = np.zeros(1, dtype=np.uint16)
    tokenizer = SimpleNamespace(pieces=tuple(str(token).encode() for token in range(GPT2_VOCAB)), name="pretended")
    return Source("pretended", [nothing], nothing, None, tokenizer, GPT2_VOCAB, GPT2_END_OF_TEXT, "")


class PretendedComm(Comm):
    """Rank 0 of `world_size` ranks on the pretended GPU; its collectives only check their shapes and are noted."""

    def __init__(self, world_size: int) -> None:
        self.device, self.world_size, self.rank, self._in_place = torch.device("cuda", 0), world_size, 0, True

    def reduce_scatter_rows(self, bank: Tensor, announced: object = None) -> tuple[Tensor, Work]:
        """Return the shard; how many rows are sent depends on the tokens, of which there are none."""
        return bank[self.slice_of(bank.size(0))], DONE


class PretendedGroup:
    """Stands for torch.distributed in optim/comm.py: notes the bytes of each collective, and sends nothing."""

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []

    def note(self, name: str, tensor: Tensor) -> object:
        """Note a collective on the larger of its tensors."""
        self.sent.append((name, tensor.numel() * tensor.element_size()))
        return DONE

    def reduce_scatter_single(self, result: Tensor, bank: Tensor, **options: object) -> object:
        """Note the bank."""
        assert bank.numel() % result.numel() == 0
        return self.note("reduce_scatter", bank)

    def all_gather_single(self, bank: Tensor, shard: Tensor, **options: object) -> object:
        """Note the bank."""
        assert bank.numel() % shard.numel() == 0
        return self.note("all_gather", bank)

    def all_reduce(self, tensor: Tensor, **options: object) -> object:
        """Note the tensor."""
        return self.note("all_reduce", tensor)

    def all_to_all_single(self, out: Tensor, rows: Tensor, *counts: object, **options: object) -> object:
        """Note the rows that are sent."""
        return self.note("all_to_all", rows)

    def broadcast(self, tensor: Tensor, src: int) -> None:
        """Do nothing."""

    def barrier(self) -> None:
        """Do nothing."""


def move(module: torch.nn.Module, device: torch.device) -> None:
    """Replace all parameters and buffers by ones on the device: Module.to cannot swap FakeTensors."""
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                new = torch.nn.Parameter(torch.empty(old.shape, dtype=old.dtype, device=device))
                new.role, new.axis = old.role, old.axis
                part._parameters[name] = new
        for name, old in part._buffers.items():
            part._buffers[name] = None if old is None else torch.empty(old.shape, dtype=old.dtype, device=device)


DISPATCH = FakeTensorMode.dispatch


def dispatch_shapes_only(mode: FakeTensorMode, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
    """Forget the values of a small CPU tensor that is copied to the device: FakeTensorMode would carry them along, and
    compute there."""
    if func is torch.ops.aten._to_copy.default and torch.device((kwargs or {}).get("device") or "cpu").type == "cuda":
        args[0].constant = None
    return DISPATCH(mode, func, types, args, kwargs)


@contextmanager
def pretended_trainer(run: Run, *, world_size: int = 1) -> Iterator[Trainer]:
    """Build the Trainer of a run; within the context all tensors are FakeTensors, and gradients are computed on this thread,
    which a Recorder sees."""
    group, threads = PretendedGroup(), torch.autograd.set_multithreading_enabled(False)
    with ExitStack() as stack:
        for target, name, value in ((train_gpt, "open_source", lambda *args, **options: pretended_source()),
                                    (train_gpt, "Comm", lambda device: PretendedComm(world_size)),
                                    (train_gpt.GPT, "to", move), (optim.comm, "dist", group),
                                    (Step, "project_start", lambda *args: None),  # it looks at the weights
                                    (FakeTensorMode, "dispatch", dispatch_shapes_only),
                                    (torch.Tensor, "pin_memory", lambda tensor: tensor)):  # no GPU to pin for
            stack.enter_context(mock.patch.object(target, name, value))
        with FakeTensorMode(allow_non_fake_inputs=True), threads:
            trainer = Trainer(run)
            trainer.group = group
            yield trainer
