"""A page as pictures: Chromium or Chrome, run without a window."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from data.files import replacing

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT_SECONDS = 120
SCALE = 2  # pixels of the picture to a pixel of the page


def find_browser() -> str:
    """The first of BROWSERS on the PATH. Raises ValueError where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise ValueError("--png needs Chromium or Chrome to draw with, and none is on the PATH: apt-get install chromium")
    return found


def screenshot(page: Path, figure: str, path: Path, *, width: int, height: int) -> None:
    """Write one figure of a report's page as PNG, all or nothing. Raises ValueError where the browser draws nothing."""
    rootless = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    with tempfile.TemporaryDirectory() as profile, replacing(path) as aside:
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
