"""One training run, in this order: main, train, step, validate, save and resume.

    python train_gpt.py [PRESET] [--dotted.field VALUE ...]
    torchrun --standalone --nproc_per_node=8 train_gpt.py PRESET ...

Timed: data loading, steps, logging. Not timed: imports, compilation and warm-up, validation, checkpoints, sampling.
"""

import sys
import time

from configs.cli import fail, parse

if __name__ == "__main__":
    BEGAN = time.time()
    RUN = parse(sys.argv[1:])  # before torch is imported: --help and typing errors answer at once

# ruff: noqa: E402
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from configs.schema import Run, Train
from configs.serialize import config_to_dict, flatten
from data.batches import Batches, micro_batches
from data.evaluate import Score, evaluate, sample_text
from data.orders import Position
from data.run.checkpoint import check_same_run, load_checkpoint, match_tensors, save_checkpoint
from data.run.clock import Clock, Interruption
from data.run.diagnostics import Metrics, activation_metrics, in_row, weight_metrics
from data.run.environment import choose_device, device_name
from data.run.folder import open_run_folder
from data.run.log import Log, Progress
from data.run.metrics import EQUILIBRIUM, metric_name
from data.run.plan import format_groups, format_plan, format_schedule
from data.sources import open_source
from data.tokenizers import prefix_tokens
from model import GPT, AuxLossWeights
from optim.comm import Comm, local_rank
from optim.groups import build_groups
from optim.hooks import build_hooks
from optim.metrics import StepMetrics, equilibrium_angle
from optim.schedule import Schedule, Values
from optim.sharded import NonFiniteError, ShardedOptimizer

CACHE = Path(__file__).resolve().parent / ".cache"
CHECKPOINT = "checkpoint.safetensors"
RNG = "rng/torch"
LAYER_TOKENS = 4096  # most that layers are measured on: uncompiled attention may hold T x T scores
GPU_SIGNAL_POLL_STEPS = 16  # agreeing on a signal waits for the device; on CPUs it is free


class DivergedError(RuntimeError):
    """The loss or a gradient is not finite."""


def main(run: Run, began: float | None = None) -> None:
    """Train as `run` says; `began` is when the process did, in seconds since 1970."""
    began = began or time.time()
    trainer = Trainer(run)
    rank, world_size = trainer.comm.rank, trainer.comm.world_size
    if rank == 0:
        print(trainer.plan(), flush=True)
        if run.run.dry_run:
            print(format_schedule(trainer.schedule.values, run.train.steps), flush=True)
    if run.run.dry_run:
        return
    # Rank 0 chooses and makes the folder: of runs without a name each takes the next number.
    identity, folder = run.run, None
    if rank == 0:
        folder = open_run_folder(identity.dir, identity.name, fallback_name=run.preset, resume=identity.resume)
    folder = trainer.comm.share(folder)
    resumed = identity.resume and (folder / CHECKPOINT).exists()
    if resumed:
        trainer.load(folder / CHECKPOINT)
    log = Log(run, folder, trainer.progress, device=trainer.device, rank=rank, world_size=world_size)
    if identity.resume:
        log.say(f"resuming {folder} at step {trainer.progress.step}" if resumed
                else f"no checkpoint in {folder}: starting at step 0")
    if trainer.compiled and run.train.warmup_steps:
        trainer.warm_up()
    try:
        ended = train(trainer, log)
    except NonFiniteError as error:
        saved = folder / CHECKPOINT
        good = f"the last good checkpoint is {saved}" if saved.exists() else "no checkpoint was written yet"
        raise DivergedError(f"{error}; {good}. Lower --optim.matrix.lr or the lr of "
                            "the embeddings, or start from lr 0 (--schedule.lr '0=0 5%=1 ...')") from error
    if ended:
        log.finish(sample=trainer.sample(), wall_seconds=time.time() - began, parameters=trainer.parameters,
                   data_hash=trainer.source.data_hash)
    else:
        log.say(f"interrupted at step {trainer.progress.step}; saved. Continue with --run.name {folder.name} --run.resume")
    trainer.comm.close()


