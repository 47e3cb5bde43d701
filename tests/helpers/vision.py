"""torchvision beside a torch that it was not built for."""

import importlib.util
from pathlib import Path

import torch


def declare_torchvision() -> torch.library.Library | None:
    """torchvision's wheel is built for torch's CUDA build. Beside a CPU build its library does not load, and its import
    ends at the first of these operators, which it wants to describe. Nothing here calls one: that they exist is enough.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        for compiled in Path(spec.origin).parent.glob("_C*"):
            torch.ops.load_library(compiled)
    except OSError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


declared = declare_torchvision()
