"""From a problem and its tile to launches: which kernels, on what grid, with which arguments. Pure, without torch."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

from .backward import backward_tma
from .config import Problem, Target, TileConfig, dtype_name, kernel_name, kind, workspace_bytes
from .epilogue import SCALES
from .gemm import gemm
from .reduce import reduce
from .tma import gemm_tma
from .vector import matvec

REDUCE_BLOCK = 1024
# 8-bit products that the matrix unit of sm_90 may add in 14 bits; torch's use_fast_accum=False promises no less.
IMPRECISE = 128
# Left to itself, ptxas spills a few registers to fit one more block on a multiprocessor.
MAX_REGISTERS = 255


class PointerArg(NamedTuple):
    """An argument that is the address of a tensor: which one, by its name."""

    name: str


class ScalarArg(NamedTuple):
    """An argument that is a number of each call, of 32 bits: which one, by its name."""

    name: str


class DescriptorArg(NamedTuple):
    """An argument that is a TMA descriptor of a tensor: shape and strides in memory order, and the block it brings."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


class Strides(NamedTuple):
    """How a matrix lies in memory, in elements; batch is 0 where there is one product."""

    row: int
    col: int
    batch: int = 0


class Epilogue(NamedTuple):
    """C = alpha * (A . B) + beta * source: how the source lies, with stride 0 where it repeats; None to add nothing."""

    source: Strides | None


NOWHERE = Strides(0, 0)


@dataclass(frozen=True)
class Plan:
    """One kernel: its arguments as a launch takes them, constants by name, and the compiler's options."""

    kernel: Any
    grid: tuple[int, int]
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
    """The launches of C = A . B on the operands "a", "b", "c", and "work" where k is cut.

    strides: of a, b, c. store_tma: the copy engine can write c. upcast: for Triton's interpreter. sum: what the kernel
    that stores c does besides, with the operand "source" and the numbers of `scales_of`.
    """
    make = {"pointers": _gemm, "tma": _gemm_tma, "vector": _matvec}[config.path]
    if config.split_k == 1:
        return [make(problem, config, target, strides, "c", store_tma, upcast, epilogue)]
    work = Strides(problem.n, 1, problem.m * problem.n)
    first = make(problem, config, target, (*strides[:2], work), "work", False, upcast, None)
    return [first, _reduce(problem, config, strides[2], epilogue)]


def scales_of(alpha: float, beta: float) -> dict[str, int]:
    """alpha and beta as the kernels take them: by the halves of their bits.

    >>> scales_of(1, -2.5)
    {'alpha_low': 0, 'alpha_high': 1072693248, 'beta_low': 0, 'beta_high': -1073479680}
    """
    return dict(zip(SCALES, struct.unpack("=4i", struct.pack("=2d", alpha, beta)), strict=True))


def source_of(epilogue: Epilogue | None) -> tuple[PointerArg | None, Strides]:
    """What is added, and how it lies."""
    return (None, NOWHERE) if epilogue is None or epilogue.source is None else (PointerArg("source"), epilogue.source)


def scaling(epilogue: Epilogue | None) -> tuple[ScalarArg | None, ...]:
    """The last arguments of a kernel that stores a result."""
    alpha, beta = epilogue is not None, epilogue is not None and epilogue.source is not None
    used = (alpha, alpha, beta, beta)
    return tuple(ScalarArg(name) if use else None for name, use in zip(SCALES, used, strict=True))


def added(epilogue: Epilogue | None) -> tuple[Any, ...]:
    """The arguments from the source on; a stride that is None says that nothing changes along it."""
    source, lies = source_of(epilogue)
    if source is None:
        return (None, None, None, None, *scaling(epilogue))
    return (source, lies.row or None, lies.col or None, lies.batch, *scaling(epilogue))


def named(name: str, epilogue: Epilogue | None) -> str:
    return name if epilogue is None else f"{name}_addmm"


def work_elements(problem: Problem, config: TileConfig) -> int:
    """Sums, float64 for float64 and else float32, that the launches need beside the operands."""
    return workspace_bytes(problem, config) // (8 if problem.dtype == "float64" else 4)


