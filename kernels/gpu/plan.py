"""From a problem and its tile to plans: which kernels, on what grid, with which arguments. Pure, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .arguments import (
    DescriptorArg,
    Matrix,
    MatvecStrides,
    Operands,
    PointerArg,
    ScalarArg,
    ScalePtrs,
    Strides,
    Vector,
)
from .backward import backward_tma
from .config import (
    PADDING,
    Problem,
    Target,
    TileConfig,
    cdiv,
    dtype_name,
    kernel_name,
    kind,
    resident_blocks,
    work_items,
    workspace_bytes,
)
from .epilogue import SCALARS, Epilogue, columns_at_a_time
from .gemm import gemm
from .reduce import reduce
from .tma import gemm_tma
from .vector import matvec

REDUCE_BLOCK = 1024
# Of a thread and of a multiprocessor, by the hardware.
MAX_REGISTERS, REGISTERS = 255, 1 << 16


@dataclass(frozen=True)
class Plan:
    """One kernel launch: the kernel, its number of programs, its arguments, constants by name, compiler options."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


def plans(
    problem: Problem,
    config: TileConfig,
    target: Target,
    strides: tuple[Strides, Strides, Strides],
    *,
    store_tma: bool = False,
    upcast: bool = False,
    epilogue: Epilogue | None = None,
) -> list[Plan]:
    """The plans of C = A . B on the tensors "a", "b", "c", and "work" where k is split.

    strides: of a, b, c. store_tma: TMA can write c. upcast: for Triton's interpreter. epilogue: applied by the kernel
    that stores c, with the tensor "source" and `Epilogue.scalars` of each call.
    """
    make = {"pointers": _gemm, "tma": _gemm_tma, "vector": _matvec}[config.path]
    if config.split_k == 1:
        return [make(problem, config, target, strides, "c", store_tma, upcast, epilogue)]
    work = Strides(problem.n, 1, problem.m * problem.n)
    first = make(problem, config, target, (*strides[:2], work), "work", False, upcast, None)
    return [first, _reduce(problem, config, strides[2], epilogue)]


def scalar_args(epilogue: Epilogue | None) -> tuple[ScalarArg | None, ...]:
    """The last arguments of a kernel that stores a result: `SCALARS`, None for those that it does not use."""
    alpha, beta = epilogue is not None, epilogue is not None and epilogue.source is not None
    used = (alpha, alpha, beta, beta)
    return tuple(ScalarArg(name) if use else None for name, use in zip(SCALARS, used, strict=True))


def matrix_arg(name: str, strides: Strides) -> Matrix:
    return Matrix(PointerArg(name), *strides)


def source_arg(epilogue: Epilogue | None, repeats: bool = True) -> Matrix:
    """The source of an epilogue. repeats: a stride of 0 is None, for a kernel that loads one row or column for all."""
    if epilogue is None or epilogue.source is None:
        return Matrix()
    source = matrix_arg("source", epilogue.source)
    return source._replace(row=source.row or None, col=source.col or None) if repeats else source


def with_suffix(name: str, epilogue: Epilogue | None) -> str:
    """The name of a kernel with an epilogue."""
    if epilogue is None:
        return name
    return f"{name}_addmm_{epilogue.activation}" if epilogue.activation else f"{name}_addmm"


def activation_of(epilogue: Epilogue | None) -> str | None:
    """The activation as a kernel takes it."""
    return None if epilogue is None else epilogue.activation or None


def pre_arg(epilogue: Epilogue | None) -> PointerArg | None:
    """The address of what gets the argument of the activation."""
    return PointerArg("pre") if epilogue is not None and epilogue.pre else None


def work_elements(problem: Problem, config: TileConfig) -> int:
    """Elements of the workspace, float64 for float64 and else float32."""
    return workspace_bytes(problem, config) // (8 if problem.dtype == "float64" else 4)


def is_wide(extents: list[tuple[int, int]]) -> bool:
    """Whether an offset inside a block can exceed 32 bits: by its (size, stride) along each dimension."""
    return sum(size * stride for size, stride in extents) >= 2**31


def options(config: TileConfig) -> dict[str, Any]:
    """The compiler's options. Fused multiply-add is named because its default differs between versions.

    The limit of registers is what one block can have: left to itself, ptxas spills a few to fit one more of them on a
    multiprocessor. More than all threads of a block can have together would not launch.
    """
    most = min(MAX_REGISTERS, REGISTERS // (32 * config.warps) // 8 * 8)
    named = {"num_warps": config.warps, "num_stages": config.stages}
    return {**named, "enable_fp_fusion": True, "maxnreg": most}


def blocks(config: TileConfig) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }


