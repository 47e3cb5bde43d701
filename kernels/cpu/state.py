"""Words that Python and the compiled entry points share, behind the symbol ``matmul_grad_state``.

STRICT        how many strict() blocks are open, in the process
ABI_VERSION   torch's version as its C ABI takes it
AUTOGRAD_KEY  the dispatch key to exclude below autograd
PYTHON_KEY    of Python modes; two more that may be on between autograd and CPU
KEYS_AT       which word of a TensorImpl holds its dispatch keys, PLAIN_KEYS what is in that of an ordinary tensor
GEMMS + code  by dtype code: a driver's address, NOT_LOADED, or NOT_ACCELERATED
TORCHS + 2i   of overload i of aten: torch's own kernel, that is a boxed function and its functor
SWITCH        torch's handle of the registration while the switch is on, else 0
COUNTS + …    calls while the switch is on, see ``calls``
"""

from __future__ import annotations

import ctypes
import threading

STRICT, ABI_VERSION, AUTOGRAD_KEY, PYTHON_KEY, FUNCTORCH_KEY, FUNCTIONALIZE_KEY, KEYS_AT, PLAIN_KEYS, GEMMS = range(9)
NOT_ACCELERATED, NOT_LOADED = range(2)
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

# What the switch takes over, and in whose name it counts.
OVERLOADS = (
    "mm", "mm.out", "addmm", "addmm.out", "addmm_", "bmm", "bmm.out", "baddbmm", "baddbmm.out", "baddbmm_"
)  # fmt: skip
OPERATORS = ("mm", "addmm", "bmm", "baddbmm")
ACCELERATED, HANDED_OVER = range(2)
TORCHS = GEMMS + CODES
SWITCH = TORCHS + 2 * len(OVERLOADS)
COUNTS = SWITCH + 1


def entry_name(overload: str) -> str:
    """C name of the entry for one of OVERLOADS."""
    return f"matmul_grad_aten_{overload.replace('.', '_')}"


def count_at(operator: int, code: int, outcome: int) -> int:
    """Which word counts the calls of one of OPERATORS, for torch's code of a dtype, that ended in ``outcome``."""
    return COUNTS + (operator * CODES + code) * 2 + outcome


words = (ctypes.c_int64 * (COUNTS + 2 * CODES * len(OPERATORS)))()

raised = threading.local()  # .error: the last exception of Python's that crossed compiled code in this thread


def calls(operator: str, outcome: int) -> dict[str, int]:
    """Dtypes, and how many calls of one of OPERATORS ended in ``outcome``."""
    counted = {}
    for code in range(CODES):
        calls = words[count_at(OPERATORS.index(operator), code, outcome)]
        if calls:
            counted[DTYPES.get(code, f"dtype {code}")] = calls
    return counted
