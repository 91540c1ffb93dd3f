"""What was measured: scripts that regenerate the files beside them."""

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


def machine() -> dict[str, object]:
    """The machine that a result was measured on, its environment variables apart."""
    return {name: value for name, value in describe_environment().items() if name != "variables"}


def write_result(name: str, command: str, **result: object) -> None:
    """Write benchmarks/NAME.json: the command (`python -m benchmarks.` and this), the machine and the result."""
    write_json(HERE / f"{name}.json", {"command": f"python -m benchmarks.{command}", "environment": machine(), **result})


def train_once(folder: Path, preset: str, flags: Sequence[str], *, seed: int) -> dict | None:
    """The summary of a run, validated at its end alone; made in this process unless the folder holds it, or resumed there.
    None where it broke down."""
    if not (folder / "summary.json").exists():
        place = ("--run.dir", str(folder.parent), "--run.name", folder.name, "--run.resume")
        try:
            train_gpt.main(parse([preset, *QUIET, *flags, *place, "--run.seed", str(seed)]))
        except train_gpt.DivergedError:
            return None
    return json.loads((folder / "summary.json").read_text())


def draw_lines(name: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, xaxis: dict, yaxis: dict,
               level: float | None = None) -> None:
    """Lines of points (x, y), by name, as benchmarks/NAME.png; dashed at `level`."""
    import plotly.graph_objects as go

    figure = go.Figure(layout=dict(template="plotly_white", width=900, height=520, xaxis=xaxis, yaxis=yaxis))
    for label, (x, y) in lines.items():
        figure.add_scatter(x=x, y=y, mode="lines+markers", name=label)
    if level is not None:
        figure.add_hline(y=level, line_dash="dash")
    with tempfile.TemporaryDirectory() as place:
        page = Path(place) / "figure.html"
        figure.write_html(page)
        screenshot(page, name, HERE / f"{name}.png", width=920, height=540)
