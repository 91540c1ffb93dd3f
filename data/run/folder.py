"""The run folder: config.json, code.txt, env.json, metrics.jsonl, summary.json and checkpoint.safetensors.

Whole files are written aside and renamed, so that what stands under a name is always complete; metrics.jsonl alone
grows line by line. All JSON is strict: NaN and the infinities are written as null.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

from configs.serialize import strict_json
from data.files import atomic_write


def open_run_folder(dir: str | Path, name: str, *, fallback_name: str, resume: bool) -> Path:
    """Create dir/name, where it does not exist; without a name dir/fallback_name, numbered -2, -3, ... if that exists.

    With `resume` a folder may hold a run already, or be new: nothing was saved yet. Raises ValueError for a name that is
    no plain folder name, a folder that another run fills, and a place where no folder can be created or written.
    """
    plain = name or fallback_name
    if plain in ("", ".", "..") or plain != plain.strip() or not plain.isprintable() or re.search(r"[\\/]", plain):
        nearest = re.sub(r"\W+", "-", plain).strip("-") or "run"
        raise ValueError(f"--run.name must be a plain folder name, got {plain!r}; did you mean {nearest}?")
    parent = Path(dir).expanduser()
    folder = parent / plain
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if name or resume:
            folder.mkdir(exist_ok=True)
        else:
            folder = _make_first_free(folder)
        taken = not resume and any(folder.iterdir())
    except OSError as error:
        raise ValueError(f"cannot use {folder} as a run folder: {error.strerror}; choose another --run.dir") from None
    if taken:
        free = next(path for path in _numbered(folder) if not path.exists())
        raise ValueError(f"run folder {folder} is taken: continue that run with --run.resume, or choose another "
                         f"--run.name, say {free.name}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"run folder {folder} is not writable; choose another --run.dir")
    return folder


def _make_first_free(folder: Path) -> Path:
    """Make the first of folder, folder-2, ... that does not exist; of runs that start at once, each makes its own."""
    for path in _numbered(folder):
        with suppress(FileExistsError):
            path.mkdir()
            return path


def _numbered(folder: Path) -> Iterator[Path]:
    """folder, folder-2, folder-3, ..."""
    yield folder
    for number in count(2):
        yield folder.with_name(f"{folder.name}-{number}")


def write_text(path: Path, text: str) -> None:
    """Replace the file by `text` in UTF-8, line ends as they are, all or nothing."""
    with atomic_write(path) as aside:
        aside.write_bytes(text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Replace the file by `value` as indented JSON, keys in their order, all or nothing."""
    write_text(path, json.dumps(strict_json(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
