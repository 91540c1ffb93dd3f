"""One training run, in this order: main, train, step, validate, save and resume.

    python train_gpt.py [PRESET] [--dotted.field VALUE ...]
    torchrun --standalone --nproc_per_node=8 train_gpt.py PRESET ...

Timed: data loading, steps, logging. Not timed: imports, warm-up with compilation, validation, checkpoints, sampling.
"""

import sys
import time

from configs.cli import fail, parse

if __name__ == "__main__":
    START_SECONDS = time.time()
    RUN = parse(sys.argv[1:])  # before the slow import of torch, so that --help and typing errors answer at once

# ruff: noqa: E402
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from configs.schema import Run
from configs.serialize import config_to_dict, flatten
from data.batches import Batches, micro_batches, rows_of_rank
from data.evaluate import Score, evaluate, sample_text
from data.orders import Position
from data.run.checkpoint import check_same_run, load_checkpoint, match_tensors, save_checkpoint
from data.run.clock import Clock, Interruption
from data.run.diagnostics import Metrics, activation_metrics, row_metrics, weight_metrics
from data.run.environment import choose_device, device_name
from data.run.folder import open_run_folder
from data.run.log import Log, Progress
from data.run.memory import fit_passes, free_bytes
from data.run.metrics import EQUILIBRIUM, metric_name
from data.run.plan import format_groups, format_plan, format_schedule
from data.sources import open_source
from kernels.operators import compile_options
from model import GPT, AuxLossWeights
from optim.comm import Comm, local_rank
from optim.groups import build_groups
from optim.hooks import build_hooks
from optim.metrics import StepMetrics, equilibrium_angle
from optim.schedule import Schedule, Values, is_due, is_validation_step, loss_weights, training_shapes, validation_shapes
from optim.sharded import NonFiniteError, ShardedOptimizer

CACHE = Path(__file__).resolve().parent / ".cache"
CHECKPOINT = "checkpoint.safetensors"
RNG = "rng/torch"
LAYER_TOKENS = 4096  # longest input of the layer metrics: uncompiled attention may store T x T scores
GPU_SIGNAL_POLL_STEPS = 16  # GPUs: ask all ranks for a signal only so often, because that waits; CPUs: after every step


class DivergedError(RuntimeError):
    """The loss or a gradient is not finite: a NonFiniteError with advice to the user."""


def main(run: Run, start_seconds: float | None = None) -> None:
    """Train one run from its config to its summary. `start_seconds` is the process's start as a Unix time."""
    start_seconds = start_seconds or time.time()
    # Build the trainer and print the plan.
    trainer = Trainer(run)
    rank, world_size = trainer.comm.rank, trainer.comm.world_size
    if rank == 0:
        print(trainer.plan(), flush=True)
        if run.run.dry_run:
            print(format_schedule(trainer.schedule.values, run.train.steps), flush=True)
    if run.run.dry_run:
        return
    # Open the run folder. Rank 0 alone chooses it, because runs without a name take the next number.
    identity, folder = run.run, None
    if rank == 0:
        folder = open_run_folder(identity.dir, identity.name, fallback_name=run.preset, resume=identity.resume)
    folder = trainer.comm.share(folder)
    resumed = identity.resume and (folder / CHECKPOINT).exists()
    if resumed:
        trainer.load(folder / CHECKPOINT)
    # The log comes after loading, which replaces trainer.progress; it cuts metrics.jsonl back to the checkpoint's step.
    log = Log(trainer.run, folder, trainer.progress, device=trainer.device, rank=rank, world_size=world_size)
    if identity.resume:
        log.info(f"resuming {folder} at step {trainer.progress.step}" if resumed
                 else f"no checkpoint in {folder}: starting at step 0")
    if trainer.compiled and run.train.warmup_steps:
        trainer.warm_up()
    # Train; end with a summary, or say how to continue.
    try:
        finished = train(trainer, log)
    except NonFiniteError as error:
        checkpoint = folder / CHECKPOINT
        advice = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "no checkpoint was written yet"
        raise DivergedError(f"{error}; {advice}. Lower --optim.matrix.lr or --optim.embed.lr, or warm the learning rate up "
                            "from 0: --schedule.lr '0=0 5%=1 100%=0.1'") from error
    if finished:
        log.write_summary(time.time() - start_seconds, trainer.parameters, data_hash=trainer.source.data_hash)
        log.finish(trainer.sample())  # sampling is slow: the summary must not wait for it
    else:
        resume = f"--run.name {folder.name} --run.resume"
        log.info(f"interrupted at step {trainer.progress.step}; to continue, repeat the command with {resume}")
    trainer.comm.close()


