"""A pretended GPU: after `pretend()` torch believes in one CUDA device of a chosen compute capability; nothing runs on it.

Dynamo, Inductor and Triton only ask a device for its properties, so they compile for it on a machine without one. Tensors
on "cuda" must be FakeTensors, which have a shape and no memory. What was learned, for torch 2.13's CPU wheel:

- two small C++ objects must be registered (guard.cpp), before torch is imported;
- torch.cuda's getters, the same getters behind torch._C, and Dynamo's device interface answer from one table;
- Triton takes its target and its limits from a driver object, which is replaced;
- Inductor must not run anything on the device while it compiles: constants are not folded, patterns that are found by
  tracing attention or by timing padded products are left out. On a real GPU some small products may therefore be padded.

It changes torch for the whole process: use it in a process of its own.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
GUARD = Path(__file__).with_name("guard.cpp")

# Largest shared memory of a thread block in bytes, multiprocessors, and memory in GiB: A100, RTX 4090, H100.
LIMITS = {"8.0": (166_912, 108, 80), "8.9": (101_376, 128, 24), "9.0": (232_448, 132, 80)}


def missing() -> str | None:
    """Return why this machine cannot pretend, or None if it can."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    # A CUDA build registers a real guard and real hooks, and torch takes only one of each.
    is_cuda_build = (torch_folder() / "lib/libtorch_cuda.so").exists()
    return "this torch is built for CUDA; pretending needs the CPU wheel" if is_cuda_build else None


def torch_folder() -> Path:
    """Return the folder of the package, without importing it."""
    return Path(importlib.util.find_spec("torch").origin).parent


def build_guard(cache_dir: Path = ROOT / ".cache" / "gpu_free") -> Path:
    """Compile guard.cpp against torch's own headers, once for each version of both; return the library."""
    version, torch_dir = importlib.metadata.version("torch"), torch_folder()
    digest = hashlib.sha256(GUARD.read_bytes() + f"{version} {torch_dir}".encode()).hexdigest()[:12]
    library = cache_dir / f"guard-{digest}.so"
    if not library.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")  # renamed when it is whole: tests may build it at the same time
        include = torch_dir / "include"
        subprocess.run(["g++", "-shared", "-fPIC", "-O1", "-std=c++20", f"-I{include}",
                        f"-I{include}/torch/csrc/api/include", str(GUARD), "-o", str(partial), f"-L{torch_dir}/lib",
                        "-lc10", "-ltorch_cpu"], check=True)
        partial.replace(library)
    return library


def pretend(capability: str = "9.0") -> None:
    """Make torch believe in a CUDA device of this compute capability, one of LIMITS. Call it before `import torch`."""
    # One process, no caches: every kernel is compiled here and now, with this driver.
    os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    for library in (torch_folder() / "lib/libc10.so", torch_folder() / "lib/libtorch_cpu.so", build_guard()):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    properties = device_properties(capability)
    patch_torch(properties)
    patch_driver(properties)
    patch_inductor()


def device_properties(capability: str) -> SimpleNamespace:
    """Return what torch.cuda.get_device_properties returns."""
    shared, multiprocessors, gib = LIMITS[capability]
    major, minor = (int(digit) for digit in capability.split("."))
    return SimpleNamespace(
        name=f"pretended GPU of compute capability {capability}", major=major, minor=minor, total_memory=gib * 2**30,
        multi_processor_count=multiprocessors, max_threads_per_multi_processor=1536 if capability == "8.9" else 2048,
        max_threads_per_block=1024, warp_size=32, regs_per_multiprocessor=65_536, shared_memory_per_block=49_152,
        shared_memory_per_block_optin=shared, shared_memory_per_multiprocessor=shared + 1024, gcnArchName="",
        is_integrated=0, L2_cache_size=50 * 2**20, uuid="", clock_rate=1_980_000, memory_clock_rate=2_619_000,
        memory_bus_width=5120)


def replace_all(target: object, **answers: object) -> None:
    """Set attributes: functions that ignore their arguments and return the given values."""
    for name, answer in answers.items():
        setattr(target, name, (lambda *args, _answer=answer, **kwargs: _answer))


