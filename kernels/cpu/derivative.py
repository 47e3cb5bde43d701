"""The gradient of an activation on all threads: each computes some rows, or some columns where there are few rows.

    out[i, j] = grad[i, j] · activation'[i, j]      or both gradients of activation(gate) · value

An element depends on its own operands alone, so the bits do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from .config_words import DERIVATIVE, SIZE
from .derivative_args import (
    ACTIVATION,
    GRAD,
    GRAD_CS,
    GRAD_RS,
    KEPT,
    KEPT_CS,
    KEPT_RS,
    OUT,
    OUT_RS,
    OUT_VALUE,
    VALUE,
    VALUE_CS,
    VALUE_RS,
    M,
    N,
)
from .derivative_ir import DERIVATIVE_ARGUMENTS
from .memory import call_kernel, get, put, stack_words, symbol
from .schedule import parallel_for, plan_threads, round_lanes, split_range
from .workspace import forked

WORK = 64  # multiply-adds that take as long as an element
ARGS, CONFIG, COUNT = range(3)  # of the context that the threads share

call_derivative = call_kernel(DERIVATIVE_ARGUMENTS)
context_words = stack_words(3)
task_address = symbol("matmul_grad_derivative_task")


def task(begin, end, context):
    """The parts ``begin`` to ``end`` of COUNT."""
    args, config, count = get(context, ARGS), get(context, CONFIG), get(context, COUNT)
    m, n, size = get(args, M), get(args, N), get(config, SIZE)
    for part in range(begin, end):
        i, j, rows, columns = 0, 0, m, n
        if m >= count:
            i, last = split_range(m, count, part)
            rows = last - i
        else:
            width = round_lanes(config, (n + count - 1) // count)
            j = min(part * width, n)
            columns = min(width, n - j)
        grad_rs, grad_cs, kept_rs, kept_cs = (
            get(args, GRAD_RS),
            get(args, GRAD_CS),
            get(args, KEPT_RS),
            get(args, KEPT_CS),
        )
        grad = get(args, GRAD) + (i * grad_rs + j * grad_cs) * size
        kept = get(args, KEPT) + (i * kept_rs + j * kept_cs) * size
        offset = (i * get(args, OUT_RS) + j) * size
        value, value_rs, value_cs = get(args, VALUE), get(args, VALUE_RS), get(args, VALUE_CS)
        value += (i * value_rs + j * value_cs) * size if value != 0 else 0
        call_derivative(
            get(config, DERIVATIVE), rows, columns, grad, grad_rs, grad_cs, kept, kept_rs, kept_cs,
            get(args, OUT) + offset, get(args, OUT_RS), get(args, ACTIVATION),
            value, value_rs, value_cs, get(args, OUT_VALUE) + offset,
        )  # fmt: skip


def derivative(config, args, count, threads):
    """The gradient that ``args`` describe; count is 1. Returns 0."""
    context = context_words()
    wanted = plan_threads(float(get(args, M)) * get(args, N) * WORK, threads)
    parts = 1 if forked() else wanted
    put(context, ARGS, args)
    put(context, CONFIG, config)
    put(context, COUNT, parts)
    if parts == 1:
        linked_task(0, 1, context)
    else:
        parallel_for(0, parts, 1, task_address(), context)
    return 0


TASK_SIGNATURE = types.void(types.int64, types.int64, types.int64)
linked_task = types.ExternalFunction("matmul_grad_derivative_task", TASK_SIGNATURE)
KERNELS: dict[str, tuple[Callable, types.Type]] = {
    "matmul_grad_derivative": (derivative, types.int64(types.int64, types.int64, types.int64, types.int64)),
    "matmul_grad_derivative_task": (task, TASK_SIGNATURE),
}
