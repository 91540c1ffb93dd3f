"""The kernels against their plain twins in Triton's interpreter, which must be chosen before Triton is imported: each file
interpreted_*.py in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.machine_code import needs_triton

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("interpreted_*.py"))


@needs_triton
@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_kernels_equal_their_twins_in_tritons_interpreter(file):
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    process = subprocess.run(command, cwd=HERE.parents[1], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True,
                             text=True)
    assert process.returncode == 0, process.stdout
    assert "passed" in process.stdout and "skipped" not in process.stdout


def test_every_room_with_kernels_is_interpreted():
    assert {file.stem.removeprefix("interpreted_") for file in FILES} == {
        "dynamic_heads", "embedding", "fused", "mlp", "symmetric"}
