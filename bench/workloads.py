"""What the bench compares: a workload is one product, of one dtype, layout and shape, on so many threads."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import testing
from ..kernels.cpu import host
from . import shapes as lists
from .shapes import SETS, Shape

TORCH, OURS = "torch", "matmul_grad"
CAST = "torch in float32"  # 16-bit operands are cast to float32, multiplied by torch, and the result cast back
STEP = "step"  # forward and both gradients through autograd
PASSES = (*testing.PRODUCTS, STEP)
LAYOUTS = ("NN", "NT", "TN")
SUITES = ("quick", *(name for name in SETS if name != "deepseek"), "all")
OPERATOR, INVARIANT = "operator", "invariant"  # modes: the registered operators themselves; the batch-invariant mode
# Operations a second of the slower of two backends on one thread of Zen 4: to weigh what is left to do.
PACE = {"f32": 60e9, "f64": 30e9, "bf16": 100e9, "f16": 100e9}
WIDENED_PACE = 6e9  # of torch in bf16 with AVX-512 that does not multiply it (Zen 4)
SCALAR_PACE = 2e9  # of torch in 16 bits by a loop: AVX2 1.3e9 to 3e9, f16 on Zen 5 2e9 at 512³ and 0.3e9 at 2048³
# On a GPU, by name: a dtype, and the precision of its products.
NUMBERS = {
    "bf16": ("bf16", "ieee"), "f16": ("f16", "ieee"), "f32": ("f32", "ieee"), "tf32": ("f32", "tf32"),
    "tf32x3": ("f32", "tf32x3"), "f64": ("f64", "ieee"),
}  # fmt: skip
CALL = 8  # the size whose time is all overhead


@dataclass(frozen=True)
class Workload:
    """One comparison.

    layout: how A and B lie in memory; the gradient of C lies by rows. precision: of this package's float32 on a GPU,
    "ieee", "tf32" or "tf32x3"; that of others is "ieee". batch: of as many products at once. mode: "" is the public
    functions.
    """

    product: str
    dtype: str
    layout: str
    m: int
    n: int
    k: int
    threads: int = 1
    device: str = "cpu"
    precision: str = "ieee"
    batch: int = 1
    mode: str = ""

    @property
    def name(self) -> str:
        precision = self.precision if self.precision != "ieee" else ""
        size = f"{self.batch}x" * (self.batch > 1) + f"{self.m}x{self.n}x{self.k}"
        where = f"{self.threads}t" if self.device == "cpu" else self.device
        return "-".join(filter(None, (self.product, self.dtype, precision, self.layout, size, where, self.mode)))

    @property
    def shape(self) -> Shape:
        return self.m, self.n, self.k

    @property
    def torch_dtype(self) -> torch.dtype:
        return testing.DTYPES[self.dtype]

    @property
    def flops(self) -> int:
        return self.batch * flops(*self.shape, self.product)

    @property
    def takes_torch_long(self) -> bool:
        """Whether torch's 16-bit loop, on a CPU that does not multiply 16 bits, would take a second or more."""
        slow = self.device == "cpu" and pace(self.dtype, host.host_features()) == SCALAR_PACE
        return slow and self.flops >= SCALAR_PACE

    @property
    def summed(self) -> int:
        """How many products an element of the result is the sum of: the fewest, in a step."""
        m, n, k = self.shape
        return {"forward": k, "dgrad": n, "wgrad": m}.get(self.product, min(m, n))

    @property
    def held(self) -> int:
        """Bytes of A, B and the gradient."""
        m, n, k = self.shape
        return self.batch * (m * k + k * n + m * n) * self.torch_dtype.itemsize

    @property
    def given(self) -> int:
        """Bytes of the results."""
        m, n, k = self.shape
        sizes = {"forward": m * n, "dgrad": m * k, "wgrad": k * n}
        return self.batch * sizes.get(self.product, sum(sizes.values())) * self.torch_dtype.itemsize

    @property
    def moved(self) -> int:
        """Bytes that have to be read or written: each factor and each result once, for each of the products."""
        return self.held * (3 if self.product == STEP else 1)

    def weight(self, seconds: float, rounds: int = 6, backends: int = 3) -> float:
        """About how many seconds the comparison takes where ``seconds`` are asked for."""
        if self.device != "cpu":
            return seconds + 1.0
        slowest = PACE["f32"] if self.takes_torch_long else pace(self.dtype, host.host_features())
        return seconds + 0.3 + rounds * backends * self.flops / slowest / self.threads


