"""One training run, told from top to bottom: config > data > model > optimizer > warm-up > timed loop > checkpoint.

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
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from configs.schema import Identity, Run
from data.batches import Batches
from data.checkpoint import load_checkpoint, match_tensors, save_checkpoint
from data.clock import Clock, Interruption
from data.device import choose_device, device_name, peak_memory_bytes
from data.environment import peak_flops
from data.evaluate import Score, evaluate
from data.metrics import EQUILIBRIUM, measure_name
from data.orders import Position
from data.reporter import Progress, Reporter
from data.run.diagnostics import Measures, feature_measures, in_row, weight_measures
from data.runs import config_to_dict, flatten, open_run_folder
from data.sources import Source, open_source
from data.tokenizers import prefix_tokens
from model import GPT, AuxLossWeights
from optim.comm import Comm, local_rank
from optim.equilibrium import equilibrium_angle
from optim.finite import NonFiniteError
from optim.groups import build_groups, group_table
from optim.lookahead import Lookahead
from optim.schedule import Schedule, Values
from optim.sharded import ShardedOptimizer
from optim.weight_average import WeightAverage

CACHE = Path(__file__).resolve().parent / ".cache"
CHECKPOINT = "checkpoint.safetensors"
RNG = "rng/torch"
PROMPT_TOKENS = 32
LAYER_TOKENS = 4096  # most that layers are measured on: uncompiled attention may hold T x T scores
GPU_SIGNAL_POLL_STEPS = 16  # agreeing on a signal waits for the device; on CPUs it is free


class DivergedError(RuntimeError):
    """The loss or a gradient is not finite."""


# ---- The run's state ----------------------------------------------------------------------------------------------------


class Trainer:
    """Model, optimizer, data and clock of one run, on one rank."""

    def __init__(self, run: Run) -> None:
        """Build everything that the run needs; nothing is written to disk but the tokenizer's cache."""
        self.run = run
        self.comm = Comm(choose_device(run.run.device, local_rank()))
        self.device = self.comm.device
        self.schedule = Schedule(run)
        self.source = self._open_source()
        self.model = self._build_model()
        groups = build_groups(dict(self.model.named_parameters()), self.model.roles(), run.optim,
                              self.model.axes())
        self.group_table = group_table(groups)
        self.compiled = run.run.compile == "on" or (run.run.compile == "auto" and self.device.type == "cuda")
        self.optimizer = ShardedOptimizer(groups, self.comm, compile_updates=self.compiled,
                                          average=WeightAverage.build(run.train), lookahead=Lookahead.build(run))
        if self.compiled:
            self.model.compile(dynamic=False)
        self.progress = Progress()
        self.clock = Clock(self.device)

    def _open_source(self) -> Source:
        """Each machine's first rank opens the source first, so that caches are built once."""
        def opened() -> Source:
            return open_source(self.run.data, cache_dir=CACHE, seed=self.run.run.seed)

        source = opened() if local_rank() == 0 else None
        self.comm.barrier()
        return source or opened()

    def _build_model(self) -> GPT:
        torch.manual_seed(self.run.run.seed)
        values = [self.schedule.values(step) for step in range(self.run.train.steps)]
        longest = max(max(v.sequence_tokens for v in values), self.run.data.val_sequence_tokens or 0)
        on_cuda, tokenizer = self.device.type == "cuda", self.source.tokenizer
        prefixes = prefix_tokens(tokenizer.pieces) if self.run.model.prefix_loss and tokenizer else None
        model = GPT(self.run.model, vocab_size=self.source.vocab_size, max_tokens=longest,
                    document_start=self.source.document_start, prefix_of=prefixes, on_cuda=on_cuda,
                    dtype=torch.bfloat16 if on_cuda else torch.float32)
        if self.run.train.tied_until_frac:
            model.head.weight.data.copy_(model.embed)
        return model.to(self.device)

    def start_batches(self) -> Batches:
        """The stream of training batches, from the present step on."""
        batches = Batches(self.source.train, order=self.run.data.order, seed=self.run.run.seed,
                          document_start=self.source.document_start, rank=self.comm.rank,
                          world_size=self.comm.world_size, plan=self.schedule.portions,
                          total_steps=self.run.train.steps, pin=self.device.type == "cuda",
                          vocab_size=self.source.vocab_size)
        batches.start(self.progress.step, Position.from_dict(self.progress.position))
        return batches

    # ---- One step, one validation ----

    def gradients(self, inputs: Tensor, targets: Tensor, values: Values) -> Tensor:
        """Accumulate this rank's gradients of the step's loss; its own summed nats, 0-D."""
        scale = 1 / values.batch_tokens if self.run.train.loss_reduction == "mean" else 1.0
        total = torch.zeros((), device=self.device)
        aux_weights = AuxLossWeights(*(torch.full((), x, device=self.device) for x in (values.mtp, values.prefix_loss)))
        for x, y in micro_batches(inputs, targets, self.run.train.micro_tokens):
            x, y = (part.to(self.device, non_blocking=True) for part in (x, y))
            nats = self.model(x, y, aux_weights=aux_weights, **values.windows)
            (nats * scale).backward()
            total += nats.detach()
        return total

    def step(self, batches: Batches, *, remember: bool = False) -> Tensor:
        """One optimizer step: this rank's summed nats before it; with `remember` it can be measured afterwards."""
        progress, values = self.progress, self.schedule.values(self.progress.step)
        inputs, targets, position = batches.next()
        nats = self.gradients(inputs, targets, values)
        if self._is_tied():
            share_gradients(self.model.embed, self.model.head.weight)
        self.optimizer.step(values, progress.step + 1, remember=remember)
        self.optimizer.zero_grad()
        progress.step += 1
        progress.tokens += values.batch_tokens
        progress.position = position.as_dict()
        return nats

    def _is_tied(self) -> bool:
        """Whether this step moves the embedding, and the head with it. Gradients that wait for a later step are not shared
        yet: what they add up to is, once."""
        step, train = self.progress.step, self.run.train
        return step < train.tied_until_frac * train.steps and (step + 1) % self.run.optim.embed.update_every == 0

    @torch.no_grad()
    def validate(self) -> Score:
        """The referee's score of the present weights."""
        values = self.last_values()
        with self.optimizer.averaged_weights():
            return evaluate(partial(self.model, **values.windows), self.source,
                            sequence_tokens=self.run.data.val_sequence_tokens or values.sequence_tokens,
                            micro_tokens=self.run.train.micro_tokens, rank=self.comm.rank, world_size=self.comm.world_size,
                            device=self.device, sum_over_ranks=lambda x: self.comm.sum(x)[0])

    def last_values(self) -> Values:
        """What held at the last step; before the first, what will hold there."""
        return self.schedule.values(max(0, self.progress.step - 1))

    def layer_measures(self) -> Measures:
        """How the last step turned each hidden matrix; on rank 0 also features, spectra and factors of every layer, on the
        validation text's first tokens, and the angles that groups should turn by. A collective."""
        values, turns = self.last_values(), self.optimizer.turns("matrix")
        if self.comm.rank > 0:
            return {}
        found = weight_measures(self.model)
        for name, measures in turns.items():
            found |= in_row(name, measures)
        groups = {bank.group.role: bank.group for bank in self.optimizer.banks}
        found |= {measure_name(role, EQUILIBRIUM): angle for role, group in groups.items()
                  if (angle := equilibrium_angle(group, values)) is not None}
        count = min(values.sequence_tokens, LAYER_TOKENS)
        tokens = torch.from_numpy(self.source.validation[:count].astype("int64")).to(self.device)[None]
        return found | feature_measures(self.model, tokens, **values.windows)

    def warm_up(self) -> None:
        """Run every shape of the schedule on random tokens, so that all is compiled, then undo it."""
        snapshot = self.optimizer.snapshot()
        generator = torch.Generator().manual_seed(0)
        shapes = {values[3:7]: values for values in map(self.schedule.values, range(self.run.train.steps))}
        for step, values in enumerate(shapes.values()):
            rows = max(1, values.batch_tokens // values.sequence_tokens // self.comm.world_size)
            tokens = torch.randint(self.source.vocab_size, (rows, values.sequence_tokens), generator=generator)
            for _ in range(self.run.train.warmup_steps):
                self.gradients(tokens, tokens, values)
                self.optimizer.step(values, (step + 1) * self.optimizer.period)  # so that every group is updated
                self.optimizer.zero_grad()
            with torch.no_grad():
                x = next(micro_batches(tokens, tokens, self.run.train.micro_tokens))[0].to(self.device)
                self.model(x, x, **values.windows)
        self.optimizer.restore(snapshot)

    # ---- Saving and resuming ----

    def save(self, path: Path) -> None:
        """Write a checkpoint, atomically. A collective: every rank must call it."""
        tensors = self.optimizer.state_tensors()
        if self.comm.rank == 0:
            meta = {"progress": {name: getattr(self.progress, name) for name in Progress.__slots__},
                    "config": flatten(config_to_dict(self.run)), "data_hash": self.source.data_hash}
            save_checkpoint(path, tensors | {RNG: torch.get_rng_state()}, meta)
        self.comm.barrier()

    def load(self, path: Path) -> None:
        """Continue from a checkpoint. Raises ValueError if it is corrupt, of another model, or of another run."""
        tensors, meta = load_checkpoint(path)
        match_tensors(self.optimizer.state_shapes() | {RNG: tuple(torch.get_rng_state().shape)}, tensors, what=str(path))
        refuse_other_run(meta, self.run, self.source.data_hash, path)
        self.optimizer.load_state_tensors(tensors)
        torch.set_rng_state(tensors[RNG])
        self.progress = Progress(**meta["progress"])
        self.clock = Clock(self.device, self.progress.train_seconds)

    def flops_per_token(self) -> float:
        """Floating-point operations of a training token of the last step."""
        values = self.last_values()
        return self.model.flops_per_token(values.sequence_tokens, **values.windows)


def share_gradients(*tied: Tensor) -> None:
    """Every tensor's gradient becomes the sum of all, in place: tensors that are equal and trained alike stay equal."""
    total = sum(tensor.grad for tensor in tied)
    for tensor in tied:
        tensor.grad.copy_(total)


def micro_batches(inputs: Tensor, targets: Tensor, micro_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of (n, T) tensors in portions of at most `micro_tokens` tokens, at least one row."""
    rows = max(1, micro_tokens // inputs.size(1))
    yield from zip(inputs.split(rows), targets.split(rows), strict=True) if len(inputs) else ()


def refuse_other_run(meta: dict, run: Run, data_hash: str, path: Path) -> None:
    """Raise ValueError if a checkpoint's settings that decide the losses, or its data, are not this run's."""
    if meta["data_hash"] != data_hash:
        raise ValueError(f"{path} was trained on data {meta['data_hash']}, this run reads {data_hash}")
    free = {f"run.{name}" for name in Identity.__slots__ if name != "seed"}
    mine = flatten(config_to_dict(run))
    for name, value in meta["config"].items():
        if name not in free and not name.startswith("log.") and name != "train.micro_tokens" and mine.get(name) != value:
            raise ValueError(f"{path} was trained with --{name} {value}, this run says {mine.get(name)}; "
                             "resume with the same settings, or start another --run.name")


# ---- The story ----------------------------------------------------------------------------------------------------------


def is_validation_step(run: Run, step: int) -> bool:
    """Whether the weights after `step` steps are validated: always at the end, never at the start."""
    train = run.train
    late = train.final_val_every_steps and step >= 0.9 * train.steps
    every = train.final_val_every_steps if late else train.val_every_steps
    return step == train.steps or (step > 0 and every > 0 and step % every == 0)


def is_finished(run: Run, progress: Progress) -> bool:
    """Whether all steps are done, or the target is reached where that ends the run."""
    return progress.step >= run.train.steps or (run.run.stop_at_target and progress.target_step is not None)


def plan(trainer: Trainer) -> str:
    """What the run will do: groups, sizes, schedule, memory."""
    run, model, source = trainer.run, trainer.model, trainer.source
    steps, micro = run.train.steps, min(run.train.micro_tokens, run.train.batch_tokens // trainer.comm.world_size)
    parameters = sum(p.numel() for p in model.parameters())
    state = sum(t.nbytes for b in trainer.optimizer.banks for t in (b.weights, b.grads, *b.state.values()))
    kernel = model.kernel if run.model.flash == "default" else f"{model.kernel} by {run.model.flash}"
    lines = [trainer.group_table, "",
             f"preset {run.preset} on {trainer.comm.world_size} x {device_name(trainer.device)}, seed {run.run.seed}, "
             f"activations {str(model.dtype)[6:]}, attention {kernel}, compile {'on' if trainer.compiled else 'off'}",
             f"data {source.name}, hash {source.data_hash}, {sum(map(len, source.train)):,} training tokens, "
             f"{len(source.validation) - 1:,} validation tokens, vocabulary {source.vocab_size:,}",
             *source.notes, *([model.paths.line()] if trainer.device.type == "cuda" else []),
             f"{parameters:,} parameters, {trainer.flops_per_token() / 1e6:.1f} MFLOP a token; {steps:,} steps, "
             f"{trainer.schedule.tokens_before(steps):,} tokens; memory a rank: weights, gradients and optimizer state "
             f"{state / 2**20:,.0f} MiB, activations about {model.activation_bytes(micro) / 2**20:,.0f} MiB"]
    return "\n".join(lines)


def schedule_table(schedule: Schedule) -> str:
    """The schedule's values at eleven steps."""
    steps = sorted({round(i * (schedule.total_steps - 1) / 10) for i in range(11)})
    lines = [f"{'step':>8} " + " ".join(f"{name:>15}" for name in Values._fields)]
    for step in steps:
        cells = ("-" if x is None else f"{x:.6g}" for x in schedule.values(step))
        lines.append(f"{step:>8} " + " ".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def train(trainer: Trainer, reporter: Reporter) -> bool:
    """The timed loop. True if the run ended, False if a signal cut it short; a checkpoint is written in both cases."""
    run, progress, clock = trainer.run, trainer.progress, trainer.clock
    interruption, batches = Interruption(), trainer.start_batches()
    poll = GPU_SIGNAL_POLL_STEPS if trainer.device.type == "cuda" else 1
    clock.start()
    while not is_finished(run, progress):
        validates, every = is_validation_step(run, progress.step + 1), run.log.layers_every_steps
        measures = every > 0 and (progress.step + 1) % every == 0
        with advised(trainer, reporter.folder):
            nats = trainer.step(batches, remember=measures or (validates and run.log.diagnostics))
        reporter.advance()
        if progress.step % run.log.every_steps == 0 or validates:
            record_train_loss(trainer, reporter, nats)
        if measures:
            clock.stop()
            reporter.layers(trainer.layer_measures())
            clock.start()
        if validates:
            clock.stop()
            score = trainer.validate()
            progress.note_score(score, run.run.target_loss_nats)
            values = trainer.schedule.values(progress.step - 1)
            reporter.validation(score, trainer.optimizer.measure(values) if run.log.diagnostics else {})
            refuse_non_finite(trainer, score.nats_per_token, reporter.folder)
            clock.start()
        every = run.run.checkpoint_every_steps
        saves = is_finished(run, progress) or (every and progress.step % every == 0)
        if progress.step % poll == 0 or saves:
            with advised(trainer, reporter.folder):
                trainer.optimizer.refuse_non_finite()
        interrupted = progress.step % poll == 0 and trainer.comm.max(float(interruption.received))[0] > 0
        if saves or interrupted:
            clock.stop()
            refuse_non_finite(trainer, trainer.comm.sum(nats.item())[0], reporter.folder)
            checkpoint(trainer, reporter)
            clock.start()
        if interrupted:
            break
    clock.stop()
    batches.close()
    return is_finished(run, progress)


def record_train_loss(trainer: Trainer, reporter: Reporter, nats: Tensor) -> None:
    """Sum the step's loss over ranks, write it down, and stop the run where it is not finite."""
    progress, comm = trainer.progress, trainer.comm
    loss = comm.sum(nats.item())[0] / trainer.schedule.values(progress.step - 1).batch_tokens
    progress.train_seconds = trainer.clock.seconds
    peak = peak_flops(device_name(trainer.device))
    reporter.training(loss, flops_per_token=trainer.flops_per_token(), peak_flops=peak and peak * comm.world_size)
    refuse_non_finite(trainer, loss, reporter.folder)


def refuse_non_finite(trainer: Trainer, loss: float, folder: Path) -> None:
    """Raise DivergedError, with advice, where the loss is NaN or infinite."""
    with advised(trainer, folder):
        if not math.isfinite(loss):
            raise NonFiniteError(f"loss is {loss} at step {trainer.progress.step}")


@contextmanager
def advised(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Turn NonFiniteError into DivergedError, with advice."""
    try:
        yield
    except NonFiniteError as error:
        saved = folder / CHECKPOINT
        good = f"the last good checkpoint is {saved}" if saved.exists() else "no checkpoint was written yet"
        raise DivergedError(f"{error}; {good}. Lower --optim.matrix.lr or the lr of "
                            "the embeddings, or start from lr 0 (--schedule.lr '0=0 5%=1 ...')") from error


def checkpoint(trainer: Trainer, reporter: Reporter) -> None:
    """Save everything, with the length of the metrics file as of now."""
    trainer.progress.train_seconds = trainer.clock.seconds
    trainer.progress.metrics_bytes = reporter.metrics_bytes()
    trainer.save(reporter.folder / CHECKPOINT)


def finish(trainer: Trainer, reporter: Reporter, began: float) -> None:
    """Write summary.json, print it, and sample a continuation of the validation text."""
    with trainer.optimizer.averaged_weights():  # on all ranks, though one samples
        text = sample(trainer) if reporter.active else None
    reporter.finish(
        sample=text, wall_seconds=time.time() - began,
        peak_memory_bytes=peak_memory_bytes(trainer.device), parameters=sum(p.numel() for p in trainer.model.parameters()),
        data_hash=trainer.source.data_hash, device=device_name(trainer.device), world_size=trainer.comm.world_size)


def sample(trainer: Trainer) -> tuple[str, str] | None:
    """The validation text's first tokens, and the model's continuation of them; None if not asked for."""
    tokenizer, count = trainer.source.tokenizer, trainer.run.log.sample_tokens
    if tokenizer is None or not count:
        return None
    prompt = torch.from_numpy(trainer.source.validation[1:1 + PROMPT_TOKENS].astype("int64")).to(trainer.device)
    rng = torch.Generator().manual_seed(trainer.run.run.seed)
    tokens = trainer.model.generate(prompt, count, generator=rng, **trainer.last_values().windows)
    prompt, text = (tokenizer.decode(part.tolist()).decode("utf-8", "replace") for part in (prompt, tokens[len(prompt):]))
    return prompt, text


def open_folder(run: Run, comm: Comm) -> Path:
    """The run's folder, chosen and made by rank 0."""
    identity = run.run
    made = comm.rank == 0 and open_run_folder(identity.dir, identity.name, fallback_name=run.preset, resume=identity.resume)
    return Path(comm.share(str(made)))


def main(run: Run, began: float | None = None) -> None:
    """Train as `run` says; `began` is when the process did, in seconds since 1970."""
    began = began or time.time()
    trainer = Trainer(run)
    lead = trainer.comm.rank == 0
    if lead:
        print(plan(trainer), flush=True)
    if run.run.dry_run:
        print(schedule_table(trainer.schedule) if lead else "", flush=True)
        return
    folder = open_folder(run, trainer.comm)
    resumed = run.run.resume and (folder / CHECKPOINT).exists()
    if resumed:
        trainer.load(folder / CHECKPOINT)
    reporter = Reporter(run, folder, trainer.progress, active=lead, resumed=resumed)
    if run.run.resume:
        reporter.say(f"resuming {folder} at step {trainer.progress.step}" if resumed
                     else f"no checkpoint in {folder}: starting at step 0")
    if trainer.compiled and run.train.warmup_steps:
        trainer.warm_up()
    if train(trainer, reporter):
        finish(trainer, reporter, began)
    else:
        reporter.say(f"interrupted at step {trainer.progress.step}; saved. "
                     f"Continue with --run.name {folder.name} --run.resume")
    trainer.comm.close()


if __name__ == "__main__":
    try:
        main(RUN, BEGAN)
    except ValueError as error:
        fail(str(error))
    except DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory; lower --train.micro_tokens ({RUN.train.micro_tokens}). {error}", file=sys.stderr)
        raise SystemExit(1) from None
