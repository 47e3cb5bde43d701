"""How DTensor may shard the operators: registered when torch.distributed.tensor is first imported.

    C[m,n] = Σ_k A[m,k] · B[k,n]

The operators have the schemas of aten's, so they get the strategies that torch has for those: the same placements,
strided shards and partial sums included. torch does not promise the tables that hold them; where they are not found
the rules of this file are registered. Over one dimension of a mesh every rule shards one letter. What has the letter
is sharded along it, what has not is replicated. A letter that the result has not, k, is summed over: there each
device holds a partial sum.

Convolutions are sharded along the batch alone; the gradient of a filter is a partial sum there. Products with an
activation are sharded along m and n: of a partial sum there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from .import_hooks import on_import

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
        addends = [place(letter, names) if letter in result else Partial() for names in inputs]
        rules.append(([whole], [*addends, place(letter, left), place(letter, right)]))
    return rules


def share_strategy(propagator: Any, ours: Any, atens: Any) -> bool:
    """Register an operator wherever DTensor's propagator has aten's; whether it has a strategy then."""
    tables = {name: table for name, table in vars(propagator).items() if isinstance(table, dict) and atens in table}
    for table in tables.values():
        table[ours] = table[atens]
    return bool(tables.keys() & {"op_strategy_funcs", "op_single_dim_strategy_funcs"})


def register_rules(name: str, equation: str) -> None:
    """The rules of ``shardings`` for one operator."""
    from torch.distributed.tensor.experimental import register_sharding

    def rules(*operands: Any, **_scalars: Any) -> list[tuple[list[Any], list[Any]]]:
        return shardings(equation, [tuple(operand.shape) for operand in operands[: equation.count(",") + 1]])

    register_sharding(getattr(torch.ops.matmul_grad, name).default)(rules)


def convolution_rules(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    """Of a convolution: (input, weight, bias or None, …) with the filters whole."""
    from torch.distributed.tensor import Replicate, Shard

    whole, rest = Replicate(), [None] * (len(arguments) - 3)
    bias = None if arguments[2] is None else whole
    return [([placement], [placement, whole, bias, *rest]) for placement in (whole, Shard(0))]


def weight_gradient_rules(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    """Of the gradient of a filter: (grad, input, …), a sum over the batch."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    rest = [None] * (len(arguments) - 2)
    both = ((Replicate(), Replicate()), (Partial(), Shard(0)))
    return [([result], [operand, operand, *rest]) for result, operand in both]


def grouped_shardings(ranks: tuple[int, int]) -> list[tuple[list[Any], list[Any]]]:
    """As ``shardings``, of a grouped product: what offs cut stays whole, and so do the groups.

    >>> len(grouped_shardings((2, 3))), len(grouped_shardings((2, 2)))
    (3, 3)
    """
    equation = {(2, 3): "rk,gkn->rn", (3, 2): "gmk,kr->mr", (2, 2): "mr,rn->gmn", (3, 3): "bmk,bkn->bmn"}[ranks]
    every, *rules = shardings(equation, [(), ()])
    letters = dict.fromkeys(equation.split("->")[0].replace(",", ""))
    whole = [rule for letter, rule in zip(letters, rules, strict=True) if letter not in "rg"]
    return [every, *whole]


def register_grouped_with(_: ModuleType) -> None:
    """The grouped product by rules of this file: aten's strategy refuses strides that are not whole 16 bytes."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.experimental import register_sharding

    def rules(self: Any, mat2: Any, offs: Any = None, *_: Any) -> list[tuple[list[Any], list[Any]]]:
        found = grouped_shardings((len(self.shape), len(mat2.shape)))
        rest = [None if offs is None else Replicate(), None, None]
        return [(result, [*operands, *rest]) for result, operands in found]

    register_sharding(torch.ops.matmul_grad.grouped_mm.default)(rules)


# Products with an activation, by operator: the letters as above, and how many results there are, placed alike.
ACTIVATED = {
    "addmm_activation": ("mn,mk,kn->mn", 1),
    "_addmm_activation_kept": ("mn,mk,kn->mn", 2),
    "_activation_gradient": ("mn,mn->mn", 1),
    "addmm_gated": ("mn,mn,mk,kn,kn->mn", 1),
    "_addmm_gated_kept": ("mn,mn,mk,kn,kn->mn", 3),
    "_gated_gradients": ("mn,mn,mn->mn", 2),
}


def activated_shardings(name: str, shapes: list[tuple[int, ...] | None]) -> list[tuple[list[Any], list[Any]]]:
    """As ``shardings``, of what has an activation; an operand that is left out has no shape.

    >>> len(activated_shardings("addmm_activation", [None, (2, 3), (3, 4)]))
    3
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    equation, count = ACTIVATED[name]
    operands, result = equation.split("->")
    letters = [None if shape is None else added(x, shape) for x, shape in zip(operands.split(","), shapes, strict=True)]
    rules: list[tuple[list[Any], list[Any]]] = []
    for letter in ("", *result):
        whole = Shard(result.index(letter)) if letter else Replicate()
        placed = [
            None if x is None else Shard(x.index(letter)) if letter and letter in x else Replicate() for x in letters
        ]
        rules.append(([whole] * count, [*placed, None]))
    if "k" not in equation:  # linear in the gradient
        rules.append(([Partial()] * count, [Partial(), *(Replicate() for _ in letters[1:]), None]))
    return rules


def register_activated_with(_: ModuleType) -> None:
    from torch.distributed.tensor.experimental import register_sharding

    def register_one(name: str) -> None:
        def rules(*arguments: Any) -> list[tuple[list[Any], list[Any]]]:
            return activated_shardings(name, [None if x is None else tuple(x.shape) for x in arguments[:-1]])

        register_sharding(getattr(torch.ops.matmul_grad, name).default)(rules)

    for name in ACTIVATED:
        register_one(name)


def register_out_dtype_with(_: ModuleType) -> None:
    """Products with a float32 result: as the products, and the dtype behind the operands."""
    from torch.distributed.tensor.experimental import register_sharding

    def register_one(name: str, equation: str) -> None:
        def rules(*arguments: Any, **_scalars: Any) -> list[tuple[list[Any], list[Any]]]:
            found = shardings(equation, [tuple(x.shape) for x in arguments[:-1]])
            return [(result, [*operands, None]) for result, operands in found]

        register_sharding(getattr(torch.ops.matmul_grad, f"{name}_dtype").default)(rules)

    for name, equation in EQUATIONS.items():
        register_one(name, equation)


def register_with(tensor: ModuleType) -> None:
    """Every operator with DTensor."""
    dispatcher = getattr(tensor.DTensor, "_op_dispatcher", None)
    propagator = getattr(dispatcher, "sharding_propagator", None)
    for name, equation in EQUATIONS.items():
        ours, atens = (getattr(getattr(torch.ops, space), name).default for space in ("matmul_grad", "aten"))
        if propagator is None or not share_strategy(propagator, ours, atens):
            register_rules(name, equation)


def register_convolutions_with(_: ModuleType) -> None:
    from torch.distributed.tensor.experimental import register_sharding

    register_sharding(torch.ops.matmul_grad.convolution.default)(convolution_rules)
    register_sharding(torch.ops.matmul_grad.convolution_weight_gradient.default)(weight_gradient_rules)


def register(operators: Callable[[ModuleType], None] = register_with) -> None:
    """Register operators, which are defined by now, with DTensor, now or when it is imported."""
    on_import(TENSOR, operators)
