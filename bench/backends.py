"""Who multiplies: this package, torch, and the other packages that are installed.

A backend is a name, the process that it runs in (libraries with a pool of threads of their own never share one),
and a library: how it is called on torch's operands, without a copy where it can read them in place.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import api, ops, testing
from .inputs import Operands
from .workloads import CAST, OPERATOR, OURS, STEP, TORCH, Workload

PEAK = "peak"  # stands among the backends, and is none: the most that this machine can multiply
TORCH_PROCESS = "torch"  # the process of all that runs on torch's pool of threads
CUBES_COMPILED = (1024, 4096)  # torch.compile takes half a minute to tune itself to one

Call = Callable[[], Any]
Mm = Callable[[Tensor, Tensor], Tensor]

# Looked up at each call, so that what is timed is what the package does now.
IMPLEMENTATIONS: Mapping[str, Mm] = {TORCH: lambda a, b: torch.mm(a, b), OURS: lambda a, b: api.mm(a, b)}


class Skipped(Exception):
    """What a package cannot do; the message says why."""


class Library(Protocol):
    """How a package multiplies."""

    def of(self, workload: Workload) -> Library:
        """The library for this workload, where what it calls depends on it."""
        ...

    def product(self, x: Tensor, y: Tensor) -> Call: ...

    def step(self, operands: Operands) -> Call:
        """Forward and both gradients, of which it gives all three."""
        ...

    def tensor(self, result: Any) -> Tensor:
        """What a product gave."""
        ...


@dataclass(frozen=True)
class OfTorch:
    """A function of tensors that autograd knows."""

    mm: Mm

    def of(self, workload: Workload) -> Library:
        return self

    def product(self, x: Tensor, y: Tensor) -> Call:
        mm = self.mm
        return lambda: mm(x, y)

    def step(self, operands: Operands) -> Call:
        mm, grad = self.mm, operands.grad
        a, b = (operand.detach().requires_grad_() for operand in operands[:2])

        def whole() -> tuple[Tensor, ...]:
            c = mm(a, b)
            return c, *torch.autograd.grad(c, (a, b), grad)

        return whole

    def tensor(self, result: Any) -> Tensor:
        return result.detach()


@dataclass(frozen=True)
class Own(OfTorch):
    """torch or this package: in every layout, batch, precision and mode."""

    name: str

    def of(self, workload: Workload) -> Library:
        return OfTorch(mm_of(self.name, workload))


def mm_of(name: str, workload: Workload) -> Mm:
    """The function of torch or of this package that a workload calls.

    >>> mm_of(TORCH, Workload("forward", "f32", "NN", 1, 1, 1, batch=2)) is torch.bmm
    True
    """
    if workload.mode == OPERATOR:
        ops.native_status()  # which registers them
        return {TORCH: torch.ops.aten.mm.default, OURS: torch.ops.matmul_grad.mm.default}[name]
    if workload.batch > 1:
        batched: dict[str, Mm] = {TORCH: torch.bmm, OURS: api.bmm}
        return batched[name]
    if workload.precision != "ieee" and name == OURS:
        from . import gpu_calls

        return gpu_calls.mm(workload.precision)
    return IMPLEMENTATIONS[name]


class Bare:
    """A package without gradients: its step is the three products, each by itself."""

    def of(self, workload: Workload) -> Library:
        return self

    def product(self, x: Tensor, y: Tensor) -> Call:
        raise NotImplementedError

    def step(self, operands: Operands) -> Call:
        forward, dgrad, wgrad = (self.product(*operands.of(product)) for product in testing.PRODUCTS)
        return lambda: (forward(), dgrad(), wgrad())

    def tensor(self, result: Any) -> Tensor:
        return torch.from_numpy(result)


class Numpy(Bare):
    """OpenBLAS, in the wheels of NumPy."""

    def product(self, x: Tensor, y: Tensor) -> Call:
        left, right = x.numpy(), y.numpy()
        return lambda: left @ right


class Blis(Bare):
    """BLIS, as the package `blis` brings it. Its gemm takes matrices by rows, and which of them to turn."""

    def __init__(self) -> None:
        self._gemm = importlib.import_module("blis.py").gemm

    def product(self, x: Tensor, y: Tensor) -> Call:
        gemm, transposed = self._gemm, [not operand.is_contiguous() for operand in (x, y)]
        if any(transposed) and x.dtype == torch.float64:
            raise Skipped("blis takes the sizes of transposed float64 matrices as if they were not transposed")
        left, right = ((o.mT if turn else o).numpy() for o, turn in zip((x, y), transposed, strict=True))
        return lambda: gemm(left, right, trans1=transposed[0], trans2=transposed[1])


class Jax(Bare):
    """XLA's compiled products. Its arrays lie by rows: a transposed operand is contracted along its other axis."""

    def __init__(self) -> None:
        self._jax = importlib.import_module("jax")
        self._jax.config.update("jax_enable_x64", True)
        self._compiled: dict[Any, Any] = {}

    def product(self, x: Tensor, y: Tensor) -> Call:
        left, along_left = (x, 1) if x.is_contiguous() else (x.mT, 0)
        right, along_right = (y, 0) if y.is_contiguous() else (y.mT, 1)
        contract = (((along_left,), (along_right,)), ((), ()))
        return self._call(contract, lambda a, b: self._jax.lax.dot_general(a, b, contract), left, right)

    def step(self, operands: Operands) -> Call:
        def whole(a: Any, b: Any, grad: Any) -> Any:
            c, backward = self._jax.vjp(self._jax.numpy.dot, a, b)
            return c, *backward(grad)

        return self._call("step", whole, *operands)

    def _call(self, key: Any, function: Callable[..., Any], *operands: Tensor) -> Call:
        if key not in self._compiled:
            self._compiled[key] = self._jax.jit(function)
        compiled = self._compiled[key]
        arrays = [self._jax.dlpack.from_dlpack(operand) for operand in operands]
        wait = self._jax.block_until_ready
        return lambda: wait(compiled(*arrays))

    def tensor(self, result: Any) -> Tensor:
        return torch.from_dlpack(result)


