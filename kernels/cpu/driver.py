"""The compiled GEMM of a dtype: its configuration on this CPU and the address of its driver. Knows nothing of torch."""

from __future__ import annotations

import ctypes
import functools
import os

from . import build, fork_safety, host
from .config import WORKSPACE_SLOTS, BlockConfig, choose, compiled_for
from .config_words import (
    BACKWARD,
    DERIVATIVE,
    FUNCTIONS,
    GEMM,
    MICROKERNEL,
    PACK_PATCH_ROWS,
    PACK_PATCH_STEPS,
    STORE,
    STORE_WIDE,
    config_words,
)
from .once import Once

workspace = (ctypes.c_int64 * (1 + 3 * WORKSPACE_SLOTS))()
parallel_for = ctypes.c_int64()  # the address of the thread pool's function, 0: one thread computes all
_gemms: dict[BlockConfig, Once[int]] = {}
_drivers: dict[str, Once[int]] = {}  # by instruction set
_addresses: dict[str, Once[int]] = {}
_patches: dict[BlockConfig, Once[None]] = {}  # what packs the patches of convolutions
_activations: dict[BlockConfig, Once[int]] = {}  # what stores with activations, and the gradient of those
_derivatives: dict[str, Once[int]] = {}  # its driver, by instruction set
_words: dict[BlockConfig, ctypes.Array[ctypes.c_int64]] = {}
_kept: list[object] = []  # loaded code, for the life of the process


@ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 5)
def _serial_for(begin, end, grain, function, context):
    task = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(function)
    task(begin, end, context)
    return 0


def _symbols() -> dict[str, int]:
    return {
        "matmul_grad_parallel_for": parallel_for.value or ctypes.cast(_serial_for, ctypes.c_void_p).value or 0,
        "matmul_grad_workspace": ctypes.addressof(workspace),
    }


@functools.cache
def config(dtype: str, isa: str | None = None) -> BlockConfig:
    """The configuration for a dtype on this CPU; ValueError where the CPU has no kernel for it."""
    return choose(dtype, host.cpu(isa))


@functools.cache
def supports(dtype: str) -> bool:
    """Whether this CPU has what the kernels of a dtype need: float16 needs conversions."""
    try:
        return bool(config(dtype))
    except ValueError:
        return False


def address(dtype: str) -> int:
    """Address of the driver for a dtype; 0 where this CPU has no kernel for it, or, after a
    notice, where none can be compiled.

    Raises only what interrupts the caller; the call can be repeated.
    """
    if not supports(dtype):
        return 0
    return _addresses.setdefault(dtype, Once(functools.partial(_address, dtype))).result()


def _address(dtype: str) -> int:
    try:
        return gemm_address(config(dtype))
    except Exception as error:
        build.notify(f"{dtype} falls back to torch, its CPU kernels cannot be compiled: {error}")
        return 0


def gemm_address(block: BlockConfig) -> int:
    """Address of the driver for ``block``, compiled or loaded at the first call; RuntimeError where that failed."""
    return _gemms.setdefault(block, Once(functools.partial(_load, block))).result()


def patches_address(block: BlockConfig) -> int:
    """Likewise, with what packs patches."""
    address = gemm_address(block)
    _patches.setdefault(block, Once(functools.partial(_load_patches, block))).result()
    return address


def load_all(block: BlockConfig) -> None:
    """Compile or load everything for ``block``."""
    patches_address(block)
    activations_address(block)


def activations_address(block: BlockConfig) -> int:
    """As ``gemm_address``, with what stores results with activations."""
    derivative_address(block)
    return gemm_address(block)


def derivative_address(block: BlockConfig) -> int:
    """Address of the gradient of activations."""
    gemm_address(block)
    return _activations.setdefault(block, Once(functools.partial(_load_activations, block))).result()


def _load(block: BlockConfig) -> int:
    def kernels() -> build.Kernels:
        from .dtype_kernels import make_kernels

        return make_kernels(compiled)

    compiled, words = compiled_for(block), config_words(block)
    words[GEMM] = _drivers.setdefault(block.isa, Once(functools.partial(_load_driver, block.isa))).result()
    symbols = {"matmul_grad_config": ctypes.addressof(words)}
    loaded = build.load(repr(compiled), block.name, kernels, host.machine(block.isa), symbols)
    for at, function in enumerate(FUNCTIONS, MICROKERNEL):
        words[at] = loaded.address(f"{block.name}_{function}")
    if block.accumulates_wider:
        words[STORE_WIDE] = loaded.address(f"{block.name}_store_wide")
    _kept.append(loaded)
    _words[block] = words
    return loaded.address(block.name)


def _load_patches(block: BlockConfig) -> None:
    def kernels() -> build.Kernels:
        from .patches import make_kernels

        return make_kernels(compiled)

    compiled, name = compiled_for(block), f"{block.name}_patches"
    loaded = build.load(f"patches {compiled!r}", name, kernels, host.machine(block.isa), {})
    _words[block][PACK_PATCH_STEPS] = loaded.address(f"{block.name}_patch_steps")
    _words[block][PACK_PATCH_ROWS] = loaded.address(f"{block.name}_patch_rows")
    _kept.append(loaded)


def _load_activations(block: BlockConfig) -> int:
    """The words of ``block`` get what stores with activations in the place of what does without."""

    def kernels() -> build.Kernels:
        from .dtype_kernels import make_activation_kernels

        return make_activation_kernels(compiled)

    compiled, words, name = compiled_for(block), _words[block], f"{block.name}_activations"
    words[BACKWARD] = _derivatives.setdefault(block.isa, Once(functools.partial(_load_derivative, block.isa))).result()
    symbols = {"matmul_grad_config": ctypes.addressof(words)}
    loaded = build.load(f"activations {compiled!r}", name, kernels, host.machine(block.isa), symbols)
    words[DERIVATIVE], words[STORE] = (loaded.address(f"{block.name}_{part}") for part in ("derivative", "store"))
    if block.accumulates_wider:
        words[STORE_WIDE] = loaded.address(f"{block.name}_store_wide")
    _kept.append(loaded)
    return loaded.address(f"{block.name}_backward")


def _load_driver(isa: str) -> int:
    """Address of the driver of all dtypes."""

    def kernels() -> build.Kernels:
        from .gemm import KERNELS

        return KERNELS

    loaded = build.load("gemm", "gemm", kernels, host.machine(isa), _symbols())
    _kept.append(loaded)
    return loaded.address("matmul_grad_gemm")


def _load_derivative(isa: str) -> int:
    """Likewise of the gradients of activations."""

    def kernels() -> build.Kernels:
        from .derivative import KERNELS

        return KERNELS

    loaded = build.load("derivative", "derivative", kernels, host.machine(isa), _symbols())
    _kept.append(loaded)
    return loaded.address("matmul_grad_derivative")


def _forked() -> None:
    """One thread computes all."""
    workspace[0] = 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
if fork_safety.is_child():  # torch's threads, if the parent has used them, are not in this process
    _forked()
