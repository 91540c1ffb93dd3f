"""All that runs left, on one page that needs no network: `python -m scripts.report runs -o report.html`.

Losses against steps, tokens, time and FLOPs; ablations, tuning curves, diagnostics, schedules, and a table to sort.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, NamedTuple

import tyro
from plotly.offline import get_plotlyjs

from data.files import atomic_write
from data.run.folder import write_text
from scripts import command
from scripts.lab.figures import diagnostics, flops_of_runs, known_axes, loss_lines, rounded, run_metrics, schedules, tuning
from scripts.lab.folders import UNITS, RunFolder, by_experiment, differences, find_runs, read_json

WIDTH, LOSS_HEIGHT = 1200, 560  # of pictures, in pixels of the page
HEAD_HEIGHT, FIGURE_HEIGHT, ROW_HEIGHT = 110, 130, 28  # of the ablations': their heading, axes and captions, a bar


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What to show, and where."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders, patterns, or folders of runs."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """The page."""
    title: str = "steepest"
    ablation: tuple[Path, ...] = ()
    """ablation.json files, or their folders, beside those that are found next to the runs."""
    png: Path | None = None
    """Draw pictures too, which needs Chromium or Chrome: a .png file for the losses, or a folder for loss.png and
    ablation.png."""


def report(args: Report) -> list[Path]:
    """Write the page, and the pictures if asked for: the files written. Raises ValueError for what cannot be shown."""
    check_arguments(args)
    runs = find_runs(args.runs)
    named = [path / "ablation.json" if path.is_dir() else path for path in args.ablation]
    data = page_data(runs, list(dict.fromkeys([*ablation_files(runs), *named])))
    write_text(args.output, render(data, title=args.title, subtitle=subtitle(runs)))
    bars = [len(ablation["rows"]) for ablation in data["ablations"]]
    return [args.output, *(pictures(args.output, args.png, bars) if args.png else [])]


def check_arguments(args: Report) -> None:
    """Raise ValueError, before any work, for arguments that no page can come of."""
    if not args.runs:
        raise ValueError("name the runs to show: a folder of them, say runs")
    if args.output.suffix == ".png":
        raise ValueError(f"{args.output} is a picture, not a page; did you mean --png {args.output}?")
    if args.output.is_dir() or not args.output.parent.is_dir():
        raise ValueError(f"cannot write {args.output}: say a file in a folder that exists, such as report.html")
    if args.png:
        find_browser()


def pictures(page: Path, target: Path, bars: Sequence[int]) -> list[Path]:
    """Draw the losses, and into a folder also the ablations, which have so many bars each: the files written."""
    if target.suffix == ".png":
        screenshot(page, "loss", target, width=WIDTH, height=LOSS_HEIGHT)
        return [target]
    target.mkdir(parents=True, exist_ok=True)
    ablation_height = HEAD_HEIGHT + sum(FIGURE_HEIGHT + ROW_HEIGHT * count for count in bars)
    heights = {"loss": LOSS_HEIGHT} | ({"ablation": ablation_height} if bars else {})
    for figure, height in heights.items():
        screenshot(page, figure, target / f"{figure}.png", width=WIDTH, height=height)
    return [target / f"{figure}.png" for figure in heights]


# ---- The page -------------------------------------------------------------------------------------------------------


PAGE = Path(__file__).resolve().parent / "page"
ABLATION = "ablation.json"


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
    rows = [row for row in found["rows"] if row["difference"] is not None]
    unit = UNITS[found.get("metric", "val_loss_nats")]
    return {"title": f"{path.parent.name}: against {found.get('base', 'the baseline')}", "unit": unit, "rows": rows}


def page_data(runs: Sequence[RunFolder], ablations: Sequence[Path]) -> dict[str, Any]:
    """All that the page shows. Raises ValueError for a damaged file."""
    lines = loss_lines(runs, flops_of_runs())
    groups = by_experiment(runs)
    mean_loss = _over_seeds("val_loss_nats", fmean)
    experiments = [{"name": group[0], "runs": len(group[1]), "loss": mean_loss(group)} for group in groups.items()]
    found, problems = schedules(runs)
    targets = {run.summary.get("target_loss_nats") for run in runs if run.summary} - {None}
    bars = [ablation for path in ablations if (ablation := read_ablation(path))["rows"]]
    return {
        "experiments": experiments, "axes": known_axes(lines), "lines": lines, "targets": sorted(targets), "ablations": bars,
        "tuning": tuning(runs), "diagnostics": diagnostics(runs), "schedules": found, "problems": problems,
        "tables": {"experiment-table": table(EXPERIMENT_COLUMNS, list(groups.items())),
                   "run-table": table(RUN_COLUMNS, runs), "difference-table": difference_table(runs)},
    }


def subtitle(runs: Sequence[RunFolder]) -> str:
    """How much the page shows, and when the last of it was written."""
    last = datetime.fromtimestamp(max((run.path / "config.json").stat().st_mtime for run in runs))
    experiments = len(by_experiment(runs))
    return (f"{len(runs):,} run{'s' * (len(runs) != 1)}, {experiments:,} experiment{'s' * (experiments != 1)}; "
            f"the last began on {last:%d %B %Y}")


def render(data: dict[str, Any], *, title: str, subtitle: str) -> str:
    """The page: one file that needs no network."""
    parts = {"title": escape(title), "subtitle": escape(subtitle), "plotly": get_plotlyjs(),
             "style": (PAGE / "page.css").read_text(), "data": embedded(data),
             "script": "\n".join((PAGE / name).read_text() for name in ("page.js", "figures.js", "start.js"))}
    return re.sub(r"<!--(\w+)-->", lambda hole: parts[hole[1]], (PAGE / "page.html").read_text())


def embedded(value: object) -> str:
    """JSON that can stand within a script element: no `<` ends it early."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c")


