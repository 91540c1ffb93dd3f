"""Two pictures of what a newcomer sees: the terminal of `python train_gpt.py`, and the validation curve of that run.

    python -m benchmarks.first_run

Trains `tiny` in a pseudo-terminal of 80 columns. Writes its output as first_run.svg, and its validation losses against
training seconds as first_run.png (needs Chromium), beside those of compressors after the same text (compression.json).
"""

import io
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from benchmarks import HERE, draw_lines
from benchmarks.table import load
from data.run.folder import write_text
from data.run.metrics import VAL_BITS, read_metrics

COLUMNS, ROWS = 80, 40
PROMPT = "$ pip install -r requirements.txt\n$ python train_gpt.py\n"


def record_terminal(command: list[str], folder: Path) -> str:
    """Return all that a command prints into a terminal of 80 columns, run in `folder`. Raises CalledProcessError."""
    reader, terminal = pty.openpty()
    environment = os.environ | {"COLUMNS": str(COLUMNS), "LINES": str(ROWS), "PYTHONPATH": str(HERE.parent)}
    process = subprocess.Popen(command, cwd=folder, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    output = bytearray()
    try:
        while chunk := os.read(reader, 65536):
            output += chunk
    except OSError:
        pass  # on Linux a read from a terminal that nobody holds open fails, instead of returning nothing
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command, output.decode())
    return output.decode()


def visible_text(output: str) -> str:
    """Return the text that stays on a terminal: what follows a carriage return overwrites the line."""
    lines = output.replace("\r\n", "\n").split("\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2].rstrip() for line in lines)


def draw_terminal(text: str, path: Path) -> None:
    """Write a picture of a terminal with this text, as SVG."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(text))
    svg = console.export_svg(title="steepest")
    write_text(path, re.sub(r"@font-face {.*?}", "", svg, flags=re.DOTALL))  # no fonts from the network: the system's do


def main() -> None:
    """Train `tiny` and draw both pictures."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE.parent / "train_gpt.py"), "--log.wandb", "disabled"]
        output = record_terminal(command, Path(folder))
        records = read_metrics(Path(folder) / "runs" / "tiny" / "metrics.jsonl")
    draw_terminal(PROMPT + visible_text(output), HERE / "first_run.svg")
    scores = [(record["train_seconds"], record[VAL_BITS]) for record in records if VAL_BITS in record]
    seconds, bits = zip(*scores, strict=True)
    lines = {"tiny": (seconds, bits)}
    for name, row in load("compression")["compressors"].items():
        lines[name] = ((0, seconds[-1]), (row["bits_per_byte_after_train"],) * 2)
    draw_lines("first_run", lines, xaxis={"title": "training seconds", "rangemode": "tozero"},
               yaxis={"title": "bits per byte of the validation text"})


if __name__ == "__main__":
    main()
