"""Count what a compiled step does: run Inductor's generated code on tensors without memory, and note every call in it.

Inductor writes a Python function for each graph that allocates buffers, launches Triton kernels and calls operators.
`Recorder` lets this function run on FakeTensors, with kernels that only note that they were launched. So the count is that
of the code which a GPU would run: launches, bytes, matrix products, and the memory that is held at each moment.

Bytes of a Triton kernel are Inductor's own estimate (kernel_num_gb: each buffer once, gathered rows as often as they are
read); those of our own kernels come from kernels/traffic.py; those of matrix products stand apart, since time is not
spent on them but on the multiplications.
"""

import re
import weakref
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from torch._library.custom_ops import OPDEFS
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction, MockTensor

from kernels.traffic import bytes_moved, tensor_bytes

# Position of the two factors among the arguments of each matrix product.
PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "_scaled_mm": (0, 1), "_scaled_mm_v2": (0, 1)}
GROUPS = ("triton", "own", "other", "products", "attention")
# Operators that launch nothing.
SILENT = ("empty", "new_empty", "lift", "detach", "alias", "is_", "sym_", "_local_scalar_dense", "device", "set_", "resize_")


class Counted:
    """Base of the entries of a tally: they add up."""

    count: int
    bytes: float

    def plus(self, other: "Counted") -> "Counted":
        """Return the sum of two entries of the same kernel or shape."""
        summed = [name for name in ("count", "bytes", "flops") if hasattr(self, name)]
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in summed})


@dataclass
class Launches(Counted):
    """Launches of one kernel, or calls of one operator, within a graph."""

    name: str
    count: int = 0
    bytes: float = 0
    """Bytes read and written by all of them."""
    shared_bytes: int | None = None
    """Most shared memory of a thread block; None if it was not compiled by Triton."""
    float64_arguments: list[str] = field(default_factory=list)
    """Numbers that a kernel of ours takes in float64, in which all arithmetic with them then is."""


@dataclass
class Product(Counted):
    """Matrix products of one shape: (batch, m, k) x (batch, k, n)."""

    op: str
    dtype: str
    batch: int
    m: int
    n: int
    k: int
    count: int = 0
    flops: int = 0
    """2 batch m n k, of all of them."""
    bytes: int = 0
    """Bytes of factors and results, of all of them."""


@dataclass
class AttentionCall(Counted):
    """Calls of one attention kernel on one shape."""

    kernel: str
    """flex, varlen or sdpa."""
    backward: bool
    batch: int
    heads: int
    tokens: int
    head_dim: int
    count: int = 0
    bytes: float = 0


@dataclass
class Tally:
    """What one run of a compiled graph does, or, for the kind `eager`, what happens between graphs."""

    name: str
    kind: str
    """forward, backward, inference, or eager."""
    triton: dict[str, Launches] = field(default_factory=dict)
    """Kernels that Inductor wrote, by name; FlexAttention's are among them."""
    own: dict[str, Launches] = field(default_factory=dict)
    """Our operators and Triton kernels."""
    other: dict[str, Launches] = field(default_factory=dict)
    """Other operators: sorts, scatters; in eager mode everything."""
    products: dict[tuple, Product] = field(default_factory=dict)
    attention: dict[tuple, AttentionCall] = field(default_factory=dict)
    """Also in `triton`, where they are FlexAttention's, or in `other`."""

    @property
    def launches(self) -> int:
        """Number of kernels launched, matrix products among them."""
        return sum(x.count for group in (self.triton, self.own, self.other, self.products) for x in group.values())

    @property
    def bytes(self) -> float:
        """Bytes moved by Triton's and our own kernels; products and other operators are not among them."""
        return sum(x.bytes for group in (self.triton, self.own) for x in group.values())

    def plus(self, other: "Tally") -> "Tally":
        """Return the sum of two runs."""
        total = Tally(self.name, self.kind)
        for group in GROUPS:
            entries = getattr(total, group)
            for key, entry in [*getattr(self, group).items(), *getattr(other, group).items()]:
                entries[key] = entries[key].plus(entry) if key in entries else entry
        return total

    def as_json(self) -> dict[str, Any]:
        """Return sums and lists, the largest first."""
        groups = {group: sorted((asdict(x) for x in getattr(self, group).values()), key=lambda x: -x["bytes"])
                  for group in GROUPS}
        sums = {"bytes": round(self.bytes), "launches": self.launches,
                "kernel_launches": sum(x["count"] for x in (*groups["triton"], *groups["own"])),
                "product_flops": sum(x["flops"] for x in groups["products"]),
                "product_bytes": sum(x["bytes"] for x in groups["products"]),
                "other_bytes": sum(x["bytes"] for x in groups["other"])}
        return sums | groups


