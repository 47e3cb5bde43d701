"""Packing of operands that are patches of an image: panels as in pack.py, of elements found by digits.

Vectors lie along the index that counts pixels. Along columns of B they are stored as they are (patch_columns.py). Along
k they are transposed for B, and stored as they are for A; none crosses the end of a row of the image.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from llvmlite import ir

from .config import BlockConfig
from .operand import Operand, operand_of
from .pack import element_at
from .patch_columns import TAPS, Panel, pack_columns
from .patch_runs import (
    Image,
    Line,
    Room,
    Run,
    X,
    digits_of,
    distance_of,
    following,
    indices_of,
    is_inside,
    lanes_inside,
    place_of,
    read_image,
    read_line,
    read_masked,
    read_seconds,
    run_in_row,
    set_others,
    slot,
)
from .simd import I1, I32, I64, POINTER, choose, each, function_ir, repeat_to, splat

PATCH_STEPS_ARGUMENTS, PATCH_ROWS_ARGUMENTS = 6, 6
ROWS = 256  # at a time, for which a run is found once
FAR = -(1 << 30)  # from any coordinate to one outside
FEW_PIXELS = 64  # of an outer index, up to which those of the next one are fetched ahead


def make_kernels(config: BlockConfig) -> dict[str, str]:
    """IR by C name of both functions for a dtype."""
    operand, name = operand_of(config), config.name
    return {
        f"{name}_patch_steps": patch_steps_ir(f"{name}_patch_steps", operand, config.nr),
        f"{name}_patch_rows": patch_rows_ir(f"{name}_patch_rows", operand),
    }


def patch_steps_ir(name: str, operand: Operand, width: int) -> str:
    """IR of ``void name(target, width, source, k, exist, patches)``: rows are steps of k, as of ``pack_steps``.

    source is what ``patches_args`` has in the place of an address; width is that of a panel.
    """

    def emit(builder, target, width_, source, k, exist, patches):
        steps = operand.of_steps
        image = read_image(builder, steps, patches)
        room = Room(builder, steps, max(width, TAPS), width // steps.vector.lanes)
        panel = Panel(operand, target, width_)
        if operand.k_per_lane == 2:
            with builder.if_then(builder.trunc(k, I1)):
                panel.clear(builder, builder.lshr(k, I64(1)))
        first, step = indices_of(builder, operand, source)
        transposes = builder.icmp_signed(">", image.k.extents[X], image.free.extents[X])  # along pixels, not along taps
        with builder.if_else(transposes) as (deep, wide):
            with deep:
                _pack_transposed(builder, image, room, panel, (first, exist), (step, k))
            with wide:
                pack_columns(builder, image, room, panel, (first, exist), (step, k))

    return function_ir(name, PATCH_STEPS_ARGUMENTS, emit)


def patch_rows_ir(name: str, operand: Operand) -> str:
    """IR of ``void name(target, rows, stride, source, k, patches)``: a row's steps of k are adjacent."""

    def emit(builder, target, rows, stride, source, k, patches):
        steps = operand.of_steps
        image, room = read_image(builder, steps, patches), Room(builder, steps, ROWS)
        first, step = indices_of(builder, operand, source)
        ahead = _bytes_ahead(builder, image)

        def some_rows(i):
            left = builder.sub(rows, i)
            count = builder.select(builder.icmp_signed("<", left, I64(ROWS)), left, I64(ROWS))
            set_others(builder, image, image.free, builder.add(first, i), count, count, room)
            begin = operand.vector.at(builder, target, builder.mul(i, stride))
            block = _Rows(operand, image, room, begin, stride, ahead)

            if operand.k_per_lane == 2:  # as in a panel; after an even number of steps there is room, too
                last = builder.lshr(k, I64(1))

                def clear(i):
                    builder.store(I32(0), operand.vector.at(builder, block.row(builder, i), last), align=4)

                each(builder, count, 1, clear)

            def some_pixels(p, run, exist, read):
                each(builder, count, 1, lambda i: block.pack_pixels(builder, i, p, run, exist, read))

            def pixels_apart(p, run, exist):
                whole = builder.icmp_signed(">", exist, I64(image.lanes))
                lanes = builder.select(whole, I64(image.lanes), exist)
                distance = distance_of(builder, image, image.k)

                def element(lane):  # of all rows one after the other: a loop over a few lanes would be all overhead
                    first, at = builder.add(run.origins[0], builder.mul(lane, distance)), builder.add(p, lane)
                    each(builder, count, 1, lambda i: block.pack_element(builder, i, at, first))

                each(builder, lanes, 1, element)

            _rows_of_pixels(builder, image, room, step, k, some_pixels, pixels_apart)

        each(builder, rows, ROWS, some_rows)

    return function_ir(name, PATCH_ROWS_ARGUMENTS, emit)


