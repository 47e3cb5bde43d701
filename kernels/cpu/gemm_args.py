"""The arguments of the driver for one product, or for a batch of them: int64, sizes and strides in elements.

    C = activation(t)             t = alpha · (A · B) + beta · source
    C = activation(gate) · t      where there is a gate

SOURCE is 0 where nothing is added, and may be C itself. ALPHA and BETA hold the bits of a float64. ACTIVATION is an
index of ACTIVATIONS. PRE is 0, or where t is stored, rounded, with the strides of C. GATE is 0, or the address of what
the activation is applied to instead of t, with the strides of C too; without an activation it is not read. WIDE is 1
where C, the source, PRE and the gate are float32 and the operands have 16 bits, else 0. GROUPS is 0, or the address of
the table of groups.py. ACCUMULATE is 1 where the chains of the product may be added to C one after the other; then
SOURCE is C, and alpha and beta are 1.

A_PATCHES and B_PATCHES are 0, or the address of what describes an operand that is found by digits, and C_RUNS of what
describes columns of C that are not at one distance: see patches_args.py. C_COLUMN is then the first column. C_ROWS and
C_ROW are the same of rows, where the columns are runs too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

M, N, K, A, A_RS, A_CS, B, B_RS, B_CS, C, C_RS, C_CS = range(12)
BATCH, A_BS, B_BS, C_BS = range(12, 16)  # number of products, and the distances between them
SOURCE, S_RS, S_CS, S_BS, ALPHA, BETA = range(16, 22)
ACTIVATION, PRE, WIDE = range(22, 25)
GROUPS, A_PATCHES, B_PATCHES, C_RUNS, C_COLUMN, C_ROWS, C_ROW, ACCUMULATE, GATE = range(25, 34)
GEMM_ARGS = 34
ONE = 0x3FF0000000000000  # the bits of 1.0
ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu", "tanh")
BY_RESULT = ("relu", "tanh")  # whose derivative is a function of their result


@dataclass(frozen=True)
class Epilogue:
    """What happens to a product where it is stored, as C = activation(alpha · (A · B) + beta · source).

    Nothing is added where ``source``, which expands to C, is None or beta is 0. activation: one of ACTIVATIONS. pre: a
    tensor with the strides of C that gets the argument of the activation, or None. gate: a tensor with the strides of C
    whose activation the sum is multiplied by, instead of being activated itself, or None.
    """

    alpha: float = 1.0
    beta: float = 1.0
    source: Any = None
    activation: str = ""
    pre: Any = None
    gate: Any = None
