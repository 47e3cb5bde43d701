"""The compiled code of ``python_functions.py``.

Signature, CPython's of METH_FASTCALL: ``PyObject *entry(self, objects, count)``. An object that is a tensor holds the
word that a handle of the stable C ABI points at, so the address of that word serves as one. No C++ exception and no
Python one leaves an entry: what torch would raise is left to the way through the dispatcher. A process in which CPython
has no memory for the object of a result ends.
"""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from ..cpu.gemm_args import ALPHA, BETA, GEMM_ARGS
from ..cpu.memory import INT64, bits_of, get, jit, put, stack_words, symbol
from .broadcast import linked_matmul
from .call import HANDLE, RUN, linked_compute, set_tensors, tensor_words
from .op_table import BATCHES, DOT, LINEAR, MATMUL, MATRICES, MATVEC
from .python_functions import (
    AUTOCAST_KEY,
    FLOAT,
    INFERENCE_KEYS,
    INT,
    MODE_KEYS,
    NOTHING,
    PARAMETER,
    PLAIN_KEYS,
    TENSOR,
    TENSOR_AT,
    entry_name,
)
from .state import KEYS_AT
from .torch_c_api import (
    delete_tensor,
    get_dim,
    get_sizes,
    has_driver,
    key_included,
    needs_gradient,
    out_param,
    read_dtype,
    state,
)

PYTHON_SIGNATURE = INT64(INT64, INT64, INT64)
CALL_SIGNATURE = INT64(*[INT64] * 4)
LONG = 2**18  # multiplications from which on other Python threads may run meanwhile: 64³, 6 µs on Zen 3
EXACT = 2.0**53  # integers below are float64, and none beyond is rounded to one below

increment = types.ExternalFunction("matmul_grad_Py_IncRef", types.void(INT64))
save_thread = types.ExternalFunction("matmul_grad_PyEval_SaveThread", INT64())
restore_thread = types.ExternalFunction("matmul_grad_PyEval_RestoreThread", types.void(INT64))
as_double = types.ExternalFunction("matmul_grad_PyFloat_AsDouble", types.float64(INT64))
error_occurred = types.ExternalFunction("matmul_grad_PyErr_Occurred", INT64())
clear_error = types.ExternalFunction("matmul_grad_PyErr_Clear", types.void())
wrap = types.ExternalFunction("matmul_grad_wrap", INT64(INT64))
function_mode_enabled = types.ExternalFunction("matmul_grad_function_mode_enabled", types.uint8())
has_callbacks = types.ExternalFunction("matmul_grad_has_callbacks", types.uint8())
key_excluded = types.ExternalFunction("matmul_grad_key_excluded", types.uint8(types.uint16))
get_numel = types.ExternalFunction("matmul_grad_numel", types.int32(INT64, INT64))
linked_call = types.ExternalFunction("matmul_grad_python_call", CALL_SIGNATURE)

table = symbol("matmul_grad_python")
args_words = stack_words(GEMM_ARGS)


@jit
def tensor_of(operand):
    """The handle of a tensor in a Python object; 0 for any that is not ordinary: no subclass, no graph, no tangent."""
    kind = get(operand, 1)
    if kind != get(table(), TENSOR) and kind != get(table(), PARAMETER):
        return 0
    tensor = operand + get(table(), TENSOR_AT)
    impl = get(tensor, 0)
    if impl == 0:
        return 0
    keys = get(impl, get(state(), KEYS_AT))
    if keys != get(table(), PLAIN_KEYS) and keys != get(table(), INFERENCE_KEYS):
        return 0
    return 0 if needs_gradient(tensor) else tensor


@jit
def is_followed():
    """Whether a mode, a transform, a tracer, a profiler or autocast is to see the call."""
    if function_mode_enabled() | has_callbacks() != 0 or key_excluded(get(table(), AUTOCAST_KEY)) == 0:
        return True
    index = MODE_KEYS
    while get(table(), index) != 0:
        if key_included(get(table(), index)) != 0:
            return True
        index += 1
    return False


