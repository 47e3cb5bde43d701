"""The table of records that ``cuda_entries.py`` reads: where its words are, how it is filled. Imports nothing heavy.

A key's twelve words are dtype, device, mode, m, n, k, the strides of a and of b, and the alignments of a and of b.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

DEVICE_TYPE, MODE, PLAIN_KEYS, SLOT = range(4)
SLOTS = 4096
MOST = SLOTS // 2  # records: beyond that a search would be long, and new shapes take the way through Python

KEYS = 12
WORK, WORK_DTYPE, LAUNCHES, FIRST = range(KEYS, KEYS + 4)
FUNCTION, PROGRAMS, THREADS, SHARED, PARAMETERS, HEADER = range(6)

# A parameter: VALUE is what is passed, or which tensor's address is; the rest describes that tensor to TMA.
KIND, VALUE, ELEMENT, RANK, SWIZZLE = range(5)
DIMENSIONS, STRIDES, BOX, STEPS, PARAMETER = 5, 10, 15, 18, 21  # five words each, then five halves each
CONSTANT, POINTER, DESCRIPTOR = range(3)
A, B, C, W = range(4)  # the tensors: operands, result, workspace
MOST_PARAMETERS, DESCRIPTORS = 64, 4  # of a launch
MAP_BYTES = 128  # of an encoded descriptor; the driver wants 64-byte alignment
L2_PROMOTION = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B, as Triton asks for
ALIGNMENT = 16
CUDA = 1  # torch's code of the device type

words = (ctypes.c_int64 * (SLOT + SLOTS))()
words[DEVICE_TYPE] = CUDA

_records: list[ctypes.Array] = []  # never freed: a call may be reading one


def mixed(place: int, word: int) -> int:
    """One more word in the hash of a key, which stays below 2^31."""
    return (place * 31 + word + (word >> 15)) & 0x7FFFFFFF


def find(key: Sequence[int]) -> int:
    """Address of the record for a key, or 0."""
    return words[_slot(key)]


def put(record: Sequence[int]) -> bool:
    """Add a record for the key that it begins with, which is new; False where the table is full."""
    if len(_records) >= MOST:
        return False
    _records.append((ctypes.c_int64 * len(record))(*record))
    words[_slot(record[:KEYS])] = ctypes.addressof(_records[-1])
    return True


def refuse(key: Sequence[int]) -> None:
    """Leave a key to Python for good: its record has no launches, which a compiled call takes for a failure."""
    record = (ctypes.c_int64 * FIRST).from_address(find(key))
    record[LAUNCHES] = 0


def counts() -> tuple[int, int]:
    """How many records were made, and how many of them refused."""
    return len(_records), sum(record[LAUNCHES] == 0 for record in _records)


def forget() -> None:
    """Empty the table. What it pointed at stays: at most MOST records are ever made in a process."""
    for slot in range(SLOT, SLOT + SLOTS):
        words[slot] = 0


def _slot(key: Sequence[int]) -> int:
    """Where a key's record is, or belongs: MOST leaves places free, so the search ends."""
    place = functools.reduce(mixed, key, 0)
    while True:
        slot = SLOT + place % SLOTS
        if words[slot] == 0 or (ctypes.c_int64 * KEYS).from_address(words[slot])[:] == list(key):
            return slot
        place += 1
