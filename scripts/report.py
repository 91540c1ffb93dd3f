"""Write one HTML page on a set of runs: `python -m scripts.report runs -o report.html`.

The page shows losses against steps, tokens, time and FLOPs, ablations, tuning curves, diagnostics, schedules, and tables
that can be sorted. It is one file that needs no network.
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

# Sizes of the pictures, in pixels of the page. The ablations' height is one heading, then axes and caption per figure,
# then one row per bar, as page.css and figures.js lay them out.
WIDTH, LOSS_HEIGHT = 1200, 560
HEAD_HEIGHT, FIGURE_HEIGHT, ROW_HEIGHT = 110, 130, 28


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Runs to show, and files to write."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]
    """Runs to show: folders, patterns, or folders of run folders."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """The page's file."""
    title: str = "steepest"
    """Title of the page."""
    ablation: tuple[Path, ...] = ()
    """More ablation.json files, or their folders; those in the folders that hold the runs are always shown."""
    png: Path | None = None
    """Also draw pictures, with Chromium or Chrome: the losses to a .png file, or loss.png and ablation.png in a folder."""


def report(args: Report) -> list[Path]:
    """Write the page, and the pictures of --png; return the paths written. Raises ValueError for what cannot be shown."""
    check_arguments(args)
    runs = find_runs(args.runs)
    more_ablations = [path / ABLATION if path.is_dir() else path for path in args.ablation]
    data = page_data(runs, list(dict.fromkeys([*ablation_files(runs), *more_ablations])))
    write_text(args.output, render(data, title=args.title, subtitle=subtitle(runs)))
    bar_counts = [len(ablation["rows"]) for ablation in data["ablations"]]
    return [args.output, *(draw_pictures(args.output, args.png, bar_counts) if args.png else [])]


def check_arguments(args: Report) -> None:
    """Raise ValueError, before any work is done, if there are no runs, no place for the page, or no browser for --png."""
    if not args.runs:
        raise ValueError("name the runs to show: folders, patterns, or a folder of run folders such as runs/")
    if args.output.suffix == ".png":
        raise ValueError(f"{args.output} is a picture, but --output is the HTML page; did you mean --png {args.output}?")
    if args.output.is_dir() or not args.output.parent.is_dir():
        raise ValueError(f"cannot write {args.output}: give a file in a folder that exists, such as report.html")
    if args.png:
        find_browser()


def draw_pictures(page: Path, target: Path, bar_counts: Sequence[int]) -> list[Path]:
    """Draw figures of the page and return their paths: the losses; into a folder also the ablations, if there are any.

    bar_counts: number of bars of each ablation figure, which decides the picture's height.
    """
    if target.suffix == ".png":
        screenshot(page, "loss", target, width=WIDTH, height=LOSS_HEIGHT)
        return [target]
    target.mkdir(parents=True, exist_ok=True)
    ablation_height = HEAD_HEIGHT + sum(FIGURE_HEIGHT + ROW_HEIGHT * count for count in bar_counts)
    heights = {"loss": LOSS_HEIGHT} | ({"ablation": ablation_height} if bar_counts else {})
    for figure, height in heights.items():
        screenshot(page, figure, target / f"{figure}.png", width=WIDTH, height=height)
    return [target / f"{figure}.png" for figure in heights]


# ---- The page -------------------------------------------------------------------------------------------------------


PAGE = Path(__file__).resolve().parent / "page"
ABLATION = "ablation.json"


def ablation_files(runs: Sequence[RunFolder]) -> list[Path]:
    """Return the ablation.json files in the folders that hold the run folders."""
    candidates = dict.fromkeys(run.path.parent / ABLATION for run in runs)
    return [path for path in candidates if path.is_file()]


def read_ablation(path: Path) -> dict[str, Any]:
    """Return {title, unit, rows} of an ablation.json, with the rows that were compared with a baseline.

    Raises ValueError for a file that was not written by scripts.ablate.
    """
    ablation = read_json(path)
    rows = ablation.get("rows")
    if not isinstance(rows, list) or not all("difference" in row and "name" in row for row in rows):
        raise ValueError(f"{path} is no ablation of scripts.ablate: it has no rows with a name and a difference")
    return {"title": f"{path.parent.name}: against {ablation.get('base', 'the baseline')}",
            "unit": UNITS[ablation.get("metric", "val_loss_nats")],
            "rows": [row for row in rows if row["difference"] is not None]}


