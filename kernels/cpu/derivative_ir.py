"""The gradient of an activation, of one dtype, as IR: one pass over the gradient of its result."""

from __future__ import annotations

from .activation import GRADIENT, by_name
from .config import BlockConfig
from .epilogue_ir import adjacent_elements
from .operand import Operand
from .pack import element_at, scratch
from .simd import Vector, each, function_ir

DERIVATIVE_ARGUMENTS = 11


def derivative_ir(name: str, config: BlockConfig) -> str:
    """IR of ``void name(m, n, grad, g_rs, g_cs, kept, k_rs, k_cs, out, o_rs, activation)``.

    out[i, j] = round(grad[i, j] · activation'[i, j])

    kept is the argument of the activation, or its result for those of BY_RESULT. Columns of out are adjacent. The
    derivative is computed, and multiplied, in the type of the accumulator.
    """
    operand, lanes = Operand(Vector(config.accumulator, config.lanes, config.fused), config.dtype), config.lanes

    def emit(builder, m, n, grad, g_rs, g_cs, kept, k_rs, k_cs, out, o_rs, activation):
        room = [scratch(builder, operand) for _ in range(2)]

        def row(i):
            def vector(j):
                count = builder.sub(n, j)

                def read(matrix, rs, cs, gathered):
                    index = builder.add(builder.mul(i, rs), builder.mul(j, cs))
                    at = element_at(builder, operand, matrix, index)
                    return operand.read(builder, adjacent_elements(builder, operand, at, cs, count, gathered), count)

                incoming, known = read(grad, g_rs, g_cs, room[0]), read(kept, k_rs, k_cs, room[1])
                result = by_name(builder, operand.vector, activation, GRADIENT, incoming, known)
                place = builder.add(builder.mul(i, o_rs), j)
                operand.write(builder, result, element_at(builder, operand, out, place), count)

            each(builder, n, lanes, vector)

        each(builder, m, 1, row)

    return function_ir(name, DERIVATIVE_ARGUMENTS, emit)
