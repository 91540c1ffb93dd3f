"""All that runs left, on one page that needs no network: `python -m scripts.report runs -o report.html`.

Losses against steps, tokens, time and FLOPs; ablations, tuning curves, diagnostics, schedules, and a table to sort.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from configs.cli import fail
from data.run.folder import write_text
from scripts.lab.browser import find_browser, screenshot
from scripts.lab.folders import find_runs
from scripts.lab.page import ablation_files, page_data, render, subtitle

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
    refuse_mistakes(args)
    runs = find_runs(args.runs)
    named = [path / "ablation.json" if path.is_dir() else path for path in args.ablation]
    data = page_data(runs, list(dict.fromkeys([*ablation_files(runs), *named])))
    write_text(args.output, render(data, title=args.title, subtitle=subtitle(runs)))
    bars = [len(ablation["rows"]) for ablation in data["ablations"]]
    return [args.output, *(pictures(args.output, args.png, bars) if args.png else [])]


def refuse_mistakes(args: Report) -> None:
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


if __name__ == "__main__":
    try:
        for written in report(tyro.cli(Report, description=__doc__, use_underscores=True)):
            print(f"{written}  {written.stat().st_size / 1e6:.2f} MB")
    except ValueError as error:
        fail(str(error))
