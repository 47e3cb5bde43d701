"""From tensors to launches: the operators of the GPU, and the only place that launches a grid."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import settings
from .choose import choose, choose_backward, choose_padded, padded_problem
from .config import Problem, Target, TileConfig, is_valid, layout
from .epilogue import Epilogue
from .operands import (
    INTERPRETED,
    NAMES,
    NAMES_OF_8_BITS,
    checked_shape,
    describe,
    fits_tma,
    is_aligned,
    padded,
    strides_of,
    strides_of_source,
)
from .plan import backward_plan, plans, work_elements
from .run import CannotBuild as CannotBuild
from .run import Runner, build_failures

INTERPRETER = Target(arch=80, sms=2, shared_bytes=227 << 10)
MAX_LAUNCHES = 4096  # kept at once; with more shapes than that, launches are made again


class Launch(NamedTuple):
    """The kernels of a product of given shapes, strides, dtypes and alignments, the shape of C and the workspace.

    padded: whether the kernels read a padded copy of A, and of B.
    """

    runners: tuple[Runner, ...]
    shape: tuple[int, ...]
    workspace: int = 0
    workspace_dtype: torch.dtype = torch.float32
    padded: tuple[bool, bool] = (False, False)


_launches: dict[tuple, Launch] = {}


def mm(
    a: Tensor,
    b: Tensor,
    precision: str | None = None,
    *,
    config: TileConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """C = A . B on the GPU, without a gradient of its own.

    Shapes: a (m, k), b (k, n), result (m, n), or a batch of each; any size may be 0. k = 0 gives zeros.
    Strides: any of a and b, and of out if given. Of large products in 16 bits an operand that TMA cannot read is copied
    where the model predicts that this is faster (`choose_padded`); else nothing is. The result is contiguous.
    Dtypes: a, b and result alike: float16, bfloat16, float32, float64; out may be float32 where a and b have 16 bits.
    precision: "ieee", "tf32" or "tf32x3" for float32, by default torch's setting at this call; the others ignore it.
    Aliasing: out must overlap neither a nor b, nor itself.
    Rounding: once, at the store, from a sum in float32 (float64 for float64).
    Edges: masked in the kernel or by TMA.
    Determinism: the same operands give the same bits on the same GPU model; see `choose`. Where
    `matmul_grad.deterministic(batch_invariant=True)` holds, a row of C has the same bits for any m.
    Memory: where k is split, at most 32 MiB of partial results, and the copies, from torch's allocator.
    Source: kernels/gpu/. config fixes the tile, for tests and for `tune`. Under TRITON_INTERPRET=1, CPU tensors run
    through Triton's interpreter. Raises ValueError for operands that it cannot multiply.
    """
    precision = precision_of(a, precision)
    key = _key(a, b, precision, config)
    if out is not None:
        key += _layout_key(out)
    launch = _launches.get(key)
    if launch is None:
        launch = _remember(key, make_launch(a, b, out, precision, config))
    result = a.new_empty(launch.shape) if out is None else out
    return _run_launch(launch, a, b, result) if launch.runners else result.zero_()


bmm = mm


def addmm(
    a: Tensor,
    b: Tensor,
    epilogue: Epilogue,
    out: Tensor | None = None,
    precision: str | None = None,
    *,
    config: TileConfig | None = None,
) -> Tensor:
    """C = f(alpha * (A . B) + beta * source), computed where A . B is stored: no more launches than for A . B.

    Shapes, strides, dtypes, aliasing, edges, determinism, memory: as `mm`. The source expands to C, of its dtype and of
    any strides; it may be out itself, else out does not overlap it.
    Rounding: alpha and beta to the type of the sums S of A . B, then alpha * S, one multiply-add of beta and source,
    f of it, and the result. Where beta is 0 the source is not read; where there is nothing to multiply, A . B is 0,
    and an activation is refused. epilogue.pre has the shape, strides and dtype of the result, and overlaps nothing.
    """
    source, pre = epilogue.added, epilogue.pre
    if epilogue.alpha == 1 and source is None and not epilogue.activation:
        return mm(a, b, precision, config=config, out=out)
    precision = precision_of(a, precision)
    key = ("addmm", *_key(a, b, precision, config), out is not None, epilogue.activation, pre is not None)
    for tensor in (out, source, pre):
        if tensor is not None:
            key += _layout_key(tensor)
    launch = _launches.get(key)
    if launch is None:
        launch = _remember(key, make_launch(a, b, out, precision, config, epilogue))
    result = a.new_empty(launch.shape) if out is None else out
    if launch.runners:
        if pre is not None and (pre.shape, pre.stride(), pre.dtype) != (result.shape, result.stride(), result.dtype):
            raise ValueError("what gets the argument of the activation must have the layout of the result")
        return _run_launch(launch, a, b, result, source=source, pre=pre, **epilogue.scalars())
    if epilogue.activation:
        raise ValueError("there is nothing to multiply, and so nothing to activate")
    return result.zero_() if source is None else result.copy_(source.expand(launch.shape)).mul_(epilogue.beta)


def precision_of(a: Tensor, precision: str | None) -> str:
    """The precision asked for, or torch's setting; other dtypes than float32 have no choice."""
    if a.dtype != torch.float32:
        return "ieee"
    return precision_now() if precision is None else precision