class Memory:
    """Bytes of the tensors that live now, and the most there ever were."""

    def __init__(self) -> None:
        self.now, self.peak, self.known = 0, 0, set()

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, until it is freed; a storage that is known counts once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        """Forget a storage."""
        self.known.discard(key)
        self.now -= size


class Recorder(TorchDispatchMode):
    """While it is entered, every graph that is compiled and run is noted, and every operator between graphs."""

    supports_higher_order_operators = True

    def __init__(self, triton: str = "none") -> None:
        """triton: kernels that Triton compiles: none, `own` alone, or all, which takes most of the time."""
        super().__init__()
        self.triton, self.memory = triton, Memory()
        self.compiled: list[str] = []
        """Names of the graphs compiled so far."""
        self.tallies: list[Tally] = []
        self.current = Tally("eager", "eager")
        self.launched: list[int | None] = []
        """Shared memory of the Triton kernels that an operator of ours has launched."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile work while this mode is on."""
        return True

    def take(self) -> list[Tally]:
        """Return what was noted since the last call, in order; what happened between graphs is one entry at the end."""
        tallies, self.tallies = [*self.tallies, self.current], []
        self.current = Tally("eager", "eager")
        return tallies

    # ---- Patches: from entering to leaving ----

    def __enter__(self) -> "Recorder":
        self._undo = [(AsyncCompile, "triton", AsyncCompile.triton), (GraphLowering, "compile_to_module",
                      GraphLowering.compile_to_module), (JITFunction, "run", JITFunction.run)]
        (_, _, compile_kernel), (_, _, compile_graph), (_, _, launch) = self._undo
        recorder = self

        def triton(self: AsyncCompile, name: str, source: str, device_str: str = "cuda") -> Kernel:
            kernel = Kernel(recorder, name, source)
            if recorder.triton == "all" or recorder.triton == "own" and kernel.bytes is None:
                kernel.shared = shared_bytes(compile_kernel(self, name, source, device_str))
            return kernel

        def compile_to_module(self: GraphLowering) -> Any:
            kind = "backward" if self.is_backward else "inference" if self.is_inference else "forward"
            return recorder.watch(compile_graph(self), kind)

        def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            shared = None
            if recorder.triton != "none":
                mocks = [MockTensor(x.dtype, x.shape) if isinstance(x, Tensor) else x for x in args]
                shared = launch(self, *mocks, grid=grid, warmup=True, **options).metadata.shared
            recorder.launched.append(shared)

        AsyncCompile.triton, GraphLowering.compile_to_module, JITFunction.run = triton, compile_to_module, run
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        for target, name, original in self._undo:
            setattr(target, name, original)
        super().__exit__(*error)

    def watch(self, module: Any, kind: str) -> Any:
        """Make a generated module run on FakeTensors and note what it does."""
        name = f"{kind} {len(self.compiled)}"
        self.compiled.append(name)
        module.empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device="cuda")
        module.empty_strided_cpu = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype)
        module.reinterpret_tensor = lambda base, size, stride, offset: torch.as_strided(
            base, size, stride, base.storage_offset() + offset)
        module.copy_if_misaligned = lambda tensor: tensor
        call = module.call

        def noted(args: list) -> Any:
            outer, self.current = self.current, Tally(name, kind)
            try:
                return call(args)  # the list itself, which the generated code empties: it frees its inputs early
            finally:
                self.tallies.append(self.current)
                self.current = outer

        module.call = noted
        return module

    # ---- Operators ----

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if isinstance(func, HigherOrderOperator):  # FlexAttention outside a graph, while sampling: not counted
            return func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        # Products into a buffer that is there: not all of them have a form for FakeTensors.
        is_into = name in PRODUCTS and "out" in (kwargs or {})
        out = kwargs["out"] if is_into else func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor) and not any(x is y for y in inputs)]
        if any(x.device.type == "cuda" for x in (*inputs, *outputs)):
            aliased = {x.untyped_storage()._cdata for x in inputs}
            for tensor in outputs:
                if tensor.device.type == "cuda" and tensor.untyped_storage()._cdata not in aliased:
                    self.memory.add(tensor)
            if not (func.is_view or name.startswith(SILENT)):
                self.note(func._schema.name, inputs + outputs, args, kwargs or {})
        return out

    def note(self, operator: str, tensors: list[Tensor], args: tuple, kwargs: dict) -> None:
        """Note one call of an operator (namespace::name) that launches a kernel; `tensors`: arguments, then results."""
        tally, name = self.current, operator.split("::")[1]
        if name in PRODUCTS:
            a, b = (args[i] for i in PRODUCTS[name])
            shape = (a.size(0) if a.ndim == 3 else 1, a.size(-2), b.size(-1), a.size(-1))
            dtype = str(a.dtype).removeprefix("torch.")
            product = tally.products.setdefault((name, dtype, *shape), Product(name, dtype, *shape))
            product.count += 1
            product.flops += 2 * shape[0] * shape[1] * shape[2] * shape[3]
            product.bytes += sum(map(tensor_bytes, tensors))
        elif operator.startswith("steepest::"):
            self.launched.clear()
            OPDEFS[operator]._init_fn(*args, **kwargs)  # its own lines, to see which kernels they launch
            add(tally.own, name, bytes_moved(operator, tensors), count=len(self.launched),
                shared=max((x for x in self.launched if x is not None), default=None))
        else:
            moved = sum(map(tensor_bytes, tensors))
            add(tally.other, name, moved)
            if "attention" in name or "varlen" in name:
                self.note_attention("varlen" if "varlen" in name else "sdpa", "backward" in name, tensors, moved)

    def note_attention(self, kernel: str, backward: bool, tensors: list[Tensor], moved: float) -> None:
        """Note one attention kernel; its first four-dimensional tensor, or first tensor, holds queries."""
        query = next((x for x in tensors if x.ndim == 4), tensors[0])
        # (B, H, T, D), (B, T, H, D) or (T, H, D): of heads and tokens there are fewer heads.
        *batch, a, b, dim = query.shape
        key = (kernel, backward, batch[0] if batch else 1, min(a, b), max(a, b), dim)
        call = self.current.attention.setdefault(key, AttentionCall(*key))
        call.count += 1
        call.bytes += moved


