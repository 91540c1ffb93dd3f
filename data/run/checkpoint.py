"""Checkpoints: one safetensors file of tensors and JSON, complete or absent, and checked when it is loaded. No pickle.

The tensors are the optimizer's (optim/state.py: weights/NAME, STATE/NAME, ...) and the random generator's, rng/torch.
`meta` holds the progress, the config by dotted names, and data_hash. The world size is not stored: a run may be resumed on
any number of ranks.

The safetensors header has one entry of ours: format version, checksum and the JSON `meta`. The checksum is a CRC-32
over meta and every tensor's name, type, shape and bytes (about 1 GB/s), so that a flipped bit is noticed.

A run is resumed in five phases, and nothing of it changes before the last one: read the header, compare the checksum
(`load_checkpoint`), compare names and shapes (`match_tensors`), compare config and data (`check_same_run`), restore.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from configs.schema import Identity, Run
from configs.serialize import config_from_dict, config_to_dict, flatten, unflatten
from data.files import atomic_write

HEADER_KEY = "steepest_checkpoint"
FORMAT_VERSION = 1
MOST_NAMES = 3  # of each kind, in an error message


def save_checkpoint(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Replace `path` by a checkpoint of `tensors` (of any type, shape and device) and `meta` (JSON values).

    A kill at any moment leaves the previous checkpoint. JSON changes `meta`: its keys become strings, its tuples lists.
    """
    # Contiguous copies on the CPU: safetensors refuses tensors that share storage, as views of one bank do.
    copies = {name: tensors[name].detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
              for name in sorted(tensors)}
    header = {"version": FORMAT_VERSION, "crc32": _checksum(copies, meta), "meta": meta}
    with atomic_write(path) as temporary_path:
        # Not by the library's save_file: its temporary file has a random name, and would stay behind after a kill.
        temporary_path.write_bytes(save(copies, metadata={HEADER_KEY: json.dumps(header)}))


def load_checkpoint(path: Path, *, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, on `device`, and the meta of a checkpoint.

    Raises ValueError, naming the file, if it is missing, truncated, altered, or of another program or format version.
    """
    if not path.exists():
        raise ValueError(f"there is no checkpoint {path}; start the run without --run.resume, or check --run.name")
    # Read the header, then the tensors in the order of their names, in which the checksum was computed.
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = _read_header(path, file.metadata())
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise _unusable(path, f"is truncated or no safetensors file ({error})") from None
    # Compare the checksum.
    if _checksum(tensors, header["meta"]) != header["crc32"]:
        raise _unusable(path, "was altered after it was written: its checksum does not match")
    # Copied, because what safe_open returns may lie in the mapped file, which the next checkpoint replaces.
    return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}, header["meta"]


def match_tensors(expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor], *, what: str) -> None:
    """Raise ValueError unless `tensors` have exactly the expected names and shapes; `what` is the checkpoint's path."""
    common = [name for name in expected if name in tensors]
    differences = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": [f"{name} {tuple(tensors[name].shape)} instead of {tuple(expected[name])}"
                             for name in common if tuple(tensors[name].shape) != tuple(expected[name])],
    }
    if any(differences.values()):
        details = "; ".join(f"{kind}: {_join_first(names)}" for kind, names in differences.items() if names)
        raise ValueError(f"{what} is the checkpoint of another model or optimizer ({details}); give the --model and "
                         "--optim flags of that run (they are in its config.json), or another --run.name")


def check_same_run(meta: dict[str, Any], run: Run, data_hash: str, path: Path) -> None:
    """Raise ValueError if the checkpoint was trained on other data, or with other settings that change the losses."""
    if meta["data_hash"] != data_hash:
        raise ValueError(f"{path} was trained on data with hash {meta['data_hash']}, this run reads data with hash "
                         f"{data_hash}; give the same --data flags and files, or another --run.name")
    # Settings that may differ: where the run is stored, when it is saved, how much memory a step takes, what is logged.
    free = {f"run.{name}" for name in Identity.__slots__ if name != "seed"} | {"train.micro_tokens"}
    # Through the config classes, so that an older checkpoint has today's names, and defaults where it lacks a field.
    saved, present = (flatten(config_to_dict(config))
                      for config in (config_from_dict(unflatten(meta["config"])), run))
    for name in dict.fromkeys([*saved, *present]):
        if name not in free and not name.startswith("log.") and present.get(name) != saved.get(name):
            raise ValueError(f"{path} was trained with --{name} {saved.get(name)}, this run has {present.get(name)}; "
                             "resume with the same settings, or start another --run.name")


def _read_header(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    """Return our entry of the safetensors metadata. Raises ValueError if it is missing, damaged or of another version."""
    if HEADER_KEY not in (metadata or {}):
        raise _unusable(path, "is a safetensors file of another program")
    try:
        header = json.loads(metadata[HEADER_KEY])
    except ValueError:
        raise _unusable(path, "has a damaged header") from None
    # The version first: of another one, nothing is known about the other entries.
    version = header.get("version") if isinstance(header, dict) else None
    if version != FORMAT_VERSION:
        raise _unusable(path, f"has format version {version}, and this code reads {FORMAT_VERSION}")
    if not {"crc32", "meta"} <= header.keys():
        raise _unusable(path, "has a damaged header")
    return header


def _unusable(path: Path, problem: str) -> ValueError:
    return ValueError(f"checkpoint {path} {problem}; delete it to start anew, or resume from another run's folder")


def _checksum(tensors: dict[str, Tensor], meta: dict[str, Any]) -> int:
    """Return the CRC-32 of all contents; tensors must be contiguous, on the CPU, and in the order of their names."""
    # Through JSON and back, because keys that were integers return as strings.
    crc = zlib.crc32(json.dumps(json.loads(json.dumps(meta)), sort_keys=True).encode())
    for name, tensor in tensors.items():
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        # As bytes, because numpy has no bfloat16 and no float8.
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def _join_first(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
