"""What a run's numbers rest on: the device, the machine, the versions, and the text of the code."""

import hashlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

# Dense bfloat16 tensor-core peak in floating-point operations per second, accumulating in float32 (NVIDIA's data
# sheets; where they quote sparse rates, half of it). None: a part whose name contains a listed one but is slower.
PEAK_FLOPS: dict[str, float | None] = {
    "B200": 2250e12, "GH200": 989.4e12, "H200": 989.4e12, "H200 NVL": 835.5e12,
    "H100": 989.4e12, "H100 PCIe": 756e12, "H100 NVL": 835.5e12,
    "A100": 312e12, "L40S": 362e12, "A40": 149.7e12, "V100": 125e12,  # V100: float16, it has no bfloat16
    "RTX 4090": 165.2e12, "RTX 4090 D": None, "RTX 4090 Laptop": None, "RTX 3090": 71e12, "RTX 3090 Ti": None,
}
RECORDED_VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TORCH", "PYTORCH", "NCCL")
NOT_OURS = {"tests", "site-packages"}
HEADER = re.compile(r"======== (?P<path>.+) \((?P<characters>\d+) characters\)\n")


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device by name, `auto` meaning CUDA, else MPS, else CPU. Raises ValueError where it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(name for name, usable in available.items() if usable) if wanted == "auto" else wanted
    if not available[kind]:
        names = [name for name, usable in available.items() if usable]
        raise ValueError(f"device {kind} is not on this machine; available: {names}")
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device(kind)


def device_name(device: torch.device) -> str:
    """The hardware's own name, or the device type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory allocated so far: on the GPU, else resident in the process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe_environment() -> dict[str, object]:
    """Machine, versions and repository state, ready for JSON; None where something cannot be known. No host name."""
    gpus, gpu_driver = _gpus() if torch.cuda.is_available() else ([], None)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        # Cores that this process may run on, where the system tells; else all of them.
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "gpus": gpus,
        "gpu_driver": gpu_driver,
        "torch_threads": torch.get_num_threads(),
        "git": _git_state(Path(__file__).resolve().parents[2]),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(RECORDED_VARIABLES)},
    }


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 peak, in operations per second, of the GPU that CUDA calls `device_name`; None if unknown.

    Names match as whole words (an RTX A4000 is no A40), and the longest listed name wins.
    """
    matches = [name for name in PEAK_FLOPS if re.search(rf"\b{re.escape(name)}\b", device_name, re.IGNORECASE)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def code_files(root: Path) -> list[Path]:
    """Every Python file under `root` that this process has imported, and its main file; tests and libraries apart."""
    root = root.resolve()
    libraries = [Path(p).resolve() for p in (sys.prefix, sys.base_prefix)]
    inner_libraries = [p for p in libraries if p != root and p.is_relative_to(root)]
    named = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    loaded = {Path(name).resolve() for name in named if isinstance(name, str) and name.endswith(".py")}
    return sorted(
        path for path in loaded
        if path.is_relative_to(root) and path.is_file()
        and NOT_OURS.isdisjoint(path.relative_to(root).parts)
        and not any(path.is_relative_to(p) for p in inner_libraries)
    )


def code_text(files: list[Path], root: Path) -> str:
    """One text of all files, each under a header with its path relative to `root` and its length.

    The length makes `split_code` exact even where a file contains lines that look like a header.
    """
    parts = []
    for path in files:
        source = path.read_bytes().decode("utf-8")  # bytes: line ends stay what they are
        name = path.resolve().relative_to(root.resolve()).as_posix()
        parts.append(f"======== {name} ({len(source)} characters)\n{source}\n")
    return "".join(parts)


def split_code(text: str) -> dict[str, str]:
    """The inverse of `code_text`: relative path to source. Raises ValueError where the text is not of that form."""
    sources, position = {}, 0
    while position < len(text):
        header = HEADER.match(text, position)
        if header is None:
            raise ValueError(f"not a code text: no header at character {position}: {text[position:position + 40]!r}")
        end = header.end() + int(header["characters"])
        if text[end:end + 1] != "\n":
            raise ValueError(f"not a code text: {header['path']} is not as long as its header says")
        sources[header["path"]] = text[header.end():end]
        position = end + 1
    return sources


def code_hash(text: str) -> str:
    """The first 16 hexadecimal digits of the text's SHA-256: equal hashes, equal code."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _output(*command: str) -> str | None:
    """What a command prints, stripped; None if it is missing, fails or takes over ten seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()


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
    """Name and memory of each GPU that CUDA offers, and the driver's version."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    printed = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return ([{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
            printed.splitlines()[0] if printed else None)


def _git_state(root: Path) -> dict[str, object] | None:
    """Commit, branch and whether tracked files differ from the commit; None outside git or before the first commit."""
    commit = _output("git", "-C", str(root), "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    branch = _output("git", "-C", str(root), "branch", "--show-current") or None  # none on a detached head
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "branch": branch, "dirty": changes != ""}