# ---- Its tables -----------------------------------------------------------------------------------------------------


UNTOLD = ("log.experiment", "run.seed")  # the table of runs tells them


class Column(NamedTuple):
    """A column: its head, the kind of its values (text, number, count, si, seconds, bytes), and where a value comes from."""

    label: str
    kind: str
    value: Callable[[Any], Any]


def _from_summary(key: str) -> Callable[[RunFolder], Any]:
    return lambda run: (run.summary or {}).get(key)


def state(run: RunFolder) -> str:
    """`finished`, or how far the run came."""
    if run.summary is not None:
        return "finished"
    records = run_metrics(run)
    return f"at step {records[-1]['step']:,}" if records else "no metrics"


def speed(run: RunFolder) -> float | None:
    """Training tokens a second, over the whole run."""
    tokens, seconds = _from_summary("tokens")(run), _from_summary("train_seconds")(run)
    return tokens / seconds if tokens and seconds else None


RUN_COLUMNS = (
    Column("run", "text", lambda run: run.name),
    Column("experiment", "text", lambda run: run.experiment),
    Column("seed", "count", lambda run: run.config.get("run.seed")),
    Column("validation loss (nats)", "number", _from_summary("val_loss_nats")),
    Column("bits per byte", "number", _from_summary("val_bits_per_byte")),
    Column("best loss (nats)", "number", _from_summary("best_val_loss_nats")),
    Column("steps", "count", _from_summary("steps")),
    Column("tokens", "si", _from_summary("tokens")),
    Column("training time", "seconds", _from_summary("train_seconds")),
    Column("tokens/s", "si", speed),
    Column("target (nats)", "number", _from_summary("target_loss_nats")),
    Column("step at target", "count", _from_summary("target_step")),
    Column("time to target", "seconds", _from_summary("target_seconds")),
    Column("peak memory", "bytes", _from_summary("peak_memory_bytes")),
    Column("parameters", "si", _from_summary("parameters")),
    Column("device", "text", _from_summary("device")),
    Column("devices", "count", _from_summary("world_size")),
    Column("state", "text", state),
)


