"""The one list of operators: those registered as ``matmul_grad::*``, and those of aten that the override replaces.

A kind is the rank of the result: 0 for a dot product, 1 for matrix times vector, 2 for matrices, 3 for batches. Two
more are of any ranks: matmul, and linear, whose second operand is Bᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass

DOT, MATVEC, MATRICES, BATCHES, MATMUL, LINEAR = range(6)

REFUSAL = (
    "matmul_grad.strict(): this product goes to torch's kernel; these kernels take two dense matrices of one dtype "
    "on one device: bfloat16, float32 or float64, on CPU or CUDA, and float16 where the processor converts it"
)


@dataclass(frozen=True)
class Op:
    """A product, C = A · B, or with an addend C = beta · input + alpha · (A · B).

    schema     of ``matmul_grad::name``; None where only aten has the operator
    overloads  of aten, which the override replaces
    """

    name: str
    kind: int
    has_addend: bool
    schema: str | None
    overloads: tuple[str, ...]


OPS = (
    Op("mm", MATRICES, False, "(Tensor self, Tensor mat2) -> Tensor", ("mm", "mm.out")),
    Op(
        "addmm", MATRICES, True, "(Tensor self, Tensor mat1, Tensor mat2, *, float beta=1, float alpha=1) -> Tensor",
        ("addmm", "addmm.out", "addmm_"),
    ),
    Op("bmm", BATCHES, False, "(Tensor self, Tensor mat2) -> Tensor", ("bmm", "bmm.out")),
    Op(
        "baddbmm", BATCHES, True,
        "(Tensor self, Tensor batch1, Tensor batch2, *, float beta=1, float alpha=1) -> Tensor",
        ("baddbmm", "baddbmm.out", "baddbmm_"),
    ),
    Op("addmv", MATVEC, True, None, ("addmv", "addmv.out", "addmv_")),
    Op("dot", DOT, False, None, ("dot",)),
    Op("vdot", DOT, False, None, ("vdot",)),
    Op("matmul", MATMUL, False, "(Tensor self, Tensor other) -> Tensor", ()),
    Op("linear", LINEAR, False, "(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor", ()),
)  # fmt: skip
OWN = tuple(op for op in OPS if op.schema is not None and op.kind <= BATCHES)
COMPOSED = tuple(op for op in OPS if op.kind > BATCHES)  # of OWN, where one compiled call does not compute them
OVERLOADS = tuple(overload for op in OPS for overload in op.overloads)
# Of aten, what the override looks at above autograd too: how many arguments, and the place of the first matrix.
ABOVE_AUTOGRAD = {"linear": (3, 0), "mm": (2, 0), "addmm": (5, 1)}


def op_of(overload: str) -> Op:
    """The operator that an overload of aten belongs to.

    >>> op_of("addmm_").name, op_of("bmm.out").kind
    ('addmm', 3)
    """
    return next(op for op in OPS if overload in op.overloads)
