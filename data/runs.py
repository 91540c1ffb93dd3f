"""The run folder: config.json, code.txt, env.json, metrics.jsonl, summary.json and checkpoint.safetensors.

Whole files are written aside and renamed, so that what stands under a name is always complete; metrics.jsonl alone
grows line by line. All JSON is strict: NaN and the infinities are written as null.
"""

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from itertools import chain, count
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from configs.schema import Run
from data.files import replacing

# What leaves the losses as they are, up to the rounding of the device: names, folders, machine, what is written down.
HASH_IGNORES = frozenset({"preset", "run.name", "run.dir", "run.resume", "run.device", "run.compile", "run.dry_run",
                          "run.checkpoint_every_steps", "train.warmup_steps"})
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
    write_text(path, json.dumps(_strict(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def config_to_dict(run: Run) -> dict[str, Any]:
    """The configuration as nested dicts, in the order of the schema, and as JSON gives it back: tuples are lists."""
    return _strict(asdict(run))


def config_from_dict(config: Mapping[str, Any]) -> Run:
    """The inverse of `config_to_dict`, lists become tuples again and whole numbers floats.

    A missing field takes its default: an older version wrote the file, and new techniques are off by default. Raises
    ValueError naming an unknown or ill-typed field, and for all that the schema itself refuses.
    """
    return _restore(Run, config, "")


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names: {"optim": {"lr": 1}} becomes {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def config_hash(run: Run) -> str:
    """16 hexadecimal digits over every field that the losses depend on; runs of one hash are one experiment and seed.

    Left out: HASH_IGNORES, all of `log`, the target loss unless the run ends there, and what is at its default, so that
    the hash outlives fields that later versions add.
    """
    normal = config_from_dict(config_to_dict(run))  # so that 1 and 1.0 in a float field are the same
    ignored = HASH_IGNORES if run.run.stop_at_target else HASH_IGNORES | {"run.target_loss_nats"}
    defaults = flatten(config_to_dict(Run()))
    kept = {name: value for name, value in flatten(config_to_dict(normal)).items()
            if value != defaults[name] and name not in ignored and not name.startswith("log.")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


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
        self._file.write(json.dumps(_strict(record), allow_nan=False).encode() + b"\n")
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
    _refuse_unknown(SUMMARY_KEYS, values, "summary")
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


def _strict(value: Any) -> Any:
    """The same value as JSON gives it back: lists for tuples, and None for every float that JSON cannot write."""
    if isinstance(value, Mapping):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _refuse_unknown(wanted: tuple[str, ...], found: Mapping[str, object], what: str) -> None:
    for key in found:
        if key not in wanted:
            near = difflib.get_close_matches(key, wanted, n=1)
            raise ValueError(f"{what} has no field {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _restore(hint: Any, value: Any, where: str) -> Any:
    """The value that a field of type `hint` had before it was written as JSON; `where` is its dotted name."""
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where or 'the configuration'} must be an object, got {value!r}")
        _refuse_unknown(tuple(f.name for f in fields(hint)), value, where or "the configuration")
        hints = get_type_hints(hint)
        return hint(**{key: _restore(hints[key], value[key], f"{where}.{key}".lstrip(".")) for key in value})
    for option in get_args(hint) if isinstance(hint, UnionType) else (hint,):
        if _fits(option, value):
            return tuple(value) if get_origin(option) is tuple else float(value) if option is float else value
    kind = hint.__name__ if isinstance(hint, type) else str(hint).removeprefix("typing.")
    raise ValueError(f"{where} must be {kind}, got {value!r}")


def _fits(option: Any, value: Any) -> bool:
    if get_origin(option) is Literal:
        return value in get_args(option)
    if get_origin(option) is tuple:
        return isinstance(value, list | tuple) and all(isinstance(item, get_args(option)[0]) for item in value)
    if option in (int, float):
        return isinstance(value, int | option) and not isinstance(value, bool)
    return isinstance(value, option)