@jit
def multiplications(a, b):
    """At least as many as the product has, unless it broadcasts."""
    at = out_param()
    put(at, 0, 0)
    put(at, 1, 0)
    get_numel(a, at)
    get_numel(b, at + 8)
    numbers = float(get(at, 0)) * get(at, 1)  # of expanded operands more than an int64 holds
    get_dim(a, at)
    rank = get(at, 0)
    if rank == 0:
        return 0.0
    get_sizes(a, at)
    return numbers / max(get(get(at, 0), rank - 1), 1)


@jit
def set_scale(args, which, number):
    """Write the bits of a Python number as float64; False for one of another type, or that float64 cannot hold."""
    kind = get(number, 1)
    if kind != get(table(), FLOAT) and kind != get(table(), INT):
        return False
    value = as_double(number)
    if value == -1.0 and error_occurred() != 0:
        clear_error()
        return False
    put(args, which, bits_of(value))
    return kind == get(table(), FLOAT) or abs(value) < EXACT


@jit
def compute(kind, a, b, source, args, returned):
    """The outcome."""
    if kind > BATCHES:
        return linked_matmul(a, b, source, kind - MATMUL, returned)
    tensors = tensor_words()
    set_tensors(tensors, a, b, source, 0)
    return linked_compute(tensors, args, kind, 1, returned)


@jit
def product(kind, a, b, source, args):
    """The result as a new Python object; 0 where these kernels do not compute it."""
    # Loading kernels may raise, so the way through the dispatcher does that.
    if a == 0 or b == 0 or not has_driver(read_dtype(a)) or is_followed():
        return 0
    returned = out_param()
    if multiplications(a, b) < LONG:
        outcome = compute(kind, a, b, source, args, returned)
    else:
        thread = save_thread()
        outcome = compute(kind, a, b, source, args, returned)
        restore_thread(thread)
    if outcome != RUN:
        return 0
    handle = get(returned, HANDLE)
    result = wrap(handle)
    delete_tensor(handle)
    return result


def call(objects, count, kind, has_addend):
    """``f(a, b)``, ``f(input, a, b, beta, alpha)``; of LINEAR ``f(a, weight, bias or None)``. None if not computed."""
    args, source, result, known = args_words(), 0, 0, True
    if kind == LINEAR:
        known = count == 3
        if known and get(objects, 2) != get(table(), NOTHING):
            source = tensor_of(get(objects, 2))
            known = source != 0
    elif has_addend != 0:
        known = count == 5 and set_scale(args, BETA, get(objects, 3)) and set_scale(args, ALPHA, get(objects, 4))
        if known:
            source = tensor_of(get(objects, 0))
            known = source != 0
    else:
        known = count == 2
    if known:
        first = objects + 8 * has_addend
        result = product(kind, tensor_of(get(first, 0)), tensor_of(get(first, 1)), source, args)
    if result == 0:
        result = get(table(), NOTHING)
        increment(result)
    return result


def make_entry(kind: int, has_addend: int, linked: types.ExternalFunction = linked_call) -> Callable:
    """A function of CPython for a kind of product; ``linked`` is the compiled code that all of them share."""

    def entry(module, objects, count):
        return linked(objects, count, kind, has_addend)

    return entry


KINDS = {
    "mm": (MATRICES, 0),
    "bmm": (BATCHES, 0),
    "addmm": (MATRICES, 1),
    "baddbmm": (BATCHES, 1),
    "mv": (MATVEC, 0),
    "addmv": (MATVEC, 1),
    "dot": (DOT, 0),
    "matmul": (MATMUL, 0),
    "linear": (LINEAR, 0),
}
KERNELS: dict[str, tuple[Callable, object]] = {
    "matmul_grad_python_call": (call, CALL_SIGNATURE),
    **{entry_name(name): (make_entry(*kind), PYTHON_SIGNATURE) for name, kind in KINDS.items()},
}
