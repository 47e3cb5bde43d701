"""A product that is written to a tensor which is there already: ``out=``, and in place. Beside ``call.py``.

Nothing is written, resized or copied before the outcome is known, and no address of an element is read before the last
operation that can move it.
"""

from __future__ import annotations

from numba.core import types

from ..cpu.gemm_args import BATCH, C_BS, C_CS, C_RS, SOURCE, C, M, N
from ..cpu.memory import INT64, get, jit, put
from .aliasing import are_dense, is_non_overlapping, is_result, overlap, repeats_an_element, share_storage
from .call import (
    A_TENSOR,
    B_TENSOR,
    FALLBACK,
    HANDLE,
    INFO_A,
    INFO_B,
    INFO_OUT,
    INFO_SOURCE,
    NEW,
    OUT,
    OUT_TENSOR,
    PENDING,
    RUN,
    SOURCE_TENSOR,
    UNSUPPORTED,
    begin,
    bounds_outcome,
    call_gemm,
    infos_words,
    item_size,
    locate_operands,
    multiply_into_new,
    shape_words,
    write_result_shape,
)
from .op_table import BATCHES, MATRICES, MATVEC
from .torch_c_api import (
    DATA,
    DIM,
    copy_,
    delete_tensor,
    describe,
    driver_of,
    dtype_of,
    locate_to_write,
    resize_output,
    size,
    stride,
    threads,
)

TEMPORARY = PENDING + 1  # an outcome as RUN, into new memory first

COMPUTE_SIGNATURE = INT64(*[INT64] * 6)
linked_compute_out = types.ExternalFunction("matmul_grad_compute_out", COMPUTE_SIGNATURE)


@jit
def has_result_shape(args, info, kind):
    """Whether a tensor has the sizes of the result."""
    if get(info, DIM) != kind:
        return False
    if kind == BATCHES and size(info, 0) != get(args, BATCH):
        return False
    if kind >= MATRICES and size(info, kind - 1) != get(args, N):
        return False
    return kind == 0 or size(info, kind - 1 if kind == MATVEC else kind - 2) == get(args, M)


@jit
def set_result(args, info, kind):
    put(args, C, get(info, DATA))
    put(args, C_BS, stride(info, 0) if kind == BATCHES else 0)
    put(args, C_RS, stride(info, kind - 2) if kind >= MATRICES else stride(info, 0) if kind == MATVEC else 1)
    put(args, C_CS, stride(info, kind - 1) if kind >= MATRICES else 1)


@jit
def resize(out, args, kind):
    sizes = shape_words()
    write_result_shape(args, sizes, kind)
    resize_output(out, sizes, kind)


@jit
def check_out(a, b, source, out, infos, args, kind, result):
    """The outcome of a call that writes to ``out``; it is resized, with torch's warning, where its sizes differ.

    Resizing moves a storage. Where an operand shares it the outcome is TEMPORARY: ``out`` is resized after the product.
    """
    info, item = infos + INFO_OUT, item_size(dtype_of(infos + INFO_A))
    if not describe(out, info) or dtype_of(info) != dtype_of(infos + INFO_A):
        return FALLBACK
    if not has_result_shape(args, info, kind):
        if result != OUT:
            return FALLBACK
        shared = share_storage(out, info, a, infos + INFO_A, item)
        shared |= share_storage(out, info, b, infos + INFO_B, item)
        if source != 0:
            shared |= share_storage(out, info, source, infos + INFO_SOURCE, item)
        if shared:
            return TEMPORARY
        resize(out, args, kind)
        describe(out, info)
    outcome = bounds_outcome(info, item)
    if outcome == RUN:
        if not locate_to_write(out, info):
            return FALLBACK
        set_result(args, info, kind)
    return outcome


@jit
def outcome_for_torch(outcome, out, info, args, kind):
    """The outcome of a fallback: PyTorch's kernel writes to ``out`` without checking its storage."""
    if outcome in (FALLBACK, UNSUPPORTED) and describe(out, info) and has_result_shape(args, info, kind):
        bounds = bounds_outcome(info, item_size(dtype_of(info)))
        return outcome if bounds == RUN else bounds
    return outcome


@jit
def choose_target(infos, args):
    """OUT, or NEW where that would overwrite what is read; -1 where PyTorch's kernel takes the call.

    That is where elements of the result overlap each other, and where PyTorch has an error: it overlaps an addend, and
    both are dense.
    """
    info, source, item = infos + INFO_OUT, infos + INFO_SOURCE, item_size(dtype_of(infos + INFO_A))
    if repeats_an_element(info):
        return -1
    if get(args, SOURCE) != 0 and not is_result(args) and overlap(info, source, item):
        return -1 if are_dense(info, source) else NEW
    if overlap(info, infos + INFO_A, item) or overlap(info, infos + INFO_B, item):
        return NEW
    return OUT if is_non_overlapping(info) else -1


def compute_out(tensors, args, kind, result, has_scales, returned):
    """``compute`` for an OUT_TENSOR that is written; ``result`` is OUT or IN_PLACE."""
    infos = infos_words()
    outcome = begin(tensors, infos, args, kind, has_scales, returned)
    a, b = get(tensors, A_TENSOR), get(tensors, B_TENSOR)
    source, out, dtype = get(tensors, SOURCE_TENSOR), get(tensors, OUT_TENSOR), dtype_of(infos + INFO_A)
    if outcome != RUN:
        return outcome_for_torch(outcome, out, infos + INFO_OUT, args, kind)
    outcome = check_out(a, b, source, out, infos, args, kind, result)
    if outcome not in (RUN, TEMPORARY):
        return outcome
    if not locate_operands(a, b, source, infos, args, kind):
        return FALLBACK
    target = NEW if outcome == TEMPORARY else choose_target(infos, args)
    if target < 0:
        return UNSUPPORTED
    if target == OUT:
        return RUN if call_gemm(driver_of(dtype), args, 1, threads()) == 0 else UNSUPPORTED
    if multiply_into_new(args, dtype, kind, returned) != RUN:
        return UNSUPPORTED
    if outcome == TEMPORARY:
        resize(out, args, kind)
    handle = get(returned, HANDLE)
    failed = copy_(out, handle, 0)
    delete_tensor(handle)
    return RUN if failed == 0 else UNSUPPORTED


KERNELS = {"matmul_grad_compute_out": (compute_out, COMPUTE_SIGNATURE)}
