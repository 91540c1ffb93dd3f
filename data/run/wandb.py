"""wandb run: a copy of metrics.jsonl to watch. Its errors never stop a training run; when it is off it is not imported.

**Axes.** wandb's own step is our step, so that the records of one step become one row; the row is sent when the next step
begins. Metrics are drawn against `step`. wandb allows one axis per metric, so the scores of validations are logged three
times: under their own keys, and under `by_tokens/` and `by_seconds/`.

**Summary.** A metric's value there is its last one, which is the official result; the best is `best_val_loss_nats`.

**Resuming.** wandb's steps never go back. Online, wandb drops the steps that a resumed run repeats after its checkpoint, so
the first record of a step stays; the repeated one differs only in its times. Offline, a resumed run is a second file of the
same run, which repeats those steps. (Only some wandb servers can rewind a run.) metrics.jsonl alone is complete; it is
attached when the run ends.
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
MODES_OF_VARIABLE = {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}
"""Mode for each value of the environment variable WANDB_MODE; all other values mean online."""
AXIS_PREFIXES = {"tokens": "by_tokens", "train_seconds": "by_seconds"}
"""Axes beside `step`, and the prefix of the metrics that are drawn against them."""
SCORES = (VAL_LOSS, VAL_BITS)
"""Metrics that are drawn against every axis."""
SAMPLES = "samples"
SAMPLE_COLUMNS = ("step", "prompt", "text")


class WandbRun:
    """Copy of a run's records on wandb; after the first error every method does nothing."""

    def __init__(self, wandb_run: Any, *, folder: Path = Path()) -> None:
        """Wrap an open wandb run; `folder` is the run folder whose JSON files are attached at the end."""
        self._run, self._folder = wandb_run, folder

    def log(self, record: dict[str, Any]) -> None:
        """Send one record of metrics.jsonl under the same keys, without its nulls, and its scores once per axis."""
        row = {key: value for key, value in record.items() if value is not None}
        by_axis = {score_name(name, axis): row[name] for axis in AXIS_PREFIXES for name in SCORES if name in row}
        self._call(lambda run: run.log(row | by_axis, step=record["step"]))

    def add_sample(self, step: int, *, prompt: str, text: str) -> None:
        """Send a text that the model generated after `step` steps, as a table of one row."""
        def send(run: Any) -> None:
            import wandb

            table = wandb.Table(columns=list(SAMPLE_COLUMNS), data=[[step, prompt, text]])
            run.log({"step": step, SAMPLES: table}, step=step)

        self._call(send)

    def finish(self, summary: dict[str, Any]) -> None:
        """Send the summary and the folder's JSON files, and close the wandb run."""
        # Three calls, so that each error switches off what comes after it.
        self._call(lambda run: run.summary.update(summary))
        self._call(lambda run: _attach_json_files(run, self._folder))
        self._call(lambda run: run.finish())
        self._run = None

    def _call(self, action: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        # Every exception: a network error must not cost hours of training, and wandb's errors have no common base.
        try:
            action(self._run)
        except Exception as error:
            self._run = None
            _print_off(error)


def score_name(metric: str, axis: str) -> str:
    """Return the key of a score that is drawn against an axis: val/x against tokens is by_tokens/val_x."""
    return f"{AXIS_PREFIXES[axis]}/{metric.replace('/', '_')}"


def has_key(wandb: Any) -> bool:
    """True if a wandb key is configured; asks neither the user nor the network."""
    return bool(wandb.login(prompt=False, verify=False))


def open_wandb(run: Run, *, folder: Path, environment: dict[str, Any], code_hash: str, resume: bool) -> WandbRun | None:
    """Begin the wandb run that belongs to `folder`, or continue it with `resume`.

    Its group is the experiment, or else the preset; its job type is the preset; its config has dotted names. code.txt is
    the artifact code-<hash>, which wandb stores once for equal code.

    Returns None if wandb is switched off. Prints one line and returns None if wandb is not installed, has no key, or fails.
    """
    # --log.wandb decides before the environment variable.
    configured = run.log.wandb
    mode = configured if configured != "auto" else MODES_OF_VARIABLE.get(os.environ.get("WANDB_MODE", ""), "online")
    if mode == "disabled":
        return None
    try:
        import wandb

        wandb.setup(wandb.Settings(silent=True, mode=mode))
        # Asked for here, because wandb.init would stop and prompt the user for it.
        if mode == "online" and not has_key(wandb):
            print("wandb: off (no key configured; `wandb login` makes one, --log.wandb offline needs none)")
            return None
        wandb_run = _init_run(wandb, run, folder=folder, mode=mode, environment=environment, resume=resume)
        _define_metrics(wandb_run)
        _log_code(wandb, wandb_run, folder / "code.txt", code_hash)
        _attach_json_files(wandb_run, folder)
    except Exception as error:
        _print_off(error)
        return None
    return WandbRun(wandb_run, folder=folder)


def _init_run(wandb: Any, run: Run, *, folder: Path, mode: str, environment: dict[str, Any], resume: bool) -> Any:
    settings = wandb.Settings(silent=True, console="off", init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS)
    return wandb.init(
        mode=mode, project=run.log.wandb_project, tags=run.log.wandb_tags, group=run.log.experiment or run.preset,
        job_type=run.preset, name=folder.name, dir=folder, id=_wandb_id(folder), resume="allow" if resume else None,
        settings=settings, config=flatten(config_to_dict(run) | {"environment": environment}))


def _define_metrics(wandb_run: Any) -> None:
    """Set the axis of every metric, and hide the axes, which need no charts of their own.

    No metric gets a summary setting, because wandb would then store its value as name.last and not as name.
    """
    for axis in METRICS_KEYS:
        wandb_run.define_metric(axis, hidden=True)
    wandb_run.define_metric("*", step_metric="step")
    for axis in AXIS_PREFIXES:
        for name in SCORES:
            wandb_run.define_metric(score_name(name, axis), step_metric=axis, summary="none")


def _log_code(wandb: Any, wandb_run: Any, file: Path, code_hash: str) -> None:
    """Send code.txt as an artifact: directly from the run folder, without a copy in the user's cache."""
    artifact = wandb.Artifact(f"code-{code_hash}", type="code")
    artifact.add_file(str(file), policy="immutable", skip_cache=True)
    wandb_run.log_artifact(artifact)


def _attach_json_files(wandb_run: Any, folder: Path) -> None:
    """Send the folder's JSON files as they are now: config and environment, at the end also summary and metrics."""
    wandb_run.save(str(folder.absolute() / "*.json*"), base_path=folder.absolute(), policy="now")


def _wandb_id(folder: Path) -> str:
    """Return the id of the folder's wandb run; it is kept in a file, so that a resumed run continues the same one."""
    file = folder / ID_FILE
    if not file.is_file():
        write_text(file, uuid.uuid4().hex[:12] + "\n")
    return file.read_text().strip()


def _print_off(error: Exception) -> None:
    lines = str(error).strip().splitlines()
    print(f"wandb: off from here on ({type(error).__name__}: {lines[0] if lines else 'no message'})")