class Kernel:
    """A Triton kernel in generated code: it notes its launches."""

    shared: int | None = None
    """Shared memory in bytes, if Triton has compiled it."""

    def __init__(self, recorder: Recorder, name: str, source: str) -> None:
        self.recorder, self.name = recorder, name
        gigabytes = re.search(r"'kernel_num_gb': ([0-9.e+-]+)", source)
        self.bytes = float(gigabytes[1]) * 1e9 if gigabytes else None
        # A kernel of ours, launched through wrap_triton, keeps its function's name in the source.
        self.function = re.search(r"^def (\w+)\(", source, re.MULTILINE)[1]
        # Inductor hands Python numbers over in float64 where the device has it.
        self.float64_arguments = re.findall(r"'(\w+)': 'fp64'", source)

    def run(self, *args: Any, stream: int, **options: Any) -> None:
        """Note one launch."""
        tensors = [x for x in args if isinstance(x, Tensor)]
        tally = self.recorder.current
        if self.bytes is None:
            add(tally.own, self.function, bytes_moved(self.function, tensors), shared=self.shared)
            tally.own[self.function].float64_arguments = self.float64_arguments
            return
        add(tally.triton, self.name, self.bytes, shared=self.shared)
        if "flex_attention" in self.name and self.name.startswith("triton_tem"):
            self.recorder.note_attention("flex", "backward" in self.name, tensors, self.bytes)


def add(group: dict[str, Launches], name: str, moved: float, *, count: int = 1, shared: int | None = None) -> None:
    """Add launches to a group."""
    launches = group.setdefault(name, Launches(name))
    launches.count += count
    launches.bytes += moved
    if shared is not None:
        launches.shared_bytes = max(shared, launches.shared_bytes or 0)


def shared_bytes(autotuner: Any) -> int:
    """Return the most shared memory of a compiled kernel's configurations."""
    return max(getattr(launcher, "shared", 0) or 0 for launcher in autotuner.launchers)