def cdiv(size: int, block: int) -> int:
    return -(-size // block)


def is_wide(extents: list[tuple[int, int]]) -> bool:
    """Whether an offset inside a block can leave 32 bits: by its (size, stride) along each dimension."""
    return sum(size * stride for size, stride in extents) >= 2**31


def options(config: TileConfig) -> dict[str, Any]:
    """The compiler's options. Fused multiply-add is named because its default differs between versions."""
    named = {"num_warps": config.warps, "num_stages": config.stages}
    return {**named, "enable_fp_fusion": True, "maxnreg": MAX_REGISTERS}


def blocks(config: TileConfig) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }


def scales(problem: Problem) -> tuple[PointerArg | None, PointerArg | None]:
    """The two scales of 8-bit operands."""
    return (PointerArg("scale_a"), PointerArg("scale_b")) if kind(problem) == "fp8" else (None, None)


def of_8_bits(problem: Problem) -> dict[str, Any]:
    """The constants that 8-bit operands alone set."""
    narrow = kind(problem) == "fp8"
    return {"SCALED": narrow, "IMPRECISE": IMPRECISE if narrow else None}


def _gemm(
    problem: Problem,
    config: TileConfig,
    target: Target,
    strides: tuple[Strides, ...],
    result: str,
    _: bool,
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
        (cdiv(m, bm) * cdiv(n, bn), config.split_k * problem.batch),
        (
            PointerArg("a"), PointerArg("b"), PointerArg(result), *scales(problem), m, n, k,
            a.row, a.col, b.row, b.col, c.row, c.col, a.batch, b.batch, c.batch, *added(epilogue),
        ),
        {
            **blocks(config),
            "SPLIT_K": config.split_k,
            "PRECISION": problem.precision,
            "WIDE": wide,
            "UPCAST": upcast,
            **of_8_bits(problem),
            "NAME": named(kernel_name(problem, config), epilogue),
        },
        options(config),
    )  # fmt: skip


