"""What was measured: scripts that regenerate the files beside them."""

from pathlib import Path

from data.run.environment import describe_environment
from data.run.folder import write_json

HERE = Path(__file__).resolve().parent


def machine() -> dict[str, object]:
    """The machine that a result was measured on, its environment variables apart."""
    return {name: value for name, value in describe_environment().items() if name != "variables"}


def write_result(name: str, command: str, **result: object) -> None:
    """Write benchmarks/NAME.json: the command (`python -m benchmarks.` and this), the machine and the result."""
    write_json(HERE / f"{name}.json", {"command": f"python -m benchmarks.{command}", "environment": machine(), **result})
