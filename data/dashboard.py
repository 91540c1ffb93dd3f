"""The run on wandb: a copy of metrics.jsonl for watching. It never stops a run, and is not even imported when off."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.schema import Log, Run
from data.runs import METRICS_KEYS, config_to_dict, flatten, write_text

ID_FILE = "wandb_id.txt"
INIT_SECONDS = 30  # longest wait for the server at the start
FINISH_SECONDS = 120  # and at the end, for what is still to be sent
MODES_OF_VARIABLE = {"offline": "offline", "dryrun": "offline", "disabled": "disabled"}  # all others: online


class Dashboard:
    """Where records go to be watched; when off, or after the first failure, its methods do nothing."""

    def __init__(self, wandb_run: Any = None) -> None:
        """Wrap a running wandb run; None: off."""
        self._run = wandb_run

    def log(self, record: dict[str, Any]) -> None:
        """Send one record of metrics.jsonl, under the same keys."""
        self._attempt(lambda run: run.log({key: value for key, value in record.items() if value is not None}))

    def add_sample(self, text: str) -> None:
        """Show a text that the model wrote."""
        self._attempt(lambda run: run.summary.update({"sample": text}))

    def finish(self, summary: dict[str, Any]) -> None:
        """Send the summary and close the run; the dashboard is off from then on."""
        self._attempt(lambda run: run.summary.update(summary))
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


def open_dashboard(log: Log, *, run: Run, folder: Path, environment: dict[str, Any], resume: bool) -> Dashboard:
    """Begin, or with `resume` continue, the wandb run that belongs to `folder`.

    Grouped by preset, configured by dotted names, every metric plottable against step, tokens and train_seconds. Prints
    one line and returns a dashboard that is off where wandb is missing, has no key, or fails.
    """
    mode = log.wandb if log.wandb != "auto" else MODES_OF_VARIABLE.get(os.environ.get("WANDB_MODE", ""), "online")
    if mode == "disabled":
        return Dashboard()
    try:
        import wandb

        wandb.setup(wandb.Settings(silent=True, mode=mode))
        if mode == "online" and not wandb.login(prompt=False, verify=False):  # neither asks the user nor the network
            print("wandb: off (no key configured; `wandb login` makes one, --log.wandb offline needs none)")
            return Dashboard()
        settings = wandb.Settings(silent=True, console="off", init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS)
        wandb_run = wandb.init(
            mode=mode, project=log.wandb_project, tags=log.wandb_tags, group=run.preset, name=folder.name,
            dir=folder, id=_wandb_id(folder), resume="allow" if resume else None, settings=settings,
            config=flatten(config_to_dict(run) | {"environment": environment}),
        )
        for key in METRICS_KEYS:
            wandb_run.define_metric(key)
        wandb_run.define_metric("*", step_metric="step")
    except Exception as error:
        _say_off(error)
        return Dashboard()
    return Dashboard(wandb_run)


def _wandb_id(folder: Path) -> str:
    """The identity of the folder's wandb run, kept in a file, so that a resumed run continues it."""
    file = folder / ID_FILE
    if not file.is_file():
        write_text(file, uuid.uuid4().hex[:12] + "\n")
    return file.read_text().strip()


def _say_off(error: Exception) -> None:
    told = str(error).strip().splitlines()
    print(f"wandb: off from here on ({type(error).__name__}: {told[0] if told else 'no message'})")