def descriptor_arg(
    name: str, rows: int, cols: int, strides: Strides, block: tuple[int, int], batch: int
) -> DescriptorArg:
    """A matrix for the copy engine, its adjacent dimension last; ``block`` is in the matrix's own order."""
    shape, leading = (rows, cols), strides.row
    if strides.col != 1:
        shape, leading, block = (cols, rows), strides.col, (block[1], block[0])
    if batch == 1:
        return DescriptorArg(name, shape, (leading, 1), block)
    return DescriptorArg(name, (batch, *shape), (strides.batch, leading, 1), (1, *block))


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
    items = cdiv(m, bm) * cdiv(n, bn) * config.split_k * batch
    stored = descriptor_arg(result, m, n, c, (bm, bn // config.subtiles), batch) if store_tma else None
    return Plan(
        gemm_tma,
        (programs(items, target), 1),
        (
            descriptor_arg("a", m, k, a, (bm, bk), batch), descriptor_arg("b", k, n, b, (bk, bn), batch), stored,
            None if store_tma else PointerArg(result), *scales(problem), c.row, c.batch, m, n, k, batch,
            *added(epilogue),
        ),
        {
            **blocks(config),
            "SPLIT_K": config.split_k,
            "A_TRANSPOSED": a.col != 1,
            "B_TRANSPOSED": b.col != 1,
            "BATCHED": batch > 1,
            "STORE_TMA": store_tma,
            "SUBTILES": config.subtiles,
            "UPCAST": upcast,
            **of_8_bits(problem),
            "NAME": named(kernel_name(problem, config), epilogue),
        },
        options(config),
    )  # fmt: skip


def programs(items: int, target: Target) -> int:
    """One program a multiprocessor where each has two tiles or more, else one a tile."""
    return target.sms if items >= 2 * target.sms else items


def _matvec(
    problem: Problem,
    config: TileConfig,
    target: Target,
    strides: tuple[Strides, ...],
    result: str,
    _: bool,
    upcast: bool,
    epilogue: Epilogue | None,
) -> Plan:
    a, b, c = strides
    source, s = source_of(epilogue)
    rows, matrix, vector, a_row, a_col = problem.m, "a", "b", a.row, a.col
    x_step, y_step, s_step = b.row, c.row, s.row
    if problem.n != 1:
        rows, matrix, vector, a_row, a_col = problem.n, "b", "a", b.col, b.row
        x_step, y_step, s_step = a.col, c.col, s.col
    bm, bk = config.block_m, config.block_k
    wide = is_wide([(bm, a_row), (bk, a_col)]) or is_wide([(bk, x_step)]) or is_wide([(bm, max(y_step, s_step))])
    return Plan(
        matvec,
        (cdiv(rows, bm), config.split_k),
        (
            PointerArg(matrix), PointerArg(vector), PointerArg(result), rows, problem.k,
            a_row, a_col, x_step, y_step, c.batch, source, None if source is None else s_step, *scaling(epilogue),
        ),
        {
            "BLOCK_M": bm,
            "BLOCK_K": bk,
            "SPLIT_K": config.split_k,
            "WIDE": wide,
            "NAME": named(kernel_name(problem, config), epilogue),
        },
        options(config),
    )  # fmt: skip


def _reduce(problem: Problem, config: TileConfig, c: Strides, epilogue: Epilogue | None) -> Plan:
    size = problem.m * problem.n
    name = named(f"reduce_{dtype_name(problem)}_k{config.split_k}", epilogue)
    source, s = source_of(epilogue)
    lies = (None, None, None) if source is None else (s.row, s.col, s.batch)
    return Plan(
        reduce,
        (cdiv(size, REDUCE_BLOCK), problem.batch),
        (
            PointerArg("work"),
            PointerArg("c"),
            size,
            problem.n,
            c.row,
            c.col,
            c.batch,
            source,
            *lies,
            *scaling(epilogue),
        ),
        {"SPLIT_K": config.split_k, "BLOCK": REDUCE_BLOCK, "NAME": name},
        {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True},
    )


def backward_plan(
    problem: Problem,
    config: TileConfig,
    target: Target,
    strides: tuple[Strides, Strides, Strides],
    *,
    store_tma: tuple[bool, bool] = (True, True),
    bias: bool = False,
    upcast: bool = False,
) -> Plan:
    """The one launch of a backward pass: "grad", "a", "b" to "da", "db" and, where asked, "bias".

    problem: of the forward product. strides: of a, b, grad; the results are contiguous. store_tma: of da and db.
    """
    (a, b, grad), (m, n, k) = strides, (problem.m, problem.n, problem.k)
    bm, bn, bk = config.block_m, config.block_n, config.block_k
    items = cdiv(k, bm) * cdiv(n, bn) + cdiv(m, bm) * cdiv(k, bn)
    da, db = Strides(k, 1), Strides(n, 1)
    stored = (bm, bn // config.subtiles)
    return Plan(
        backward_tma,
        (programs(items, target), 1),
        (
            descriptor_arg("a", m, k, a, (bk, bm), 1), descriptor_arg("b", k, n, b, (bn, bk), 1),
            descriptor_arg("grad", m, n, grad, (bm, bk), 1), descriptor_arg("grad", m, n, grad, (bk, bn), 1),
            descriptor_arg("da", m, k, da, stored, 1) if store_tma[0] else None,
            descriptor_arg("db", k, n, db, stored, 1) if store_tma[1] else None,
            None if store_tma[0] else PointerArg("da"), None if store_tma[1] else PointerArg("db"),
            PointerArg("bias") if bias else None, k, n, m, n, k,
        ),
        {
            **blocks(config),
            "A_TRANSPOSED": a.col != 1,
            "B_TRANSPOSED": b.col != 1,
            "GRAD_TRANSPOSED": grad.col != 1,
            "BIAS": bias,
            "DA_TMA": store_tma[0],
            "DB_TMA": store_tma[1],
            "SUBTILES": config.subtiles,
            "UPCAST": upcast,
            "NAME": kernel_name(problem, config).replace("gemm_tma", "backward") + ("_bias" if bias else ""),
        },
        options(config),
    )  # fmt: skip
