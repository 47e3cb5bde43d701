"""Which tensors share memory, for compiled code."""

from __future__ import annotations

from ..cpu.gemm_args import C_BS, C_CS, C_RS, S_BS, S_CS, S_RS, SOURCE, C
from ..cpu.memory import get, jit
from .torch_c_api import DATA, DIM, STORAGE_OFFSET, locate, reach, size, stride


@jit
def overlap(info, other, item):
    """Whether the memory between first and last element of two tensors meets; both have elements."""
    start, other_start = get(info, DATA), get(other, DATA)
    end = start + (reach(info) + 1) * item
    other_end = other_start + (reach(other) + 1) * item
    return start < other_end and other_start < end


@jit
def is_non_overlapping(info):
    """Whether no two elements share an address: each stride is beyond all that the smaller ones reach."""
    for dim in range(get(info, DIM)):
        step, covered = stride(info, dim), 0
        for other in range(get(info, DIM)):
            if other != dim and stride(info, other) <= step:
                covered += (size(info, other) - 1) * stride(info, other)
        if size(info, dim) > 1 and step <= covered:
            return False
    return True


@jit
def is_dense(info):
    """Whether the elements fill the memory that they span, each once."""
    count = 1
    for dim in range(get(info, DIM)):
        count *= size(info, dim)
    return reach(info) + 1 == count and is_non_overlapping(info)


@jit
def are_dense(result, addend):
    """Whether both are, the addend as it is expanded to the result."""
    return is_dense(result) and is_dense(addend) and reach(result) == reach(addend)


@jit
def repeats_an_element(info):
    """Whether a dimension of several elements has one address, so that nothing can be copied there."""
    for dim in range(get(info, DIM)):  # noqa: SIM110  # Numba compiles no generator
        if size(info, dim) > 1 and stride(info, dim) == 0:
            return True
    return False


@jit
def is_result(args):
    """Whether the addend is the result itself, element for element."""
    same = get(args, SOURCE) == get(args, C) and get(args, S_RS) == get(args, C_RS)
    return same and get(args, S_CS) == get(args, C_CS) and get(args, S_BS) == get(args, C_BS)


@jit
def share_storage(one, info, other, other_info, item):
    """Whether two tensors are views of one storage, so that resizing one moves the other."""
    if not locate(one, info) or not locate(other, other_info):
        return True
    start = get(info, DATA) - get(info, STORAGE_OFFSET) * item
    return get(one, 0) == get(other, 0) or start == get(other_info, DATA) - get(other_info, STORAGE_OFFSET) * item
