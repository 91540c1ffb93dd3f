"""The pretended GPU counts a small graph as one can by hand; and what pretending needs."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_free.pretend import LIMITS, missing

ROOT = Path(__file__).resolve().parents[2]
needs_tools = pytest.mark.skipif(missing() is not None, reason=missing() or "")
N, C, M, V = 1024, 256, 512, 128  # as in small_graph.py
FLOAT = 4


@pytest.fixture(scope="module")
def small() -> dict:
    done = subprocess.run([sys.executable, "-B", "-m", "tests.gpu_free.small_graph", "9.0"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def product(m: int, n: int, k: int) -> dict:
    return {"op": "mm", "dtype": "float32", "batch": 1, "m": m, "n": n, "k": k, "count": 1, "flops": 2 * m * n * k,
            "bytes": FLOAT * (m * n + m * k + n * k)}


@needs_tools
def test_products_are_counted_by_shape(small):
    def by_shape(products: list[dict]) -> list[dict]:
        return sorted(products, key=lambda p: (p["m"], p["n"], p["k"]))

    assert small["graphs"] == 2
    assert by_shape(small["forward"]["products"]) == by_shape([product(N, M, C), product(N, V, M)])
    assert by_shape(small["backward"]["products"]) == by_shape([product(V, M, N), product(N, M, V), product(M, C, N),
                                                                product(N, C, M)])


@needs_tools
def test_own_kernels_count_what_they_declare_however_they_are_launched(small):
    """The opaque operator reads and writes M x N once; the kernel that Inductor launches has declared three times that."""
    own = {entry["name"]: (entry["count"], entry["bytes"]) for entry in small["forward"]["own"]}
    assert own == {"opaque_double": (1, 2 * N * M * FLOAT), "doubled_block": (1, 3 * N * M * FLOAT)}
    assert all(entry["shared_bytes"] is not None for entry in small["forward"]["own"])  # Triton has compiled both


@needs_tools
def test_bytes_and_launches_are_those_of_kernels_without_products(small):
    for tally in (small["forward"], small["backward"]):
        groups = [tally[group] for group in ("triton", "own", "other", "products")]
        assert tally["launches"] == sum(entry["count"] for group in groups for entry in group)
        assert tally["bytes"] == pytest.approx(sum(entry["bytes"] for group in groups[:2] for entry in group))
    # The sum of squares reads the result, N x V; one kernel doubles the gradient, N x M, twice, which it reads and writes.
    assert sum(entry["bytes"] for entry in small["forward"]["triton"]) == pytest.approx(N * V * FLOAT, rel=0.001)
    assert max(entry["bytes"] for entry in small["backward"]["triton"]) == pytest.approx(2 * N * M * FLOAT, rel=0.001)


@needs_tools
def test_memory_is_that_of_the_tensors_that_live_together(small):
    """At the peak two N x M tensors: each is freed after it was doubled."""
    gradients = FLOAT * (N * C + M * C + V * M)
    assert small["held_bytes"] == gradients
    assert small["peak_bytes"] == FLOAT * 2 * N * M


def test_triton_is_the_one_that_torch_asks_for():
    """CI compiles kernels with the compiler that a GPU machine has: torch's CUDA wheel names its version."""
    pin = re.search(r"^triton==(\S+?);", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    assert pin, "requirements-dev.txt pins no version of Triton"
    asked = {match[1] for line in importlib.metadata.requires("torch") if (match := re.match(r"triton==([\d.]+)", line))}
    if not asked:
        pytest.skip("torch's CPU wheel names no Triton")
    assert asked == {pin[1]}


def test_limits_are_those_of_hopper_and_ada():
    assert LIMITS["9.0"][0] == 232_448 and LIMITS["8.9"][0] == 101_376
