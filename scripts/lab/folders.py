"""Run folders as the laboratory reads them: configuration, environment, summary and curves of each run."""

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from configs.notation import nearest
from configs.serialize import HASH_IGNORES, flatten
from data.run.metrics import read_metrics

Metric = Literal["val_loss_nats", "val_bits_per_byte"]
UNITS: dict[Metric, str] = {"val_loss_nats": "nats", "val_bits_per_byte": "bits per byte"}
"""The final loss in a summary, in the two units."""


@dataclass(frozen=True)
class RunFolder:
    """One run, as its files tell it."""

    path: Path
    config: dict[str, Any]
    """Flat, by dotted names: {"optim.matrix.lr": 0.03, ...}."""
    environment: dict[str, Any]
    """env.json: machine, versions, repository state."""
    summary: dict[str, Any] | None
    """summary.json (data.runs.SUMMARY_KEYS); None while the run has not ended."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def experiment(self) -> str:
        """What its seeds have in common: log.experiment, else the name without `-seedN`."""
        return self.config.get("log.experiment") or re.sub(r"[-_]?seed\d+$", "", self.name)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings that the losses depend on but the seed, by dotted names."""
        return {name: value for name, value in self.config.items()
                if name not in HASH_IGNORES | {"run.seed", "run.target_loss_nats"} and not name.startswith("log.")}

    @property
    def setting(self) -> str:
        """16 hexadecimal digits over `settings`: equal for runs of one experiment."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """All records of metrics.jsonl, read once."""
        return read_metrics(self.path / "metrics.jsonl")

    def series(self, y: str, x: str = "step") -> tuple[list[float], list[float]]:
        """The values of metric `x` and of metric `y` in the records that hold both: two lists of one length."""
        pairs = [(record[x], record[y]) for record in self.metrics
                 if record.get(x) is not None and record.get(y) is not None]
        return [a for a, _ in pairs], [b for _, b in pairs]


def read_run(path: Path) -> RunFolder:
    """The run in a folder. Raises ValueError where the folder is none of a run, or a file in it is damaged."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not a run folder: it has no config.json")
    config = flatten(read_json(path / "config.json"))
    environment = read_json(path / "env.json") if (path / "env.json").is_file() else {}
    summary = read_json(path / "summary.json") if (path / "summary.json").is_file() else None
    return RunFolder(path, config, environment, summary)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file where it is missing or holds anything else."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def common_target(summaries: Iterable[Mapping[str, Any]]) -> float | None:
    """The target loss that all the runs were given; None where they had none, or different ones."""
    targets = {summary.get("target_loss_nats") for summary in summaries}
    return targets.pop() if len(targets) == 1 else None


def is_number(value: object) -> bool:
    """Whether a JSON value is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def find_runs(patterns: Sequence[str]) -> list[RunFolder]:
    """The runs that paths or glob patterns name, in order, each once; a folder of run folders stands for all of them.

    Raises ValueError for a pattern that names no run, with the nearest folder.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        paths = [path for match in sorted(glob.glob(pattern)) for path in _runs_at(Path(match))]
        if not paths:
            parent = Path(pattern).parent
            near = [path.name for path in sorted(parent.glob("*")) if _runs_at(path)] if parent.is_dir() else []
            hint = nearest(Path(pattern).name, near) if near else f"; there are no runs in {parent}"
            raise ValueError(f"no run at {pattern}{hint}")
        found |= dict.fromkeys(paths)
    return [read_run(path) for path in found]


def _runs_at(path: Path) -> list[Path]:
    """The folder itself if it is a run's; else the run folders in it, one or two levels down."""
    if (path / "config.json").is_file():
        return [path]
    return sorted(file.parent for deep in ("*", "*/*") for file in path.glob(f"{deep}/config.json"))


def by_experiment(runs: Sequence[RunFolder]) -> dict[str, list[RunFolder]]:
    """Runs grouped by experiment, in order of appearance."""
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        groups.setdefault(run.experiment, []).append(run)
    return groups


def differences(runs: Sequence[RunFolder]) -> dict[str, list[Any]]:
    """Settings (dotted names) and environment entries (`env.NAME`) in which the runs differ: name to a value per run.

    Names and folders of the runs are left out.
    """
    described = [run.config | flatten(run.environment, "env.") for run in runs]
    names = dict.fromkeys(name for one in described for name in one if name not in ("run.name", "run.dir"))
    columns = {name: [one.get(name) for one in described] for name in names}
    return {name: values for name, values in columns.items() if any(value != values[0] for value in values)}
