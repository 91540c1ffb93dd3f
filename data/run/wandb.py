"""The run on wandb: a copy of metrics.jsonl for watching. It never stops a run, and is not even imported when off.

**Axes.** wandb's own step is our step, so that records of one step are one row; it is sent when the next one begins.
Metrics are drawn against `step`: all that is scheduled goes by it, and the times of a step with it. wandb allows a metric
one axis, so the validation's scores are logged thrice: as they are, and under `by_tokens/` and `by_seconds/`.

**Summary.** A metric's value there is its last, which is the official one; the best is `best_val_loss_nats`.

**Resuming.** wandb's steps never go back: what an online run repeats after its checkpoint is dropped, and the first
record of a step stays, the same but for the times. Offline, a resumed run is a second file of the same run and repeats those
steps. (To rewind a run is a feature of some servers.) The whole truth is metrics.jsonl, attached when the run ends.
"""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.schema import Run
from configs.serialize import config_to_dict, flatten
from data.run.folder import write_text
from data.run.metrics import METRICS_KEYS, VAL_BITS, VAL_LOSS

ID_FILE = "wandb_id.txt"
INIT_SECONDS = 30  # longest wait for the server at the start
FINISH_SECONDS = 120  # and at the end, for what is still to be sent
MODES_OF_VARIABLE = {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}  # all others: online
VIEWS = {"tokens": "by_tokens", "train_seconds": "by_seconds"}
"""The axes beside `step`, and the prefix of what is drawn against them."""
VIEWED = (VAL_LOSS, VAL_BITS)
SAMPLES = "samples"
SAMPLE_COLUMNS = ("step", "prompt", "text")


class Dashboard:
    """Where records go to be watched; after the first failure its methods do nothing."""

    def __init__(self, wandb_run: Any, *, folder: Path = Path()) -> None:
        """Wrap a running wandb run and the run folder that it mirrors."""
        self._run, self._folder = wandb_run, folder

    def log(self, record: dict[str, Any]) -> None:
        """Send one record of metrics.jsonl under the same keys, null left out, and the views of its scores."""
        row = {key: value for key, value in record.items() if value is not None}
        views = {view_name(name, axis): row[name] for axis in VIEWS for name in VIEWED if name in row}
        self._attempt(lambda run: run.log(row | views, step=record["step"]))

    def add_sample(self, step: int, *, prompt: str, text: str) -> None:
        """Show a text that the model wrote after so many steps, as a table."""
        def send(run: Any) -> None:
            import wandb

            table = wandb.Table(columns=list(SAMPLE_COLUMNS), data=[[step, prompt, text]])
            run.log({"step": step, SAMPLES: table}, step=step)

        self._attempt(send)

    def finish(self, summary: dict[str, Any]) -> None:
        """Send the summary and the folder's JSON files, and close the run; the dashboard is off from then on."""
        self._attempt(lambda run: run.summary.update(summary))
        self._attempt(lambda run: _attach(run, self._folder))
        self._attempt(lambda run: run.finish())
        self._run = None

    def _attempt(self, action: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._run = None
            _say_off(error)


def view_name(metric: str, axis: str) -> str:
    """The name under which a validation's score is drawn against an axis of VIEWS: val/x by_tokens is by_tokens/val_x."""
    return f"{VIEWS[axis]}/{metric.replace('/', '_')}"


def has_key(wandb: Any) -> bool:
    """Whether a wandb key is configured; asks neither the user nor the network."""
    return bool(wandb.login(prompt=False, verify=False))


def open_dashboard(run: Run, *, folder: Path, environment: dict[str, Any], code_hash: str, resume: bool) -> Dashboard | None:
    """Begin, or with `resume` continue, the wandb run that belongs to `folder`.

    Grouped by experiment (else preset), of the preset's job type, configured by dotted names; its code.txt is the
    artifact code-<hash>, which wandb stores once for equal code. Returns None where wandb is switched off; prints one line
    and returns None where it is missing, has no key, or fails.
    """
    configured = run.log.wandb
    mode = configured if configured != "auto" else MODES_OF_VARIABLE.get(os.environ.get("WANDB_MODE", ""), "online")
    if mode == "disabled":
        return None
    try:
        import wandb

        wandb.setup(wandb.Settings(silent=True, mode=mode))
        if mode == "online" and not has_key(wandb):
            print("wandb: off (no key configured; `wandb login` makes one, --log.wandb offline needs none)")
            return None
        wandb_run = _begin(wandb, run, folder=folder, mode=mode, environment=environment, resume=resume)
        _define_metrics(wandb_run)
        _log_code(wandb, wandb_run, folder / "code.txt", code_hash)
        _attach(wandb_run, folder)
    except Exception as error:
        _say_off(error)
        return None
    return Dashboard(wandb_run, folder=folder)


def _begin(wandb: Any, run: Run, *, folder: Path, mode: str, environment: dict[str, Any], resume: bool) -> Any:
    settings = wandb.Settings(silent=True, console="off", init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS)
    return wandb.init(
        mode=mode, project=run.log.wandb_project, tags=run.log.wandb_tags, group=run.log.experiment or run.preset,
        job_type=run.preset, name=folder.name, dir=folder, id=_wandb_id(folder), resume="allow" if resume else None,
        settings=settings, config=flatten(config_to_dict(run) | {"environment": environment}))


def _define_metrics(wandb_run: Any) -> None:
    """Axes have no panels of their own. No metric asks for a summary, else wandb would nest it: name.last, not name."""
    for axis in METRICS_KEYS:
        wandb_run.define_metric(axis, hidden=True)
    wandb_run.define_metric("*", step_metric="step")
    for axis in VIEWS:
        for name in VIEWED:
            wandb_run.define_metric(view_name(name, axis), step_metric=axis, summary="none")


def _log_code(wandb: Any, wandb_run: Any, file: Path, code_hash: str) -> None:
    """Immutable: sent from where it lies, without a copy in the user's home."""
    artifact = wandb.Artifact(f"code-{code_hash}", type="code")
    artifact.add_file(str(file), policy="immutable", skip_cache=True)
    wandb_run.log_artifact(artifact)


def _attach(wandb_run: Any, folder: Path) -> None:
    """The folder's JSON files as they are now: config and environment, and in the end summary and metrics."""
    wandb_run.save(str(folder.absolute() / "*.json*"), base_path=folder.absolute(), policy="now")


def _wandb_id(folder: Path) -> str:
    """The identity of the folder's wandb run, kept in a file, so that a resumed run continues it."""
    file = folder / ID_FILE
    if not file.is_file():
        write_text(file, uuid.uuid4().hex[:12] + "\n")
    return file.read_text().strip()


def _say_off(error: Exception) -> None:
    lines = str(error).strip().splitlines()
    print(f"wandb: off from here on ({type(error).__name__}: {lines[0] if lines else 'no message'})")
