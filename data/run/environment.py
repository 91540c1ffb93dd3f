"""Environment of a run: device, machine, versions, and the source text of the code; all that is needed to repeat it."""

import hashlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

# Dense bfloat16 tensor-core peak in floating-point operations per second, accumulating in float32 (NVIDIA's data
# sheets; where they quote sparse rates, half of it). None: a GPU whose name contains a listed one, but that is slower.
PEAK_FLOPS: dict[str, float | None] = {
    "B200": 2250e12, "GH200": 989.4e12, "H200": 989.4e12, "H200 NVL": 835.5e12,
    "H100": 989.4e12, "H100 PCIe": 756e12, "H100 NVL": 835.5e12,
    "A100": 312e12, "L40S": 362e12, "A40": 149.7e12, "V100": 125e12,  # V100: float16, it has no bfloat16
    "RTX 4090": 165.2e12, "RTX 4090 D": None, "RTX 4090 Laptop": None, "RTX 3090": 71e12, "RTX 3090 Ti": None,
}
RECORDED_VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TORCH", "PYTORCH", "NCCL")
"""Beginnings of the environment variables that are recorded; all others may hold secrets."""
EXCLUDED_FOLDERS = {"tests", "site-packages"}
FILE_HEADER = re.compile(r"======== (?P<path>.+) \((?P<characters>\d+) characters\)\n")


def choose_device(name: str, local_rank: int) -> torch.device:
    """Return the device called cpu, mps or cuda; auto is the first of CUDA, MPS and CPU that this machine has.

    On CUDA it is the GPU numbered `local_rank`, which becomes the process's current one, and float32 products use TF32, as
    in nanoGPT: the model's are in bfloat16 but for small ones. Raises ValueError if the machine has no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    usable = [kind for kind, is_usable in available.items() if is_usable]
    kind = usable[0] if name == "auto" else name
    if kind not in usable:
        raise ValueError(f"this machine has no {kind} device; choose auto or one of: {', '.join(usable)}")
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")
        return torch.device("cuda", local_rank)
    return torch.device(kind)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, as "NVIDIA H100 80GB HBM3", or the device type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the largest memory in use so far, in bytes; None if the system does not report it.

    On a GPU it is the memory allocated by torch, elsewhere the resident memory of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    # macOS reports bytes, Linux KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe_environment() -> dict[str, object]:
    """Return machine, versions and repository state as JSON values; None for what cannot be known.

    The host name is left out, because run folders are published.
    """
    gpus, gpu_driver = _gpus() if torch.cuda.is_available() else ([], None)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        # Cores that this process may use: in a container or a batch job they are fewer than the machine's.
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "gpus": gpus,
        "gpu_driver": gpu_driver,
        "torch_threads": torch.get_num_threads(),
        "git": _git_state(Path(__file__).resolve().parents[2]),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(RECORDED_VARIABLES)},
    }


def peak_flops(device_name: str) -> float | None:
    """Return the dense bfloat16 peak of a GPU, in operations per second; None if it is not listed.

    `device_name` is the name that CUDA reports. Listed names match as whole words (an RTX A4000 is no A40), and the longest
    match wins.
    """
    matches = [name for name in PEAK_FLOPS if re.search(rf"\b{re.escape(name)}\b", device_name, re.IGNORECASE)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def code_files(root: Path) -> list[Path]:
    """Return the Python files under `root` that this process runs: main file and imports, without tests and libraries."""
    root = root.resolve()
    libraries = [Path(p).resolve() for p in (sys.prefix, sys.base_prefix)]
    # A virtual environment often lies in the repository itself.
    inner_libraries = [p for p in libraries if p != root and p.is_relative_to(root)]
    file_names = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    loaded = {Path(name).resolve() for name in file_names if isinstance(name, str) and name.endswith(".py")}
    return sorted(path for path in loaded
                  if path.is_relative_to(root) and path.is_file()
                  and EXCLUDED_FOLDERS.isdisjoint(path.relative_to(root).parts)
                  and not any(path.is_relative_to(p) for p in inner_libraries))


def code_text(files: list[Path], root: Path) -> str:
    """Join the files into one text: each after a header line with its path relative to `root` and its length in characters.

    The length makes `split_code` exact even if a file contains a line that looks like a header.
    """
    parts = []
    for path in files:
        source = path.read_bytes().decode("utf-8")  # not read_text, which would change line ends
        name = path.resolve().relative_to(root.resolve()).as_posix()
        parts.append(f"======== {name} ({len(source)} characters)\n{source}\n")
    return "".join(parts)


def split_code(text: str) -> dict[str, str]:
    """Return relative path -> source: the inverse of `code_text`. Raises ValueError if the text has another form."""
    sources, position = {}, 0
    while position < len(text):
        header = FILE_HEADER.match(text, position)
        if header is None:
            raise ValueError(f"not a code text: no header at character {position}: {text[position:position + 40]!r}")
        end = header.end() + int(header["characters"])
        if text[end:end + 1] != "\n":
            raise ValueError(f"not a code text: {header['path']} is not as long as its header says")
        sources[header["path"]] = text[header.end():end]
        position = end + 1
    return sources


def code_hash(text: str) -> str:
    """Return the first 16 hexadecimal digits of the text's SHA-256; runs with equal hashes had the same code."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _output(*command: str) -> str | None:
    """Return the stripped output of a command; None if it does not exist, fails, or takes more than ten seconds."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return process.stdout.strip()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if name:
            return name[1].strip()
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> tuple[list[dict[str, object]], str | None]:
    """Return name and memory of each GPU that CUDA reports, and the version of the driver."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    output = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return ([{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
            output.splitlines()[0] if output else None)


def _git_state(root: Path) -> dict[str, object] | None:
    """Return commit, branch, and whether tracked files differ from the commit; None outside git or without a commit."""
    commit = _output("git", "-C", str(root), "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    branch = _output("git", "-C", str(root), "branch", "--show-current") or None  # empty on a detached head
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "branch": branch, "dirty": changes != ""}