def pace(dtype: str, features: Mapping[str, bool]) -> float:
    """PACE on a CPU that has these ``features``, by LLVM's names, or what torch reaches in 16 bits without them.

    >>> pace("bf16", {"avx512f": True, "avx512bf16": True}), pace("bf16", {"avx2": True})
    (100000000000.0, 2000000000.0)
    >>> pace("f16", {"avx512f": True, "avx512bf16": True})
    2000000000.0
    """
    multiplied = {"bf16": "avx512bf16", "f16": "avx512fp16"}.get(dtype)
    if multiplied is None or features.get(multiplied):
        return PACE[dtype]
    return WIDENED_PACE if dtype == "bf16" and features.get("avx512f") else SCALAR_PACE


def flops(m: int, n: int, k: int, product: str) -> int:
    """Floating-point operations: a multiplication and an addition for each of m·n·k, thrice for a step.

    >>> flops(2, 3, 4, "wgrad"), flops(2, 3, 4, STEP)
    (48, 144)
    """
    return 2 * m * n * k * (3 if product == STEP else 1)


def of_row(row: dict[str, Any]) -> Workload:
    """The workload that a row was measured of.

    >>> of_row({"product": "dgrad", "dtype": "f32", "layout": "NN", "m": 1, "n": 2, "k": 3, "rounds": 5}).name
    'dgrad-f32-NN-1x2x3-1t'
    """
    return Workload(**{name: row[name] for name in Workload.__dataclass_fields__ if name in row})


def shapes(suite: str, device: str) -> tuple[Shape, ...]:
    """The shapes of a suite.

    >>> shapes("small", "cpu")[:3]
    ((1, 1, 1), (2, 2, 2), (4, 4, 4))
    """
    quick = lists.QUICK if device == "cpu" else lists.QUICK_GPU
    if suite == "quick":
        return quick
    sets = SETS.values() if suite == "all" else [SETS[suite]]
    return tuple(dict.fromkeys([*(quick if suite == "all" else ()), *itertools.chain(*sets)]))


def plan(
    suite: str, device: str, dtypes: Sequence[str], passes: Sequence[str], threads: Sequence[int], max_gflop: float
) -> tuple[list[Workload], int]:
    """The workloads of a run in the order of measuring, and how many were left out as larger than ``max_gflop``.

    A shape is met in every layout forward. Its gradients and the step read operands that lie by rows, and turn
    them by their strides.

    >>> planned, larger = plan("cubes", "cpu", ["f32"], ["forward"], [1], max_gflop=1)
    >>> [workload.name for workload in planned][:4], larger
    (['forward-f32-NN-64x64x64-1t', 'forward-f32-NT-64x64x64-1t', 'forward-f32-TN-64x64x64-1t', \
'forward-f32-NN-128x128x128-1t'], 9)
    """
    every = [
        Workload(product, dtype, layout, *shape, threads=count, device=device)
        for count, shape, dtype, product in itertools.product(threads, shapes(suite, device), dtypes, passes)
        for layout in (LAYOUTS if product == "forward" else LAYOUTS[:1])
    ]
    kept = [workload for workload in every if workload.flops <= max_gflop * 1e9]
    return kept, len(every) - len(kept)


CPU_PARTS = ("products", "thin", "small", "step", "openblas", "overhead")
UNSHARED = ("small", "overhead")  # products that one thread computes, however many there are
CPU_DTYPES = ("f32", "f64", "bf16", "f16")


def cpu_targets(
    parts: Collection[str], dtypes: Collection[str], threads: Sequence[int], quick: bool = False
) -> list[Workload]:
    """What the targets of the CPU are made of, by parts: see `cpu_part`."""
    chosen = [
        replace(workload, threads=count)
        for count in threads
        for part in CPU_PARTS
        if part in parts and (count == 1 or part not in UNSHARED)
        for workload in cpu_part(part, quick)
        if workload.dtype in dtypes
    ]
    return list(dict.fromkeys(chosen))


