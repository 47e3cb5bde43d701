"""Words that Python and the compiled entry points share, behind the symbol ``matmul_grad_state``.

STRICT        how many strict() blocks are open, in the process
ABI_VERSION   torch's version as its C ABI takes it
AUTOGRAD_KEY  the dispatch key to exclude below autograd
GEMMS + code  by dtype code: a driver's address, NOT_LOADED, or NOT_ACCELERATED
"""

from __future__ import annotations

import ctypes
import threading

STRICT, ABI_VERSION, AUTOGRAD_KEY, PYTHON_KEY, GEMMS = range(5)
NOT_ACCELERATED, NOT_LOADED = range(2)
DTYPE_CODES = {
    "float32": 6,
    "float64": 7,
    "bfloat16": 15,
    "float16": 5,
}  # torch's codes of the dtypes that have kernels
CODES = 64

words = (ctypes.c_int64 * (GEMMS + CODES))()

raised = threading.local()  # .error: the last exception of Python's that crossed compiled code in this thread
