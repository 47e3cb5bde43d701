"""Each public function with operands and torch's function, and a record of the operators that run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

LINEAR = nn.functional.linear


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


# name: (operands, torch's function)
CALLS: dict[str, tuple[tuple[Tensor, ...], Callable[..., Tensor]]] = {
    "mm": ((ones(3, 4), ones(4, 2)), torch.mm),
    "bmm": ((ones(5, 3, 4), ones(5, 4, 2)), torch.bmm),
    "addmm": ((ones(2), ones(3, 4), ones(4, 2)), torch.addmm),
    "baddbmm": ((ones(2), ones(5, 3, 4), ones(5, 4, 2)), torch.baddbmm),
    "matmul": ((ones(5, 3, 4), ones(4, 2)), torch.matmul),
    "linear": ((ones(5, 3, 4), ones(2, 4), ones(2)), LINEAR),
    "mv": ((ones(3, 4), ones(4)), torch.mv),
    "addmv": ((ones(3), ones(3, 4), ones(4)), torch.addmv),
    "dot": ((ones(4), ones(4)), torch.dot),
    "vdot": ((ones(4), ones(4)), torch.vdot),
}


class Seen(TorchDispatchMode):
    """The operators of matmul_grad that were called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "matmul_grad":
            self.ours.append(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))