def cpu_part(part: str, quick: bool = False) -> list[Workload]:
    """Products of cubes and layers; of one row, one column and short k; small calls and steps; training steps; cubes
    beside OpenBLAS; the cost of a call of the operator."""
    if part in ("products", "thin"):
        shapes = {
            "products": lists.CPU_QUICK if quick else lists.CPU_TARGETS,
            "thin": lists.CPU_THIN[1::4] if quick else lists.CPU_THIN,
        }
        return [
            Workload("forward", dtype, layout, *shape)
            for shape, dtype, layout in itertools.product(shapes[part], CPU_DTYPES, LAYOUTS)
            if not quick or dtype != "f16" or flops(*shape, "forward") < 1e9
        ]
    if part == "overhead":
        return [Workload("forward", "f32", "NN", CALL, CALL, CALL, mode=OPERATOR)]
    if part == "openblas":
        cubes = lists.CPU_CUBES[:2] if quick else lists.CUBES[:6]
        return [Workload("forward", dtype, "NN", *cube) for cube in cubes for dtype in ("f32", "f64")]
    if part == "step":
        return [Workload(STEP, "f32", "NN", *cube) for cube in lists.CPU_CUBES[: 1 if quick else None]]
    cubes = lists.CPU_SMALL[: 1 if quick else None]
    calls = itertools.product(cubes, ("f32", "f64"), LAYOUTS)
    return [
        *(Workload("forward", dtype, layout, *cube) for cube, dtype, layout in calls),
        *(Workload(STEP, "f32", "NN", *cube) for cube in cubes),
    ]


def gpu_targets() -> list[Workload]:
    """What the targets of a GPU are made of, in order: when the time is up, what is left out is what matters least.

    First bfloat16 on the shapes that matter most, then some of every other kind, then the rest.
    """
    rest = [shape for shape in lists.GPU_EVERY if shape not in lists.GPU_CORE]
    ordered = [
        *gpu_products(lists.GPU_CORE, "bf16"),
        *gpu_float32(lists.GPU_FLOAT32[:4]),
        *(on_gpu(STEP, "bf16", shape, mode=INVARIANT) for shape in lists.GPU_INVARIANT),
        *(on_gpu(p, "bf16", shape, batch=b) for (b, shape), p in itertools.product(lists.BATCHED, testing.PRODUCTS)),
        *gpu_products(lists.GPU_CORE, "f16"),
        *gpu_float32(lists.GPU_FLOAT32[4:]),
        *gpu_products(rest, "bf16"),
        *gpu_products(rest, "f16"),
    ]
    return list(dict.fromkeys(ordered))


def on_gpu(product: str, dtype: str, shape: Shape, precision: str = "ieee", batch: int = 1, mode: str = "") -> Workload:
    return Workload(product, dtype, "NN", *shape, device="cuda", precision=precision, batch=batch, mode=mode)


def gpu_products(shapes: Sequence[Shape], dtype: str) -> Iterator[Workload]:
    return (on_gpu(product, dtype, shape) for shape, product in itertools.product(shapes, PASSES))


def gpu_float32(shapes: Sequence[Shape]) -> Iterator[Workload]:
    """A step follows torch's setting, which has no name for 3×TF32 and would be torch's TF32 too."""
    for shape, precision in itertools.product(shapes, ("ieee", "tf32", "tf32x3")):
        for product in PASSES if precision == "ieee" else testing.PRODUCTS:
            yield on_gpu(product, "f32", shape, precision)


def gpu_rivals() -> list[Workload]:
    """The products on which every other package is timed too, which would take too long on all."""
    return [on_gpu("forward", "bf16", shape) for shape in lists.GPU_RIVALS]


def gpu_memory() -> list[Workload]:
    """The steps whose memory is measured."""
    return [on_gpu(STEP, dtype, shape) for dtype, shape in lists.GPU_MEMORY]
