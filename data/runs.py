"""The run folder: config.json, code.txt, env.json, metrics.jsonl, summary.json and checkpoint.safetensors.

Whole files are written aside and renamed, so that what stands under a name is always complete; metrics.jsonl alone
grows line by line. All JSON is strict: NaN and the infinities are written as null.
"""

import json
import os
import re
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

from configs.notation import refuse_unknown
from configs.serialize import strict_json
from data.files import replacing

METRICS_KEYS = ("step", "tokens", "train_seconds")
SUMMARY_KEYS = (
    "val_loss_nats", "val_bits_per_byte", "best_val_loss_nats", "steps", "tokens", "train_seconds", "wall_seconds",
    "target_loss_nats", "target_step", "target_seconds", "peak_memory_bytes", "parameters", "seed", "config_hash",
    "code_hash", "data_hash", "device", "world_size",
)


def open_run_folder(dir: str | Path, name: str, *, fallback_name: str, resume: bool) -> Path:
    """The folder dir/name, made if need be; without a name dir/fallback_name, numbered -2, -3, ... if that exists.

    To resume is to take the folder as it is (a new one is fine: nothing was saved yet). Raises ValueError for a name
    that is no plain folder name, a folder that another run fills, and a place where no folder can be made or written.
    """
    parent = Path(dir).expanduser()
    folder = parent / _plain_name(name or fallback_name)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if name or resume:
            folder.mkdir(exist_ok=True)
        else:
            folder = _make_numbered(folder)
        taken = not resume and any(folder.iterdir())
    except OSError as error:
        raise ValueError(f"cannot use {folder} as a run folder: {error.strerror}; choose another --run.dir") from None
    if taken:
        raise ValueError(f"run folder {folder} is taken: continue that run with --run.resume, or choose another "
                         f"--run.name, say {_first_free(folder).name}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"run folder {folder} is not writable; choose another --run.dir")
    return folder


def write_text(path: Path, text: str) -> None:
    """Replace the file by `text` in UTF-8, line ends as they are, all or nothing."""
    with replacing(path) as aside:
        aside.write_bytes(text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Replace the file by `value` as indented JSON, keys in their order, all or nothing."""
    write_text(path, json.dumps(strict_json(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


class MetricsLog:
    """metrics.jsonl while it grows: one JSON object a line, always with step, tokens and train_seconds."""

    def __init__(self, path: Path, *, offset: int | None = None) -> None:
        """Open for appending; with an offset, first drop all beyond that many bytes (what a resumed run repeats).

        Raises ValueError if the file is shorter than the offset.
        """
        self._file = open(path, "ab")
        size = self._file.tell()
        if offset is not None and size < offset:
            self._file.close()
            raise ValueError(f"{path} has {size} bytes but the checkpoint was taken at {offset}: cut or replaced? "
                             "Restore it, or start anew under another --run.name")
        if offset is not None:
            self._file.truncate(offset)
            self._file.seek(offset)

    def write(self, record: Mapping[str, object]) -> None:
        """Append one record, and hand it to the system at once, so that readers see whole lines."""
        assert all(key in record for key in METRICS_KEYS), f"a record needs {METRICS_KEYS}, got {list(record)}"
        self._file.write(json.dumps(strict_json(record), allow_nan=False).encode() + b"\n")
        self._file.flush()

    def offset(self) -> int:
        """Bytes so far, safely on disk: what a checkpoint notes for the resumed run's `offset`."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file; further writes are errors."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics.jsonl; a last line that is still being written, or was cut by a kill, is left out.

    Raises ValueError naming a missing file, or the line that is not a JSON object.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path}; the run's folder, as in runs/NAME, holds it once the run has begun")
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}, is not a JSON object: {line[:60].decode()}")
        records.append(record)
    return records


def write_summary(path: Path, **values: object) -> None:
    """Write summary.json: exactly SUMMARY_KEYS, None where not reached or not known; others raise ValueError."""
    refuse_unknown(SUMMARY_KEYS, values, "summary")
    if missing := [key for key in SUMMARY_KEYS if key not in values]:
        raise ValueError(f"summary lacks the field {missing[0]!r}")
    write_json(path, {key: values[key] for key in SUMMARY_KEYS})


def _plain_name(name: str) -> str:
    if name in ("", ".", "..") or name != name.strip() or not name.isprintable() or re.search(r"[\\/]", name):
        nearest = re.sub(r"\W+", "-", name).strip("-") or "run"
        raise ValueError(f"--run.name must be a plain folder name, got {name!r}; did you mean {nearest}?")
    return name


def _first_free(folder: Path) -> Path:
    """The first of folder, folder-2, folder-3, ... that does not exist."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return next(path for path in chain([folder], numbered) if not path.exists())


def _make_numbered(folder: Path) -> Path:
    """Make the first free one; of runs that start at the same moment, the slower take the next."""
    path = _first_free(folder)
    try:
        path.mkdir()
    except FileExistsError:
        return _make_numbered(folder)
    return path
