"""The driver called from Python: for tests, for ``out=``, and where torch's C ABI is not available."""

from __future__ import annotations

import ctypes
import struct

import torch

from ..cpu import driver
from ..cpu.config import BlockConfig
from ..cpu.derivative_args import ACTIVATION as ACTIVATION_OF
from ..cpu.derivative_args import DERIVATIVE_ARGS, GRAD, KEPT, OUT, OUT_RS, OUT_VALUE, VALUE, M, N
from ..cpu.gemm_args import (
    A_BS,
    ACCUMULATE,
    ACTIVATION,
    ACTIVATIONS,
    ALPHA,
    B_BS,
    BATCH,
    BETA,
    C_BS,
    GATE,
    GEMM_ARGS,
    PRE,
    S_BS,
    S_CS,
    S_RS,
    SOURCE,
    WIDE,
    Epilogue,
)
from .torch_layout import address, const_data_ptr, has_thread_pool

CALL = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 3)
PLAIN = Epilogue()
# A driver that is loaded before it has torch's threads computes on one.
driver.parallel_for.value = address("torch_parallel_for")


def supports(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for a dtype; it is loaded, or compiled, at the first call."""
    return driver.address(str(dtype).removeprefix("torch.")) != 0


def multiply(
    block: BlockConfig,
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    threads: int = 1,
    epilogue: Epilogue = PLAIN,
    accumulate: bool = False,
) -> torch.Tensor:
    """out = activation(alpha · (a · b) + beta · source), or as ``Epilogue`` has it, by the driver for ``block``.

    Dense (m, k) and (k, n) of ``block.dtype``, or a batch of each, and any strides, k > 0 in a batch or where something
    is added; out (m, n) with its elements apart, of that dtype, or float32 where it has 16 bits. A source has the dtype
    of out, and expands to it; where beta is 0 it is not read. With ``accumulate`` source is out, both scales are 1, and
    the chains of k may be added to it one after the other.
    """
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    call = CALL(driver.activations_address(block) if epilogue.activation else driver.gemm_address(block))
    operands = (x for tensor in (a, b, out) for x in (_address(tensor, tensor is out), *tensor.stride()[-2:]))
    args = (ctypes.c_int64 * GEMM_ARGS)(m, n, k, *operands)
    args[BATCH], args[ALPHA], args[BETA] = 1, _bits(epilogue.alpha), _bits(epilogue.beta)
    if a.dim() == 3:
        args[BATCH], args[A_BS], args[B_BS], args[C_BS] = a.shape[0], a.stride(0), b.stride(0), out.stride(0)
    if epilogue.source is not None and epilogue.beta != 0:
        expanded = epilogue.source.expand(out.shape)
        args[SOURCE], (args[S_RS], args[S_CS]) = _address(epilogue.source), expanded.stride()[-2:]
        args[S_BS] = expanded.stride(0)
    args[WIDE], args[ACCUMULATE] = int(out.dtype != a.dtype), int(accumulate)
    args[ACTIVATION] = ACTIVATIONS.index(epilogue.activation)
    args[PRE] = 0 if epilogue.pre is None else _address(epilogue.pre, is_written=True)
    args[GATE] = 0 if epilogue.gate is None else _address(epilogue.gate)
    if call(ctypes.addressof(args), 1, threads):
        raise MemoryError("matmul_grad: the packing buffers cannot be allocated")
    return out


def _address(tensor: torch.Tensor, is_written: bool = False) -> int:
    """Of the first element; a copy-on-write storage is copied only where it is written."""
    return tensor.data_ptr() if is_written else const_data_ptr(tensor)


def _bits(number: float) -> int:
    return int.from_bytes(struct.pack("<d", number), "little", signed=True)


def product(
    a: torch.Tensor, b: torch.Tensor, epilogue: Epilogue = PLAIN, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``multiply`` with the configuration of a dtype, into new memory; threads where torch lends its pool."""
    block, threads = _config(a), torch.get_num_threads() if has_thread_pool() else 1
    result = a.new_empty((*a.shape[:-1], b.shape[-1])) if out is None else out
    return multiply(block, a, b, result, threads, epilogue)


def accumulate(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out += a · b, as ``product`` is of ``multiply``: with the bits of one product of all that was added so far.

    That holds where the strides of out have a 1, no product has more than a chunk of steps of k, and all have whole
    chains of one length but the last.
    """
    threads = torch.get_num_threads() if has_thread_pool() else 1
    return multiply(_config(a), a, b, out, threads, Epilogue(source=out), accumulate=True)


def activation_gradient(
    block: BlockConfig, activation: str, grad: torch.Tensor, kept: torch.Tensor, threads: int = 1
) -> torch.Tensor:
    """grad · activation', from the argument of the activation, or its result for those of BY_RESULT.

    Two matrices of ``block.dtype``, of any strides; the result is contiguous.
    """
    out = grad.new_empty(grad.shape)
    _run_derivative(block, activation, (grad, kept), (out,), threads)
    return out


def gated_gradients(
    block: BlockConfig, activation: str, grad: torch.Tensor, gate: torch.Tensor, value: torch.Tensor, threads: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad · value · activation'(gate) and grad · activation(gate): of gate, and of value.

    Three matrices of ``block.dtype``, of any strides; the results are contiguous.
    """
    out = grad.new_empty(grad.shape), grad.new_empty(grad.shape)
    _run_derivative(block, activation, (grad, gate, value), out, threads)
    return out


def _run_derivative(
    block: BlockConfig,
    activation: str,
    matrices: tuple[torch.Tensor, ...],
    out: tuple[torch.Tensor, ...],
    threads: int,
) -> None:
    (m, n), args = matrices[0].shape, (ctypes.c_int64 * DERIVATIVE_ARGS)()
    args[M], args[N], args[ACTIVATION_OF] = m, n, ACTIVATIONS.index(activation)
    for at, matrix in zip((GRAD, KEPT, VALUE), matrices):
        args[at], (args[at + 1], args[at + 2]) = _address(matrix), matrix.stride()
    args[OUT_RS] = n
    for at, result in zip((OUT, OUT_VALUE), out):
        args[at] = result.data_ptr()
    CALL(driver.derivative_address(block))(ctypes.addressof(args), 1, threads)


def gradient(activation: str, grad: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """``activation_gradient`` as ``product`` is of ``multiply``."""
    threads = torch.get_num_threads() if has_thread_pool() else 1
    return activation_gradient(_config(grad), activation, grad, kept, threads)


def gradients_of_gated(
    activation: str, grad: torch.Tensor, gate: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``gated_gradients`` likewise."""
    threads = torch.get_num_threads() if has_thread_pool() else 1
    return gated_gradients(_config(grad), activation, grad, gate, value, threads)


def _config(tensor: torch.Tensor) -> BlockConfig:
    return driver.config(str(tensor.dtype).removeprefix("torch."))