@dataclass(frozen=True)
class _Rows:
    """Rows of a block of A, ``stride`` lanes apart from ``target`` on, whose digits are in ``room``.

    ahead: the distance, in bytes, of what follows in memory, which is fetched while a row is read.
    """

    operand: Operand
    image: Image
    room: Room
    target: ir.Value
    stride: ir.Value
    ahead: ir.Value

    def row(self, builder: ir.IRBuilder, i: ir.Value) -> ir.Value:
        """Address of row i."""
        return builder.ptrtoint(self.operand.vector.at(builder, self.target, builder.mul(i, self.stride)), I64)

    def pack_pixels(self, builder, i, p, run, exist, read):
        """Steps of k from ``p`` on of row i: those of a run."""
        if read is _read_inside:
            self._place(builder, i, run.origins[0])
        value = read(builder, self.image, self.room, run, i, exist)
        self.operand.store_in_row(builder, value, self.row(builder, i), p)

    def pack_element(self, builder, i, p, first):
        """Step ``p`` of row i: one element."""
        value = self.image.operand.read(builder, self._place(builder, i, first), I64(1))
        self.operand.store_one_in_row(builder, value, self.row(builder, i), p)

    def _place(self, builder, i, first):
        """Address of element ``first`` of row i."""
        other = builder.load(slot(builder, self.room.other_offsets, i, I64), typ=I64)
        place = element_at(builder, self.operand, self.image.address, builder.add(first, other))
        self.operand.vector.prefetch(builder, builder.inttoptr(builder.add(place, self.ahead), POINTER))
        return place


def _bytes_ahead(builder: ir.IRBuilder, image: Image) -> ir.Value:
    """From a row's pixels to those of its next outer index, where that has few; else 0.

    Few pixels of many rows are adjacent in memory, those of the next index are pages apart: no hardware follows.
    """
    pixels = builder.mul(builder.mul(*image.k.extents[:X]), image.k.extents[X])
    is_short = builder.icmp_signed("<=", pixels, I64(FEW_PIXELS))
    return builder.select(is_short, builder.mul(image.k.outer, I64(image.operand.size)), I64(0))


def _pack_transposed(builder, image, room, panel, free, k):
    """Vectors along k, transposed: some pixels after the other, all columns of each.

    Columns that do not exist are as the last one.
    """
    (first, exist), (step, steps) = free, k
    vector, lanes = image.operand.vector, image.lanes
    set_others(builder, image, image.free, first, panel.width, exist, room)

    kept = builder.alloca(vector.type, lanes)

    def some_pixels(p, run, count, read):
        def columns(j):
            def one(i):
                value = read(builder, image, room, run, builder.add(j, i), count)
                vector.store(builder, value, vector.at(builder, kept, builder.mul(i, I64(lanes))))

            if read is _read_any:  # which is long
                each(builder, lanes, 1, one)
                columns = [vector.load(builder, vector.at(builder, kept, i * lanes)) for i in range(lanes)]
            else:
                columns = [read(builder, image, room, run, builder.add(j, I64(i)), count) for i in range(lanes)]
            for i, row in enumerate(vector.transpose(builder, columns)):
                with builder.if_then(builder.icmp_signed("<", I64(i), count), likely=True):
                    panel.store(builder, row, builder.add(p, I64(i)), j)

        each(builder, panel.width, lanes, columns)

    _rows_of_pixels(builder, image, room, step, steps, some_pixels)


