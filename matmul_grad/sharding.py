"""How DTensor may shard the operators: told to torch.distributed when that is first imported.

    C[m,n] = Σ_k A[m,k] · B[k,n]

Over one dimension of a mesh every rule shards one letter. What has the letter is sharded along it, what has not is
replicated. A letter that the result has not, k, is summed over: there each device holds a partial sum.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from .late import after_import

TENSOR = "torch.distributed.tensor"

# The letters of each operand, first of what is added to the product; those of the result come after the arrow.
EQUATIONS = {
    "mm": "mk,kn->mn",
    "bmm": "bmk,bkn->bmn",
    "addmm": "mn,mk,kn->mn",
    "baddbmm": "bmn,bmk,bkn->bmn",
}


def added(names: str, shape: tuple[int, ...]) -> str:
    """The letters of an input that is added: the last ones, and "·" where its size 1 is repeated.

    >>> added("mn", (5,)), added("mn", (3, 1)), added("bmn", ())
    ('n', 'm·', '')
    """
    last = names[len(names) - len(shape) :]
    return "".join("·" if size == 1 else name for name, size in zip(last, shape, strict=True))


def shardings(equation: str, shapes: list[tuple[int, ...]]) -> list[tuple[list[Any], list[Any]]]:
    """Placements of the result, and of the operands, over one dimension of a mesh.

    DTensor leaves out by itself what is too small to be sharded.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    def place(letter: str, names: str) -> Any:
        return Shard(names.index(letter)) if letter in names else Replicate()

    operands, result = equation.split("->")
    *inputs, left, right = operands.split(",")
    inputs = [added(names, shapes[0]) for names in inputs]
    rules: list[tuple[list[Any], list[Any]]] = [([Replicate()], [Replicate() for _ in shapes])]
    for letter in dict.fromkeys(left + right):
        whole = place(letter, result) if letter in result else Partial()
        sums = [place(letter, names) if letter in result else Partial() for names in inputs]
        rules.append(([whole], [*sums, place(letter, left), place(letter, right)]))
    return rules


def tell(_: ModuleType) -> None:
    """Register the rules of every operator with DTensor."""
    from torch.distributed.tensor.experimental import register_sharding

    for name, equation in EQUATIONS.items():

        def rules(*operands: Any, _equation: str = equation, **_scalars: Any) -> list[tuple[list[Any], list[Any]]]:
            count = _equation.count(",") + 1
            return shardings(_equation, [tuple(operand.shape) for operand in operands[:count]])

        register_sharding(getattr(torch.ops.matmul_grad, name).default)(rules)


def register() -> None:
    """Tell DTensor, now or when it comes."""
    after_import(TENSOR, tell)
