"""The report's page: everything that it shows as one JSON value, set into a template together with its script."""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from scripts.lab.curves import flops_of_runs, known_axes, loss_lines
from scripts.lab.figures import diagnostics, schedules, tuning
from scripts.lab.folders import RunFolder, by_experiment, read_json
from scripts.lab.tables import difference_table, experiment_table, run_table

HERE = Path(__file__).resolve().parent
ABLATION = "ablation.json"
UNITS = {"val_bits_per_byte": "bits per byte", "val_loss_nats": "nats per token"}


def ablation_files(runs: Sequence[RunFolder]) -> list[Path]:
    """The ablation.json files beside the runs' folders."""
    beside = dict.fromkeys(run.path.parent / ABLATION for run in runs)
    return [path for path in beside if path.is_file()]


def read_ablation(path: Path) -> dict[str, Any]:
    """{title, unit, rows} of an ablation.json, the rows that were held against a baseline. Raises ValueError for a file
    that is none."""
    found = read_json(path)
    if not isinstance(found.get("rows"), list) or not all("difference" in row and "name" in row for row in found["rows"]):
        raise ValueError(f"{path} is no ablation: it has no rows with a name and a difference")
    metric = found.get("metric", "val_loss_nats")
    rows = [row for row in found["rows"] if row["difference"] is not None]
    return {"title": f"{path.parent.name}: against {found.get('base', 'the baseline')}", "unit": UNITS.get(metric, metric),
            "rows": rows}


def page_data(runs: Sequence[RunFolder], ablations: Sequence[Path]) -> dict[str, Any]:
    """All that the page shows. Raises ValueError for a damaged file."""
    lines = loss_lines(runs, flops_of_runs())
    groups = by_experiment(runs)
    found, problems = schedules(runs)
    targets = {run.summary.get("target_loss_nats") for run in runs if run.summary} - {None}
    bars = [ablation for path in ablations if (ablation := read_ablation(path))["rows"]]
    return {
        "experiments": [{"name": name, "runs": len(group), "loss": _mean_loss(group)} for name, group in groups.items()],
        "axes": known_axes(lines), "lines": lines, "targets": sorted(targets), "ablations": bars, "tuning": tuning(runs),
        "diagnostics": diagnostics(runs), "schedules": found, "problems": problems,
        "tables": {"experiment-table": experiment_table(runs), "run-table": run_table(runs),
                   "difference-table": difference_table(runs)},
    }


def _mean_loss(group: Sequence[RunFolder]) -> float | None:
    losses = [run.summary["val_loss_nats"] for run in group if run.summary and run.summary.get("val_loss_nats") is not None]
    return sum(losses) / len(losses) if losses else None


def subtitle(runs: Sequence[RunFolder]) -> str:
    """How much the page shows, and when the last of it was written."""
    last = datetime.fromtimestamp(max((run.path / "config.json").stat().st_mtime for run in runs))
    experiments = len(by_experiment(runs))
    return (f"{len(runs):,} run{'s' * (len(runs) != 1)}, {experiments:,} experiment{'s' * (experiments != 1)}; "
            f"the last began on {last:%d %B %Y}")


def render(data: dict[str, Any], *, title: str, subtitle: str) -> str:
    """The page: one file that needs no network. Raises ValueError without plotly."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ValueError("plotly is not installed: pip install plotly") from None
    parts = {"title": escape(title), "subtitle": escape(subtitle), "plotly": get_plotlyjs(),
             "style": (HERE / "page.css").read_text(), "data": embedded(data),
             "script": "\n".join((HERE / name).read_text() for name in ("page.js", "page_figures.js", "page_start.js"))}
    return re.sub(r"<!--(\w+)-->", lambda hole: parts[hole[1]], (HERE / "page.html").read_text())


def embedded(value: object) -> str:
    """JSON that can stand within a script element: no `<` ends it early."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c")
