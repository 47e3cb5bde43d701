"""Whether a tensor lies within its storage, for paths through Python; ``torch_c_api.py`` has it for compiled ones."""

from __future__ import annotations

from torch import Tensor


def require(*tensors: Tensor) -> None:
    """Raise RuntimeError for a tensor whose storage was freed or shrunk, as FSDP frees parameters."""
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        if tensor.is_contiguous():
            last = tensor.numel() - 1
        else:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        held = tensor.untyped_storage().nbytes()
        if held == 0:
            raise RuntimeError("The tensor has a non-zero number of elements, but its data is not allocated yet.")
        if (tensor.storage_offset() + last + 1) * tensor.element_size() > held:
            raise RuntimeError(
                "The sizes, strides and storage offset of a tensor are out of bounds for its storage, which was "
                "resized."
            )
