"""Log of a run, on rank 0: metrics.jsonl, summary.json, the wandb run, and lines on the terminal."""

import json
import math
import os
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tqdm import tqdm

from configs.schema import Optim, Run
from configs.serialize import config_hash, config_to_dict, strict_json
from data.evaluate import Score
from data.run import environment
from data.run.folder import write_json, write_text
from data.run.metrics import METRICS_KEYS, MFU, STEP_MS, SUMMARY_KEYS, TOKENS_PER_SECOND, TRAIN_LOSS, VAL_BITS, VAL_LOSS
from data.run.plan import format_rows
from data.run.wandb import open_wandb

ROOT = Path(__file__).resolve().parents[2]


@dataclass(slots=True)
class Progress:
    """State of a run beside its weights and optimizer state; saved in every checkpoint."""

    step: int = 0
    """Number of finished steps."""
    tokens: int = 0
    """Training tokens so far, over all ranks."""
    train_seconds: float = 0.0
    """Training time so far; validation, checkpoints and compilation are not counted."""
    position: dict = field(default_factory=dict)
    """Fields of the `data.orders.Position` after the last step; empty before the first."""
    val_loss_nats: float | None = None
    """Last validation loss, in nats per token; None before the first validation."""
    val_bits_per_byte: float | None = None
    """Last validation loss in bits per byte; None if the number of bytes is not known."""
    best_val_loss_nats: float | None = None
    """Lowest validation loss, in nats per token."""
    target_step: int | None = None
    """Step of the first validation whose loss reached the target; None if there was none."""
    target_seconds: float | None = None
    """Training time at `target_step`."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl when the checkpoint was written: a resumed run writes the lines after it again."""

    def is_finished(self, run: Run) -> bool:
        """True if all steps are done, or the target is reached and run.stop_at_target is set."""
        return self.step >= run.train.steps or (run.run.stop_at_target and self.target_step is not None)

    def record_score(self, score: Score, target: float | None) -> None:
        """Store the score of a validation, and whether it is the first to reach `target`, in nats per token."""
        self.val_loss_nats, self.val_bits_per_byte = score.nats_per_token, score.bits_per_byte
        self.best_val_loss_nats = min(score.nats_per_token, self.best_val_loss_nats or math.inf)
        if target is not None and self.target_step is None and score.nats_per_token <= target:
            self.target_step, self.target_seconds = self.step, self.train_seconds


