"""Measurements: `python -m benchmarks.NAME` writes its results beside the scripts; README.md here lists them."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import train_gpt
from configs.cli import parse
from data.run.environment import describe_environment
from data.run.folder import write_json
from scripts.report import screenshot

HERE = Path(__file__).resolve().parent
QUIET = ("--log.wandb", "disabled", "--log.sample_tokens", "0", "--log.no_diagnostics", "--train.val_every_steps", "0")


def describe_machine() -> dict[str, object]:
    """Return hardware, versions and git state for a result file, without environment variables."""
    return {name: value for name, value in describe_environment().items() if name != "variables"}


def write_result(name: str, command: str, **result: object) -> None:
    """Write benchmarks/NAME.json: the command line after `python -m benchmarks.`, the machine, and the result."""
    write_json(HERE / f"{name}.json",
               {"command": f"python -m benchmarks.{command}", "environment": describe_machine(), **result})


def train_once(folder: Path, preset: str, flags: Sequence[str], *, seed: int) -> dict | None:
    """Return the summary of a run that is validated only at its end; None if the run diverged.

    The run is made in this process, in `folder`. A finished run there is not repeated, an interrupted one is resumed.
    """
    if not (folder / "summary.json").exists():
        run_flags = ("--run.dir", str(folder.parent), "--run.name", folder.name, "--run.resume")
        try:
            train_gpt.main(parse([preset, *QUIET, *flags, *run_flags, "--run.seed", str(seed)]))
        except train_gpt.DivergedError:
            return None
    return json.loads((folder / "summary.json").read_text())


def draw_lines(name: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, xaxis: dict, yaxis: dict,
               level: float | None = None) -> None:
    """Draw benchmarks/NAME.png with one line per entry of `lines`, which maps a label to (x values, y values).

    `xaxis` and `yaxis` are Plotly's settings; `level` is the height of a dashed horizontal line, None for no such line.
    """
    import plotly.graph_objects as go

    figure = go.Figure(layout=dict(template="plotly_white", width=900, height=520, xaxis=xaxis, yaxis=yaxis))
    for label, (x, y) in lines.items():
        figure.add_scatter(x=x, y=y, mode="lines+markers", name=label)
    if level is not None:
        figure.add_hline(y=level, line_dash="dash")
    # Chromium renders the picture, because Plotly's own image export needs a further package.
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        figure.write_html(page, config={"displayModeBar": False})
        screenshot(page, name, HERE / f"{name}.png", width=920, height=540)