def page_data(runs: Sequence[RunFolder], ablations: Sequence[Path]) -> dict[str, Any]:
    """Return all data of the page as JSON values, by the names that page.js reads. Raises ValueError for a damaged file."""
    lines = loss_lines(runs, flops_of_runs())
    groups = by_experiment(runs)
    mean_loss = over_seeds("val_loss_nats", fmean)
    experiments = [{"name": group[0], "runs": len(group[1]), "loss": mean_loss(group)} for group in groups.items()]
    curves, problems = schedules(runs)
    targets = {run.summary.get("target_loss_nats") for run in runs if run.summary} - {None}
    bars = [ablation for path in ablations if (ablation := read_ablation(path))["rows"]]
    return {
        "experiments": experiments, "axes": known_axes(lines), "lines": lines, "targets": sorted(targets), "ablations": bars,
        "tuning": tuning(runs), "diagnostics": diagnostics(runs), "schedules": curves, "problems": problems,
        "tables": {"experiment-table": table(EXPERIMENT_COLUMNS, list(groups.items())),
                   "run-table": table(RUN_COLUMNS, runs), "difference-table": difference_table(runs)},
    }


def subtitle(runs: Sequence[RunFolder]) -> str:
    """Return the number of runs and experiments, and the day on which the newest run began."""
    newest = datetime.fromtimestamp(max((run.path / "config.json").stat().st_mtime for run in runs))
    return (f"{count_of(len(runs), 'run')}, {count_of(len(by_experiment(runs)), 'experiment')}; "
            f"the newest began on {newest:%d %B %Y}")


def count_of(count: int, noun: str) -> str:
    """Return "1 run" or "2 runs"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def render(data: dict[str, Any], *, title: str, subtitle: str) -> str:
    """Return the HTML of the page, with styles, scripts, Plotly and data inside."""
    parts = {"title": escape(title), "subtitle": escape(subtitle), "plotly": get_plotlyjs(),
             "style": (PAGE / "page.css").read_text(), "data": json_for_script(data),
             "script": "\n".join((PAGE / name).read_text() for name in ("page.js", "figures.js", "start.js"))}
    # One pass over the template, so that <!--name--> inside a part is not replaced again.
    return re.sub(r"<!--(\w+)-->", lambda match: parts[match[1]], (PAGE / "page.html").read_text())


def json_for_script(value: object) -> str:
    """Return JSON for an HTML script element: `<` is escaped, so that no text in it can end the element."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c")


# ---- The page's tables ----------------------------------------------------------------------------------------------


SHOWN_IN_RUN_TABLE = ("log.experiment", "run.seed")  # so the table of differences leaves them out


class Column(NamedTuple):
    """A column of a table."""

    label: str
    kind: str
    """Format of its values: text, number, count, si, seconds or bytes."""
    value: Callable[[Any], Any]
    """Function from a row's item (a run, a group of runs) to the value; None means not known."""


def from_summary(key: str) -> Callable[[RunFolder], Any]:
    """Return a function from a run to an entry of its summary, or None."""
    return lambda run: (run.summary or {}).get(key)


def state(run: RunFolder) -> str:
    """Return `finished`, or the last step of a run that has not ended."""
    if run.summary is not None:
        return "finished"
    records = run_metrics(run)
    return f"at step {records[-1]['step']:,}" if records else "no metrics"


def tokens_per_second(run: RunFolder) -> float | None:
    """Return the training tokens per second over the whole run."""
    tokens, seconds = from_summary("tokens")(run), from_summary("train_seconds")(run)
    return tokens / seconds if tokens and seconds else None


RUN_COLUMNS = (
    Column("run", "text", lambda run: run.name),
    Column("experiment", "text", lambda run: run.experiment),
    Column("seed", "count", lambda run: run.config.get("run.seed")),
    Column("validation loss (nats)", "number", from_summary("val_loss_nats")),
    Column("bits per byte", "number", from_summary("val_bits_per_byte")),
    Column("best loss (nats)", "number", from_summary("best_val_loss_nats")),
    Column("steps", "count", from_summary("steps")),
    Column("tokens", "si", from_summary("tokens")),
    Column("training time", "seconds", from_summary("train_seconds")),
    Column("tokens/s", "si", tokens_per_second),
    Column("target (nats)", "number", from_summary("target_loss_nats")),
    Column("step at target", "count", from_summary("target_step")),
    Column("time to target", "seconds", from_summary("target_seconds")),
    Column("peak memory", "bytes", from_summary("peak_memory_bytes")),
    Column("parameters", "si", from_summary("parameters")),
    Column("device", "text", from_summary("device")),
    Column("devices", "count", from_summary("world_size")),
    Column("state", "text", state),
)


