"""Which tensors share memory, for compiled code."""

from __future__ import annotations

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
def share_storage(one, info, other, other_info, item):
    """Whether two tensors are views of one storage, so that resizing one moves the other."""
    if not locate(one, info) or not locate(other, other_info):
        return True
    start = get(info, DATA) - get(info, STORAGE_OFFSET) * item
    return get(one, 0) == get(other, 0) or start == get(other_info, DATA) - get(other_info, STORAGE_OFFSET) * item
