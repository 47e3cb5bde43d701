"""Packing of operands that are patches of an image: panels as in pack.py, of elements found by digits.

Vectors lie along that index whose pixels are adjacent in memory, and cross the ends of rows of the image: a vector is
one masked load for each of at most two pieces, or is gathered element by element. Which lanes exist depends on the
tap alone, so it is computed once for all channels. Padding is never read.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from .config import BlockConfig
from .operand import Operand, operand_of
from .pack import element_at, scratch
from .patches_args import (
    ADDRESS,
    DIMENSIONS,
    FREE_EXTENT,
    FREE_OUTER,
    FREE_STEP,
    K_EXTENT,
    K_OUTER,
    K_STEP,
    SIZE,
    START,
    STRIDE,
)
from .simd import I8, I32, I64, POINTER, choose, each, function_ir, repeat, splat

PATCH_STEPS_ARGUMENTS, PATCH_ROWS_ARGUMENTS = 6, 6
NOWHERE = 1 << 30  # a coordinate of no pixel
X = DIMENSIONS - 1


@dataclass(frozen=True)
class _Side:
    """One of the two indices of an operand: its outer stride, and the extents and steps of z, y and x."""

    outer: ir.Value
    extents: list[ir.Value]
    steps: list[ir.Value]


@dataclass(frozen=True)
class _Image:
    """The description of an operand, read."""

    operand: Operand
    address: ir.Value
    free: _Side
    k: _Side
    start: list[ir.Value]
    sizes: list[ir.Value]  # as vectors of int32
    strides: list[ir.Value]

    @property
    def lanes(self) -> int:
        return self.operand.vector.lanes

    def offset(self, builder: ir.IRBuilder, coordinates: list[ir.Value]) -> ir.Value:
        """Elements from the first pixel to one."""
        total: ir.Value = I64(0)
        for coordinate, stride in zip(coordinates, self.strides, strict=True):
            total = builder.add(total, builder.mul(coordinate, stride))
        return total


@dataclass(frozen=True)
class _Run:
    """Consecutive indices of one side, a vector of them: coordinates without the other side's part.

    offsets: where each is, in memory. Those of the first piece, and of the second, are adjacent from an offset on that
    lane 0 would have. scattered: whether there are more pieces.
    """

    coordinates: list[ir.Value]
    offsets: ir.Value
    pieces: list[ir.Value]
    origins: list[ir.Value]
    scattered: ir.Value


@dataclass(frozen=True)
class _Line:
    """A run with one value of the other side's digits: the masks of its pieces, and whether the first has all lanes."""

    run: _Run
    masks: list[ir.Value]
    whole: ir.Value
    exists: ir.Value  # address of a byte a lane


def make_kernels(config: BlockConfig) -> dict[str, str]:
    """IR by C name of both functions for a dtype."""
    operand, name = operand_of(config), config.name
    return {
        f"{name}_patch_steps": patch_steps_ir(f"{name}_patch_steps", operand, config.nr),
        f"{name}_patch_rows": patch_rows_ir(f"{name}_patch_rows", operand, max(config.mr, config.nr)),
    }


def patch_steps_ir(name: str, operand: Operand, width: int) -> str:
    """IR of ``void name(target, width, source, k, exist, patches)``: rows are steps of k, as of ``pack_steps``.

    source is what ``patches_args`` has in the place of an address; width is that of a panel.
    """

    def emit(builder, target, width_, source, k, exist, patches):
        image, room = _read_image(builder, operand, patches), _Room(builder, operand, width)
        first, step = _indices(builder, operand, source)
        along_free = builder.mul(image.free.steps[X], image.strides[X])
        along_k = builder.mul(image.k.steps[X], image.strides[X])
        transposes = builder.and_(
            builder.icmp_signed("!=", along_free, I64(1)), builder.icmp_signed("==", along_k, I64(1))
        )
        with builder.if_else(transposes) as (deep, wide):
            with deep:
                _pack_transposed(builder, image, room, (target, width_), (first, exist), (step, k))
            with wide:
                _pack_wide(builder, image, room, (target, width_), (first, exist), (step, k))

    return function_ir(name, PATCH_STEPS_ARGUMENTS, emit)