def over_seeds(key: str, statistic: Callable[[list[float]], float], least: int = 1) -> Callable[[Any], float | None]:
    """Return a function from an (experiment, runs) pair to a statistic of a summary entry over the runs that have it.

    The function returns None for fewer than `least` such runs.
    """
    def value(group: tuple[str, Sequence[RunFolder]]) -> float | None:
        values = [run.summary[key] for run in group[1] if run.summary and run.summary.get(key) is not None]
        return statistic(values) if len(values) >= least else None
    return value


EXPERIMENT_COLUMNS = (
    Column("experiment", "text", lambda group: group[0]),
    Column("runs", "count", lambda group: len(group[1])),
    Column("finished", "count", lambda group: sum(run.summary is not None for run in group[1])),
    Column("mean loss (nats)", "number", over_seeds("val_loss_nats", fmean)),
    Column("standard deviation (nats)", "number", over_seeds("val_loss_nats", stdev, least=2)),
    Column("lowest loss (nats)", "number", over_seeds("val_loss_nats", min)),
    Column("highest loss (nats)", "number", over_seeds("val_loss_nats", max)),
    Column("bits per byte", "number", over_seeds("val_bits_per_byte", fmean)),
    Column("steps", "count", over_seeds("steps", max)),
    Column("tokens", "si", over_seeds("tokens", fmean)),
    Column("training time", "seconds", over_seeds("train_seconds", fmean)),
    Column("time to target", "seconds", over_seeds("target_seconds", fmean)),
)


def table(columns: Sequence[Column], items: Sequence[Any]) -> dict[str, Any]:
    """Return {columns, rows} with one row per item; columns without any known value are left out."""
    cells = [[column.value(item) for item in items] for column in columns]
    known = [i for i, values in enumerate(cells) if any(value is not None for value in values)]
    return {"columns": [{"label": columns[i].label, "kind": columns[i].kind} for i in known],
            "rows": [[rounded(cells[i][row]) for i in known] for row in range(len(items))]}


def difference_table(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Return a table of the settings, and entries of the environment, in which the runs differ; one row per run."""
    values_by_name = {name: values for name, values in differences(runs).items() if name not in SHOWN_IN_RUN_TABLE}
    # values=values binds the list at once: a plain closure would see the last one in every column.
    columns = [Column(name, "text", lambda i, values=values: cell_value(values[i]))
               for name, values in values_by_name.items()]
    return table([Column("run", "text", lambda i: runs[i].name), *columns], range(len(runs)))


def cell_value(value: Any) -> Any:
    """Return text and numbers as they are, an absent setting as a dash, and any other value as text."""
    if value is None:
        return "–"
    if isinstance(value, list | Mapping):
        return json.dumps(value, ensure_ascii=False)
    return str(value) if isinstance(value, bool) or not isinstance(value, str | int | float) else value


# ---- The pictures ---------------------------------------------------------------------------------------------------


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT_SECONDS = 120
SCALE = 2  # pixels of the picture to a pixel of the page


def find_browser() -> str:
    """Return the path of the first of BROWSERS on the PATH. Raises ValueError if there is none."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise ValueError("a .png needs Chromium or Chrome to draw with, and none is on the PATH: apt-get install chromium")
    return path


def screenshot(page: Path, figure: str, path: Path, *, width: int, height: int) -> None:
    """Write one figure of a report's page as PNG; the file appears complete or not at all.

    figure: `loss` or `ablation`; width, height: of the window, in pixels of the page. Raises ValueError if the browser
    draws nothing.
    """
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # as root, Chromium starts only without its sandbox
    with tempfile.TemporaryDirectory() as folder, atomic_write(path) as partial:
        picture = Path(folder) / "page.png"
        command = [find_browser(), "--headless=new", "--hide-scrollbars", "--disable-gpu", *sandbox,
                   f"--user-data-dir={folder}/profile", f"--window-size={width},{height}",
                   f"--force-device-scale-factor={SCALE}", f"--screenshot={picture}",
                   f"{page.resolve().as_uri()}#figure={figure}&height={height}"]
        try:
            errors = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS).stderr
        except subprocess.TimeoutExpired:
            errors = f"no picture within {TIMEOUT_SECONDS} s"
        # The file decides, not the exit status: a browser that does not end in time may still have drawn the picture.
        if not picture.is_file():
            last_line = (errors.strip().splitlines() or ["no error message"])[-1]
            raise ValueError(f"{command[0]} drew no {figure}: {last_line}")
        shutil.copyfile(picture, partial)


def main(args: Report) -> None:
    """Write the report and print the names and sizes of its files."""
    for path in report(args):
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    command(main, Report, __doc__)
