"""A dashboard of this laboratory's runs, as a saved view of a wandb project:
`python -m scripts.wandb_workspace --entity TEAM`, or `--print` to see its JSON without the network.

It rests on the wandb-workspaces library, which assumes of a dotted config name that the config is nested. Ours is flat, so
that a sweep over optim.matrix.lr finds the same column; `_setting` writes the address that wandb gives to flat names.
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
"""Settings on the axes of the parallel coordinates, from the left; OUTCOMES follow."""
OUTCOMES = ("train_seconds", VAL_BITS)
PINNED = (VAL_LOSS, VAL_BITS, "train_seconds", "target_seconds")
"""Summary values in the table of runs."""
SMOOTHING = 0.6  # weight of the past in the drawn training loss
LOG_SCALED = ("update_rms", "weight_rms", "weight_size", "angle")


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Where the dashboard goes, and its name."""

    entity: str = ""
    """wandb user or team; empty: your default one."""
    project: str = "steepest"
    """The runs' --log.wandb_project."""
    name: str = "steepest"
    """What the view is called; each save makes a new one."""
    print: bool = False
    """Print the view as JSON instead of saving it; needs no network."""


def loss_panels(wr: ModuleType) -> list[Any]:
    """The validation loss by step, tokens and training seconds; bits per byte; and the training loss, smoothed."""
    axes = {"Step": "step", "tokens": "tokens", "train_seconds": "training seconds"}
    curves = [wr.LinePlot(title=f"Validation loss by {words}", x=axis, y=[VAL_LOSS], title_y="nats per token")
              for axis, words in axes.items()]
    return [*curves, wr.LinePlot(title="Validation bits per byte", y=[VAL_BITS]),
            wr.LinePlot(title="Training loss", y=[keys.TRAIN_LOSS], title_y="nats per token", smoothing_type="exponential",
                        smoothing_factor=SMOOTHING, smoothing_show_original=True)]


def optimizer_panels(wr: ModuleType) -> list[Any]:
    """A plot for each measure, with a line for each group; beside its angle that of equilibrium, where it is known."""
    beside = {"angle": f"(angle|{keys.EQUILIBRIUM})"}
    return [wr.LinePlot(title=measure, metric_regex=f"^{metric_name('[^/]+', beside.get(measure, measure))}$",
                        log_y=measure in LOG_SCALED or None) for measure in keys.MEASURES]


def ablation_panels(wr: ModuleType) -> list[Any]:
    """Outcomes by experiment, mean and standard error over its seeds; settings against outcome; what differs."""
    bars = [wr.BarPlot(title=f"{metric} (mean, standard error)", metrics=[metric], groupby="Group", groupby_aggfunc="mean",
                       groupby_rangefunc="stderr") for metric in (VAL_BITS, VAL_LOSS)]
    columns = [_setting(wr, name) for name in SETTINGS]
    columns += [wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(name)) for name in OUTCOMES]
    return [*bars, wr.ScalarChart(title="Least bits per byte", metric=VAL_BITS, groupby_aggfunc="min"),
            wr.ParallelCoordinatesPlot(title="Settings and outcome", columns=columns), wr.RunComparer(diff_only="split")]


def sections_of(wr: ModuleType) -> dict[str, list[Any]]:
    """The panels of each section; a plot for each measure of layers and matrices, with a line for each of them."""
    layers = [wr.LinePlot(title=measure, metric_regex=f"^diag/.+/{measure}$", log_y=True) for measure in keys.LAYER_MEASURES]
    speed = [wr.LinePlot(title="Tokens per second", y=[keys.TOKENS_PER_SECOND]),
             wr.LinePlot(title="Milliseconds per step", y=[keys.STEP_MS]),
             wr.LinePlot(title="Model FLOPs utilisation", y=[keys.MFU])]
    return {"Loss": loss_panels(wr), "Speed": speed, "Optimizer": optimizer_panels(wr), "Layers": layers,
            "Ablation": ablation_panels(wr), "Samples": [wr.WeavePanelSummaryTable(table_name=SAMPLES)]}


def _setting(wr: ModuleType, name: str) -> Any:
    """An axis of the parallel coordinates for a flat config entry; learning rates on a log scale."""
    class Flat(wr.ParallelCoordinatesPlotColumn):
        def _to_model(self) -> Any:
            model = super()._to_model()
            model.accessor = f"config:{name}.value"
            return model

    return Flat(metric=wr.Config(name), display_name=name, log=name.endswith(".lr") or None)


def build_workspace(view: View) -> Any:
    """The view as a wandb_workspaces Workspace, runs grouped by experiment."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sections = [ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections_of(wr).items()]
    return ws.Workspace(
        entity=view.entity, project=view.project, name=view.name, sections=sections,
        settings=ws.WorkspaceSettings(x_axis="Step", max_runs=50),
        runset_settings=ws.RunsetSettings(groupby=[ws.Metric("Group")],
                                          pinned_columns=["run:group", *(f"summary:{name}" for name in PINNED)]))


def spec(workspace: Any) -> str:
    """The view as the JSON that wandb stores; the library has no public way to say it."""
    return workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True, indent=2)


def save(workspace: Any) -> str:
    """Store the view on wandb and return its address. Raises ValueError without a key, and where wandb refuses."""
    import wandb

    if not has_key(wandb):
        raise ValueError("no wandb key is configured; `wandb login` asks for one, and --print needs none")
    try:
        workspace.entity = workspace.entity or wandb.Api().default_entity
        return workspace.save().url
    except Exception as error:
        told = str(error).strip().splitlines() or ["no message"]
        raise ValueError(f"wandb did not save the view ({type(error).__name__}: {told[0]}); is there a network, and the "
                         f"project {workspace.entity}/{workspace.project}?") from None


def main(view: View) -> None:
    """Print the view, or save it and print its address."""
    workspace = build_workspace(view)
    print(spec(workspace) if view.print else save(workspace))


if __name__ == "__main__":
    command(main, View, __doc__)