def _run_launch(launch: Launch, a: Tensor, b: Tensor, result: Tensor, **more: Any) -> Tensor:
    a, b = (padded(x) if copied else x for x, copied in zip((a, b), launch.padded, strict=True))
    return run_kernels(launch, {"a": a, "b": b, **more}, result)


def run_kernels(launch: Launch, tensors: dict[str, Any], result: Tensor) -> Tensor:
    """Run the kernels of a launch on tensors by name, "c" and "work" excepted, into the result."""
    tensors["c"] = result
    if launch.workspace:
        tensors["work"] = result.new_empty(launch.workspace, dtype=launch.workspace_dtype)
    if INTERPRETED and result.dtype == torch.bfloat16:
        # The interpreter truncates on the way to bfloat16, where a GPU rounds to nearest even.
        rounded = {name: tensors[name] for name in ("c", "pre", "value") if tensors.get(name) is not None}
        for name, x in rounded.items():
            tensors[name] = torch.empty_strided(x.shape, x.stride(), dtype=torch.float32)
        _run(launch.runners, tensors, result)
        for name, x in rounded.items():
            x.copy_(tensors[name])
        return result
    _run(launch.runners, tensors, result)
    return result


def _layout_key(x: Tensor) -> tuple:
    return x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % 16


def _key(a: Tensor, b: Tensor, precision: str, config: TileConfig | None) -> tuple:
    return (
        a.shape, a.stride(), b.shape, b.stride(), a.dtype, b.dtype, a.get_device(), b.get_device(),
        a.data_ptr() % 16, b.data_ptr() % 16, precision, settings.invariant, config,
    )  # fmt: skip


def launch_of(a: Tensor, b: Tensor) -> Launch | None:
    """The launch that ``mm`` keeps for two operands that are not float32, after the first such call."""
    return _launches.get(_key(a, b, "ieee", None))


def clear_cache() -> None:
    """Drop all launches, as when the tiles or settings that they were made from have changed."""
    _launches.clear()


def cached_launch(key: tuple, make: Callable[[], Launch]) -> Launch:
    """The launch that is kept for a key, made at the first call."""
    launch = _launches.get(key)
    return _remember(key, make()) if launch is None else launch


def _remember(key: tuple, launch: Launch) -> Launch:
    if len(_launches) >= MAX_LAUNCHES:
        _launches.clear()
    _launches[key] = launch
    return launch


def _run(runners: tuple[Runner, ...], tensors: dict[str, Any], on: Tensor) -> None:
    # autograd runs backward in threads of its own, whose current device need not be the tensors'.
    if on.is_cuda and torch.cuda.current_device() != on.device.index:
        with torch.cuda.device(on.device):
            for runner in runners:
                runner(tensors)
    else:
        for runner in runners:
            runner(tensors)