def scale_ptrs(problem: Problem) -> ScalePtrs:
    return ScalePtrs(PointerArg("scale_a"), PointerArg("scale_b")) if kind(problem) == "fp8" else ScalePtrs()


def _gemm(
    problem: Problem,
    config: TileConfig,
    target: Target,
    strides: tuple[Strides, ...],
    result: str,
    store_tma: bool,
    upcast: bool,
    epilogue: Epilogue | None,
) -> Plan:
    (a, b, c), (m, n, k) = strides, (problem.m, problem.n, problem.k)
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    wide = any(
        is_wide(extents)
        for extents in ([(bm, a.row), (bk, a.col)], [(bk, b.row), (bn, b.col)], [(bm, c.row), (bn, c.col)])
    )
    return Plan(
        gemm,
        work_items(problem, config),
        (
            Operands(PointerArg("a"), PointerArg("b"), PointerArg(result)), scale_ptrs(problem), m, n, k,
            Operands(*strides), pre_arg(epilogue), source_arg(epilogue), *scalar_args(epilogue),
        ),
        {
            **blocks(config),
            "SPLIT_K": config.split_k,
            "PRECISION": problem.precision,
            "WIDE": wide,
            "UPCAST": upcast,
            "ACTIVATION": activation_of(epilogue),
            "NAME": with_suffix(kernel_name(problem, config), epilogue),
        },
        options(config),
    )  # fmt: skip


def descriptor_arg(name: str, shape: tuple[int, ...], strides: Strides, block: tuple[int, int]) -> DescriptorArg:
    """A TMA descriptor of a matrix, or of a batch, with the adjacent dimension last.

    shape: rows, columns and the size of the batch. block: in the matrix's own order. What pads the adjacent dimension
    of a copy is part of it; other matrices have no such rest.
    """
    (rows, cols, batch), leading = shape, strides.row
    if strides.col != 1:
        rows, cols, leading, block = cols, rows, strides.col, (block[1], block[0])
    cols = cdiv(cols, PADDING) * PADDING
    if batch == 1:
        return DescriptorArg(name, (rows, cols), (leading, 1), block)
    return DescriptorArg(name, (batch, rows, cols), (strides.batch, leading, 1), (1, *block))


def _gemm_tma(
    problem: Problem,
    config: TileConfig,
    target: Target,
    strides: tuple[Strides, ...],
    result: str,
    store_tma: bool,
    upcast: bool,
    epilogue: Epilogue | None,
) -> Plan:
    (a, b, c), (m, n, k), batch = strides, (problem.m, problem.n, problem.k), problem.batch
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    stored, pre = None, pre_arg(epilogue)
    if store_tma:
        width = columns_at_a_time(bm, bn) if activation_of(epilogue) else bn // config.subtiles
        stored = descriptor_arg(result, (m, n, batch), c, (bm, width))
    kept = stored._replace(name=pre.name) if stored and pre else pre
    return Plan(
        gemm_tma,
        programs(work_items(problem, config), problem, config, target),
        (
            descriptor_arg("a", (m, k, batch), a, (bm, bk)), descriptor_arg("b", (k, n, batch), b, (bk, bn)), stored,
            Matrix() if store_tma else matrix_arg(result, c), kept, scale_ptrs(problem), m, n, k,
            batch if batch > 1 else None, source_arg(epilogue), *scalar_args(epilogue),
        ),
        {
            **blocks(config),
            "SPLIT_K": config.split_k,
            "TRANSPOSED": (a.col != 1, b.col != 1),
            "STORE": (config.subtiles, activation_of(epilogue)),
            "FLATTEN": is_flattened(problem, config, target, epilogue),
            "UPCAST": upcast,
            "NAME": with_suffix(kernel_name(problem, config), epilogue),
        },
        options(config),
    )  # fmt: skip


def programs(items: int, problem: Problem, config: TileConfig, target: Target) -> int:
    """One program a multiprocessor, or one a tile where several fit on one: one multiplies while another stores."""
    return items if resident_blocks(config, problem, target) > 1 else min(items, target.sms)


