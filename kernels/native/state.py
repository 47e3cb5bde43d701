"""Words that Python and the compiled entries share, behind the symbol ``matmul_grad_state``.

STRICT        how many strict() blocks are open, in the process
ABI_VERSION   torch's version as its C ABI takes it
RAISE         address of torch's handle of the operator that raises the pending exception
PYTHON_KEY    the dispatch key of Python modes; two more that may be on between autograd and CPU
KEYS_AT       which word of a TensorImpl holds its dispatch keys, PLAIN_KEYS what is in that of an ordinary tensor
RECORD        1 where products are recorded by C++ nodes of torch, ``graph.py``; what that needs:
RECORD_PRODUCT, RECORD_ANY  addresses of ``record`` and ``record_any`` of ``graph_entries.py``
RECORD_KEYS   the dispatch keys with which aten's operators are called
MATMUL … ADDMM  addresses of what takes them: aten::matmul, aten::linear, aten::mkldnn_linear
HOOKS         that of the one whose result holds the hooks of saved tensors, KEY_EXCLUDED that of the one that
              tells whether a key is excluded, AUTOCAST_KEY the key of autocast, ADD that of Tensor.add, SCALE of a 1,
              GRAD_DTYPE of what tells in which dtype a gradient is kept
TAGS + tag    tensors without elements, of rank TAG_RANK + tag: saved beside the one operand that a gradient uses, a
              tag tells which one the other is. 1: in column-major order, 2: of a linear layer, + TAG_OF_B: it is B, a
              matrix; TAG_OF_VECTOR, TAG_OF_BATCHES: it is B, of that kind. No weight has such a rank
GEMMS + code  by dtype code: a driver's address, NOT_LOADED, or NOT_ACCELERATED
FALLBACKS + 2i  of overload i of aten: the kernel that was replaced, a boxed function and its functor
OVERRIDE      torch's handle of the registration while entries are under aten's operators, else 0
ACTIVE        1 while those entries compute; 0: they call the kernels that they replaced
ABOVE + 4i    of operator i of ABOVE_AUTOGRAD: torch's kernel under autograd, and ours in Python, a boxed function and
              its functor each; ABOVE_LIBRARY: torch's handle of their registration, or 0
COUNTS + …    calls while they are, see ``calls``
"""

from __future__ import annotations

import ctypes

from .op_table import ABOVE_AUTOGRAD, OPS, OVERLOADS

STRICT, ABI_VERSION, RAISE, PYTHON_KEY, FUNCTORCH_KEY, FUNCTIONALIZE_KEY, KEYS_AT, PLAIN_KEYS = range(8)
RECORD, RECORD_KEYS, MATMUL, LINEAR, ADDMM, HOOKS, KEY_EXCLUDED, AUTOCAST_KEY, ADD, SCALE, GRAD_DTYPE = range(8, 19)
RECORD_PRODUCT, RECORD_ANY = GRAD_DTYPE + 1, GRAD_DTYPE + 2
TAGS = RECORD_ANY + 1
TAG_OF_B, TAG_OF_VECTOR, TAG_OF_BATCHES = 4, 8, 9
TAG_COUNT, TAG_RANK = 10, 3
GEMMS = TAGS + TAG_COUNT
# What stands for a driver: there is none, it is not loaded yet, loading it ended by an exception that is pending.
NOT_ACCELERATED, NOT_LOADED, INTERRUPTED = range(3)
DTYPE_CODES = {
    "float32": 6,
    "float64": 7,
    "bfloat16": 15,
    "float16": 5,
}  # torch's codes of the dtypes that have kernels
CODES = 64
DTYPES = {code: name for name, code in DTYPE_CODES.items()} | {
    0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 8: "complex32", 9: "complex64", 10: "complex128",
    11: "bool", 23: "float8_e5m2", 24: "float8_e4m3fn", 27: "uint16", 28: "uint32", 29: "uint64",
}  # fmt: skip

OPERATORS = tuple(op.name for op in OPS)
ACCELERATED, HANDED_OVER = range(2)
FALLBACKS = GEMMS + CODES
OVERRIDE = FALLBACKS + 2 * len(OVERLOADS)
ACTIVE = OVERRIDE + 1
ABOVE = ACTIVE + 1
ABOVE_LIBRARY = ABOVE + 4 * len(ABOVE_AUTOGRAD)
COUNTS = ABOVE_LIBRARY + 1


def entry_name(overload: str) -> str:
    """C name of the entry for one of OVERLOADS."""
    return f"matmul_grad_aten_{overload.replace('.', '_')}"


def autograd_entry_name(name: str) -> str:
    """The same for one of ABOVE_AUTOGRAD."""
    return f"matmul_grad_aten_{name}_autograd"


def count_at(operator: int, code: int, outcome: int) -> int:
    """Which word counts the calls of one of OPERATORS, for torch's code of a dtype, that ended in ``outcome``."""
    return COUNTS + (operator * CODES + code) * 2 + outcome


words = (ctypes.c_int64 * (COUNTS + 2 * CODES * len(OPERATORS)))()


def calls(operator: str, outcome: int) -> dict[str, int]:
    """Dtypes, and how many calls of one of OPERATORS ended in ``outcome``."""
    counted = {}
    for code in range(CODES):
        calls = words[count_at(OPERATORS.index(operator), code, outcome)]
        if calls:
            counted[DTYPES.get(code, f"dtype {code}")] = calls
    return counted
