"""What rank 0 writes down during a run: metrics.jsonl, summary.json, the wandb run, and lines on the terminal."""

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from tqdm import tqdm

from configs.schema import Optim, Run
from configs.serialize import config_hash, config_to_dict, strict_json
from data.evaluate import Score
from data.run import environment
from data.run.folder import write_json, write_text
from data.run.metrics import METRICS_KEYS, MFU, STEP_MS, SUMMARY_KEYS, TOKENS_PER_SECOND, TRAIN_LOSS, VAL_BITS, VAL_LOSS
from data.run.wandb import open_dashboard

ROOT = Path(__file__).resolve().parents[2]


@dataclass(slots=True)
class Progress:
    """What changes during a run, beside weights and optimizer state; saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    position: dict = field(default_factory=dict)
    val_loss_nats: float | None = None
    val_bits_per_byte: float | None = None
    best_val_loss_nats: float | None = None
    target_step: int | None = None
    target_seconds: float | None = None
    metrics_bytes: int = 0

    def is_finished(self, run: Run) -> bool:
        """Whether all steps are done, or the target is reached where that ends the run."""
        return self.step >= run.train.steps or (run.run.stop_at_target and self.target_step is not None)

    def record_score(self, score: Score, target: float | None) -> None:
        """Take over a validation's score: the last, the best, and when the target was first reached."""
        self.val_loss_nats, self.val_bits_per_byte = score.nats_per_token, score.bits_per_byte
        self.best_val_loss_nats = min(score.nats_per_token, self.best_val_loss_nats or math.inf)
        if target is not None and self.target_step is None and score.nats_per_token <= target:
            self.target_step, self.target_seconds = self.step, self.train_seconds


class Log:
    """The run's records, written on rank 0; on other ranks every method does nothing."""

    def __init__(self, run: Run, folder: Path, progress: Progress, *, device: torch.device, rank: int,
                 world_size: int) -> None:
        """Write config, code and environment, and open the logs; lines that a resumed run will repeat are cut off."""
        self.run, self.folder, self.progress, self.active = run, folder, progress, rank == 0
        self._device, self._world_size = device, world_size
        self._last = (progress.step, progress.tokens, progress.train_seconds)
        self._alarmed: set[str] = set()
        if self.active:
            code, machine = environment.code_text(environment.code_files(ROOT), ROOT), environment.describe_environment()
            self._code_hash = environment.code_hash(code)
            write_json(folder / "config.json", config_to_dict(run))
            write_json(folder / "env.json", machine)
            write_text(folder / "code.txt", code)
            self._metrics = open_metrics(folder / "metrics.jsonl", progress.metrics_bytes)
            self._dashboard = None if run.log.wandb == "disabled" else open_dashboard(
                run, folder=folder, environment=machine, code_hash=self._code_hash, resume=progress.step > 0)
        self.bar = tqdm(total=run.train.steps, initial=progress.step, unit="step", dynamic_ncols=True,
                        disable=not self.active or not sys.stderr.isatty())

    def say(self, text: str) -> None:
        """Print a line, above the progress bar."""
        if self.active:
            tqdm.write(text)

    def write(self, record: Mapping[str, object]) -> None:
        """Append a line to metrics.jsonl, with step, tokens and training seconds before the record; the same to wandb.

        What leaves its band is said, each measure once; how many do stands in the line, where any does.
        """
        if not self.active:
            return
        line = {name: getattr(self.progress, name) for name in METRICS_KEYS} | record
        if self.run.log.diagnostics:
            sentences = alarms(record, lr_shares(self.run.optim, record, self.progress.step))
            for sentence in sentences:
                name = sentence.split(" ")[0]
                if name not in self._alarmed:
                    self.say(f"alarm at step {self.progress.step}: {sentence}")
                self._alarmed.add(name)
            if sentences:
                line["alarms"] = len(sentences)
        self._metrics.write(json.dumps(strict_json(line), allow_nan=False).encode() + b"\n")
        self._metrics.flush()  # at once, so that readers see whole lines
        if self._dashboard:
            self._dashboard.log(line)

    def training(self, loss_nats: float, *, flops_per_token: float) -> None:
        """Record the training loss of the last step, and the speed since the last such record."""
        if not self.active:
            return
        progress, (step, tokens, seconds) = self.progress, self._last
        self._last = (progress.step, progress.tokens, progress.train_seconds)
        elapsed = max(progress.train_seconds - seconds, 1e-9)
        speed = (progress.tokens - tokens) / elapsed
        record = {TRAIN_LOSS: loss_nats, STEP_MS: 1000 * elapsed / (progress.step - step), TOKENS_PER_SECOND: speed}
        text = f"loss {loss_nats:.3f}, {speed:,.0f} tokens/s"
        if peak := environment.peak_flops(environment.device_name(self._device)):
            record[MFU] = speed * flops_per_token / (peak * self._world_size)
            text += f", MFU {record[MFU]:.1%}"
        self.write(record)
        self.bar.set_postfix_str(text, refresh=False)

    def validation(self, score: Score, group_measures: Mapping[str, Mapping[str, float]]) -> None:
        """Record a validation, and by role the optimizer's measures of the step before it."""
        self.write({VAL_LOSS: score.nats_per_token, VAL_BITS: score.bits_per_byte}
                   | {f"optim/{role}/{name}": value for role, measures in group_measures.items()
                      for name, value in measures.items()})
        bits = "" if score.bits_per_byte is None else f", {score.bits_per_byte:.4f} bits/byte"
        self.say(f"step {self.progress.step}/{self.run.train.steps}: validation {score.nats_per_token:.4f} "
                 f"nats/token{bits}, {self.progress.train_seconds:.1f} s")

    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl, all of it safely on disk; 0 on other ranks."""
        if not self.active:
            return 0
        os.fsync(self._metrics.fileno())
        return self._metrics.tell()

    def finish(self, *, sample: tuple[str, str] | None, wall_seconds: float, parameters: int, data_hash: str) -> None:
        """Write summary.json, and print it with the sampled (prompt, continuation)."""
        if not self.active:
            return
        self.bar.close()
        progress, run = self.progress, self.run
        summary = {name: getattr(progress, name) for name in SUMMARY_KEYS if hasattr(progress, name)} | {
            "steps": progress.step, "target_loss_nats": run.run.target_loss_nats, "seed": run.run.seed,
            "config_hash": config_hash(run), "code_hash": self._code_hash, "wall_seconds": wall_seconds,
            "peak_memory_bytes": environment.peak_memory_bytes(self._device), "parameters": parameters,
            "data_hash": data_hash, "device": environment.device_name(self._device), "world_size": self._world_size}
        assert summary.keys() == set(SUMMARY_KEYS)
        write_json(self.folder / "summary.json", {key: summary[key] for key in SUMMARY_KEYS})
        lines = [f"{name:>20}  {value}" for name, value in summary.items()]
        if sample:
            lines.append(f"{'sample':>20}  {'|'.join(sample)!r}")
        files = " ".join(sorted(path.name for path in self.folder.iterdir()))
        self.say("\n".join([*lines, f"{'files':>20}  {self.folder}/: {files}"]))
        if self._dashboard:
            if sample:
                self._dashboard.add_sample(progress.step, prompt=sample[0], text=sample[1])
            self._dashboard.finish(summary)


def open_metrics(path: Path, offset: int) -> BinaryIO:
    """A metrics.jsonl to append to, cut off at the length that it had at the checkpoint: what follows is repeated.

    Raises ValueError if the file is shorter.
    """
    file = open(path, "ab")
    size = file.tell()
    if size < offset:
        file.close()
        raise ValueError(f"{path} has {size} bytes but the checkpoint was taken at {offset}: cut or replaced? "
                         "Restore it, or start anew under another --run.name")
    file.truncate(offset)
    file.seek(offset)
    return file


# ---- Alarms ---------------------------------------------------------------------------------------------------------------


class Band(NamedTuple):
    """Where a measure should lie, and why; `low` falls as a group's lr does."""

    pattern: str
    low: float
    high: float
    why: str


