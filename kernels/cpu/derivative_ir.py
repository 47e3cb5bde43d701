"""The gradient of an activation, of one dtype, as IR: one pass over the gradient of its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from .activation import GATED_GRADIENT, GRADIENT, by_name, cases
from .config import BlockConfig
from .elementary import Lanes
from .epilogue_ir import adjacent_elements
from .operand import Operand
from .pack import element_at, scratch
from .simd import I64, Vector, each, function_ir

DERIVATIVE_ARGUMENTS = 15


@dataclass(frozen=True)
class Matrix:
    """Address, and distances of rows and columns; room for a vector that is gathered."""

    address: ir.Value
    rs: ir.Value
    cs: ir.Value
    room: ir.Value | None = None


def derivative_ir(name: str, config: BlockConfig) -> str:
    """IR of ``void name(m, n, grad, g_rs, g_cs, kept, k_rs, k_cs, out, o_rs, activation, value, v_rs, v_cs, …)``.

    The last one is out_value.

    out[i, j] = round(grad[i, j] · activation'[i, j])

    kept is the argument of the activation, or its result for those of BY_RESULT. Where value is not 0, kept is the
    argument, and these are the gradients of activation(kept) · value:

    out[i, j] = round(grad[i, j] · value[i, j] · activation'[i, j])
    out_value[i, j] = round(grad[i, j] · activation[i, j])

    Columns of out and out_value are adjacent. All is computed in the type of the accumulator.
    """
    operand, lanes = Operand(Vector(config.accumulator, config.lanes, config.fused), config.dtype), config.lanes

    def emit(builder, m, n, grad, g_rs, g_cs, kept, k_rs, k_cs, out, o_rs, activation, value, v_rs, v_cs, out_value):
        room = [scratch(builder, operand) for _ in range(3)]
        given = [(grad, g_rs, g_cs), (kept, k_rs, k_cs), (value, v_rs, v_cs)]
        matrices = [Matrix(*place, at) for place, at in zip(given, room, strict=True)]
        results = [Matrix(address, o_rs, I64(1)) for address in (out, out_value)]
        gated = builder.icmp_signed("!=", value, I64(0))

        def row(i):
            with builder.if_else(gated) as (with_value, alone):
                with with_value:
                    one_row(builder, operand, i, n, activation, (matrices, results, GATED_GRADIENT))
                with alone:
                    one_row(builder, operand, i, n, activation, (matrices[:2], results[:1], GRADIENT))

        each(builder, m, 1, row)

    def one_row(builder, operand, i, n, activation, what):
        """By a loop for each activation over whole vectors of adjacent elements; the rest vector by vector."""
        matrices, results, functions = what
        steps = [builder.icmp_signed("==", matrix.cs, I64(1)) for matrix in matrices]
        adjacent = builder.select(builder.and_(steps[0], steps[-1]), builder.and_(n, I64(-lanes)), I64(0))
        if len(steps) > 2:
            adjacent = builder.select(steps[1], adjacent, I64(0))

        def place(matrix, cs, j):
            return element_at(
                builder, operand, matrix.address, builder.add(builder.mul(i, matrix.rs), builder.mul(j, cs))
            )

        def whole_vectors(function: Callable[..., tuple[Lanes, ...]]) -> None:
            def one(j):
                values = (operand.read(builder, place(matrix, I64(1), j)) for matrix in matrices)
                made = function(*(Lanes(builder, operand.vector, value) for value in values))
                for result, matrix in zip(made, results, strict=True):
                    operand.write(builder, result.value, place(matrix, I64(1), j))

            each(builder, adjacent, lanes, one)

        def any_vector(j):
            left = builder.sub(n, j)
            count = builder.select(builder.icmp_signed("<", left, I64(lanes)), left, I64(lanes))

            def read(matrix):
                at = place(matrix, matrix.cs, j)
                address = adjacent_elements(builder, operand, at, matrix.cs, count, matrix.room)
                return operand.read(builder, address, count)

            made = by_name(builder, operand.vector, activation, functions, *map(read, matrices))
            for result, matrix in zip(made, results, strict=True):
                operand.write(builder, result, place(matrix, I64(1), j), count)

        cases(builder, activation, functions, whole_vectors)
        each(builder, n, lanes, any_vector, adjacent)

    return function_ir(name, DERIVATIVE_ARGUMENTS, emit)
