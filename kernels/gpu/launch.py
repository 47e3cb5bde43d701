"""From tensors to a kernel launch: the only place that launches a grid."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from .config import ALIGNMENT, Problem, Target, TileConfig, choose, is_valid, layout
from .gemm import constants, gemm, options

SUPPORTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in SUPPORTED}

# Triton decides this once, when it meets the kernel's decorator.
INTERPRETED = not isinstance(gemm, triton.JITFunction)
INTERPRETER = Target(arch=80, sms=1, shared_bytes=163 << 10)


def mm(
    a: Tensor,
    b: Tensor,
    precision: str | None = None,
    *,
    config: TileConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """C = A . B on the GPU, without a gradient of its own.

    Shapes: a (m, k), b (k, n), result (m, n); any size may be 0. k = 0 gives zeros.
    Strides: any of a and b, and of out if given; nothing is copied. The result is contiguous.
    Dtypes: a, b and result alike: float16, bfloat16, float32, float64. precision: "ieee" or "tf32" for
    float32, by default torch's own setting at this call; other dtypes have no choice and ignore it.
    Aliasing: out must overlap neither a nor b, nor itself.
    Rounding: once, at the store, from a sum in float32 (float64 for float64).
    Edges: masked in the kernel; nothing is padded.
    Determinism: the same operands give the same bits on the same GPU model; see `gemm` and `choose`.
    Source: kernels/gpu/gemm.py. config fixes the tile, for tests. Under TRITON_INTERPRET=1, CPU tensors run
    through Triton's interpreter. Raises ValueError for what it cannot multiply.
    """
    m, n, k = checked_sizes(a, b, out)
    result = a.new_empty((m, n)) if out is None else out
    if m == 0 or n == 0:
        return result
    if k == 0:
        return result.zero_()
    target = INTERPRETER if INTERPRETED else target_of(a.device.index)
    problem = describe(a, b, result, precision_now() if precision is None else precision)
    if config is None:
        config = choose(problem, target)
    elif not is_valid(config, problem, target):
        raise ValueError(f"{config} is not valid for {problem} on {target}")
    if INTERPRETED and a.dtype == torch.bfloat16:
        # The interpreter truncates on the way to bfloat16, where a GPU rounds to nearest even.
        rounded = a.new_empty((m, n), dtype=torch.float32)
        launch(a, b, rounded, problem, config)
        return result.copy_(rounded)
    launch(a, b, result, problem, config)
    return result


def launch(a: Tensor, b: Tensor, c: Tensor, problem: Problem, config: TileConfig) -> None:
    """Launch one kernel on the tensors' device, whichever device and thread the caller is on."""
    tiles = -(-problem.m // config.block_m) * -(-problem.n // config.block_n)
    upcast = INTERPRETED and a.dtype == torch.bfloat16
    strides = (*a.stride(), *b.stride(), *c.stride())
    # autograd runs backward in threads of its own, whose current device need not be the tensors'.
    device: AbstractContextManager = torch.cuda.device(a.device) if a.is_cuda else nullcontext()
    with device:
        gemm[(tiles,)](
            a, b, c, problem.m, problem.n, problem.k, *strides,
            **constants(problem, config, wide=is_wide(strides, config), upcast=upcast),
            **options(config),
        )  # fmt: skip


def checked_sizes(a: Tensor, b: Tensor, out: Tensor | None) -> tuple[int, int, int]:
    """m, n and k, or a ValueError that names what does not fit."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"cannot multiply shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dtype != b.dtype or a.dtype not in NAMES:
        pairs = ", ".join(NAMES.values())
        raise ValueError(f"cannot multiply {a.dtype} and {b.dtype}: supported are pairs of {pairs}")
    if a.device != b.device or not (a.is_cuda or INTERPRETED):
        raise ValueError(f"cannot multiply on {a.device} and {b.device}: both operands must be on one GPU")
    m, k, n = a.shape[0], a.shape[1], b.shape[1]
    if out is not None and (tuple(out.shape) != (m, n) or out.dtype != a.dtype or out.device != a.device):
        raise ValueError(f"out must be {(m, n)}, {a.dtype}, on {a.device}")
    return m, n, k


def describe(a: Tensor, b: Tensor, c: Tensor, precision: str) -> Problem:
    """What `choose` needs to know of the operands: sizes, dtype, layouts, precision, alignment."""
    return Problem(
        m=a.shape[0],
        n=b.shape[1],
        k=a.shape[1],
        dtype=NAMES[a.dtype],
        a=layout(*a.stride()),
        b=layout(*b.stride()),
        precision=precision if a.dtype == torch.float32 else "ieee",
        aligned=is_aligned(a) and is_aligned(b),
    )


def is_aligned(x: Tensor) -> bool:
    """Whether Triton can prove 16-byte loads: a stride of 1, and a size, stride and address that divide."""
    (rows, cols), (row_stride, col_stride) = x.shape, x.stride()
    if col_stride == 1:
        size, leading = cols, row_stride
    elif row_stride == 1:
        size, leading = rows, col_stride
    else:
        return False
    return size % ALIGNMENT == 0 and leading % ALIGNMENT == 0 and x.data_ptr() % 16 == 0


def is_wide(strides: tuple[int, ...], config: TileConfig) -> bool:
    """Whether an offset inside one tile of a, b or c can leave 32 bits."""
    a_row, a_col, b_row, b_col, c_row, c_col = strides
    m, n, k = config.block_m, config.block_n, config.block_k
    return max(m * a_row + k * a_col, k * b_row + n * b_col, m * c_row + n * c_col) >= 2**31


def precision_now() -> str:
    """How torch.mm would multiply float32 on a GPU at this moment: "tf32" or "ieee".

    Reads the setting that cuBLAS obeys, however it was made: `torch.backends.cuda.matmul.fp32_precision`,
    `allow_tf32`, `torch.set_float32_matmul_precision` or TORCH_ALLOW_TF32_CUBLAS_OVERRIDE. The other getters
    raise once old and new ways of setting have been mixed.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@cache
def target_of(index: int) -> Target:
    """The GPU of that index."""
    properties: Any = torch.cuda.get_device_properties(index)
    arch = properties.major * 10 + properties.minor
    return Target(arch, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def supports(x: Tensor) -> bool:
    """Whether mm takes this tensor: its dtype, on an NVIDIA GPU from sm_80 on (or under the interpreter)."""
    if x.dtype not in NAMES:
        return False
    if INTERPRETED:
        return x.is_cpu or x.is_cuda
    return x.is_cuda and torch.version.hip is None and target_of(x.device.index).arch >= 80