def make_launch(
    a: Tensor,
    b: Tensor,
    out: Tensor | None,
    precision: str,
    config: TileConfig | None,
    epilogue: Epilogue | None = None,
) -> Launch:
    """Check the operands, choose a tile and make the plans. ValueError for what cannot be multiplied."""
    shape = checked_shape(a, b, out)
    dtype = a.dtype if out is None else out.dtype
    if epilogue is not None:
        source = epilogue.added
        strides = None if source is None else strides_of_source(source, dtype, a.device, shape)
        epilogue = epilogue._replace(source=strides, pre=epilogue.pre is not None)
    if 0 in shape or a.shape[-1] == 0:
        return Launch((), shape)
    result = torch.empty(shape, dtype=dtype, device="meta") if out is None else out
    return _make_runners(describe(a, b, result, precision), (a, b, result), config, epilogue)


def _make_runners(
    problem: Problem,
    operands: tuple[Tensor, Tensor, Tensor],
    config: TileConfig | None,
    epilogue: Epilogue | None = None,
) -> Launch:
    """The launch of a problem on these operands and a result, in the tile that is named, else in the one chosen."""
    (a, b, c), target, copied = operands, target_of(operands[0]), (False, False)
    if config is None:
        unread = not fits_tma(a), not fits_tma(b)
        config = choose_padded(problem, target, unread) if c.stride(-1) == 1 else None
        if config is None:
            config = choose(problem, target)
        else:
            problem, copied = padded_problem(problem), unread
    elif not is_valid(config, problem, target):
        raise ValueError(f"{config} is not valid for {problem} on {target}")
    a, b = (padded(_as_meta(x)) if copy else x for x, copy in zip((a, b), copied, strict=True))
    strides = strides_of(a), strides_of(b), strides_of(c)
    upcast = INTERPRETED and (a.dtype == torch.bfloat16 or a.dtype in NAMES_OF_8_BITS)
    made = plans(problem, config, target, strides, store_tma=fits_tma(c), upcast=upcast, epilogue=epilogue)
    work = torch.float64 if a.dtype == torch.float64 else torch.float32
    return Launch(tuple(map(Runner, made)), tuple(c.shape), work_elements(problem, config), work, copied)