def train(trainer: "Trainer", log: Log) -> bool:
    """Run the timed loop and save checkpoints; return True if the run is finished, False if a signal interrupted it. Raises
    NonFiniteError, and leaves the last checkpoint as it is. Steps count from 1 here, from 0 in the schedule and the data."""
    run, progress = trainer.run, trainer.progress
    poll_steps = GPU_SIGNAL_POLL_STEPS if trainer.device.type == "cuda" else 1
    interruption, interrupted = Interruption(), False
    batches = trainer.start_batches()
    clock = Clock(trainer.device, progress.train_seconds)
    while not (interrupted or progress.is_finished(run)):
        step = progress.step + 1
        validates, measures_layers = is_validation_step(run.train, step), is_due(step, run.log.layers_every_steps)
        nats = trainer.step(batches, remember=measures_layers or (validates and run.log.diagnostics))
        log.bar.update()
        # Log the training loss. Not at every step, because reading a number waits for the GPU.
        if is_due(step, run.log.every_steps) or validates:
            values = trainer.last_values()
            loss = trainer.comm.sum(nats.item())[0] / values.batch_tokens
            progress.train_seconds = clock.seconds
            log.training(loss, flops_per_token=trainer.model.flops_per_token(values.sequence_tokens, **values.windows))
            check_finite(loss, step)
        # Measure layers and validate, with the clock stopped; in this order, because by_role drops the remembered weights.
        if measures_layers:
            with clock.paused():
                log.write(trainer.layer_metrics())
        if validates:
            with clock.paused():
                score = trainer.validate()
                check_finite(score.nats_per_token, step)
                progress.record_score(score, run.run.target_loss_nats)
                log.validation(score, trainer.measures.by_role(trainer.last_values()) if run.log.diagnostics else {})
        # Save, also after a signal: on all ranks or none, because it is a collective; never the weights after a bad step.
        ends, polls = progress.is_finished(run), is_due(step, poll_steps)
        saves = is_due(step, run.run.checkpoint_every_steps) or (ends and run.run.final_checkpoint)
        if polls or saves or ends:
            trainer.optimizer.check_finite()
        interrupted = polls and trainer.comm.max(float(interruption.received))[0] > 0
        if saves or interrupted:
            with clock.paused():
                check_finite(trainer.comm.sum(nats.item())[0], step)
                progress.train_seconds, progress.metrics_bytes = clock.seconds, log.metrics_bytes()
                trainer.save(log.folder / CHECKPOINT)
    batches.close()
    return progress.is_finished(run)


def check_finite(loss: float, step: int) -> None:
    """Raise NonFiniteError if the loss of a step is NaN or infinite."""
    if not math.isfinite(loss):
        raise NonFiniteError(f"loss is {loss} at step {step}")


