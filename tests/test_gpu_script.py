"""The prepared script for a lent GPU: every command runs in a tiny form on the CPU, so that none is stale on that day."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.profile_step import Kernel, classify, summarise

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.sh"


def dry(folder: Path, *items: str) -> tuple[subprocess.CompletedProcess, dict[str, str]]:
    """Run items in the dry form; return the process and the exit status of each command."""
    environment = os.environ | {"OUT": str(folder), "PYTHON": sys.executable}
    done = subprocess.run([SCRIPT, "--dry", *items], env=environment, capture_output=True, text=True, timeout=300)
    lines = (folder / "status.tsv").read_text().splitlines() if (folder / "status.tsv").exists() else []
    return done, {line.split("\t")[0]: line.split("\t")[1] for line in lines}


def test_machine_tests_stage_1_and_profile(tmp_path):
    done, status = dry(tmp_path, "1", "2", "3", "4")
    assert done.returncode == 0, done.stdout[-3000:]
    assert status == {"1-machine": "0", "2-tests": "0", "3-stage1": "0", "4-profile": "0"}
    assert "tests collected" in (tmp_path / "2-tests.txt").read_text()
    result = json.loads((tmp_path / "profile.json").read_text())
    assert result["steps"] == 2 and {"product", "loss", "memory-bound"} <= result["classes"].keys()
    assert 0 < result["busy_ms"] <= 1.05 * result["step_ms"]


def test_fast_paths_off_stage_3_and_track3(tmp_path):
    done, status = dry(tmp_path, "6", "5", "7")
    assert done.returncode == 0, done.stdout[-3000:]
    assert status == {"6-no-fp8": "0", "6-plain": "0", "5-stage3": "0", "7-track3": "0"}


def test_a_failed_item_does_not_stop_the_others(tmp_path):
    done, status = dry(tmp_path, "1", "8")
    assert done.returncode == 2 and "unknown item 8" in done.stderr and status == {"1-machine": "0"}


@pytest.mark.parametrize(("name", "label"), [
    ("ncclDevKernel_ReduceScatter", "communication"), ("triton_tem_fused_flex_attention_7", "attention"),
    ("nvjet_tst_128x256_64x4_2x1_v_bz_TNT", "product"), ("sm90_xmma_gemm_bf16", "product"),
    ("triton_red_fused__log_softmax_backward", "loss"), ("triton_poi_fused_embedding_dense_backward_3", "embedding"),
    ("Memcpy HtoD (Pinned -> Device)", "copy"), ("triton_per_fused_mul_sum_12", "memory-bound")])
def test_kernels_are_classified_by_name(name, label):
    assert classify(name) == label


def test_a_summary_counts_each_step():
    result = summarise([Kernel("gemm", 6.0, 4), Kernel("triton_poi", 2.0, 10)], ms=16.0, steps=2)
    assert result["idle_share"] == 0.5 and result["step_ms"] == 8
    assert result["classes"] == {"product": {"ms": 3, "launches": 2}, "memory-bound": {"ms": 1, "launches": 5}}


def test_tests_see_no_gpu_unless_they_ask(pytestconfig):
    assert pytestconfig.getoption("--cuda") or os.environ["CUDA_VISIBLE_DEVICES"] == ""
