"""Checkpoints: one safetensors file of tensors and JSON, complete or absent, and never silently wrong. No pickle.

Tensors are the optimizer's (optim/state.py: weights/NAME, STATE/NAME, ...) and the generator's, rng/torch; `meta` holds
progress, the configuration by dotted names, and data_hash. The world size is not among them: any will do.

The safetensors header carries one entry of ours: format version, checksum and the JSON `meta`. The checksum is a CRC-32
over meta and every tensor's name, type, shape and bytes (about 1 GB/s), so that a flipped bit is found at loading.
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
    """Replace `path` by the tensors (any type, shape and device; views are copied out) and `meta`, all or nothing.

    `meta` comes back as JSON gives it: string keys, lists for tuples. A kill at any moment leaves the previous file.
    """
    copies = {name: tensors[name].detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
              for name in sorted(tensors)}
    header = {"version": FORMAT_VERSION, "crc32": _checksum(copies, meta), "meta": meta}
    with atomic_write(path) as aside:
        # Not by the library's save_file: its own file aside has a random name, and would stay behind after a kill.
        aside.write_bytes(save(copies, metadata={HEADER_KEY: json.dumps(header)}))


def load_checkpoint(path: Path, *, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on `device`, and the meta of a checkpoint.

    Raises ValueError, naming the file, where it is missing, cut, altered, of another program or of another version.
    """
    if not path.exists():
        raise ValueError(f"there is no checkpoint {path}; start the run without --run.resume, or check --run.name")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = _read_header(path, file.metadata())
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise _unusable(path, f"is cut or no safetensors file ({error})") from None
    if _checksum(tensors, header["meta"]) != header["crc32"]:
        raise _unusable(path, "was altered after it was written: its checksum does not match")
    # Copied, because what safe_open returns may lie in the mapped file, which the next checkpoint replaces.
    return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}, header["meta"]


def match_tensors(expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor], *, what: str) -> None:
    """Raise ValueError unless `tensors` have exactly the expected names and shapes; `what` names the checkpoint."""
    common = [name for name in expected if name in tensors]
    faults = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": [f"{name} {tuple(tensors[name].shape)} instead of {tuple(expected[name])}"
                             for name in common if tuple(tensors[name].shape) != tuple(expected[name])],
    }
    if any(faults.values()):
        details = "; ".join(f"{kind}: {_first_few(names)}" for kind, names in faults.items() if names)
        raise ValueError(f"{what} is the checkpoint of another model or optimizer ({details}); give the --model and "
                         "--optim flags it was made with (config.json beside it tells), or another --run.name")


def check_same_run(meta: dict[str, Any], run: Run, data_hash: str, path: Path) -> None:
    """Raise ValueError if a checkpoint's settings that decide the losses, or its data, are not this run's."""
    if meta["data_hash"] != data_hash:
        raise ValueError(f"{path} was trained on data {meta['data_hash']}, this run reads {data_hash}")
    free = {f"run.{name}" for name in Identity.__slots__ if name != "seed"} | {"train.micro_tokens"}
    mine, theirs = (flatten(config_to_dict(one)) for one in (run, config_from_dict(unflatten(meta["config"]))))
    for name in dict.fromkeys([*theirs, *mine]):
        if name not in free and not name.startswith("log.") and mine.get(name) != theirs.get(name):
            raise ValueError(f"{path} was trained with --{name} {theirs.get(name)}, this run says {mine.get(name)}; "
                             "resume with the same settings, or start another --run.name")


def _read_header(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    """Our entry of the safetensors metadata, its form and version checked."""
    if HEADER_KEY not in (metadata or {}):
        raise _unusable(path, "is a safetensors file of another program")
    try:
        header = json.loads(metadata[HEADER_KEY])
    except ValueError:
        raise _unusable(path, "has a damaged header") from None
    version = header.get("version") if isinstance(header, dict) else None
    if version != FORMAT_VERSION:
        raise _unusable(path, f"has format version {version}, and this code reads {FORMAT_VERSION}")
    if not {"crc32", "meta"} <= header.keys():
        raise _unusable(path, "has a damaged header")
    return header


def _unusable(path: Path, fault: str) -> ValueError:
    return ValueError(f"checkpoint {path} {fault}; delete it to start anew, or resume from another run's folder")


def _checksum(tensors: dict[str, Tensor], meta: dict[str, Any]) -> int:
    """CRC-32 of all that a checkpoint holds; tensors contiguous and on the CPU, in the order of their names."""
    # Through JSON and back, because keys that were integers return as strings.
    crc = zlib.crc32(json.dumps(json.loads(json.dumps(meta)), sort_keys=True).encode())
    for name, tensor in tensors.items():
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def _first_few(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