def _rows_of_pixels(builder, image, room, step, k, emit, emit_apart=None):
    """``emit(p, run, count, read)`` for vectors along k, steps p to p + count of ``k`` from ``step`` on.

    None crosses the end of a row of the image. read: the function that reads one, by where it lies.
    ``emit_apart(p, run, count)``, where it is there, for those inside the image, whatever digits of the free index are
    added, whose elements are not adjacent.
    """
    extent, distance = image.k.extents[X], distance_of(builder, image, image.k)

    def row(p: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
        *outer, x = state
        left, to_end = builder.sub(k, p), builder.sub(extent, x)
        length = builder.select(builder.icmp_signed("<", left, to_end), left, to_end)

        def vector(v):
            digits = [*outer, builder.add(x, v)]
            *coordinates, one, other, origin, _, scattered = run_in_row(builder, image, image.k, digits, room.offsets)
            second = builder.icmp_signed("==", distance, I64(2))
            run = Run(coordinates, room.offsets, [one, other], [origin, origin], scattered, second)
            count = builder.sub(length, v)
            at, adjacent = builder.add(p, v), builder.icmp_signed("==", distance, I64(1))

            def by(read):
                return lambda: emit(at, run, count, read)

            def outside():
                if emit_apart is not None or not image.operand.has_masks:
                    emit(at, run, count, _read_any)
                    return
                seconds = functools.partial(_either, builder, second, by(_read_seconds), by(_read_any))
                _either(builder, adjacent, by(_read_masked), seconds)

            def inside_or_not():
                _either(builder, builder.and_(adjacent, inside), by(_read_inside), outside)

            inside = is_inside(builder, image, image.free, run, count)
            if emit_apart is None:
                inside_or_not()
                return
            apart = builder.and_(inside, builder.not_(adjacent))
            _either(builder, apart, lambda: emit_apart(at, run, count), inside_or_not)

        each(builder, length, image.lanes, vector)
        last = [*outer, builder.sub(extent, I64(1))]
        return [builder.add(p, length), *following(builder, image.k, last)]

    repeat_to(builder, I64(0), k, digits_of(builder, image.k, step), row)


def _either(builder, condition, then, otherwise):
    with builder.if_else(condition) as (one, other):
        with one:
            then()
        with other:
            otherwise()


# The vector of a run for index ``at`` of those of ``set_others``; lanes from ``count`` on are 0.


def _read_inside(builder, image, room, run, at, count):
    """Of adjacent elements, none of which is outside of the image."""
    read, place = image.operand.read, place_of(builder, image, run.origins[0], _offset(builder, room, at))
    whole = builder.icmp_signed(">=", count, I64(image.lanes))
    return choose(builder, whole, lambda: [read(builder, place)], lambda: [read(builder, place, count)])[0]


def _read_masked(builder, image, room, run, at, count):
    """Of adjacent elements."""
    exists = _inside_row(builder, image, room, run, at, count)
    return read_masked(builder, image, run.origins[0], _offset(builder, room, at), exists)


def _read_seconds(builder, image, room, run, at, count):
    """Of every second element of a row."""
    exists = _inside_row(builder, image, room, run, at, count)
    return read_seconds(builder, image, run.origins[0], _offset(builder, room, at), exists)


def _read_any(builder, image, room, run, at, count):
    taps = [builder.load(slot(builder, array, at, I32), typ=I32) for array in room.other_taps]
    exists = lanes_inside(builder, image, run, image.operand.vector.mask(builder, count), taps)
    return read_line(builder, image, room, Line(run, exists), _offset(builder, room, at))


def _offset(builder, room, at):
    return builder.load(slot(builder, room.other_offsets, at, I64), typ=I64)


def _inside_row(builder, image, room, run, at, count):
    """``lanes_inside`` for a run in one row: z and y are numbers, and where one is outside x is put outside too."""
    *others, x = [builder.load(slot(builder, array, at, I32), typ=I32) for array in room.other_taps]
    for coordinate, tap, size in zip(run.coordinates, others, image.sizes):
        coordinate, size = (builder.extract_element(v, I32(0)) for v in (coordinate, size))
        x = builder.select(builder.icmp_unsigned("<", builder.add(coordinate, tap), size), x, I32(FAR))
    at = builder.add(run.coordinates[X], splat(builder, x, image.lanes))
    return builder.and_(image.operand.vector.mask(builder, count), builder.icmp_unsigned("<", at, image.sizes[X]))