def train(trainer: "Trainer", log: Log) -> bool:
    """The timed loop. True if the run ended, False if a signal cut it short; a checkpoint is written in both cases."""
    run, progress = trainer.run, trainer.progress
    poll_steps = GPU_SIGNAL_POLL_STEPS if trainer.device.type == "cuda" else 1
    interruption, interrupted = Interruption(), False
    batches = trainer.start_batches()
    clock = Clock(trainer.device, progress.train_seconds)
    while not (interrupted or progress.is_finished(run)):
        step = progress.step + 1
        validates, measures = is_validation_step(run.train, step), is_due(step, run.log.layers_every_steps)
        nats = trainer.step(batches, remember=measures or (validates and run.log.diagnostics))
        log.bar.update()
        # At some steps: the training loss, measures of layers, a validation.
        if is_due(step, run.log.every_steps) or validates:
            values = trainer.last_values()
            loss = trainer.comm.sum(nats.item())[0] / values.batch_tokens  # waits for the device
            progress.train_seconds = clock.seconds
            log.training(loss, flops_per_token=trainer.model.flops_per_token(values.sequence_tokens, **values.windows))
            check_finite(loss, step)
        if measures:
            with clock.paused():
                log.write(trainer.layer_metrics())
        if validates:
            with clock.paused():
                score = trainer.validate()
                progress.record_score(score, run.run.target_loss_nats)
                log.validation(score, trainer.measures.by_role(trainer.last_values()) if run.log.diagnostics else {})
                check_finite(score.nats_per_token, step)
        # A checkpoint; after a signal too, on which all ranks must agree, because all of them save.
        saves = progress.is_finished(run) or is_due(step, run.run.checkpoint_every_steps)
        polls = is_due(step, poll_steps)
        if polls or saves:
            trainer.optimizer.check_finite()
        interrupted = polls and trainer.comm.max(float(interruption.received))[0] > 0
        if saves or interrupted:
            with clock.paused():
                check_finite(trainer.comm.sum(nats.item())[0], step)
                progress.train_seconds, progress.metrics_bytes = clock.seconds, log.metrics_bytes()
                trainer.save(log.folder / CHECKPOINT)
    batches.close()
    return progress.is_finished(run)


def is_due(step: int, every_steps: int) -> bool:
    """Whether something that happens every so many steps, 0 meaning never, happens after this one."""
    return every_steps > 0 and step % every_steps == 0


def is_validation_step(train: Train, step: int) -> bool:
    """Whether the weights after `step` steps are validated: always at the end."""
    late = train.final_val_every_steps and step >= 0.9 * train.steps
    return step == train.steps or is_due(step, train.final_val_every_steps if late else train.val_every_steps)


def check_finite(loss: float, step: int) -> None:
    """Raise NonFiniteError where the loss is NaN or infinite."""
    if not math.isfinite(loss):
        raise NonFiniteError(f"loss is {loss} at step {step}")


