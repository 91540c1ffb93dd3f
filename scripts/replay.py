"""Train a run again from its recorded code.txt and config.json alone, and compare the losses bit for bit.

    python -m scripts.replay runs/NAME

Start this in the folder in which the run was started: relative paths of data files are read from there.

Exit status 0: all losses are equal, bit for bit; 1: they differ; 2: the run cannot be trained again.
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
    """The run to replay."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run folder that holds code.txt, config.json and metrics.jsonl."""


def unpack_code(run: RunFolder, code_folder: Path) -> None:
    """Write the source files recorded in a run's code.txt below `code_folder`. Raises ValueError if code.txt is damaged."""
    recorded = run.path / "code.txt"
    try:
        text = recorded.read_bytes().decode()  # read_text would translate line ends, and the recorded lengths not fit
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {recorded}: {error}") from None
    for name, source in split_code(text).items():
        path = (code_folder / name).resolve()
        # A run folder may come from someone else: a name such as ../../x must not write elsewhere.
        if not path.is_relative_to(code_folder):
            raise ValueError(f"{recorded} names a file outside its own folder: {name}; it will not be unpacked")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.encode())


def replay_config(run: RunFolder, output_folder: Path) -> dict[str, Any]:
    """Return the run's nested configuration, changed to train from step 0, without wandb, into `output_folder`."""
    config = read_json(run.path / "config.json")
    config["run"] |= {"name": "replay", "dir": str(output_folder), "resume": False}
    config["log"] |= {"wandb": "disabled"}
    return config


def train_again(run: RunFolder, work_folder: Path) -> Path:
    """Train the run a second time and return the new run folder, which lies in `work_folder` (an absolute path).

    Raises ValueError with the last line of the output if the training fails.
    """
    unpack_code(run, work_folder / "code")
    write_json(work_folder / "config.json", replay_config(run, work_folder))
    (work_folder / "drive.py").write_text(DRIVER)

    # Same number of processes and threads as recorded: both decide in which order floating-point numbers are summed.
    world_size = (run.summary or {}).get("world_size") or 1
    threads = run.environment.get("torch_threads")
    environment = {**os.environ, "PYTHONPATH": str(work_folder / "code")}  # import the recorded code, not this tree's
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}

    command = [*launch_command(work_folder / "drive.py", world_size), work_folder / "config.json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        lines = (result.stderr.strip() or result.stdout.strip() or f"exit status {result.returncode}").splitlines()
        raise ValueError(f"the recorded code failed to train: {lines[-1]}")
    return work_folder / "replay"


def read_losses(folder: Path) -> dict[tuple[int, str], float]:
    """Return all training and validation losses of a run folder, in nats, by (step, metric name)."""
    return {(line["step"], name): line[name] for line in read_metrics(folder / "metrics.jsonl")
            for name in (TRAIN_LOSS, VAL_LOSS) if line.get(name) is not None}


def describe_difference(recorded: dict[tuple[int, str], float], replayed: dict[tuple[int, str], float]) -> str:
    """Describe the first difference of two runs' losses and the largest one. Return "" if all losses are equal."""
    if recorded.keys() != replayed.keys():
        return f"{len(recorded.keys() ^ replayed.keys())} losses were logged by one of the two runs only"
    differing = [key for key in recorded if recorded[key] != replayed[key]]
    if not differing:
        return ""
    step, name = min(differing)
    largest = max(abs(recorded[key] - replayed[key]) for key in differing)
    # All digits of the first difference are printed: it may lie in the last one.
    return (f"first at step {step}, {name}: {recorded[step, name]!r} recorded, {replayed[step, name]!r} replayed; "
            f"{len(differing)} of {len(recorded)} losses differ, by at most {largest:.3g} nats")


def main(args: Replay) -> int:
    """Replay the run, print the comparison and return the exit status. Raises ValueError if it cannot be trained again."""
    run = read_run(args.folder)
    with tempfile.TemporaryDirectory() as folder:
        replay = read_run(train_again(run, Path(folder).resolve()))
        recorded, replayed = read_losses(run.path), read_losses(replay.path)
        changed = [name for name in ("torch", "python", "cpu", "gpus", "torch_threads")
                   if run.environment.get(name) != replay.environment.get(name)]
    difference = describe_difference(recorded, replayed)
    if not difference:
        print(f"the loss curve is the same, bit for bit: {len(recorded)} losses")
        return 0
    causes = f"; changed since the run: {', '.join(changed)}" if changed else ""
    print(f"the loss curve differs: {difference}{causes}")
    return 1


if __name__ == "__main__":
    command(main, Replay, __doc__)