def is_flattened(problem: Problem, config: TileConfig, target: Target, epilogue: Epilogue | None) -> bool:
    """Whether the loops over tiles and over k become one.

    Not where a program has one tile, nor where k is split, since the steps then differ from tile to tile. Nor where
    what the epilogue uses takes more shared memory in the loop: a matrix to add, or on sm_100 alpha alone and the
    scales of 8-bit operands. 8-bit operands elsewhere are left out with them, and activations.
    """
    source = source_arg(epilogue)
    fits = epilogue is None or (target.arch < 100 and None in (source.row, source.col) and not epilogue.activation)
    whole = config.split_k == 1 and kind(problem) == "half"
    return whole and fits and resident_blocks(config, problem, target) == 1


def _matvec(
    problem: Problem,
    config: TileConfig,
    target: Target,
    strides: tuple[Strides, ...],
    result: str,
    store_tma: bool,
    upcast: bool,
    epilogue: Epilogue | None,
) -> Plan:
    a, b, c = strides
    added = None if epilogue is None else epilogue.source
    rows, matrix, vector = problem.m, "a", "b"
    along = MatvecStrides(a.row, a.col, b.row, c.row, c.batch)
    if problem.n != 1:
        rows, matrix, vector = problem.n, "b", "a"
        along = MatvecStrides(b.col, b.row, a.col, c.col, c.batch)
    source = Vector()
    if added is not None:
        source = Vector(PointerArg("source"), added.row if problem.n == 1 else added.col)
    bm, bk = config.block_m, config.block_k
    wide = is_wide([(bm, along.row), (bk, along.col)]) or is_wide([(bk, along.x)])
    return Plan(
        matvec,
        work_items(problem, config),
        (
            Operands(PointerArg(matrix), PointerArg(vector), PointerArg(result)), rows, problem.k, along,
            pre_arg(epilogue), source, *scalar_args(epilogue),
        ),
        {
            "BLOCK_M": bm,
            "BLOCK_K": bk,
            "SPLIT_K": config.split_k,
            "STAGES": config.stages,
            "WIDE": wide,
            "ACTIVATION": activation_of(epilogue),
            "NAME": with_suffix(kernel_name(problem, config), epilogue),
        },
        options(config),
    )  # fmt: skip


def _reduce(problem: Problem, config: TileConfig, c: Strides, epilogue: Epilogue | None) -> Plan:
    size = problem.m * problem.n
    name = with_suffix(f"reduce_{dtype_name(problem)}_k{config.split_k}", epilogue)
    source = source_arg(epilogue, repeats=False)
    return Plan(
        reduce,
        cdiv(size, REDUCE_BLOCK) * problem.batch,
        (PointerArg("work"), PointerArg("c"), size, problem.n, c, pre_arg(epilogue), source, *scalar_args(epilogue)),
        {"SPLIT_K": config.split_k, "BLOCK": REDUCE_BLOCK, "ACTIVATION": activation_of(epilogue), "NAME": name},
        {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True},
    )


def backward_plan(
    problem: Problem,
    config: TileConfig,
    target: Target,
    strides: tuple[Strides, Strides, Strides],
    *,
    store_tma: tuple[bool, bool] = (True, True),
) -> Plan:
    """The plan of a backward pass in one launch: "grad", "a", "b" to "da" and "db".

    problem: of the forward product. strides: of a, b, grad; the results are contiguous. store_tma: of da and db.
    """
    (a, b, grad), (m, n, k) = strides, (problem.m, problem.n, problem.k)
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    items = cdiv(k, bm) * cdiv(n, bn) + cdiv(m, bm) * cdiv(k, bn)
    da, db = Strides(k, 1), Strides(n, 1)
    stored = (bm, bn // config.subtiles)
    return Plan(
        backward_tma,
        programs(items, problem, config, target),
        (
            descriptor_arg("a", (m, k, 1), a, (bk, bm)), descriptor_arg("b", (k, n, 1), b, (bn, bk)),
            descriptor_arg("grad", (m, n, 1), grad, (bm, bk)), descriptor_arg("grad", (m, n, 1), grad, (bk, bn)),
            descriptor_arg("da", (m, k, 1), da, stored) if store_tma[0] else None,
            descriptor_arg("db", (k, n, 1), db, stored) if store_tma[1] else None,
            Matrix() if store_tma[0] else matrix_arg("da", da), Matrix() if store_tma[1] else matrix_arg("db", db),
            m, n, k,
        ),
        {
            **blocks(config),
            "A_TRANSPOSED": a.col != 1,
            "B_TRANSPOSED": b.col != 1,
            "GRAD_TRANSPOSED": grad.col != 1,
            "SUBTILES": config.subtiles,
            "NAME": kernel_name(problem, config).replace("gemm_tma", "backward"),
        },
        options(config),
    )  # fmt: skip