def patch_rows_ir(name: str, operand: Operand, height: int) -> str:
    """IR of ``void name(target, rows, stride, source, k, patches)``: a row's steps of k are adjacent."""

    def emit(builder, target, rows, stride, source, k, patches):
        image, room = _read_image(builder, operand, patches), _Room(builder, operand, height)
        first, step = _indices(builder, operand, source)
        _set_others(builder, image, image.free, first, rows, rows, room)

        def vector(p):
            run = _prepare(builder, image, image.k, builder.add(step, p), room)

            def row(i):
                value = _read_other(builder, image, room, run, i, builder.sub(k, p))
                to = operand.vector.at(builder, target, builder.add(builder.mul(i, stride), p))
                operand.vector.store(builder, value, to)

            each(builder, rows, 1, row)

        each(builder, k, operand.vector.lanes, vector)

    return function_ir(name, PATCH_ROWS_ARGUMENTS, emit)


class _Room:
    """Arrays on the stack of a function."""

    def __init__(self, builder: ir.IRBuilder, operand: Operand, others: int) -> None:
        def array(kind: ir.Type, count: int) -> ir.Value:
            return builder.inttoptr(builder.ptrtoint(builder.alloca(kind, count), I64), POINTER)

        lanes = operand.vector.lanes
        self.coordinates = [array(I32, lanes) for _ in range(DIMENSIONS)]
        self.offsets, self.exists = array(I64, lanes), array(I8, lanes)
        self.elements, zero = scratch(builder, operand), array(I64, 1)
        builder.store(I64(0), zero)
        self.zero = builder.ptrtoint(zero, I64)
        self.other_taps = [array(I32, others) for _ in range(DIMENSIONS)]
        self.other_offsets = array(I64, others)


def _read_image(builder: ir.IRBuilder, operand: Operand, patches: ir.Value) -> _Image:
    pointer = builder.inttoptr(patches, POINTER)

    def word(index: int) -> ir.Value:
        return builder.load(builder.gep(pointer, [I64(index)], source_etype=I64), typ=I64)

    def three(index: int) -> list[ir.Value]:
        return [word(index + d) for d in range(DIMENSIONS)]

    sizes = [splat(builder, builder.trunc(size, I32), operand.vector.lanes) for size in three(SIZE)]
    free = _Side(word(FREE_OUTER), three(FREE_EXTENT), three(FREE_STEP))
    k = _Side(word(K_OUTER), three(K_EXTENT), three(K_STEP))
    return _Image(operand, word(ADDRESS), free, k, three(START), sizes, three(STRIDE))


