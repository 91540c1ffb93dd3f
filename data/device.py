"""Where a run computes: which device, what it is called, how much memory it took."""

import sys

import torch


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device by name, `auto` meaning CUDA, else MPS, else CPU. Raises ValueError where it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(name for name, here in there.items() if here) if wanted == "auto" else wanted
    if not there[kind]:
        raise ValueError(f"device {kind} is not on this machine; available: {[n for n, here in there.items() if here]}")
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
