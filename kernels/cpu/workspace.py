"""Packing buffers: allocated at first use, kept for the process, one set for each call that runs at a time.

The slots behind the symbol ``matmul_grad_workspace`` belong to the process that loaded the kernels:

    word 0             1 in a forked child, whose parent's threads do not exist
    words 1+3i …       slot i: state, address, bytes
"""

from __future__ import annotations

from numba.core import types

from .config import WORKSPACE_SLOTS
from .memory import claim, get, jit, put, release, symbol

malloc = types.ExternalFunction("malloc", types.int64(types.int64))
free = types.ExternalFunction("free", types.void(types.int64))

slots = symbol("matmul_grad_workspace")

STATE, ADDRESS, BYTES = 0, 1, 2
SLOT_BYTES = 24
PAGE = 4096
TEMPORARY = 2  # in STATE: a buffer beyond the slots, freed when its call ends


@jit
def forked():
    """Whether this process is a forked child: there the pool's threads are gone and waking them would hang."""
    return get(slots(), 0) != 0


@jit
def acquire_slot(bytes_needed):
    """Address of a slot that this call owns until ``release_slot``; 0 when memory ran out."""
    for i in range(WORKSPACE_SLOTS):
        slot = slots() + 8 + i * SLOT_BYTES
        if claim(slot):
            if get(slot, BYTES) < bytes_needed:
                free(get(slot, ADDRESS))
                address = malloc(bytes_needed + PAGE)
                put(slot, ADDRESS, address)
                put(slot, BYTES, bytes_needed if address != 0 else 0)
                if address == 0:
                    release(slot)
                    return 0
            return slot
    slot = malloc(SLOT_BYTES + bytes_needed + PAGE)
    if slot != 0:
        put(slot, STATE, TEMPORARY)
        put(slot, ADDRESS, slot + SLOT_BYTES)
    return slot


@jit
def first_page(slot):
    """First byte of the slot's memory, at the start of a page."""
    return (get(slot, ADDRESS) + PAGE - 1) // PAGE * PAGE


@jit
def release_slot(slot):
    if get(slot, STATE) == TEMPORARY:
        free(slot)
    else:
        release(slot)
