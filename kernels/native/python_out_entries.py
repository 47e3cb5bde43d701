"""The compiled code of the functions of ``python_functions.py`` that write to ``out``. Beside ``python_entries.py``."""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from ..cpu.gemm_args import ALPHA, BETA
from ..cpu.memory import INT64, get, jit
from .call import IN_PLACE, RUN, set_tensors, tensor_words
from .call_out import linked_compute_out
from .python_entries import (
    KINDS,
    LONG,
    PYTHON_SIGNATURE,
    args_words,
    increment,
    is_followed,
    make_entry,
    multiplications,
    restore_thread,
    save_thread,
    set_scale,
    table,
    tensor_of,
)
from .python_functions import NOTHING, OUT, PLAIN_KEYS, VIEW_KEY, WITH_OUT, entry_name
from .state import KEYS_AT
from .torch_c_api import has_driver, key_included, out_param, read_dtype, state

CALL_SIGNATURE = INT64(*[INT64] * 4)
linked_call = types.ExternalFunction("matmul_grad_python_call_out", CALL_SIGNATURE)


@jit
def target_of(operand):
    """``tensor_of`` what is to be written: one made in inference mode, in that mode alone."""
    tensor = tensor_of(operand)
    if tensor == 0 or key_included(get(table(), VIEW_KEY)) == 0:
        return tensor
    return tensor if get(get(tensor, 0), get(state(), KEYS_AT)) == get(table(), PLAIN_KEYS) else 0


@jit
def is_written(kind, a, b, source, out, args):
    """Whether the product is in ``out``, which has its sizes."""
    # Loading kernels may raise, so the way through the dispatcher does that.
    if a == 0 or b == 0 or out == 0 or not has_driver(read_dtype(a)) or is_followed():
        return False
    tensors, returned = tensor_words(), out_param()
    set_tensors(tensors, a, b, source, out)
    if multiplications(a, b) < LONG:
        return linked_compute_out(tensors, args, kind, IN_PLACE, 1, returned) == RUN
    thread = save_thread()
    outcome = linked_compute_out(tensors, args, kind, IN_PLACE, 1, returned)
    restore_thread(thread)
    return outcome == RUN


def call(objects, count, kind, has_addend):
    """``f(a, b, out)``, ``f(input, a, b, beta, alpha, out)``: ``out``, or None if it is not written."""
    args, source, result = args_words(), 0, get(table(), NOTHING)
    known = count == 3 + 3 * has_addend
    if known and has_addend != 0:
        source = tensor_of(get(objects, 0))
        known = set_scale(args, BETA, get(objects, 3)) and set_scale(args, ALPHA, get(objects, 4)) and source != 0
    if known:
        a, b = tensor_of(get(objects, has_addend)), tensor_of(get(objects, has_addend + 1))
        if is_written(kind, a, b, source, target_of(get(objects, count - 1)), args):
            result = get(objects, count - 1)
    increment(result)
    return result


KERNELS: dict[str, tuple[Callable, object]] = {
    "matmul_grad_python_call_out": (call, CALL_SIGNATURE),
    **{entry_name(name + OUT): (make_entry(*KINDS[name], linked_call), PYTHON_SIGNATURE) for name in WITH_OUT},
}