def patch_torch(properties: SimpleNamespace) -> None:
    """Replace everything that asks CUDA about its device, in torch.cuda, torch._C and Dynamo."""
    import torch
    import torch._dynamo.device_interface as device_interface
    import torch._subclasses.fake_tensor as fake_tensor

    torch.version.cuda = torch.version.cuda or "13.0"
    capability, stream = (properties.major, properties.minor), IdleStream(torch.device("cuda", 0))
    replace_all(torch.cuda, is_available=True, device_count=1, current_device=0, _lazy_init=None, is_initialized=False,
                get_device_capability=capability, get_device_properties=properties, get_device_name=properties.name,
                synchronize=None, is_bf16_supported=True, set_device=None, current_stream=stream, _exchange_device=0,
                _maybe_exchange_device=0, get_rng_state=torch.zeros(16, dtype=torch.uint8), set_rng_state=None,
                manual_seed_all=None, manual_seed=None)
    replace_all(torch._C, _cuda_getCurrentRawStream=0, _cuda_getDevice=0, _cuda_setDevice=None, _cuda_exchangeDevice=0,
                _cuda_maybeExchangeDevice=0, _cuda_init=None, _accelerator_getDeviceIndex=0,
                _accelerator_exchangeDevice=0, _accelerator_maybeExchangeDevice=0, _accelerator_setDeviceIndex=None,
                _accelerator_synchronizeDevice=None, _accelerator_getStream=stream)
    replace_all(torch.accelerator, current_stream=stream)
    replace_all(fake_tensor, init_gpu_context=None)
    interface = device_interface.CudaInterface
    answers = {"current_device": 0, "device_count": 1, "is_available": True, "get_device_properties": properties,
               "get_compute_capability": properties.major * 10 + properties.minor, "synchronize": None, "get_raw_stream": 0,
               "is_bf16_supported": True, "exchange_device": 0, "maybe_exchange_device": 0, "set_device": None,
               "memory_allocated": 0}
    for name, answer in answers.items():
        setattr(interface, name, staticmethod(lambda *args, _answer=answer, **kwargs: _answer))
        if hasattr(interface.Worker, name):
            setattr(interface.Worker, name, staticmethod(lambda *args, _answer=answer, **kwargs: _answer))


class IdleStream:
    """A CUDA stream with nothing in it."""

    stream_id, device_index, device_type, cuda_stream = 0, 0, 1, 0

    def __init__(self, device: object) -> None:
        self.device = device

    def wait_stream(self, stream: "IdleStream") -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def __enter__(self) -> "IdleStream":
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing."""


def patch_driver(properties: SimpleNamespace) -> None:
    """Replace Triton's driver by one that only knows the target and the device's limits."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    class Utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": properties.shared_memory_per_block_optin, "max_num_regs": 65_536,
                    "multiprocessor_count": properties.multi_processor_count, "warpSize": 32, "sm_clock_rate": 1_980_000,
                    "mem_clock_rate": 2_619_000, "mem_bus_width": 5120}

        @staticmethod
        def load_binary(*args: object) -> tuple[int, int, int, int, int]:
            return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads: it never meets a GPU

    class Driver:
        utils, binary_ext = Utils(), "cubin"

        def get_benchmarker(self) -> object:
            raise RuntimeError("a pretended GPU cannot be timed")

        def launcher_cls(self, source: object, metadata: object) -> object:
            return lambda *args: None

    target = GPUTarget("cuda", properties.major * 10 + properties.minor, 32)
    replace_all(Driver, get_current_target=target, get_current_device=0, get_current_stream=0, is_active=True,
                get_active_torch_device=torch.device("cuda", 0), get_device_interface=torch.cuda)
    triton.runtime.driver.set_active(Driver())


def patch_inductor() -> None:
    """Keep Inductor from running anything on the device, and let it note each kernel's bytes."""
    import torch
    import torch._functorch.config
    import torch._inductor.config
    import torch._inductor.fx_passes.fuse_attention as fuse_attention
    import torch._inductor.fx_passes.pad_mm as pad_mm
    import torch._inductor.graph
    import torch._inductor.runtime.triton_helpers as triton_helpers

    torch._inductor.config.benchmark_kernel = True  # writes kernel_num_gb, the bytes, beside each kernel
    torch._inductor.graph.print = lambda *args, **options: None  # with benchmark_kernel it prints the path of each graph
    torch._inductor.config.joint_graph_constant_folding = False
    torch._functorch.config.force_non_lazy_backward_lowering = True  # the backward graph is compiled with the forward one
    replace_all(fuse_attention, _sfdp_init=None)
    replace_all(pad_mm, _pad_mm_init=None)
    replace_all(triton_helpers, set_driver_to_gpu=None, set_driver_to_cpu=None)

    class Launcher:
        pass

    replace_all(Launcher, _load_kernel=(1, 32, 0, 1024), _launch_kernel=None)
    torch._C._StaticCudaLauncher = Launcher
