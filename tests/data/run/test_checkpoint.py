"""Checkpoints come back bit by bit, or are refused; a kill leaves the last complete one."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from data.run import checkpoint
from data.run.checkpoint import load_checkpoint, match_tensors, save_checkpoint

ROOT = Path(checkpoint.__file__).resolve().parent.parent
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int32,
          torch.uint8, torch.bool]


def save_small(path):
    tensors = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}
    save_checkpoint(path, tensors, {"step": 7, "name": "é"})
    return tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 5), (4, 0)])
def test_every_type_and_shape_comes_back(tmp_path, dtype, shape):
    saved = (10 * torch.randn(shape)).to(dtype)
    save_checkpoint(tmp_path / "c", {"x": saved}, {})
    loaded = load_checkpoint(tmp_path / "c")[0]["x"]
    assert loaded.dtype == dtype and loaded.shape == saved.shape
    assert torch.equal(loaded.reshape(-1).view(torch.uint8), saved.reshape(-1).view(torch.uint8))


def test_views_shared_storage_and_gradients_are_no_obstacle(tmp_path):
    bank_Kmn = torch.randn(4, 6, 8)
    views = {"a": bank_Kmn[0], "b": bank_Kmn[1:3], "overlaps": bank_Kmn[2:], "same": bank_Kmn[0], "t": bank_Kmn[3].T,
             "strided": bank_Kmn[:, ::2, 1], "expanded": torch.ones(1).expand(5), "p": torch.nn.Parameter(torch.ones(2))}
    save_checkpoint(tmp_path / "c", views, {})
    loaded, _ = load_checkpoint(tmp_path / "c")
    assert loaded.keys() == views.keys() and all(torch.equal(loaded[name], views[name]) for name in views)
    assert (tmp_path / "c").stat().st_size < 4 * sum(v.numel() for v in views.values()) + 2000  # views, not their banks


def test_what_is_loaded_outlives_the_file(tmp_path):
    saved = save_small(tmp_path / "c")
    loaded, _ = load_checkpoint(tmp_path / "c")
    (tmp_path / "c").write_bytes(bytes((tmp_path / "c").stat().st_size))
    loaded["b"] += 0
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_the_device_is_chosen_at_loading(tmp_path):
    save_small(tmp_path / "c")
    assert load_checkpoint(tmp_path / "c", device="meta")[0]["w"].device.type == "meta"


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                    max_leaves=6)


@given(meta=st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_meta_comes_back(meta, tmp_path_factory):
    path = tmp_path_factory.mktemp("meta") / "c"
    save_checkpoint(path, {"x": torch.zeros(1)}, meta)
    assert load_checkpoint(path)[1] == meta


def test_meta_is_read_as_json_gives_it(tmp_path):
    save_checkpoint(tmp_path / "c", {}, {"keys": {3: (1, 2)}})
    assert load_checkpoint(tmp_path / "c") == ({}, {"keys": {"3": [1, 2]}})


def test_no_byte_can_change_unnoticed(tmp_path):
    path = tmp_path / "c"
    save_small(path)
    good = path.read_bytes()
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1:])
        try:
            tensors, meta = load_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:  # a blank of the header may change
            assert meta == {"step": 7, "name": "é"} and torch.equal(tensors["w"], torch.arange(12.0).reshape(3, 4))


def test_every_cut_is_noticed(tmp_path):
    path = tmp_path / "c"
    save_small(path)
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"is truncated or no safetensors file.*delete it"):
            load_checkpoint(path)


def test_foreign_files_are_named(tmp_path):
    path = tmp_path / "c"
    with pytest.raises(ValueError, match=f"there is no checkpoint {path}.*--run.resume"):
        load_checkpoint(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=f"{path} is a safetensors file of another program"):
        load_checkpoint(path)
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=f"{path} is truncated or no safetensors file"):
        load_checkpoint(path)
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(ValueError, match=f"{path} is truncated or no safetensors file"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match=f"{tmp_path} is truncated or no safetensors file"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(("header", "message"), [
    ('{"version": 2, "crc32": 0, "meta": {}}', "has format version 2, and this code reads 1"),
    ('{"version": 1, "crc32": 0}', "has a damaged header"), ("[]", "has format version None"), ("{", "damaged header"),
    ('{"version": 1, "crc32": 5, "meta": {}}', "was altered after it was written"),
])
def test_damaged_headers_are_named(tmp_path, header, message):
    save_file({"x": torch.zeros(1)}, tmp_path / "c", metadata={checkpoint.HEADER_KEY: header})
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "c")


def test_matching():
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(())}
    match_tensors({"a": (2, 3), "b": ()}, tensors, what="c")
    with pytest.raises(ValueError, match=r"^c is the checkpoint of another model.*missing: n0, n1, n2 and 2 more\)"):
        match_tensors({"a": (2, 3), "b": ()} | {f"n{i}": (1,) for i in range(5)}, tensors, what="c")
    with pytest.raises(ValueError, match=r"unexpected: b; of another shape: a \(2, 3\) instead of \(3, 2\)"):
        match_tensors({"a": (3, 2)}, tensors, what="c")


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from data.run.checkpoint import load_checkpoint, save_checkpoint

torch.set_num_threads(1)
path, random_ = Path(sys.argv[1]), random.Random(1)

def save(step):
    save_checkpoint(path, {"a": torch.full((1 << 20,), float(step)), "b": torch.tensor(step)}, {"step": step})

save(0)
steps, partials, kills = [0], 0, 0
while kills < 8 or (kills < 80 and not (partials and steps[-1])):  # at least one kill must come while a file is written
    kills += 1
    child = os.fork()
    if child == 0:
        for step in range(steps[-1] + 1, 1 << 20):
            save(step)
    time.sleep(random_.uniform(0.05, 0.25))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    partials += len(list(path.parent.iterdir())) - 1
    tensors, meta = load_checkpoint(path)
    assert (tensors["a"] == meta["step"]).all() and tensors["b"] == meta["step"]
    assert meta["step"] >= steps[-1]
    steps.append(meta["step"])
save(-1)
assert load_checkpoint(path)[1] == {"step": -1} and [p.name for p in path.parent.iterdir()] == [path.name]
print(steps[-1], partials)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_leaves_a_complete_checkpoint(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLER, str(tmp_path / "c")], env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    last_step, partials = map(int, done.stdout.split())
    assert last_step > 0 and partials > 0  # else the kills proved nothing


def test_a_leftover_of_a_kill_is_overwritten(tmp_path):
    (tmp_path / "c.partial").write_bytes(b"half" * 1000)
    saved = save_small(tmp_path / "c")
    assert torch.equal(load_checkpoint(tmp_path / "c")[0]["w"], saved["w"])
    assert list(tmp_path.iterdir()) == [tmp_path / "c"]
