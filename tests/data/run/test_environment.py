"""The environment's description, GPU peaks, and the code text that a later script splits again."""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.run import environment
from data.run.environment import (
    choose_device,
    code_files,
    code_hash,
    code_text,
    describe_environment,
    peak_flops,
    split_code,
)

ROOT = Path(environment.__file__).resolve().parents[2]


def test_description_is_strict_json_without_the_host_name():
    described = describe_environment()
    text = json.dumps(described, allow_nan=False)
    assert described["cores"] >= 1 and described["memory_bytes"] > 0 and described["cpu"]
    assert {"python", "torch", "cuda", "platform", "gpus", "torch_threads", "git", "variables"} <= described.keys()
    assert platform.node() not in described["platform"] and "hostname" not in text


def test_only_variables_that_change_the_numbers_are_described(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("SOME_PASSWORD", "secret")
    variables = describe_environment()["variables"]
    assert variables["OMP_NUM_THREADS"] == "3" and variables["NCCL_DEBUG"] == "WARN"
    assert "SOME_PASSWORD" not in variables


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_state_follows_the_repository(tmp_path):
    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    assert environment._git_state(tmp_path) is None
    git("init", "-b", "trunk")
    assert environment._git_state(tmp_path) is None
    (tmp_path / "a.py").write_text("1\n")
    git("add", "a.py")
    git("commit", "-m", "first")
    state = environment._git_state(tmp_path)
    assert len(state["commit"]) == 40 and state["branch"] == "trunk" and state["dirty"] is False
    (tmp_path / "a.py").write_text("2\n")
    assert environment._git_state(tmp_path)["dirty"] is True


def test_without_git_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_environment()["git"] is None


@pytest.mark.parametrize(("name", "flops"), [
    ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989.4e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA GeForce RTX 4090", 165.2e12),
    ("NVIDIA GeForce RTX 3090", 71e12), ("NVIDIA B200", 2250e12), ("NVIDIA A40", 149.7e12),
    ("Tesla V100-SXM2-32GB", 125e12), ("NVIDIA GH200 480GB", 989.4e12),
    ("NVIDIA RTX A4000", None), ("NVIDIA A1000", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("cpu", None),
])
def test_peak_flops(name, flops):
    assert peak_flops(name) == flops


def test_code_files_are_our_imported_sources():
    names = [path.relative_to(ROOT).as_posix() for path in code_files(ROOT)]
    assert "data/run/environment.py" in names
    assert names == sorted(names) and not any("site-packages" in n or n.startswith("tests/") for n in names)


def test_code_files_hold_the_main_file_and_what_it_imports_alone(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "used.py").write_text("X = 1\n")
    (tmp_path / "package" / "idle.py").write_text("X = 2\n")
    (tmp_path / "main.py").write_text(
        "from pathlib import Path\nimport package.used\nfrom data.run.environment import code_files\n"
        "print(*[p.name for p in code_files(Path(__file__).parent)])\n")
    printed = subprocess.run([sys.executable, "main.py"], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True,
                             capture_output=True, text=True).stdout
    assert printed.split() == ["main.py", "used.py"]


def test_our_code_splits_into_the_files_it_was_made_of():
    files = code_files(ROOT)
    sources = split_code(code_text(files, ROOT))
    assert sources == {path.relative_to(ROOT).as_posix(): path.read_bytes().decode() for path in files}


LINES = st.lists(st.sampled_from(["", "x = 1", "é", "======== a.py (3 characters)"]) | st.text(max_size=9), max_size=6)
TEXTS = LINES.flatmap(lambda lines: st.sampled_from(["\n", "\r\n"]).map(lambda end: end.join(lines)))


@given(sources=st.lists(TEXTS, max_size=3))
def test_any_text_splits_exactly(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    files = [folder / f"{index} (2 characters).py" for index in range(len(sources))]
    for path, source in zip(files, sources, strict=True):
        path.write_bytes(source.encode())
    assert list(split_code(code_text(files, folder)).values()) == sources


@pytest.mark.parametrize("text", ["x = 1\n", "======== a.py (9 characters)\nx = 1\n", "======== a.py (1 characters)\nxy\n"])
def test_a_damaged_code_text_is_refused(text):
    with pytest.raises(ValueError, match="not a code text"):
        split_code(text)


def test_code_hash_tells_texts_apart():
    assert code_hash("a") == code_hash("a") != code_hash("b")
    assert len(code_hash("a")) == 16 and int(code_hash("a"), 16) >= 0


def test_on_cuda_float32_products_use_tf32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    before = torch.get_float32_matmul_precision()
    try:
        assert choose_device("cuda", 3) == torch.device("cuda", 3) and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