class Trainer:
    """Model, optimizer and data of one run, on one rank."""

    def __init__(self, run: Run) -> None:
        """Build everything that the run needs; nothing is written to disk but the tokenizer's cache."""
        self.run, self.schedule, self.progress = run, Schedule(run), Progress()
        self.comm = Comm(choose_device(run.run.device, local_rank()))
        self.device = self.comm.device
        on_cuda = self.device.type == "cuda"
        self.compiled = run.run.compile == "on" or (run.run.compile == "auto" and on_cuda)
        # Each machine's first rank opens the source before the others do, so that caches are built once.
        if local_rank() > 0:
            self.comm.barrier()
        self.source = open_source(run.data, cache_dir=CACHE)
        if local_rank() == 0:
            self.comm.barrier()
        # The model, long enough for every step of the schedule; its draws come first from the seed.
        torch.manual_seed(run.run.seed)
        lengths = [self.schedule.values(step).sequence_tokens for step in range(run.train.steps)]
        pieces = self.source.tokenizer.pieces if run.model.prefix_loss and self.source.tokenizer else None
        self.model = GPT(run.model, vocab_size=self.source.vocab_size,
                         max_tokens=max(*lengths, run.data.val_sequence_tokens or 0),
                         document_start=self.source.document_start, prefix_of=prefix_tokens(pieces) if pieces else None,
                         on_cuda=on_cuda, dtype=torch.bfloat16 if on_cuda else torch.float32)
        if run.train.tied_until_frac:
            self.model.head.weight.data.copy_(self.model.embed)
        self.model.to(self.device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        # The optimizer takes over the storage of all parameters.
        groups = build_groups(dict(self.model.named_parameters()), self.model.roles(), run.optim, self.model.axes())
        self.group_table = format_groups(groups)
        self.optimizer = ShardedOptimizer(groups, self.comm, compile_updates=self.compiled, hooks=build_hooks(run))
        self.measures = StepMetrics(self.comm)
        if self.compiled:
            self.model.compile(dynamic=False)

    def start_batches(self) -> Batches:
        """The stream of training batches, from the present step on."""
        batches = Batches(self.source.train, order=self.run.data.order, seed=self.run.run.seed,
                          document_start=self.source.document_start, rank=self.comm.rank,
                          world_size=self.comm.world_size, plan=self.schedule.portions,
                          total_steps=self.run.train.steps, pin=self.device.type == "cuda",
                          vocab_size=self.source.vocab_size)
        batches.start(self.progress.step, Position(**self.progress.position))
        return batches

    # ---- Step ----

    def step(self, batches: Batches, *, remember: bool = False) -> Tensor:
        """One optimizer step: this rank's summed nats before it, 0-D; with `remember` it can be measured afterwards."""
        progress, train, values = self.progress, self.run.train, self.schedule.values(self.progress.step)
        # Data: this rank's rows of the global batch, prepared by a thread during the step before.
        inputs, targets, position = batches.next()
        # Gradients of the loss, added up over micro-batches.
        nats = self.gradients(inputs, targets, values)
        # A tied head: both tables, equal and trained alike, get the sum of their gradients and stay equal. Gradients that
        # wait for a later step are not shared yet: what they add up to is, once.
        tied = progress.step < train.tied_until_frac * train.steps
        if tied and is_due(progress.step + 1, self.run.optim.embed.update_every):
            embed, head = self.model.embed.grad, self.model.head.weight.grad
            head.copy_(embed.add_(head))
        # Update: gradients are summed over ranks, each rank updates its slice of the weights and sends it to all.
        if remember:
            self.measures.remember(self.optimizer.banks)
        self.optimizer.step(values, progress.step + 1)
        self.optimizer.zero_grad()
        # Progress: what a resumed run must know.
        progress.step += 1
        progress.tokens += values.batch_tokens
        progress.position = asdict(position)
        return nats

    def gradients(self, inputs: Tensor, targets: Tensor, values: Values) -> Tensor:
        """Accumulate this rank's gradients of the step's loss; its own summed nats, 0-D."""
        scale = 1 / values.batch_tokens if self.run.train.loss_reduction == "mean" else 1.0
        total = torch.zeros((), device=self.device)
        # As tensors, because a compiled model would be compiled again for other Python numbers.
        aux_weights = AuxLossWeights(*(torch.full((), x, device=self.device) for x in (values.mtp, values.prefix_loss)))
        for x, y in micro_batches(inputs, targets, self.run.train.micro_tokens):
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            nats = self.model(x, y, aux_weights=aux_weights, **values.windows)
            (nats * scale).backward()
            total += nats.detach()
        return total

    # ---- Validate and measure ----

    @torch.no_grad()
    def validate(self) -> Score:
        """The referee's score of the present weights."""
        values = self.last_values()
        with self.optimizer.evaluation_weights():
            return evaluate(partial(self.model, **values.windows), self.source,
                            sequence_tokens=self.run.data.val_sequence_tokens or values.sequence_tokens,
                            micro_tokens=self.run.train.micro_tokens, rank=self.comm.rank, world_size=self.comm.world_size,
                            device=self.device, sum_over_ranks=lambda x: self.comm.sum(x)[0])

    def last_values(self) -> Values:
        """What held at the last step; before the first, what will hold there."""
        return self.schedule.values(max(0, self.progress.step - 1))

    def layer_metrics(self) -> Metrics:
        """How the last step turned each hidden matrix; on rank 0 also features, spectra and factors of every layer, on the
        validation text's first tokens, and the angles that groups should turn by. A collective."""
        values, turns = self.last_values(), self.measures.by_tensor("matrix")
        if self.comm.rank > 0:
            return {}
        measures = weight_metrics(self.model)
        for name, of_matrix in turns.items():
            measures |= in_row(name, of_matrix)
        groups = {bank.group.role: bank.group for bank in self.optimizer.banks}
        measures |= {metric_name(role, EQUILIBRIUM): angle for role, group in groups.items()
                     if (angle := equilibrium_angle(group, values)) is not None}
        count = min(values.sequence_tokens, LAYER_TOKENS)
        tokens = torch.from_numpy(self.source.validation[:count].astype("int64")).to(self.device)[None]
        return measures | activation_metrics(self.model, tokens, **values.windows)

    def sample(self) -> tuple[str, str] | None:
        """Text: a prompt and what the model makes of it; None on other ranks than 0, and if it is not asked for."""
        generate = partial(self.model.generate, count=self.run.log.sample_tokens, **self.last_values().windows,
                           generator=torch.Generator().manual_seed(self.run.run.seed))
        with self.optimizer.evaluation_weights():  # on all ranks, though one samples
            if self.comm.rank > 0 or not self.run.log.sample_tokens:
                return None
            return sample_text(self.source, generate, device=self.device)

    # ---- Save and resume ----

    def save(self, path: Path) -> None:
        """Write a checkpoint, atomically. A collective: every rank must call it."""
        tensors = self.optimizer.state.tensors()
        if self.comm.rank == 0:
            meta = {"progress": asdict(self.progress), "config": flatten(config_to_dict(self.run)),
                    "data_hash": self.source.data_hash}
            save_checkpoint(path, tensors | {RNG: torch.get_rng_state()}, meta)
        self.comm.barrier()

    def load(self, path: Path) -> None:
        """Continue from a checkpoint. Raises ValueError if it is corrupt, of another model, or of another run."""
        tensors, meta = load_checkpoint(path)
        # Everything is compared before anything is changed.
        match_tensors(self.optimizer.state.shapes() | {RNG: tuple(torch.get_rng_state().shape)}, tensors, what=str(path))
        check_same_run(meta, self.run, self.source.data_hash, path)
        self.optimizer.state.load(tensors)
        torch.set_rng_state(tensors[RNG])
        self.progress = Progress(**meta["progress"])

    # ---- Before the first step ----

    def plan(self) -> str:
        """What the run will do: groups, data, sizes, memory."""
        model, train, values = self.model, self.run.train, self.last_values()
        state_bytes = sum(t.nbytes for b in self.optimizer.banks for t in (b.weights, b.grads, *b.state.values()))
        activation_bytes = model.activation_bytes(min(train.micro_tokens, train.batch_tokens // self.comm.world_size))
        return self.group_table + "\n\n" + format_plan(
            self.run, self.source, notes=[model.paths.line()] if self.device.type == "cuda" else [], dtype=model.dtype,
            kernel=model.kernel, compiled=self.compiled, world_size=self.comm.world_size, device=device_name(self.device),
            parameters=self.parameters, flops_per_token=model.flops_per_token(values.sequence_tokens, **values.windows),
            total_tokens=self.schedule.tokens_before(train.steps), state_bytes=state_bytes,
            activation_bytes=activation_bytes)

    def warm_up(self) -> None:
        """Run every shape of the schedule on random tokens, so that all is compiled, then undo it."""
        snapshot = self.optimizer.state.snapshot()
        generator = torch.Generator().manual_seed(0)
        shapes = {(v.batch_tokens, v.sequence_tokens, v.window_tokens, v.long_window_tokens): v
                  for v in map(self.schedule.values, range(self.run.train.steps))}
        for step, values in enumerate(shapes.values()):
            rows = max(1, values.batch_tokens // values.sequence_tokens // self.comm.world_size)
            tokens = torch.randint(self.source.vocab_size, (rows, values.sequence_tokens), generator=generator)
            for _ in range(self.run.train.warmup_steps):
                self.gradients(tokens, tokens, values)
                self.optimizer.step(values, (step + 1) * self.optimizer.period)  # so that every group is updated
                self.optimizer.zero_grad()
            with torch.no_grad():  # as validation does
                x = next(micro_batches(tokens, tokens, self.run.train.micro_tokens))[0].to(self.device)
                self.model(x, x, **values.windows)
        self.optimizer.state.restore(snapshot)


if __name__ == "__main__":
    try:
        main(RUN, BEGAN)
    except ValueError as error:
        fail(str(error))
    except DivergedError as error:
        raise SystemExit(f"error: {error}") from None  # printed on stderr; the status is 1
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"error: out of memory; lower --train.micro_tokens ({RUN.train.micro_tokens}). {error}") from None
