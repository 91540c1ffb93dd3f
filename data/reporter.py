"""What a run has achieved so far, and rank 0's pen: metrics.jsonl, summary.json, the dashboard and the terminal."""

import math
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from tqdm import tqdm

from configs.schema import Run
from configs.serialize import config_hash, config_to_dict
from data.alarms import alarms
from data.dashboard import open_dashboard
from data.environment import code_files, code_hash, code_text, describe_environment
from data.evaluate import Score
from data.metrics import MFU, STEP_MS, TOKENS_PER_SECOND, TRAIN_LOSS, VAL_BITS, VAL_LOSS, measure_name
from data.runs import MetricsLog, write_json, write_summary, write_text

ROOT = Path(__file__).resolve().parent.parent


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

    def note_score(self, score: Score, target: float | None) -> None:
        """Remember a validation, the best one, and the first at or under the target."""
        self.val_loss_nats, self.val_bits_per_byte = score.nats_per_token, score.bits_per_byte
        self.best_val_loss_nats = min(score.nats_per_token, self.best_val_loss_nats or math.inf)
        if target is not None and self.target_step is None and score.nats_per_token <= target:
            self.target_step, self.target_seconds = self.step, self.train_seconds


class Reporter:
    """Writes down a run on rank 0; on other ranks every method does nothing."""

    def __init__(self, run: Run, folder: Path, progress: Progress, *, active: bool, resumed: bool) -> None:
        """Write config, code and environment, and open the logs; a resumed run's later lines are cut off."""
        self.run, self.folder, self.progress, self.active = run, folder, progress, active
        self._last = (progress.step, progress.tokens, progress.train_seconds)
        self._alarmed_names: set[str] = set()
        if not active:
            return
        code = code_text(code_files(ROOT), ROOT)
        environment = describe_environment()
        self.code_hash = code_hash(code)
        write_json(folder / "config.json", config_to_dict(run))
        write_json(folder / "env.json", environment)
        write_text(folder / "code.txt", code)
        self.metrics = MetricsLog(folder / "metrics.jsonl", offset=progress.metrics_bytes)
        self.dashboard = open_dashboard(run, folder=folder, environment=environment, code_hash=self.code_hash,
                                        resume=resumed)
        self.bar = tqdm(total=run.train.steps, initial=progress.step, unit="step", dynamic_ncols=True,
                        disable=not sys.stderr.isatty())

    def say(self, text: str) -> None:
        """Print a line, above the progress bar."""
        if self.active:
            tqdm.write(text)

    def write(self, record: dict) -> None:
        """One line of metrics.jsonl, stamped with step, tokens and training seconds; the same to the dashboard."""
        stamp = {name: getattr(self.progress, name) for name in ("step", "tokens", "train_seconds")}
        record |= self._alarmed(record)
        self.metrics.write(stamp | record)
        self.dashboard.log(stamp | record)

    def _alarmed(self, record: dict) -> dict:
        """Say what leaves its band, each measure once; and how many do, where any does."""
        found = alarms(record, self._lr_shares(record)) if self.run.log.diagnostics else []
        for sentence in found:
            if (name := sentence.split(" ")[0]) not in self._alarmed_names:
                self._alarmed_names.add(name)
                self.say(f"alarm at step {self.progress.step}: {sentence}")
        return {"alarms": len(found)} if found else {}

    def _lr_shares(self, record: dict) -> dict[str, float]:
        """Of every group whose step is recorded: its lr over its peak, 0 if it rested."""
        shares = {}
        for role in (one.name for one in fields(self.run.optim)):
            group, lr = getattr(self.run.optim, role), record.get(measure_name(role, "lr"))
            if lr is not None:
                rested = self.progress.step % group.update_every > 0 or not group.lr
                shares[role] = 0.0 if rested else min(1.0, lr / group.lr)
        return shares

    def training(self, loss_nats: float, *, flops_per_token: float, peak_flops: float | None) -> None:
        """Record the training loss of the last step, and the speed since the last record; `peak_flops` of all devices."""
        if not self.active:
            return
        progress, (step, tokens, seconds) = self.progress, self._last
        self._last = (progress.step, progress.tokens, progress.train_seconds)
        elapsed = max(progress.train_seconds - seconds, 1e-9)
        speed = (progress.tokens - tokens) / elapsed
        record = {TRAIN_LOSS: loss_nats, STEP_MS: 1000 * elapsed / (progress.step - step), TOKENS_PER_SECOND: speed}
        if peak_flops is not None:
            record[MFU] = speed * flops_per_token / peak_flops
        self.write(record)
        mfu = f", MFU {record[MFU]:.1%}" if peak_flops is not None else ""
        self.bar.set_postfix_str(f"loss {loss_nats:.3f}, {speed:,.0f} tokens/s{mfu}", refresh=False)

    def validation(self, score: Score, measures: dict[str, dict[str, float]]) -> None:
        """Record a validation, and the optimizer's measures of the step before it."""
        if not self.active:
            return
        optim = {measure_name(role, name): value for role, found in measures.items() for name, value in found.items()}
        self.write({VAL_LOSS: score.nats_per_token, VAL_BITS: score.bits_per_byte} | optim)
        bits = "" if score.bits_per_byte is None else f", {score.bits_per_byte:.4f} bits/byte"
        self.say(f"step {self.progress.step}/{self.run.train.steps}: validation {score.nats_per_token:.4f} "
                 f"nats/token{bits}, {self.progress.train_seconds:.1f} s")

    def layers(self, measures: dict[str, float]) -> None:
        """Record what was measured layer by layer."""
        if self.active:
            self.write(measures)

    def advance(self) -> None:
        """Move the progress bar by a step."""
        if self.active:
            self.bar.update()

    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl on disk; 0 on other ranks."""
        return self.metrics.offset() if self.active else 0

    def finish(self, *, sample: tuple[str, str] | None, **facts: object) -> None:
        """Write summary.json from the progress and `facts` of the process, and print it with the sampled (prompt, text)."""
        if not self.active:
            return
        self.bar.close()
        progress, run = self.progress, self.run
        kept = ("val_loss_nats", "val_bits_per_byte", "best_val_loss_nats", "tokens", "train_seconds", "target_step",
                "target_seconds")
        summary = {name: getattr(progress, name) for name in kept} | {
            "steps": progress.step, "target_loss_nats": run.run.target_loss_nats, "seed": run.run.seed,
            "config_hash": config_hash(run), "code_hash": self.code_hash} | facts
        write_summary(self.folder / "summary.json", **summary)
        lines = [f"{name:>20}  {value}" for name, value in summary.items()]
        lines += [f"{'sample':>20}  {'|'.join(sample)!r}"] if sample else []
        files = " ".join(sorted(path.name for path in self.folder.iterdir()))
        self.say("\n".join([*lines, f"{'files':>20}  {self.folder}/: {files}"]))
        if sample:
            self.dashboard.add_sample(progress.step, prompt=sample[0], text=sample[1])
        self.dashboard.finish(summary)