def _as_meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def mm_backward(
    grad: Tensor, a: Tensor, b: Tensor, output_mask: tuple[bool, bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """dA = dC . Bt and dB = At . dC: in one launch where TMA can read all three, else in one each.

    Shapes: grad (m, n), a (m, k), b (k, n). All else as `mm`; the results are contiguous.
    """
    if output_mask[0] and output_mask[1]:
        both = backward_in_one(grad, a, b)
        if both is not None:
            return both
    return (
        mm(grad, b.mT) if output_mask[0] else None,
        mm(a.mT, grad) if output_mask[1] else None,
    )


def backward_in_one(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both gradients from one launch, or None where two launches are faster or the only way."""
    key = (
        "backward", grad.shape, grad.stride(), a.shape, a.stride(), b.shape, b.stride(), grad.dtype, a.dtype, b.dtype,
        grad.get_device(), a.get_device(), b.get_device(), grad.data_ptr() % 16, a.data_ptr() % 16, b.data_ptr() % 16,
        settings.invariant,
    )  # fmt: skip
    launch = _launches.get(key)
    if launch is None:
        launch = _remember(key, make_backward_launch(grad, a, b))
    if not launch.runners:
        return None
    da, db = a.new_empty(a.shape), b.new_empty(b.shape)
    _run(launch.runners, {"grad": grad, "a": a, "b": b, "da": da, "db": db}, a)
    return da, db


def make_backward_launch(grad: Tensor, a: Tensor, b: Tensor) -> Launch:
    """The launch of both gradients, without a runner where there is none."""
    none = Launch((), ())
    checked_shape(a, b, grad)
    if a.dim() != 2 or 0 in (*a.shape, *b.shape) or (INTERPRETED and a.dtype == torch.bfloat16):
        return none
    results = [torch.empty(x.shape, dtype=a.dtype, device="meta") for x in (a, b)]
    problem, target = describe(a, b, grad, "ieee"), target_of(a)
    config = choose_backward(problem, layout(*grad.stride()), target) if fits_tma(grad) else None
    if config is None:
        return none
    strides = strides_of(a), strides_of(b), strides_of(grad)
    stored = fits_tma(results[0]), fits_tma(results[1])
    plan = backward_plan(problem, config, target, strides, store_tma=stored)
    return Launch((Runner(plan),), ())


def scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, result: torch.dtype, *, config: TileConfig | None = None
) -> Tensor:
    """C = scale_a * scale_b * (A . B) of 8-bit floats, without a gradient.

    Shapes: a (m, k), b (k, n), every size > 0; the scales have one element each.
    Strides: the columns of a and the rows of b are adjacent, in whole 16 bytes: `supports_scaled`.
    Dtypes: a and b float8_e4m3fn or float8_e5m2, each its own; scales float32; result float16, bfloat16 or float32.
    Rounding: products are exact, sums float32 (on sm_90 after every 128 products), one rounding at the store.
    """
    key = ("scaled_mm", result, *_key(a, b, "ieee", config))
    launch = _launches.get(key)
    if launch is None:
        c = torch.empty(a.shape[0], b.shape[1], dtype=result, device="meta")
        launch = _remember(key, _make_runners(describe(a, b, c, "ieee"), (a, b, c), config))
    return _run_launch(launch, a, b, a.new_empty(launch.shape, dtype=result), scale_a=scale_a, scale_b=scale_b)


def supports_scaled(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, result: torch.dtype) -> bool:
    """Whether `scaled_mm` supports these: 8-bit matrices along k, scales of one element, a GPU from sm_89 on."""
    matrices = a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] and 0 not in (*a.shape, *b.shape)
    narrow = a.dtype in NAMES_OF_8_BITS and b.dtype in NAMES_OF_8_BITS and result in NAMES and result.itemsize <= 4
    scales = all(scale.numel() == 1 and scale.dtype == torch.float32 for scale in (scale_a, scale_b))
    one_device = a.device == b.device == scale_a.device == scale_b.device and (a.is_cuda or INTERPRETED)
    if build_failures or not (matrices and narrow and scales and one_device):
        return False
    along_k = a.stride(1) == b.stride(0) == 1 and is_aligned(a) and is_aligned(b)
    return along_k and target_of(a).arch >= 89 and (INTERPRETED or torch.version.hip is None)


def precision_now() -> str:
    """How torch.mm would multiply float32 on a GPU at this moment: "tf32" or "ieee".

    Reads the setting that cuBLAS follows, however it was made: `torch.backends.cuda.matmul.fp32_precision`,
    `allow_tf32`, `torch.set_float32_matmul_precision` or TORCH_ALLOW_TF32_CUBLAS_OVERRIDE. The other getters
    raise once old and new ways of setting have been mixed. Where it is "ieee" and
    `matmul_grad.float32_products("tf32x3")` holds, the matrix units multiply it in three parts.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else settings.float32


@cache
def _gpu(index: int) -> Target:
    properties: Any = torch.cuda.get_device_properties(index)
    arch = properties.major * 10 + properties.minor
    return Target(arch, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def target_of(x: Tensor) -> Target:
    """The GPU that the tensor is on; under the interpreter, INTERPRETER."""
    return INTERPRETER if INTERPRETED else _gpu(x.device.index)


def supports(x: Tensor) -> bool:
    """Whether mm supports this tensor: its dtype, on an NVIDIA GPU from sm_80 on (or under the interpreter)."""
    if x.dtype not in NAMES or build_failures:
        return False
    if INTERPRETED:
        return x.is_cpu or x.is_cuda
    return x.is_cuda and torch.version.hip is None and target_of(x).arch >= 80
