"""The dashboard refers only to metrics, settings and summary values that runs write."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs.schema import Run
from configs.serialize import config_to_dict, flatten
from data.run.metrics import SUMMARY_KEYS, read_metrics
from scripts import wandb_workspace
from scripts.wandb_workspace import View, build_workspace, workspace_json

ROOT = Path(wandb_workspace.__file__).resolve().parent.parent
NOT_ON_EVERY_MACHINE = {"time/mfu_frac"}  # only where the device's peak is known
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the library's own
pytest.importorskip("wandb_workspaces")


def call(*arguments, **variables):
    """Return exit status, output and error of a command run in the repository."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=inherited | {"OMP_NUM_THREADS": "1"} | variables)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def view():
    """The view that would be saved, as JSON."""
    return json.loads(workspace_json(build_workspace(View(entity="us", project="p", name="n"))))["section"]


@pytest.fixture(scope="module")
def panels(view):
    """Panels by section."""
    return {section["name"]: section["panels"] for section in view["panelBankConfig"]["sections"]}


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The names of all metrics that a real run logs."""
    folder = tmp_path_factory.mktemp("runs")
    status, output, error = call("train_gpt.py", "ngpt_bytes", "--train.steps", 2, "--data.val_bytes", 2048, "--log.wandb",
                               "disabled", "--run.dir", folder, "--run.name", "a", "--log.sample_tokens", 0,
                               "--log.layers_every_steps", 2)
    assert status == 0, output + error
    return {name for record in read_metrics(folder / "a" / "metrics.jsonl") for name in record}


def configs(panels, key):
    """Return all values under one key of the panels' configurations."""
    return [panel["config"][key] for section in panels.values() for panel in section if key in panel.get("config", {})]


def test_every_plotted_metric_is_logged_by_runs(panels, logged):
    metrics = {name for names in configs(panels, "metrics") for name in names}
    assert {"val/loss_nats", "train/loss_nats", "time/step_ms"} <= metrics <= logged | NOT_ON_EVERY_MACHINE
    axes = set(configs(panels, "xAxis"))
    assert axes == {"_step", "tokens", "train_seconds"} and axes <= logged | {"_step"}


def test_every_measure_of_optimizer_and_layers_has_one_plot(panels, logged):
    patterns = configs(panels, "metricRegex")
    measured = {name for name in logged if name.startswith(("optim/", "diag/"))}
    drawn = [{name for name in measured if re.search(pattern, name)} for pattern in patterns]
    assert all(drawn) and set.union(*drawn) == measured
    assert sum(map(len, drawn)) == len(measured)


def test_parallel_coordinates_show_settings_and_end_with_the_score(panels, logged):
    columns, = configs(panels, "columns")
    where = [column["accessor"].split(":", 1) for column in columns]
    settings = [name.removesuffix(".value") for place, name in where if place == "config"]
    assert "optim.matrix.lr" in settings and set(settings) <= flatten(config_to_dict(Run())).keys()
    assert where[-1] == ["summary", "val/bits_per_byte"]
    assert {name for place, name in where if place == "summary"} <= logged


def test_runs_are_grouped_by_experiment_and_their_table_shows_summary_values(view, logged):
    runs, = view["runSets"]
    assert runs["grouping"] == [{"section": "run", "name": "group"}]
    columns = {name.removeprefix("summary:") for name in runs["runFeed"]["columnOrder"] if name.startswith("summary:")}
    assert "val/loss_nats" in columns and columns <= logged | set(SUMMARY_KEYS)


def test_bars_are_means_over_the_seeds_of_an_experiment(panels):
    bars = [panel["config"] for panel in panels["Ablation"] if panel["viewType"] == "Bar Chart"]
    assert [(bar["groupBy"], bar["groupAgg"], bar["groupArea"]) for bar in bars] == [("group", "mean", "stderr")] * 2


def test_the_samples_panel_shows_the_table_that_runs_log(panels):
    assert '"samples"' in json.dumps(panels["Samples"])


def test_printing_needs_no_network_and_saving_without_a_key_is_refused(tmp_path):
    status, printed, error = call("-m", "scripts.wandb_workspace", "--print", WANDB_BASE_URL="http://127.0.0.1:9")
    assert status == 0 and error == "" and json.loads(printed)["section"]["panelBankConfig"]["sections"]
    keyless = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path / "config")}
    status, _, error = call("-m", "scripts.wandb_workspace", **keyless)
    assert status == 2 and error.startswith("error: no wandb key") and error.count("\n") == 1


def test_a_failed_save_gives_one_line(monkeypatch):
    import wandb

    workspace = build_workspace(View(entity="us"))
    monkeypatch.setattr(wandb, "login", lambda **options: True)
    monkeypatch.setattr(type(workspace), "save", lambda self: (_ for _ in ()).throw(OSError("no route\nto host")))
    with pytest.raises(ValueError, match=r"did not save the view \(OSError: no route\).*us/steepest"):
        wandb_workspace.save(workspace)
