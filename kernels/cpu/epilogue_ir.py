"""The epilogue of one dtype, as IR: sums are added, scaled, activated, rounded and stored, one vector at a time."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from .activation import FORWARD, cases
from .config import BlockConfig
from .elementary import Lanes
from .operand import Operand
from .pack import copy_element, element_at, scratch
from .simd import I64, Vector, each, function_ir, splat

ADD_ARGUMENTS, STORE_ARGUMENTS = 3, 15


def add_ir(name: str, operand: Operand) -> str:
    """IR of ``void name(target, source, count)``: target += source, ``count`` lanes, whole vectors."""
    vector = operand.vector

    def emit(builder, target, source, count):
        def one_vector(index):
            to, at = (vector.at(builder, address, index) for address in (target, source))
            vector.store(builder, builder.fadd(vector.load(builder, to), vector.load(builder, at)), to)

        each(builder, count, vector.lanes, one_vector)

    return function_ir(name, ADD_ARGUMENTS, emit)


def store_ir(name: str, config: BlockConfig, dtype: str, activates: bool = True) -> str:
    """IR of ``void name(m, n, partials, row_lanes, c, c_rs, c_cs, alpha, source, s_rs, s_cs, beta, activation, …)``.

    The last two are pre and gate.

    pre[i, j] = round(t), C[i, j] = round(activation(t))       t = alpha · partials[i, j] + beta · source[i, j]

    where C, pre, gate and source are of ``dtype``, partials are lanes, ``row_lanes`` a row, and alpha and beta the bits
    of a float64. Nothing is added where source is 0; only C is stored where pre is 0; where gate is not 0, C is
    round(activation(gate[i, j]) · t). An activation has a separate loop over each row; t stays in the partials. Those
    are most of the function, and left out unless it ``activates``: then it takes an activation of 0 alone.
    """
    # an element a lane, also where the k-loop has two
    operand = Operand(Vector(config.accumulator, config.lanes, config.fused), dtype)
    lanes = config.lanes

    def emit(builder, m, n, partials, row_lanes, c, c_rs, c_cs, alpha, source, s_rs, s_cs, beta, activation, pre, gate):
        buffer, gathered = scratch(builder, operand), scratch(builder, operand)
        alpha, beta = (_splat_bits(builder, operand.vector, bits) for bits in (alpha, beta))
        adds = builder.icmp_signed("!=", source, I64(0))
        adjacent = builder.icmp_signed("==", c_cs, I64(1))
        is_activated = builder.icmp_signed("!=", activation, I64(0))
        gated = builder.icmp_signed("!=", gate, I64(0))

        def row(i):
            def place(matrix, j):
                return element_at(builder, operand, matrix, builder.add(builder.mul(i, c_rs), builder.mul(j, c_cs)))

            def write(value, matrix, j, count):
                _write(builder, operand, value, place(matrix, j), c_cs, count, buffer, adjacent)

            def partials_at(j):
                return operand.vector.at(builder, partials, builder.add(builder.mul(i, row_lanes), j))

            def add_source(j, count=None):
                at = partials_at(j)
                value = builder.fmul(operand.vector.load(builder, at), alpha)
                element = builder.add(builder.mul(i, s_rs), builder.mul(j, s_cs))
                element = element_at(builder, operand, source, element)
                with builder.if_else(adds) as (some, none):
                    with some:
                        address = adjacent_elements(builder, operand, element, s_cs, count, gathered)
                        total = operand.vector.fma(builder, beta, operand.read(builder, address, count), value)
                        added = builder.block
                    with none:
                        plain = builder.block
                result = _either(builder, (total, added), (value, plain))
                if not activates:
                    write(result, c, j, count)
                    return
                with builder.if_else(is_activated) as (more, done):
                    with more:
                        operand.vector.store(builder, result, at)
                        with builder.if_then(builder.icmp_signed("!=", pre, I64(0))):
                            write(result, pre, j, count)
                    with done:
                        write(result, c, j, count)

            def activate(function):
                def one_vector(j, count=None):
                    value = operand.vector.load(builder, partials_at(j))
                    with builder.if_else(gated) as (other, own):
                        with other:
                            address = adjacent_elements(builder, operand, place(gate, j), c_cs, count, gathered)
                            read = operand.read(builder, address, count), builder.block
                        with own:
                            kept = value, builder.block
                    activated = function(Lanes(builder, operand.vector, _either(builder, read, kept))).value
                    write(builder.select(gated, builder.fmul(activated, value), activated), c, j, count)

                each_vector(builder, n, lanes, one_vector)

            each_vector(builder, n, lanes, add_source)
            if activates:
                cases(builder, activation, FORWARD, activate)

        each(builder, m, 1, row)

    return function_ir(name, STORE_ARGUMENTS, emit)


def each_vector(builder: ir.IRBuilder, n: ir.Value, lanes: int, body: Callable[..., None]) -> None:
    """``body(j)`` for whole vectors of n lanes, ``body(j, count)`` for the rest: AVX2 has no mask of 16 bits."""
    whole = builder.and_(n, I64(-lanes))
    each(builder, whole, lanes, body)
    with builder.if_then(builder.icmp_signed("<", whole, n)):
        body(whole, builder.sub(n, whole))


def adjacent_elements(builder, operand, element, s_cs, count, gathered):
    """Address of the elements of a vector of the source: where they are, or ``gathered``, to which they are copied."""
    entry = builder.block
    with builder.if_then(builder.icmp_signed("!=", s_cs, I64(1))):

        def one_lane(lane):
            at = element_at(builder, operand, element, builder.mul(lane, s_cs))
            to = element_at(builder, operand, gathered, lane)
            copy_element(builder, operand.size, to, at)

        each(builder, operand.vector.lanes if count is None else count, 1, one_lane)
        copied = builder.block
    address = builder.phi(I64)
    address.add_incoming(element, entry)
    address.add_incoming(gathered, copied)
    return address


def _either(builder, *values):
    """The value of the block, of those paired with it, that was run."""
    result = builder.phi(values[0][0].type)
    for value, block in values:
        result.add_incoming(value, block)
    return result


def _write(builder, operand, value, target, c_cs, count, buffer, adjacent):
    """A vector of C, or ``count`` elements of one, where they lie together, or one by one."""
    with builder.if_else(adjacent, likely=True) as (together, apart):
        with together:
            operand.write(builder, value, target, count)
        with apart:
            operand.write(builder, value, buffer)

            def one_lane(lane):
                to = element_at(builder, operand, target, builder.mul(lane, c_cs))
                copy_element(builder, operand.size, to, element_at(builder, operand, buffer, lane))

            each(builder, operand.vector.lanes if count is None else count, 1, one_lane)


def _splat_bits(builder: ir.IRBuilder, vector: Vector, bits: ir.Value) -> ir.Value:
    """A vector of one number, from the bits of a float64."""
    number = builder.bitcast(bits, ir.DoubleType())
    if vector.scalar != number.type:
        number = builder.fptrunc(number, vector.scalar)
    return splat(builder, number, vector.lanes)