class Log:
    """Writer of a run's files and terminal lines on rank 0; on other ranks every method does nothing."""

    def __init__(self, run: Run, folder: Path, progress: Progress, *, device: torch.device, rank: int,
                 world_size: int) -> None:
        """Write config.json, env.json and code.txt, and open metrics.jsonl, the wandb run and the progress bar.

        `progress` is read at every record, so the caller must update it in place.
        """
        self.run, self.folder, self.progress, self.active = run, folder, progress, rank == 0
        self._device, self._world_size = device, world_size
        self._last = (progress.step, progress.tokens, progress.train_seconds)
        self._alarmed: set[str] = set()
        if self.active:
            # First of all, so that even a run that crashes at its first step has its code, config and environment.
            code, machine = environment.code_text(environment.code_files(ROOT), ROOT), environment.describe_environment()
            self._code_hash = environment.code_hash(code)
            write_json(folder / "config.json", config_to_dict(run))
            write_json(folder / "env.json", machine)
            write_text(folder / "code.txt", code)
            self._metrics = open_metrics(folder / "metrics.jsonl", progress.metrics_bytes)
            self._wandb = None if run.log.wandb == "disabled" else open_wandb(
                run, folder=folder, environment=machine, code_hash=self._code_hash, resume=progress.step > 0)
        self.bar = tqdm(total=run.train.steps, initial=progress.step, unit="step", dynamic_ncols=True,
                        disable=not self.active or not sys.stderr.isatty())

    def info(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.active:
            tqdm.write(text)

    def write(self, record: Mapping[str, object]) -> None:
        """Append a record to metrics.jsonl, after step, tokens and training seconds, and send it to wandb.

        An alarm is printed for a metric that leaves its healthy range, only the first time; the key "alarms" of the line is
        the number of metrics that are outside now.
        """
        if not self.active:
            return
        line = {name: getattr(self.progress, name) for name in METRICS_KEYS} | record
        if self.run.log.diagnostics:
            alarms = find_alarms(record, lr_fractions(self.run.optim, record, self.progress.step))
            for name, message in alarms.items():
                if name not in self._alarmed:
                    self.info(format_rows([(f"alarm at step {self.progress.step}:", message)]))
            self._alarmed |= alarms.keys()
            if alarms:
                line["alarms"] = len(alarms)
        self._metrics.write(json.dumps(strict_json(line), allow_nan=False).encode() + b"\n")
        self._metrics.flush()  # at once, so that whoever reads the file during the run sees whole lines
        if self._wandb:
            self._wandb.log(line)

    def training(self, loss_nats: float, *, flops_per_token: float) -> None:
        """Record the training loss of the last step, in nats per token, and the speed since the previous call."""
        if not self.active:
            return
        progress, (step, tokens, seconds) = self.progress, self._last
        self._last = (progress.step, progress.tokens, progress.train_seconds)
        elapsed = max(progress.train_seconds - seconds, 1e-9)
        speed = (progress.tokens - tokens) / elapsed
        record = {TRAIN_LOSS: loss_nats, STEP_MS: 1000 * elapsed / (progress.step - step), TOKENS_PER_SECOND: speed}
        text = f"loss {loss_nats:.3f} nats, {speed:,.0f} tokens/s"
        if peak := environment.peak_flops(environment.device_name(self._device)):
            record[MFU] = speed * flops_per_token / (peak * self._world_size)
            text += f", MFU {record[MFU]:.1%}"
        self.write(record)
        self.bar.set_postfix_str(text, refresh=False)  # not now: the bar redraws itself a few times a second

    def validation(self, score: Score, group_measures: Mapping[str, Mapping[str, float]]) -> None:
        """Record and print a validation.

        `group_measures` are the optimizer's measures of the step before it, by role and measure.
        """
        self.write({VAL_LOSS: score.nats_per_token, VAL_BITS: score.bits_per_byte}
                   | {f"optim/{role}/{name}": value for role, measures in group_measures.items()
                      for name, value in measures.items()})
        self.info(f"step {self.progress.step}/{self.run.train.steps}: validation "
                  f"{format_loss(score.nats_per_token, score.bits_per_byte)}, {self.progress.train_seconds:.1f} s")

    def metrics_bytes(self) -> int:
        """Return the length of metrics.jsonl, after waiting until all of it is on disk; 0 on other ranks."""
        if not self.active:
            return 0
        os.fsync(self._metrics.fileno())
        return self._metrics.tell()

    def write_summary(self, wall_seconds: float, parameters: int, *, data_hash: str) -> None:
        """Write summary.json. Before `finish`: the run counts even if it is killed while it samples."""
        if not self.active:
            return
        progress, run = self.progress, self.run
        summary = {name: getattr(progress, name) for name in SUMMARY_KEYS if hasattr(progress, name)} | {
            "steps": progress.step, "target_loss_nats": run.run.target_loss_nats, "seed": run.run.seed,
            "config_hash": config_hash(run), "code_hash": self._code_hash, "wall_seconds": wall_seconds,
            "peak_memory_bytes": environment.peak_memory_bytes(self._device), "parameters": parameters,
            "data_hash": data_hash, "device": environment.device_name(self._device), "world_size": self._world_size}
        assert summary.keys() == set(SUMMARY_KEYS)
        self._summary = {key: summary[key] for key in SUMMARY_KEYS}
        write_json(self.folder / "summary.json", self._summary)

    def finish(self, sample: tuple[str, str] | None) -> None:
        """Print the summary, after the sample, a (prompt, continuation), if there is one, and end the wandb run."""
        if not self.active:
            return
        self.bar.close()
        if sample:
            self.info("\n".join(("", "prompt from the validation text:", indented(sample[0]), "",
                                 "the model continues:", indented(sample[1]), "")))
        rows = summary_rows(self._summary)
        rows.append(("files", " ".join([f"{self.folder}:", *sorted(path.name for path in self.folder.iterdir())])))
        self.info(format_rows(rows))
        if self._wandb:
            if sample:
                self._wandb.add_sample(self.progress.step, prompt=sample[0], text=sample[1])
            self._wandb.finish(self._summary)


def format_loss(nats: float, bits: float | None) -> str:
    """Return a loss for print, as "loss 2.1234 nats/token, 1.2345 bits/byte"; without bits if they are None."""
    return f"loss {nats:.4f} nats/token" + ("" if bits is None else f", {bits:.4f} bits/byte")


def indented(text: str) -> str:
    """Return a text for print, indented; control characters become ?, as a model of bytes may write any."""
    return textwrap.indent("".join(c if c.isprintable() or c in "\n\t" else "?" for c in text), "    ", lambda _: True)


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the (label, text) rows that are printed at the end of a run, from the values of summary.json."""
    target = "{target_loss_nats:g} nats/token, not reached"
    if summary["target_step"] is not None:
        target = "{target_loss_nats:g} nats/token, reached at step {target_step} after {target_seconds:.1f} s of training"
    memory = "unknown" if summary["peak_memory_bytes"] is None else f"{summary['peak_memory_bytes'] / 2**20:,.0f} MiB"
    rows = {
        "validation": format_loss(summary["val_loss_nats"], summary["val_bits_per_byte"])
                      + "; lowest loss {best_val_loss_nats:.4f}",
        "target loss": target,
        "training": "{steps:,} steps, {tokens:,} tokens, {train_seconds:.1f} s of training; {wall_seconds:.1f} s in all",
        "model": "{parameters:,} parameters, seed {seed}",
        "machine": "{world_size} x {device}, peak memory of rank 0 " + memory,
        "hashes": "config {config_hash}, code {code_hash}, data {data_hash}"}
    if summary["target_loss_nats"] is None:
        del rows["target loss"]
    return [(label, text.format_map(summary)) for label, text in rows.items()]


def open_metrics(path: Path, offset: int) -> BinaryIO:
    """Open a metrics.jsonl to append to, cut off at `offset`: its length in bytes when the checkpoint was written.

    A resumed run repeats the steps after its checkpoint and writes their lines again. Raises ValueError if the file is
    shorter.
    """
    file = open(path, "ab")
    size = file.tell()
    if size < offset:
        file.close()
        raise ValueError(f"{path} has {size} bytes, but had {offset} when the checkpoint was written; "
                         "restore the file, or start anew under another --run.name")
    file.truncate(offset)
    file.seek(offset)
    return file


# ---- Alarms ---------------------------------------------------------------------------------------------------------------


# Ranges in which the metrics of a healthy run lie: (name of the metric, with the wildcard *; smallest healthy value, at the
# group's peak lr; largest healthy value; meaning of a value outside, printed with the alarm). The smallest value falls in
# proportion to the lr.
HEALTHY_RANGES = (
    # Kosson et al. 2023 (arXiv 2305.17212): in equilibrium weights turn by about sqrt(2 lr wd), a few hundredths; by much
    # more they are replaced at each step, by much less they stand still.
    ("optim/matrix/angle", 1e-5, 0.5, "angle in radians that the matrices turn in one step"),
    ("optim/head/angle", 1e-6, 0.7, "angle in radians that the head turns in one step"),
    ("optim/*/weight_rms", 0.0, 1e3, "the weights grow without bound"),
    ("diag/logits/rms", 0.0, 30.0, "the softmax is one-hot on most tokens, and its gradient vanishes"),
    ("diag/logits/largest", 0.0, 200.0, "bfloat16 rounds logits beyond 128 to whole numbers"),
    ("diag/block*/stream_rms", 1e-3, 1e3, "the residual stream vanishes or explodes"),
    ("diag/*/spectral", 0.0, 1e3, "the weights grow without bound"),
    # Matrices that start at zero are almost of rank one after Adam's first step (1e11); in float32 more is a lost rank.
    ("diag/*/condition", 0.0, 1e14, "the matrix has lost rank"),
)


def find_alarms(record: Mapping[str, object], fractions: Mapping[str, float] | None = None) -> dict[str, str]:
    """Return a message for every optim/ and diag/ metric of a record that is not finite or outside its healthy range.

    `fractions` are the `lr_fractions` by role; a role that is not among them counts as at its peak lr.
    """
    messages = {}
    for name, value in record.items():
        if not isinstance(value, int | float) or not name.startswith(("optim/", "diag/")):
            continue
        if not math.isfinite(value):
            messages[name] = f"{name} is {value}"
            continue
        fraction = (fractions or {}).get(name.split("/")[1], 1.0)
        for pattern, low, high, reason in HEALTHY_RANGES:
            if fnmatchcase(name, pattern) and not fraction * low <= value <= high:
                messages[name] = f"{name} is {value:.3g}, outside {fraction * low:.3g} to {high:g}: {reason}"
    return messages


def lr_fractions(optim: Optim, record: Mapping[str, object], step: int) -> dict[str, float]:
    """Return lr over peak lr of every group whose lr is in the record; 0 if the group was not updated in this step.

    A small lr turns weights little, and a group that is not updated not at all: neither is an alarm.
    """
    fractions = {}
    for role in (f.name for f in fields(optim)):
        group, lr = getattr(optim, role), record.get(f"optim/{role}/lr")
        if lr is not None:
            is_idle = step % group.period(step) > 0 or not group.lr
            fractions[role] = 0.0 if is_idle else min(1.0, lr / group.lr)
    return fractions