# Bands that healthy runs stay in: below, nothing is learned; above, it is not stable.
BANDS = (
    # Kosson et al. 2023 (arXiv 2305.17212): in equilibrium weights turn by about sqrt(2 lr wd), a few hundredths; by much
    # more they are replaced at each step, by much less they stand still.
    Band("optim/matrix/angle", 1e-5, 0.5, "the matrices turn so much in a step"),
    Band("optim/head/angle", 1e-6, 0.7, "the head turns so much in a step"),
    Band("optim/*/weight_rms", 0.0, 1e3, "weights grow"),
    Band("diag/logits/rms", 0.0, 30.0, "the softmax is one-hot on most tokens, and its gradient gone"),
    Band("diag/logits/largest", 0.0, 200.0, "logits beyond a hundred leave bfloat16 no resolution"),
    Band("diag/block*/stream_rms", 1e-3, 1e3, "the stream vanishes or explodes"),
    Band("diag/*/spectral", 0.0, 1e3, "weights grow"),
    # Matrices that start at zero are all but of rank one after Adam's first step (1e11); in float32 more is a lost rank.
    Band("diag/*/condition", 0.0, 1e14, "the matrix has lost directions for good"),
)


def alarms(record: Mapping[str, object], shares: Mapping[str, float] | None = None) -> list[str]:
    """A sentence, its name first, for every number of a record that is outside its band or not finite. `shares`: by role,
    what the group's lr is of its peak, 0 where it rested in this step; 1 where a role is not named."""
    sentences = []
    for name, value in record.items():
        if not isinstance(value, int | float) or not name.startswith(("optim/", "diag/")):
            continue
        if not math.isfinite(value):
            sentences.append(f"{name} is {value}")
            continue
        share = (shares or {}).get(name.split("/")[1], 1.0)
        for band in BANDS:
            if fnmatchcase(name, band.pattern) and not share * band.low <= value <= band.high:
                sentences.append(f"{name} is {value:.3g}, outside {share * band.low:.3g} to {band.high:g}: {band.why}")
    return sentences


def lr_shares(optim: Optim, record: Mapping[str, object], step: int) -> dict[str, float]:
    """Of every group whose lr a record holds: that over its peak, 0 if the group rested in this step."""
    shares = {}
    for role in (f.name for f in fields(optim)):
        group, lr = getattr(optim, role), record.get(f"optim/{role}/lr")
        if lr is not None:
            rested = step % group.update_every > 0 or not group.lr
            shares[role] = 0.0 if rested else min(1.0, lr / group.lr)
    return shares
