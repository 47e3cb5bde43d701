"""The gradient of an activation, of one dtype, as IR: one pass over the gradient of its result."""

from __future__ import annotations

from .activation import GRADIENT, by_name, cases
from .config import BlockConfig
from .elementary import Lanes
from .epilogue_ir import adjacent_elements
from .operand import Operand
from .pack import element_at, scratch
from .simd import I64, Vector, each, function_ir

DERIVATIVE_ARGUMENTS = 11


def derivative_ir(name: str, config: BlockConfig) -> str:
    """IR of ``void name(m, n, grad, g_rs, g_cs, kept, k_rs, k_cs, out, o_rs, activation)``.

    out[i, j] = round(grad[i, j] · activation'[i, j])

    kept is the argument of the activation, or its result for those of BY_RESULT. Columns of out are adjacent. The
    derivative is computed, and multiplied, in the type of the accumulator.
    """
    operand, lanes = Operand(Vector(config.accumulator, config.lanes, config.fused), config.dtype), config.lanes
    vector = operand.vector

    def emit(builder, m, n, grad, g_rs, g_cs, kept, k_rs, k_cs, out, o_rs, activation):
        room = [scratch(builder, operand) for _ in range(2)]
        both = builder.and_(*(builder.icmp_signed("==", cs, I64(1)) for cs in (g_cs, k_cs)))
        adjacent = builder.select(both, builder.and_(n, I64(-lanes)), I64(0))

        def row(i):
            def place(matrix, rs, cs, j):
                return element_at(builder, operand, matrix, builder.add(builder.mul(i, rs), builder.mul(j, cs)))

            def whole_vectors(function):
                def one(j):
                    grad_at, kept_at = place(grad, g_rs, I64(1), j), place(kept, k_rs, I64(1), j)
                    values = (Lanes(builder, vector, operand.read(builder, at)) for at in (grad_at, kept_at))
                    operand.write(builder, function(*values).value, place(out, o_rs, I64(1), j))

                each(builder, adjacent, lanes, one)

            def any_vector(j):
                left = builder.sub(n, j)
                count = builder.select(builder.icmp_signed("<", left, I64(lanes)), left, I64(lanes))

                def read(matrix, rs, cs, gathered):
                    at = place(matrix, rs, cs, j)
                    return operand.read(builder, adjacent_elements(builder, operand, at, cs, count, gathered), count)

                values = read(grad, g_rs, g_cs, room[0]), read(kept, k_rs, k_cs, room[1])
                result = by_name(builder, vector, activation, GRADIENT, *values)
                operand.write(builder, result, place(out, o_rs, I64(1), j), count)

            cases(builder, activation, GRADIENT, whole_vectors)
            each(builder, n, lanes, any_vector, adjacent)

        each(builder, m, 1, row)

    return function_ir(name, DERIVATIVE_ARGUMENTS, emit)