def _indices(builder: ir.IRBuilder, operand: Operand, source: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The free index and the step of k that a source stands for."""
    both = builder.udiv(source, I64(2 * operand.size))
    return builder.and_(both, I64(0xFFFFFFFF)), builder.lshr(both, I64(32))


def _digits(builder: ir.IRBuilder, side: _Side, index: ir.Value) -> list[ir.Value]:
    """(outer, z, y, x)"""
    digits = []
    for extent in reversed(side.extents):
        digits.append(builder.urem(index, extent))
        index = builder.udiv(index, extent)
    return [index, *reversed(digits)]


def _next(builder: ir.IRBuilder, side: _Side, digits: list[ir.Value]) -> list[ir.Value]:
    """The digits of the next index."""
    outer, *inner = digits
    carry: ir.Value = I64(1)
    following = []
    for digit, extent in zip(reversed(inner), reversed(side.extents), strict=True):
        counted = builder.add(digit, carry)
        ends = builder.icmp_signed("==", counted, extent)
        following.append(builder.select(ends, I64(0), counted))
        carry = builder.zext(ends, I64)
    return [builder.add(outer, carry), *reversed(following)]


def _slot(builder: ir.IRBuilder, array: ir.Value, index: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.gep(array, [index], source_etype=kind)


def _prepare(builder: ir.IRBuilder, image: _Image, side: _Side, first: ir.Value, room: _Room) -> _Run:
    """The run of ``lanes`` indices of a side from ``first`` on."""
    wide = ir.VectorType(I64, image.lanes)

    def lane(at: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
        second, pieces, *digits = state
        coordinates = [
            builder.add(builder.mul(digit, step), start)
            for digit, step, start in zip(digits[1:], side.steps, image.start, strict=True)
        ]
        for coordinate, array in zip(coordinates, room.coordinates, strict=True):
            builder.store(builder.trunc(coordinate, I32), _slot(builder, array, at, I32))
        offset = builder.add(builder.mul(digits[0], side.outer), image.offset(builder, coordinates))
        builder.store(offset, _slot(builder, room.offsets, at, I64))
        origin, first_origin = builder.sub(offset, at), builder.load(room.offsets, typ=I64)
        differs = builder.icmp_signed("!=", origin, first_origin)
        new = builder.or_(
            builder.icmp_signed("==", pieces, I64(1)), builder.icmp_signed("!=", origin, second)
        )  # than the second
        is_new = builder.and_(differs, new)
        second = builder.select(builder.and_(is_new, builder.icmp_signed("==", pieces, I64(1))), origin, second)
        return [second, builder.add(pieces, builder.zext(is_new, I64)), *_next(builder, side, digits)]

    digits = _digits(builder, side, first)
    _, state = repeat(builder, I64(0), I64(image.lanes), 1, [I64(0), I64(1), *digits], lane)
    second, pieces, *_ = state
    origin = builder.load(room.offsets, typ=I64)
    second = builder.select(builder.icmp_signed("==", pieces, I64(1)), origin, second)
    lanes = ir.Constant(wide, [I64(i) for i in range(image.lanes)])
    origins = builder.sub(builder.load(room.offsets, typ=wide, align=8), lanes)
    one = builder.icmp_signed("==", origins, splat(builder, origin, image.lanes))
    other = builder.and_(builder.not_(one), builder.icmp_signed("==", origins, splat(builder, second, image.lanes)))
    narrow = ir.VectorType(I32, image.lanes)
    coordinates = [builder.load(array, typ=narrow, align=4) for array in room.coordinates]
    return _Run(coordinates, room.offsets, [one, other], [origin, second], builder.icmp_signed(">", pieces, I64(2)))


def _line(builder: ir.IRBuilder, image: _Image, room: _Room, run: _Run, taps: list[ir.Value], count: ir.Value) -> _Line:
    """The run where the other side adds ``taps``, int32, to the coordinates; lanes from ``count`` on do not exist."""
    mask = image.operand.vector.mask(builder, count)
    for coordinate, tap, size in zip(run.coordinates, taps, image.sizes, strict=True):
        at = builder.add(coordinate, splat(builder, tap, image.lanes))
        mask = builder.and_(mask, builder.icmp_unsigned("<", at, size))
    masks = [builder.and_(mask, piece) for piece in run.pieces]
    bits = builder.bitcast(masks[0], ir.IntType(image.lanes))
    builder.store(builder.zext(mask, ir.VectorType(I8, image.lanes)), room.exists, align=1)
    whole = builder.icmp_signed("==", bits, ir.IntType(image.lanes)(-1))
    return _Line(run, masks, whole, room.exists)


def _read_line(builder: ir.IRBuilder, image: _Image, room: _Room, line: _Line, offset: ir.Value) -> ir.Value:
    """One vector of lanes; those that do not exist are 0. The other side adds ``offset`` elements."""
    operand, run = image.operand, line.run
    places = [element_at(builder, operand, image.address, builder.add(origin, offset)) for origin in run.origins]

    def whole() -> list[ir.Value]:
        return [operand.read(builder, places[0])]

    def pieces() -> list[ir.Value]:
        vector = operand.vector
        one, other = (
            vector.masked_load(builder, vector.at(builder, at), mask)
            for at, mask in zip(places, line.masks, strict=True)
        )
        return [builder.select(line.masks[1], other, one)]

    def gathered() -> list[ir.Value]:
        element = ir.IntType(8 * operand.size)

        def lane(at: ir.Value) -> None:
            elements = builder.add(builder.load(_slot(builder, run.offsets, at, I64), typ=I64), offset)
            exists = builder.icmp_signed("!=", builder.load(_slot(builder, line.exists, at, I8), typ=I8), I8(0))
            address = builder.select(exists, element_at(builder, operand, image.address, elements), room.zero)
            value = builder.load(builder.inttoptr(address, POINTER), typ=element, align=operand.size)
            to = element_at(builder, operand, room.elements, at)
            builder.store(value, builder.inttoptr(to, POINTER), align=operand.size)

        each(builder, image.lanes, 1, lane)
        return [operand.read(builder, room.elements)]

    def partial() -> list[ir.Value]:
        if operand.converts:  # AVX2 has no masks of 16 bits: a branch an element
            return gathered()
        return choose(builder, run.scattered, gathered, pieces)

    return choose(builder, line.whole, whole, partial)[0]


def _pack_wide(builder, image, room, target, free, k):
    """Vectors along the free index, a tap after the other, all channels of each."""
    (to, width), (first, exist), (step, steps) = target, free, k
    operand, taps = image.operand, builder.mul(*image.k.extents[:2])
    taps = builder.mul(taps, image.k.extents[X])
    end, last = builder.add(step, steps), builder.sub(taps, I64(1))

    def vector(j):
        run = _prepare(builder, image, image.free, builder.add(first, j), room)
        count = builder.sub(exist, j)

        def tap(t: ir.Value, digits: list[ir.Value]) -> list[ir.Value]:
            coordinates = [builder.mul(digit, by) for digit, by in zip(digits[1:], image.k.steps, strict=True)]
            line = _line(builder, image, room, run, [builder.trunc(x, I32) for x in coordinates], count)
            offset, before = image.offset(builder, coordinates), builder.sub(last, t)
            begin, stop = (builder.udiv(builder.add(p, before), taps) for p in (step, end))

            def channel(c):
                row = builder.sub(builder.add(builder.mul(c, taps), t), step)
                at = builder.add(offset, builder.mul(c, image.k.outer))
                lane = operand.vector.at(builder, to, builder.add(builder.mul(row, width), j))
                operand.vector.store(builder, _read_line(builder, image, room, line, at), lane)

            each(builder, stop, 1, channel, begin)
            return _next(builder, image.k, digits)

        repeat(builder, I64(0), taps, 1, [I64(0)] * (1 + DIMENSIONS), tap)

    each(builder, width, operand.vector.lanes, vector)


def _set_others(builder, image, side, first, count, exist, room):
    """For ``count`` indices of a side: what they add to coordinates and to offsets. From ``exist`` on, nowhere."""

    def one(at: ir.Value, digits: list[ir.Value]) -> list[ir.Value]:
        coordinates = [builder.mul(digit, by) for digit, by in zip(digits[1:], side.steps, strict=True)]
        missing = builder.icmp_signed(">=", at, exist)
        for coordinate, array in zip(coordinates, room.other_taps, strict=True):
            tap = builder.select(missing, I32(NOWHERE), builder.trunc(coordinate, I32))
            builder.store(tap, _slot(builder, array, at, I32))
        offset = builder.add(builder.mul(digits[0], side.outer), image.offset(builder, coordinates))
        builder.store(offset, _slot(builder, room.other_offsets, at, I64))
        return _next(builder, side, digits)

    repeat(builder, I64(0), count, 1, _digits(builder, side, first), one)


def _read_other(builder, image, room, run, at, count):
    """The vector of a run for index ``at`` of those of ``_set_others``."""
    taps = [builder.load(_slot(builder, array, at, I32), typ=I32) for array in room.other_taps]
    line = _line(builder, image, room, run, taps, count)
    offset = builder.load(_slot(builder, room.other_offsets, at, I64), typ=I64)
    return _read_line(builder, image, room, line, offset)


def _pack_transposed(builder, image, room, target, free, k):
    """Vectors along k, transposed: a block of pixels after the other, all columns of each."""
    (to, width), (first, exist), (step, steps) = target, free, k
    vector, lanes = image.operand.vector, image.lanes
    _set_others(builder, image, image.free, first, width, exist, room)

    def block(p):
        run, left = _prepare(builder, image, image.k, builder.add(step, p), room), builder.sub(steps, p)

        def columns(j):
            read = [_read_other(builder, image, room, run, builder.add(j, I64(i)), left) for i in range(lanes)]
            for i, row in enumerate(vector.transpose(builder, read)):
                at = builder.add(builder.mul(builder.add(p, I64(i)), width), j)
                with builder.if_then(builder.icmp_signed("<", I64(i), left), likely=True):
                    vector.store(builder, row, vector.at(builder, to, at))

        each(builder, width, lanes, columns)

    each(builder, steps, lanes, block)
