"""Run a folder again from its own code.txt and config.json alone: is the loss curve the same?

    python -m scripts.replay runs/NAME

Relative paths of data files mean what they meant to the run: start this where that was started.

Exit status 0: the same, bit for bit; 1: different; 2: it cannot be run.
"""

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from data.run.environment import split_code
from data.run.folder import write_json
from data.run.metrics import TRAIN_LOSS, VAL_LOSS, read_metrics
from scripts import command
from scripts.lab.folders import RunFolder, read_json, read_run
from scripts.lab.sweep import launch_command

DRIVER = """
import json, sys
from pathlib import Path
import train_gpt
from configs.serialize import config_from_dict
train_gpt.main(config_from_dict(json.loads(Path(sys.argv[1]).read_text())))
"""


@dataclass(frozen=True, slots=True)
class Replay:
    """What to replay."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run folder, with code.txt, config.json and metrics.jsonl."""


def unpack(run: RunFolder, place: Path) -> None:
    """The recorded code, and the configuration of a run that writes below `place`. Raises ValueError for damaged code."""
    recorded, tree = run.path / "code.txt", place / "code"
    try:
        text = recorded.read_bytes().decode()  # line ends as they are
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {recorded}: {error}") from None
    for name, source in split_code(text).items():
        path = (tree / name).resolve()
        if not path.is_relative_to(tree):
            raise ValueError(f"{recorded} holds a file outside its tree: {name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.encode())


def redirected(run: RunFolder, place: Path) -> dict[str, Any]:
    """The run's nested configuration, under the name `again`, from the start, silent, and writing below `place` alone."""
    config = read_json(run.path / "config.json")
    config["run"] |= {"name": "again", "dir": str(place), "resume": False}
    config["log"] |= {"wandb": "disabled"}
    return config


def run_again(run: RunFolder, place: Path) -> Path:
    """The folder of the second run. Raises ValueError with its last line where it does not end well."""
    unpack(run, place)
    write_json(place / "config.json", redirected(run, place))
    (place / "drive.py").write_text(DRIVER)
    world = (run.summary or {}).get("world_size") or 1
    threads = run.environment.get("torch_threads")
    environment = {**os.environ, "PYTHONPATH": str(place / "code")}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}  # sums depend on how they are divided
    done = subprocess.run([*launch_command(place / "drive.py", world), place / "config.json"], env=environment,
                          capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()
        raise ValueError(f"the recorded code did not run: {said[-1]}")
    return place / "again"


def losses(folder: Path) -> dict[tuple[int, str], float]:
    """Every loss of a run, by step and name."""
    return {(line["step"], name): line[name] for line in read_metrics(folder / "metrics.jsonl")
            for name in (TRAIN_LOSS, VAL_LOSS) if line.get(name) is not None}


def difference(first: dict[tuple[int, str], float], again: dict[tuple[int, str], float]) -> str:
    """Where two runs' losses first differ, and by how much at most; empty where they are the same."""
    if first.keys() != again.keys():
        return f"{len(first.keys() ^ again.keys())} of the losses are in one run only"
    differing = [key for key in first if first[key] != again[key]]
    if not differing:
        return ""
    step, name = min(differing)
    most = max(abs(first[key] - again[key]) for key in differing)
    return (f"first at step {step}, {name}: {first[step, name]!r}, now {again[step, name]!r}; {len(differing)} of "
            f"{len(first)} losses differ, by {most:.3g} at most")


def main(args: Replay) -> int:
    """Run the folder again and say what came of it; the exit status. Raises ValueError where it cannot be run."""
    run = read_run(args.folder)
    with tempfile.TemporaryDirectory() as place:
        again = read_run(run_again(run, Path(place).resolve()))
        first, second = losses(run.path), losses(again.path)
        found = difference(first, second)
        changed = [name for name in ("torch", "python", "cpu", "gpus", "torch_threads")
                   if run.environment.get(name) != again.environment.get(name)]
    if not found:
        print(f"the loss curve is the same, bit for bit: {len(first)} losses")
        return 0
    print(f"the loss curve is another: {found}" + (f"; different here: {', '.join(changed)}" if changed else ""))
    return 1


if __name__ == "__main__":
    command(main, Replay, __doc__)