@dataclass(frozen=True)
class Backend:
    """A package, and what of a run it takes part in."""

    name: str
    package: str  # whose version is stamped
    module: str
    library: Callable[[], Library]
    devices: tuple[str, ...] = ("cpu",)
    dtypes: tuple[str, ...] = tuple(testing.DTYPES)
    process: str = TORCH_PROCESS
    products: tuple[str, ...] = (*testing.PRODUCTS, STEP)
    most_threads: int = 1 << 20
    takes_all: bool = False
    tunes: bool = False  # itself to each shape, which takes its time
    compiles: bool = False  # each shape at its first call, and takes memory for it that no other call takes
    sizes: tuple[int, ...] = field(default=(), compare=False)  # cubes of these alone
    leaves_out: Callable[[Workload], bool] = field(default=lambda workload: False, compare=False)

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module.partition(".")[0]) is not None

    def takes(self, workload: Workload) -> bool:
        """Others than torch read every layout only as gradients do, and have no batches: ratios are of torch."""
        plain = (workload.layout, workload.precision, workload.batch, workload.mode) == ("NN", "ieee", 1, "")
        return (
            workload.device in self.devices
            and workload.dtype in self.dtypes
            and workload.product in self.products
            and workload.threads <= self.most_threads
            and (self.takes_all or plain)
            and (not self.sizes or (workload.m == workload.n == workload.k and workload.m in self.sizes))
            and not self.leaves_out(workload)
        )


def own(name: str) -> Own:
    return Own(IMPLEMENTATIONS[name], name)


def cast(a: Tensor, b: Tensor) -> Tensor:
    """What a user writes where torch.mm is slow in 16 bits."""
    return (a.float() @ b.float()).to(a.dtype)


def compiled(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b)


HALF, SINGLE = ("bf16", "f16"), ("f32", "f64")
BOTH = ("cpu", "cuda")
ALL = (
    Backend(
        TORCH, TORCH, TORCH, functools.partial(own, TORCH), BOTH, takes_all=True,
        leaves_out=lambda workload: workload.takes_torch_long,
    ),
    Backend(OURS, OURS, OURS, functools.partial(own, OURS), BOTH, takes_all=True),
    Backend(CAST, TORCH, TORCH, lambda: OfTorch(cast), dtypes=HALF, takes_all=True),
    Backend("numpy", "numpy", "numpy", Numpy, dtypes=SINGLE, process="numpy"),
    # The wheels of blis are built without threads.
    Backend("blis", "blis", "blis", Blis, dtypes=SINGLE, process="blis", most_threads=1),
    Backend("jax", "jax", "jax", Jax, process="jax", compiles=True),
    Backend(
        "flag_gems", "flag_gems", "flag_gems",
        lambda: OfTorch(importlib.import_module("flag_gems.ops").mm), ("cuda",), products=testing.PRODUCTS,
    ),
    # The persistent kernel of Triton's tutorials, as this package ships it.
    Backend(
        "triton tutorial", "batch_invariant_ops", "batch_invariant_ops",
        lambda: OfTorch(importlib.import_module("batch_invariant_ops").matmul_persistent), ("cuda",), HALF,
        products=testing.PRODUCTS,
    ),
    Backend(
        "quack", "quack-kernels", "quack",
        lambda: OfTorch(importlib.import_module("quack.gemm_interface").gemm), ("cuda",), HALF,
        products=testing.PRODUCTS,
    ),
    Backend(
        "torch.compile", "torch", "torch",
        lambda: OfTorch(torch.compile(compiled, mode="max-autotune-no-cudagraphs", dynamic=False)), ("cuda",), HALF,
        products=("forward",), sizes=CUBES_COMPILED, tunes=True,
    ),
)  # fmt: skip
BY_NAME = {backend.name: backend for backend in ALL}
NAMES = tuple(BY_NAME)


def chosen(names: Sequence[str], device: str) -> list[Backend]:
    """Of these names those that run on ``device`` and are installed, this package among them.

    >>> [backend.name for backend in chosen(["torch", "no such"], "cpu")]
    ['torch', 'matmul_grad']
    """
    return [
        backend
        for backend in ALL
        if (backend.name in names or backend.name == OURS) and device in backend.devices and backend.installed
    ]


def call_of(library: Library, workload: Workload, each: Operands) -> Call:
    """The call that is timed."""
    mine = library.of(workload)
    return mine.step(each) if workload.product == STEP else mine.product(*each.of(workload.product))


def products_of(library: Library, workload: Workload, result: Any) -> dict[str, Tensor]:
    """The products that a call gave, by name."""
    if workload.product != STEP:
        return {workload.product: library.tensor(result)}
    return {product: library.tensor(each) for product, each in zip(testing.PRODUCTS, result, strict=True)}
