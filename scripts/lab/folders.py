"""Reading of run folders: config, environment, summary and metrics of each run."""

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from configs.notation import nearest, raise_if
from configs.serialize import HASH_IGNORES, flatten
from data.run.metrics import read_metrics

Metric = Literal["val_loss_nats", "val_bits_per_byte"]
UNITS: dict[Metric, str] = {"val_loss_nats": "nats", "val_bits_per_byte": "bits per byte"}
"""Names of the final validation loss in summary.json, and the unit of each."""


@dataclass(frozen=True)
class RunFolder:
    """Contents of one run folder."""

    path: Path
    config: dict[str, Any]
    """config.json, flat, by dotted names: {"optim.matrix.lr": 0.03, ...}."""
    environment: dict[str, Any]
    """env.json: machine, versions, state of the repository; empty if there is no such file."""
    summary: dict[str, Any] | None
    """summary.json (its keys: data.run.metrics.SUMMARY_KEYS); None until the run has ended."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name

    @property
    def experiment(self) -> str:
        """Name that the seeds of one experiment share: log.experiment, else the folder's name without `-seedN`."""
        return self.config.get("log.experiment") or re.sub(r"[-_]?seed\d+$", "", self.name)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that change the losses, except the seed, by dotted names."""
        return {name: value for name, value in self.config.items()
                if name not in HASH_IGNORES | {"run.seed", "run.target_loss_nats"} and not name.startswith("log.")}

    @property
    def setting(self) -> str:
        """Hash of `settings` in 16 hexadecimal digits: equal for runs that differ in the seed only."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Records of metrics.jsonl, read once and cached."""
        return read_metrics(self.path / "metrics.jsonl")

    def series(self, y: str, x: str = "step") -> tuple[list[float], list[float]]:
        """Return the values of metric `x` and of metric `y` in the records that have both: two lists of equal length."""
        records = [record for record in self.metrics if record.get(x) is not None and record.get(y) is not None]
        return [record[x] for record in records], [record[y] for record in records]


def read_run(path: Path) -> RunFolder:
    """Read the run in a folder. Raise ValueError if it is not a run folder, or if one of its files is damaged."""
    raise_if(not (path / "config.json").is_file(), f"{path} is not a run folder: it has no config.json")
    config = flatten(read_json(path / "config.json"))
    environment = read_json(path / "env.json") if (path / "env.json").is_file() else {}
    summary = read_json(path / "summary.json") if (path / "summary.json").is_file() else None
    return RunFolder(path, config, environment, summary)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raise ValueError with the path if the file is missing, or is not a JSON object."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    raise_if(not isinstance(value, dict), f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def common_target(summaries: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the target loss in nats that all the runs share; None if they have none, or different ones."""
    targets = {summary.get("target_loss_nats") for summary in summaries}
    return targets.pop() if len(targets) == 1 else None


def is_number(value: object) -> bool:
    """True if a JSON value is a number. In Python True and False are integers, but here they are not numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def find_runs(patterns: Sequence[str]) -> list[RunFolder]:
    """Return the runs at paths or glob patterns, in order, each once. A folder of run folders stands for all of them.

    Raise ValueError for a pattern without a run, with the nearest name of a run folder.
    """
    run_paths: dict[Path, None] = {}  # an ordered set
    for pattern in patterns:
        paths = [path for match in sorted(glob.glob(pattern)) for path in _runs_at(Path(match))]
        if not paths:
            parent = Path(pattern).parent
            near = [path.name for path in sorted(parent.glob("*")) if _runs_at(path)] if parent.is_dir() else []
            hint = nearest(Path(pattern).name, near) if near else f"; there are no runs in {parent}"
            raise ValueError(f"no run at {pattern}{hint}")
        run_paths |= dict.fromkeys(paths)
    return [read_run(path) for path in run_paths]


def _runs_at(path: Path) -> list[Path]:
    """Return the folder itself if it is a run folder; else the run folders in it, one or two levels down."""
    if (path / "config.json").is_file():
        return [path]
    return sorted(file.parent for level in ("*", "*/*") for file in path.glob(f"{level}/config.json"))


def by_experiment(runs: Sequence[RunFolder]) -> dict[str, list[RunFolder]]:
    """Group runs by experiment, in order of appearance."""
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        groups.setdefault(run.experiment, []).append(run)
    return groups


def differences(runs: Sequence[RunFolder]) -> dict[str, list[Any]]:
    """Return the settings (dotted names) and environment entries (`env.NAME`) that differ: {name: [value of each run]}.

    Names and folders of the runs are left out.
    """
    run_values = [run.config | flatten(run.environment, "env.") for run in runs]
    names = dict.fromkeys(name for values in run_values for name in values if name not in ("run.name", "run.dir"))
    columns = {name: [values.get(name) for values in run_values] for name in names}
    return {name: values for name, values in columns.items() if any(value != values[0] for value in values)}