def _over_seeds(key: str, measure: Callable[[list[float]], float], least: int = 1) -> Callable[[Any], float | None]:
    """The measure of a summary value over the runs that know it; None for fewer than `least`."""
    def value(group: tuple[str, Sequence[RunFolder]]) -> float | None:
        known = [run.summary[key] for run in group[1] if run.summary and run.summary.get(key) is not None]
        return measure(known) if len(known) >= least else None
    return value


EXPERIMENT_COLUMNS = (
    Column("experiment", "text", lambda group: group[0]),
    Column("runs", "count", lambda group: len(group[1])),
    Column("finished", "count", lambda group: sum(run.summary is not None for run in group[1])),
    Column("mean loss (nats)", "number", _over_seeds("val_loss_nats", fmean)),
    Column("sd", "number", _over_seeds("val_loss_nats", stdev, least=2)),
    Column("least", "number", _over_seeds("val_loss_nats", min)),
    Column("greatest", "number", _over_seeds("val_loss_nats", max)),
    Column("bits per byte", "number", _over_seeds("val_bits_per_byte", fmean)),
    Column("steps", "count", _over_seeds("steps", max)),
    Column("tokens", "si", _over_seeds("tokens", fmean)),
    Column("training time", "seconds", _over_seeds("train_seconds", fmean)),
    Column("time to target", "seconds", _over_seeds("target_seconds", fmean)),
)


def table(columns: Sequence[Column], things: Sequence[Any]) -> dict[str, Any]:
    """One row a thing; columns that know nothing of any are left out."""
    cells = [[column.value(thing) for thing in things] for column in columns]
    known = [i for i, values in enumerate(cells) if any(value is not None for value in values)]
    return {"columns": [{"label": columns[i].label, "kind": columns[i].kind} for i in known],
            "rows": [[rounded(cells[i][row]) for i in known] for row in range(len(things))]}


def difference_table(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """The settings, and entries of the environment, in which the runs differ."""
    found = {name: values for name, values in differences(runs).items() if name not in UNTOLD}
    columns = [Column(name, "text", lambda i, values=values: _spelled(values[i])) for name, values in found.items()]
    return table([Column("run", "text", lambda i: runs[i].name), *columns], range(len(runs)))


def _spelled(value: Any) -> Any:
    """Text and numbers as they are, all else as JSON; an absent setting is a dash."""
    if value is None or isinstance(value, str | int | float) and not isinstance(value, bool):
        return "–" if value is None else value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | Mapping) else str(value)


# ---- Its pictures ---------------------------------------------------------------------------------------------------


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT_SECONDS = 120
SCALE = 2  # pixels of the picture to a pixel of the page


def find_browser() -> str:
    """The first of BROWSERS on the PATH. Raises ValueError where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise ValueError("a .png needs Chromium or Chrome to draw with, and none is on the PATH: apt-get install chromium")
    return found


def screenshot(page: Path, figure: str, path: Path, *, width: int, height: int) -> None:
    """Write one figure of a report's page as PNG, all or nothing. Raises ValueError where the browser draws nothing."""
    rootless = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    with tempfile.TemporaryDirectory() as profile, atomic_write(path) as aside:
        drawn = Path(profile) / "page.png"
        command = [find_browser(), "--headless=new", "--hide-scrollbars", "--disable-gpu", *rootless,
                   f"--user-data-dir={profile}/profile", f"--window-size={width},{height}",
                   f"--force-device-scale-factor={SCALE}", f"--screenshot={drawn}",
                   f"{page.resolve().as_uri()}#figure={figure}&height={height}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
            told = done.stderr.strip().splitlines()
        except subprocess.TimeoutExpired:
            told = [f"no picture within {TIMEOUT_SECONDS} s"]
        if not drawn.is_file():
            raise ValueError(f"{command[0]} drew no {figure}: {told[-1] if told else 'it said nothing'}")
        shutil.copyfile(drawn, aside)


def main(args: Report) -> None:
    """Write the report and name its files."""
    for path in report(args):
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    command(main, Report, __doc__)
