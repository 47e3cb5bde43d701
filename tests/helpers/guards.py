"""Memory that ends where a page begins that cannot be read."""

import ctypes
import mmap

import torch
from torch import Tensor


def with_guard(values: Tensor) -> tuple[Tensor, Tensor]:
    """A copy, in its order of memory, whose last element ends where a page begins that cannot be read; all of it."""
    size = values.numel() * values.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + pages * mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    whole = torch.frombuffer(memory, dtype=values.dtype, count=pages * mmap.PAGESIZE // values.element_size())
    whole.fill_(float("nan"))
    view = whole[whole.numel() - values.numel() :].as_strided(
        values.shape, values.stride(), whole.numel() - values.numel()
    )
    view.copy_(values)
    return view, whole
