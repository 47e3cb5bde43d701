"""The native CUDA kernel of ``matmul_grad::mm``: calls after the first reach the driver without Python.

A product's first call goes through Python, which chooses, compiles and launches (kernels/gpu). What it launched is then
written down as a record, and a compiled entry (kernels/native/cuda_entries.py) makes it again for every later call of
the same shapes, strides, dtype and alignment. Each record proves itself once: its first result must have the bits of
Python's.

Off unless MATMUL_GRAD_NATIVE_CUDA=1: no GPU has run it yet. float32 stays with Python, which reads torch's precision
setting at each call. Hooks in Triton's own launcher do not see native launches; profilers of the driver do.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import ops
from .kernels.cpu.fork_safety import fork_safe_lock
from .kernels.native import launch_table as table
from .kernels.native.state import DTYPE_CODES

VARIABLE = "MATMUL_GRAD_NATIVE_CUDA"
DRIVER = {"device": "cuCtxGetDevice", "encode": "cuTensorMapEncodeTiled", "launch": "cuLaunchKernel"}
PLACES = {"a": table.A, "b": table.B, "c": table.C, "work": table.W}

_lock = fork_safe_lock()
_status: str | None = None
_launched: list[Sequence] = []  # what records were made of: a kernel that nothing holds may be unloaded


def status() -> str:
    """Register the compiled entry if that was not tried yet; "" when it is there, else why not."""
    global _status
    if _status is None:
        with _lock:
            if _status is None:
                _status = _register()
    return _status


def _register() -> str:
    if os.environ.get(VARIABLE) != "1":
        return f"{VARIABLE} is not 1"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "there is no NVIDIA GPU"
    from .kernels.native import register

    try:
        register.register_cuda(driver())
    except (register.Unavailable, OSError, AttributeError) as reason:
        return str(reason)
    return ""


@functools.cache
def driver() -> Mapping[str, int]:
    """Addresses of what the entry calls, by the names that it is linked with."""
    library = ctypes.CDLL("libcuda.so.1")
    found = {name: ctypes.cast(getattr(library, function), ctypes.c_void_p).value for name, function in DRIVER.items()}
    return {f"matmul_grad_cuda_{name}": address or 0 for name, address in found.items()}


def mm_in_python(self: Tensor, mat2: Tensor) -> Tensor:
    """What the entry calls where it has no record; it has one from then on, if there can be one."""
    result = _mm(self, mat2)
    if self.is_cuda and self.dtype != torch.float32 and ops.accelerated(self, mat2) and ops.has_work(self, mat2):
        offer(self, mat2, result)
    return result


def offer(a: Tensor, b: Tensor, result: Tensor) -> None:
    """Write down what has made ``result``, and prove it; not while a graph is captured: nothing can be compared."""
    from .kernels.gpu import launch

    key = key_of(a, b)
    found = launch.launch_of(a, b)
    if found is None or True in found.padded or table.find(key) or torch.cuda.is_current_stream_capturing():
        return
    records = [runner.record() for runner in found.runners]
    words = None if None in records else encoded(key, records, found.workspace, found.workspace_dtype)
    if words is not None and table.put(words):
        _launched.append(found.runners)
        prove(key, a, b, result)


def prove(key: Sequence[int], a: Tensor, b: Tensor, result: Tensor) -> None:
    """Follow a new record once; where it does not give the bits that Python's launches gave, never again."""
    again = torch.ops.matmul_grad.mm.default(a.detach(), b.detach())
    if not torch.equal(again.view(torch.uint8), result.view(torch.uint8)):
        table.refuse(key)


def key_of(a: Tensor, b: Tensor) -> list[int]:
    """As ``cuda_entries.put_key`` has it."""
    settings = _code(a.dtype), a.get_device() & 0xFFFFFFFF, table.words[table.MODE]
    aligned = (tensor.data_ptr() % table.ALIGNMENT for tensor in (a, b))
    return [*settings, a.shape[0], b.shape[1], a.shape[1], *a.stride(), *b.stride(), *aligned]


def _code(dtype: torch.dtype) -> int:
    return DTYPE_CODES[str(dtype).removeprefix("torch.")]


def encoded(key: Sequence[int], records: Sequence, work: int, work_dtype: torch.dtype) -> list[int] | None:
    """The words of a record, as launch_table.py lays them out; None where its parameters are more than fit."""
    words = [*key, work, _code(work_dtype), len(records)]
    for record in records:
        parameters = [_parameter(x) for x in record.parameters]
        descriptors = sum(x[table.KIND] == table.DESCRIPTOR for x in parameters)
        if len(parameters) > table.MOST_PARAMETERS or descriptors > table.DESCRIPTORS:
            return None
        words += [record.function, record.programs, record.threads, record.shared, len(parameters)]
        words += [word for parameter in parameters for word in parameter]
    return words


def _parameter(parameter: object) -> list[int]:
    from .kernels.gpu.launch_record import Constant, Descriptor, Pointer

    words = [0] * table.PARAMETER
    if isinstance(parameter, Constant):
        words[table.KIND], words[table.VALUE] = table.CONSTANT, parameter.value
    elif isinstance(parameter, Pointer):
        words[table.KIND], words[table.VALUE] = table.POINTER, PLACES[parameter.name]
    elif isinstance(parameter, Descriptor):
        words[: table.DIMENSIONS] = (
            table.DESCRIPTOR, PLACES[parameter.name], parameter.element, len(parameter.sizes), parameter.swizzle,
        )  # fmt: skip
        words[table.DIMENSIONS : table.DIMENSIONS + len(parameter.sizes)] = parameter.sizes
        words[table.STRIDES : table.STRIDES + len(parameter.strides)] = parameter.strides
        words[table.BOX : table.STEPS] = _halves(parameter.box)
        words[table.STEPS : table.PARAMETER] = _halves([1] * len(parameter.box))
    return words


def _halves(values: Sequence[int]) -> list[int]:
    """Up to six 32-bit numbers, two to a word, the first one below."""
    padded = [*values, *[0] * (6 - len(values))]
    return [low | high << 32 for low, high in zip(padded[::2], padded[1::2], strict=True)]


_mm = ops.make_kernel("mm")
ops.by_compiled_code("_mm_cuda_in_python", ops.SCHEMAS["mm"], mm_in_python, "CompositeExplicitAutograd")