class Trainer:
    """Model, optimizer and data of one run, on one rank."""

    def __init__(self, run: Run) -> None:
        """Build the source, the model and the optimizer. Writes nothing to disk except the cached tokens and tokenizer."""
        self.run, self.schedule, self.progress = run, Schedule(run), Progress()
        self.comm = Comm(choose_device(run.run.device, local_rank()))
        self.device, on_cuda = self.comm.device, self.comm.device.type == "cuda"
        self.compiled = run.run.compile == "on" or (run.run.compile == "auto" and on_cuda)
        self.shapes = training_shapes(run, limited=self.compiled)
        # Tokens. The first rank of each machine opens the source before its other ranks, so that caches are built once.
        if local_rank() > 0:
            self.comm.barrier()
        self.source = open_source(run.data, cache_dir=CACHE, plan_for=run.preset if run.run.dry_run else None)
        if local_rank() == 0:
            self.comm.barrier()
        # Model: long enough for training and validation. Seeded here, right before the first random draw.
        torch.manual_seed(run.run.seed)
        longest = max(run.data.val_sequence_tokens or 0, *(values.sequence_tokens for values in self.shapes))
        self.model = GPT(run.model, vocab_size=self.source.vocab_size, max_tokens=longest, on_cuda=on_cuda,
                         document_start=self.source.document_start, dtype=torch.bfloat16 if on_cuda else torch.float32,
                         prefix_of=self.source.prefixes() if run.model.prefix_loss else None)
        if run.train.tied_until_frac:
            self.model.head.weight.data.copy_(self.model.embed)
        self.model.to(self.device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        # Optimizer. It makes all parameters views of its banks: a later model.to(...) would break the link.
        groups = build_groups(dict(self.model.named_parameters()), self.model.roles(), run.optim, self.model.axes())
        self.group_table = format_groups(groups)
        self.optimizer = ShardedOptimizer(groups, self.comm, compile_updates=self.compiled, hooks=build_hooks(run))
        self.measures = StepMetrics(self.comm)
        self.notes = [self.model.paths.line(), self.model.kernel_note] if on_cuda else []
        if run.train.micro_tokens is None:  # chosen here, where the memory that the banks leave is known
            self.run, note = fit_passes(run, self.shapes, free=-self.comm.max(-free_bytes(self.device))[0],
                                        world_size=self.comm.world_size, activation_bytes=self.model.activation_bytes)
            self.notes.append(note)
        if self.compiled:
            # One graph per shape: dynamic shapes cost speed, and warm_up sees all shapes.
            self.model.compile(dynamic=False, options=compile_options(on_cuda and run.run.combo_kernels))

    def start_batches(self) -> Batches:
        """Return the stream of training batches, started at the current step."""
        run, source = self.run, self.source
        batches = Batches(source.train, order=run.data.order, seed=run.run.seed, document_start=source.document_start,
                          rank=self.comm.rank, world_size=self.comm.world_size, plan=self.schedule.portions,
                          total_steps=run.train.steps, pin=self.device.type == "cuda", vocab_size=source.vocab_size,
                          beside=self.model.used_rows if self.optimizer.exchanges_rows else None)
        batches.start(self.progress.step, Position(**self.progress.position))
        return batches

    # ---- Step ----

    def step(self, batches: Batches, *, remember: bool = False) -> Tensor:
        """Take one optimizer step; return this rank's training loss before it, summed in nats, auxiliary losses included,
        0-D. `remember` copies the weights first, so that `self.measures` can measure the step."""
        progress, train, values = self.progress, self.run.train, self.schedule.values(self.progress.step)
        # Data: this rank's rows of the global batch, which a thread prepared during the previous step.
        inputs, targets, position, used_rows = batches.next()
        if used_rows is not None:
            self.optimizer.note_rows(used_rows, progress.step + 1)
        # Gradients: added up over micro-batches.
        nats = self.gradients(inputs, targets, values)
        # Update: sum the gradients over ranks; each rank updates its slice of the weights and sends it to all others.
        if remember:
            self.measures.remember(self.optimizer.banks)
        # Tied head: two tensors, equal in weights and optimizer settings (the config checks it), which one step keeps equal.
        tied = ("embed", "head.weight") if progress.step < train.tied_until_frac * train.steps else None
        self.optimizer.step(values, progress.step + 1, tied=tied)
        self.optimizer.zero_grad()  # those of groups with update_every > 1 go on adding up
        # Progress: the state, besides tensors, that a resumed run needs.
        progress.step += 1
        progress.tokens += values.batch_tokens
        progress.position = asdict(position)
        return nats

    def gradients(self, inputs: Tensor, targets: Tensor, values: Values) -> Tensor:
        """Add this rank's gradients of the step's loss to the buffers; return the loss, as `step` does.
        Inputs and targets are (rows, T) on the CPU."""
        # Divided by the tokens of the global batch: the optimizer's sum over ranks is then the mean over all tokens.
        scale = 1 / values.batch_tokens if self.run.train.loss_reduction == "mean" else 1.0
        total = torch.zeros((), device=self.device)
        aux = AuxLossWeights.of(*loss_weights(values, self.run.model), self.device)
        for number, (x, y) in enumerate(micro_batches(inputs, targets, self.run.train.micro_tokens)):
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            aux = aux.draw_classes(self.run.model.sampled_softmax, len(self.model.head_weight), device=self.device,
                                   key=(self.run.run.seed, self.progress.step, number))
            nats = self.model(x, y, aux_weights=aux, longest_document=values.max_document_tokens, **values.windows)
            (nats * scale).backward()
            total += nats.detach()  # on the device: .item() here would wait for it in every micro-batch
        return total

    # ---- Validate and measure ----

    @torch.no_grad()
    def validate(self) -> Score:
        """Return the validation score of the current weights (of their average, if the run keeps one). A collective."""
        values = self.schedule.validation_values(self.progress.step)
        with self.optimizer.evaluation_weights():
            return evaluate(partial(self.model, **values.windows), self.source,
                            sequence_tokens=self.run.data.val_sequence_tokens or values.sequence_tokens,
                            micro_tokens=self.run.train.micro_tokens, rank=self.comm.rank, world_size=self.comm.world_size,
                            device=self.device, sum_over_ranks=lambda x: self.comm.sum(x)[0])

    def last_values(self) -> Values:
        """Return the scheduled values of the last step taken; before the first step, those of the first."""
        return self.schedule.values(max(0, self.progress.step - 1))

    def layer_metrics(self) -> Metrics:
        """Return spectra, rotation angles and expected angles of the weights, and the activations' RMS on the first
        validation tokens; {} on ranks other than 0. A collective."""
        values, angles = self.last_values(), self.measures.by_tensor("matrix")
        if self.comm.rank > 0:
            return {}
        metrics = weight_metrics(self.model)
        for name, of_matrix in angles.items():
            metrics |= row_metrics(name, of_matrix)
        groups = {bank.group.role: bank.group for bank in self.optimizer.banks}  # banks of a role share one group
        metrics |= {metric_name(role, EQUILIBRIUM): angle for role, group in groups.items()
                    if (angle := equilibrium_angle(group, values)) is not None}
        count = min(values.sequence_tokens, LAYER_TOKENS)
        tokens = torch.from_numpy(self.source.validation[:count].astype("int64")).to(self.device)[None]
        return metrics | activation_metrics(self.model, tokens, **values.windows)

    def sample(self) -> tuple[str, str] | None:
        """Return a prompt and the model's continuation; None on ranks other than 0, or if log.sample_tokens is 0."""
        generate = partial(self.model.generate, count=self.run.log.sample_tokens, **self.last_values().windows,
                           generator=torch.Generator().manual_seed(self.run.run.seed))
        with self.optimizer.evaluation_weights():  # a collective, so on all ranks, though only rank 0 samples
            samples = self.comm.rank == 0 and self.run.log.sample_tokens
            return sample_text(self.source, generate, device=self.device) if samples else None

    # ---- Save and resume ----

    def save(self, path: Path) -> None:
        """Write a checkpoint; the file appears whole or not at all. A collective: all ranks gather their optimizer state."""
        tensors = self.optimizer.state.tensors(keep=self.comm.rank == 0)
        if self.comm.rank == 0:
            meta = {"progress": asdict(self.progress), "config": flatten(config_to_dict(self.run)),
                    "data_hash": self.source.data_hash}
            save_checkpoint(path, tensors | {RNG: torch.get_rng_state()}, meta)
        self.comm.barrier()

    def load(self, path: Path) -> None:
        """Load a checkpoint. Raises ValueError if it is corrupt, or of another model, config or data."""
        # Read: header, checksum, tensors.
        tensors, meta = load_checkpoint(path)
        # Compare names, shapes, config and data before anything changes, so that an error leaves the trainer as it was.
        match_tensors(self.optimizer.state.shapes() | {RNG: tuple(torch.get_rng_state().shape)}, tensors, what=str(path))
        check_same_run(meta, self.run, self.source.data_hash, path)
        # Restore. Rank 0's CPU generator is enough: all ranks draw alike, and nothing draws on a GPU.
        self.optimizer.state.load(tensors)
        torch.set_rng_state(tensors[RNG])
        self.progress = Progress(**meta["progress"])

    # ---- Before the first step ----

    def plan(self) -> str:
        """Return the printed plan of the run: data, sizes, FLOPs, memory, parameter groups."""
        model, train, values = self.model, self.run.train, self.last_values()
        state_bytes = sum(t.nbytes for b in self.optimizer.banks for t in (b.weights, b.grads, *b.state.values()))
        plan = format_plan(
            self.run, self.source, notes=self.notes, dtype=model.dtype, kernel=model.kernel, world_size=self.comm.world_size,
            compiled=len(self.shapes) if self.compiled else 0, device=device_name(self.device), parameters=self.parameters,
            flops_per_token=model.flops_per_token(values.sequence_tokens, **values.windows),
            total_tokens=self.schedule.tokens_before(train.steps), state_bytes=state_bytes,
            activation_bytes=model.activation_bytes(min(train.micro_tokens, train.batch_tokens // self.comm.world_size)))
        return f"{plan}\n\n{self.group_table}\n"

    def warm_up(self) -> None:
        """Compile every shape that this rank will meet, on random documents, and leave no trace of them."""
        draw = partial(torch.randint, self.source.vocab_size, generator=torch.Generator().manual_seed(0))
        with self.optimizer.state.restored(self.model):
            for i, values in enumerate(self.shapes):
                rows = rows_of_rank(values.batch_tokens // values.sequence_tokens, self.comm.rank, self.comm.world_size)
                tokens = draw((len(rows), values.sequence_tokens))
                tokens[:, ::values.max_document_tokens or values.sequence_tokens] = self.source.document_start or 0
                for _ in range(self.run.train.warmup_steps):
                    self.gradients(tokens, tokens, values)
                    self.optimizer.step(values, (i + 1) * self.optimizer.period)  # a count at which every group is updated
                    self.optimizer.zero_grad()
            for values in validation_shapes(self.run):
                length = self.run.data.val_sequence_tokens or values.sequence_tokens
                x = draw((max(1, self.run.train.micro_tokens // length), length)).to(self.device)
                with torch.no_grad():  # a graph of its own
                    self.model(x, x, **values.windows)


if __name__ == "__main__":
    try:
        main(RUN, START_SECONDS)
    except ValueError as error:  # by convention a mistake in the settings or the data: no traceback
        fail(str(error))
    except DivergedError as error:
        raise SystemExit(f"error: {error}") from None  # printed on stderr; the status is 1
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"error: out of memory; lower --train.micro_tokens ({RUN.train.micro_tokens}). {error}") from None
