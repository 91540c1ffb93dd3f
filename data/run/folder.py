"""Run folder: config.json, code.txt, env.json, metrics.jsonl, summary.json and checkpoint.safetensors.

Files are written to a temporary name and then renamed, so they are always complete; only metrics.jsonl grows line by
line. JSON is strict: NaN and infinity are written as null.
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
    """Return the folder dir/name, created if it does not exist.

    Without a name it is dir/fallback_name, or with -2, -3, ... after it if that exists. With `resume` the folder may hold a
    run already; it may also be new or empty, because the run may have stopped before its first checkpoint.

    Raises ValueError for a name that is no plain folder name, a folder that holds another run, and a folder that cannot be
    created or written.
    """
    # The name: it must not lead to another folder.
    plain = name or fallback_name
    if plain in ("", ".", "..") or plain != plain.strip() or not plain.isprintable() or re.search(r"[\\/]", plain):
        nearest = re.sub(r"\W+", "-", plain).strip("-") or "run"
        raise ValueError(f"--run.name must be a plain folder name, got {plain!r}; did you mean {nearest}?")
    # The folder.
    parent = Path(dir).expanduser()
    folder = parent / plain
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if name or resume:
            folder.mkdir(exist_ok=True)
        else:
            folder = _make_first_free(folder)
        is_taken = not resume and any(folder.iterdir())
    except OSError as error:
        raise ValueError(f"cannot use {folder} as a run folder: {error.strerror}; choose another --run.dir") from None
    # Its contents and permissions: found out now, and not after hours of training.
    if is_taken:
        free = next(path for path in _numbered(folder) if not path.exists())
        raise ValueError(f"run folder {folder} holds a run already: continue it with --run.resume, or choose another "
                         f"--run.name, for example {free.name}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"run folder {folder} is not writable; choose another --run.dir")
    return folder


def _make_first_free(folder: Path) -> Path:
    """Create the first of folder, folder-2, ... that does not exist, and return it."""
    for path in _numbered(folder):
        # mkdir and not exists: of runs that start at the same moment only one succeeds.
        with suppress(FileExistsError):
            path.mkdir()
            return path


def _numbered(folder: Path) -> Iterator[Path]:
    """Yield folder, folder-2, folder-3, ..."""
    yield folder
    for number in count(2):
        yield folder.with_name(f"{folder.name}-{number}")


def write_text(path: Path, text: str) -> None:
    """Replace the file by `text` in UTF-8, with its line ends unchanged; the file is complete or not written at all."""
    with atomic_write(path) as temporary_path:
        temporary_path.write_bytes(text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Replace the file by `value` as indented JSON with keys in their order; complete or not written at all."""
    write_text(path, json.dumps(strict_json(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
