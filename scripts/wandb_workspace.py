"""Save a dashboard of the runs as a view of a wandb project: `python -m scripts.wandb_workspace --entity TEAM`.

`--print` prints the view as JSON instead and needs no network. Panels are built with the wandb-workspaces library; its
module wandb_workspaces.reports.v2 is passed to functions as `wr`, so that this file can be imported without the library.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from data.run import metrics as keys
from data.run.metrics import VAL_BITS, VAL_LOSS, metric_name
from data.run.wandb import SAMPLES, has_key
from scripts import command

SETTINGS = ("optim.matrix.lr", "optim.matrix.momentum", "optim.matrix.weight_decay", "optim.embed.lr", "optim.head.lr",
            "model.layers", "model.dim", "train.batch_tokens", "train.steps", "run.seed")
"""Settings that are axes of the parallel-coordinates plot, from left to right; OUTCOMES follow them."""
OUTCOMES = ("train_seconds", VAL_BITS)
PINNED_COLUMNS = (VAL_LOSS, VAL_BITS, "train_seconds", "target_seconds")
"""Summary values that are columns of the table of runs."""
SMOOTHING = 0.6  # decay of the moving average in the plot of the training loss
LOG_SCALED = ("update_rms", "weight_rms", "weight_size", "angle")


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The wandb project that receives the dashboard, and the dashboard's name."""

    entity: str = ""
    """wandb user or team. If empty, your default one."""
    project: str = "steepest"
    """wandb project of the runs, as in their --log.wandb_project."""
    name: str = "steepest"
    """Name of the view. Each save creates a new view, even under the same name."""
    print: bool = False
    """Print the view as JSON instead of saving it. Needs no network."""


def loss_panels(wr: ModuleType) -> list[Any]:
    """Plot the validation loss by step, tokens and training seconds; bits per byte; and the smoothed training loss."""
    labels = {"Step": "step", "tokens": "tokens", "train_seconds": "training seconds"}
    curves = [wr.LinePlot(title=f"Validation loss by {label}", x=axis, y=[VAL_LOSS], title_y="nats per token")
              for axis, label in labels.items()]
    return [*curves, wr.LinePlot(title="Validation bits per byte", y=[VAL_BITS]),
            wr.LinePlot(title="Training loss", y=[keys.TRAIN_LOSS], title_y="nats per token", smoothing_type="exponential",
                        smoothing_factor=SMOOTHING, smoothing_show_original=True)]


def optimizer_panels(wr: ModuleType) -> list[Any]:
    """Plot every measure of the optimizer, with one line per parameter group.

    The plot of the angle also draws the angle of rotational equilibrium where a run logs it.
    """
    patterns = {"angle": f"(angle|{keys.EQUILIBRIUM})"}
    return [wr.LinePlot(title=measure, metric_regex=f"^{metric_name('[^/]+', patterns.get(measure, measure))}$",
                        log_y=measure in LOG_SCALED or None) for measure in keys.MEASURES]


def ablation_panels(wr: ModuleType) -> list[Any]:
    """Show each experiment's mean and standard error over seeds, settings against outcome, and settings that differ.

    The wandb group of a run is its experiment, or its preset if it has none.
    """
    bars = [wr.BarPlot(title=f"{metric} (mean, standard error)", metrics=[metric], groupby="Group", groupby_aggfunc="mean",
                       groupby_rangefunc="stderr") for metric in (VAL_BITS, VAL_LOSS)]
    columns = [_setting_column(wr, name) for name in SETTINGS]
    columns += [wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(name)) for name in OUTCOMES]
    return [*bars, wr.ScalarChart(title="Least bits per byte", metric=VAL_BITS, groupby_aggfunc="min"),
            wr.ParallelCoordinatesPlot(title="Settings and outcome", columns=columns), wr.RunComparer(diff_only="split")]


def panels_by_section(wr: ModuleType) -> dict[str, list[Any]]:
    """Return the panels of each section. Layers and matrices have one plot per measure, with one line per layer."""
    layers = [wr.LinePlot(title=measure, metric_regex=f"^diag/.+/{measure}$", log_y=True) for measure in keys.LAYER_MEASURES]
    speed = [wr.LinePlot(title="Tokens per second", y=[keys.TOKENS_PER_SECOND]),
             wr.LinePlot(title="Milliseconds per step", y=[keys.STEP_MS]),
             wr.LinePlot(title="Model FLOPs utilisation", y=[keys.MFU])]
    return {"Loss": loss_panels(wr), "Speed": speed, "Optimizer": optimizer_panels(wr), "Layers": layers,
            "Ablation": ablation_panels(wr), "Samples": [wr.WeavePanelSummaryTable(table_name=SAMPLES)]}


def _setting_column(wr: ModuleType, name: str) -> Any:
    """Return an axis of the parallel-coordinates plot for one setting. Learning rates have a log scale.

    The library takes a dotted name such as optim.matrix.lr for a path into a nested config. The runs log a flat config,
    so that wandb sweeps use the same names; therefore the accessor is replaced by the one that wandb uses for flat names.
    """
    class FlatConfigColumn(wr.ParallelCoordinatesPlotColumn):
        def _to_model(self) -> Any:
            model = super()._to_model()
            model.accessor = f"config:{name}.value"
            return model

    return FlatConfigColumn(metric=wr.Config(name), display_name=name, log=name.endswith(".lr") or None)


def build_workspace(view: View) -> Any:
    """Return the view as a wandb_workspaces Workspace, with the runs grouped by experiment."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(name=name, panels=panels, is_open=True) for name, panels in panels_by_section(wr).items()]
    return ws.Workspace(
        entity=view.entity, project=view.project, name=view.name, sections=sections,
        settings=ws.WorkspaceSettings(x_axis="Step", max_runs=50),
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group")],
                                          pinned_columns=["run:group", *(f"summary:{name}" for name in PINNED_COLUMNS)]))


def workspace_json(workspace: Any) -> str:
    """Return the view as the JSON that wandb stores. The library has no public function for it."""
    return workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True, indent=2)


def save(workspace: Any) -> str:
    """Save the view on wandb and return its URL. Raises ValueError if no key is configured or wandb refuses the view."""
    import wandb

    if not has_key(wandb):
        raise ValueError("no wandb key is configured: run `wandb login`, or use --print, which needs none")
    try:
        workspace.entity = workspace.entity or wandb.Api().default_entity
        return workspace.save().url
    except Exception as error:  # wandb, its HTTP library and the workspaces library each raise classes of their own
        lines = str(error).strip().splitlines() or ["no message"]
        raise ValueError(f"wandb did not save the view ({type(error).__name__}: {lines[0]}); check the network, and that "
                         f"the project {workspace.entity}/{workspace.project} exists") from None


def main(view: View) -> None:
    """Print the view as JSON, or save it and print its URL."""
    workspace = build_workspace(view)
    print(workspace_json(workspace) if view.print else save(workspace))


if __name__ == "__main__":
    command(main, View, __doc__)
