"""Panels of B whose columns are pixels of an image: vectors along columns, all taps of a channel one after the other.

Which lanes exist depends on the tap alone, so masks are made once for a tap and used for all channels. Where each
vector of a panel is adjacent in memory, a row is read as one stretch of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from .operand import Operand
from .patch_runs import (
    Image,
    Line,
    Room,
    Run,
    X,
    all_of,
    distance_of,
    is_inside,
    keep_mask,
    kept_mask,
    lanes_inside,
    place_of,
    read_line,
    read_masked,
    read_seconds,
    run_from,
    set_others,
    slot,
)
from .simd import I1, I32, I64, POINTER, choose, each, repeat

TAPS = 64  # of a channel at a time, for which masks are kept
AHEAD = 16  # rows, about, by which the same pixels of a later channel are fetched: it is pages away


@dataclass(frozen=True)
class Panel:
    """A column panel of B: its first lane, and lanes from one row to the next."""

    operand: Operand
    address: ir.Value
    width: ir.Value

    def store(self, builder: ir.IRBuilder, value: ir.Value, step: ir.Value, column: ir.Value) -> None:
        at = builder.ptrtoint(self.operand.vector.at(builder, self.address, column), I64)
        self.operand.store_step(builder, value, at, self.width, step)

    def clear(self, builder: ir.IRBuilder, row: ir.Value) -> None:
        """Of an odd number of steps the last pair has one: the other is 0."""
        vector, first = self.operand.vector, builder.mul(row, self.width)
        each(
            builder, self.width, vector.lanes,
            lambda j: vector.store(builder, vector.zero(), vector.at(builder, self.address, builder.add(first, j))),
        )  # fmt: skip


def pack_columns(builder, image, room, panel, free, k):
    """The steps ``k`` = (first, number) of the columns ``free`` = (first, number) as rows of a panel."""
    (first, exist), (step, steps), lanes = free, k, image.lanes
    taps = builder.mul(builder.mul(*image.k.extents[:X]), image.k.extents[X])

    def find(v: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
        j = builder.mul(v, I64(lanes))
        run, left = run_from(builder, image, image.free, builder.add(first, j), room, v), builder.sub(exist, j)
        room.keep(builder, v, run)
        missing = builder.not_(image.operand.vector.mask(builder, left))
        adjacent = all_of(builder, builder.or_(run.pieces[0], missing))
        inside = builder.and_(
            builder.icmp_signed(">=", left, I64(lanes)), is_inside(builder, image, image.k, run, left)
        )
        return [builder.and_(known, now) for known, now in zip(state, (adjacent, inside), strict=True)]

    dense = builder.icmp_signed("==", distance_of(builder, image, image.free), I64(1))
    _, (adjacent, inside) = repeat(builder, I64(0), I64(room.runs), 1, [dense, I1(1)], find)

    def some_taps(begin):
        left = builder.sub(taps, begin)
        count = builder.select(builder.icmp_signed("<", left, I64(TAPS)), left, I64(TAPS))
        set_others(builder, image, image.k, begin, count, count, room)
        rows = _Rows(image, room, panel, exist, step, builder.add(step, steps), taps, begin, count)

        def partial():
            if not image.operand.has_masks:
                return rows.pack_apart(builder)
            return choose(builder, adjacent, lambda: rows.pack(builder, True), lambda: rows.pack_apart(builder))

        choose(builder, builder.and_(inside, adjacent), lambda: rows.pack(builder, False), partial)

    each(builder, taps, TAPS, some_taps)


@dataclass(frozen=True)
class _Rows:
    """Rows ``step`` to ``end`` of B for ``count`` of all ``taps``, from ``begin`` on, whose digits are in ``room``.

    As are the runs of the panel's vectors, of whose lanes ``exist`` exist.
    """

    image: Image
    room: Room
    panel: Panel
    exist: ir.Value
    step: ir.Value
    end: ir.Value
    taps: ir.Value
    begin: ir.Value
    count: ir.Value

    def pack(self, builder: ir.IRBuilder, is_masked: bool) -> list[ir.Value]:
        """All vectors of a row together: each is adjacent in memory, and inside the image unless ``is_masked``."""
        image, room = self.image, self.room
        if is_masked:
            each(builder, room.runs, 1, lambda v: self._set_masks(builder, v))
        vectors = [I64(v) for v in range(room.runs)]
        origins = [builder.load(slot(builder, room.origins[0], v, I64), typ=I64) for v in vectors]

        def row(t, offset, ahead, p):
            for v, origin in zip(vectors, origins, strict=True):
                self._fetch(builder, origin, ahead)
                if is_masked:
                    value = read_masked(builder, image, origin, offset, self._mask(builder, t, v))
                else:
                    value = image.operand.read(builder, place_of(builder, image, origin, offset))
                self.panel.store(builder, value, p, builder.mul(v, I64(image.lanes)))

        self._each_row(builder, row)
        return []

    def pack_apart(self, builder: ir.IRBuilder) -> list[ir.Value]:
        """One vector of each row, then the next one."""
        image, room, lanes = self.image, self.room, self.image.lanes
        every_second = builder.icmp_signed("==", distance_of(builder, image, image.free), I64(2))

        def vector(v):
            j, run = builder.mul(v, I64(lanes)), room.kept(builder, v, lanes, every_second)
            exist, whole = builder.sub(self.exist, j), all_of(builder, run.pieces[0])
            inside = builder.icmp_signed(">=", exist, I64(lanes))
            inside = builder.and_(inside, is_inside(builder, image, image.k, run, exist))

            def seconds():
                return self._pack_vector(
                    builder, run, j, lambda _, offset: read_seconds(builder, image, run.origins[0], offset)
                )

            def other():
                self._set_masks(builder, v)

                def read(t, offset):
                    line = Line(run, self._mask(builder, t, v))
                    return read_line(builder, image, room, line, offset)

                return self._pack_vector(builder, run, j, read)

            choose(builder, builder.and_(builder.and_(inside, whole), every_second), seconds, other)

        each(builder, room.runs, 1, vector)
        return []

    def _pack_vector(self, builder, run: Run, j, read: Callable) -> list[ir.Value]:
        lanes = self.image.lanes
        distance = distance_of(builder, self.image, self.image.free)
        last = builder.add(run.origins[1], builder.mul(distance, I64(lanes - 1)))

        def row(t, offset, ahead, p):
            for place in (run.origins[0], last):
                self._fetch(builder, place, ahead)
            self.panel.store(builder, read(t, offset), p, j)

        self._each_row(builder, row)
        return []

    def _each_row(self, builder, emit: Callable) -> None:
        """``emit(t, offset, ahead, row)`` for tap ``begin`` + t of each channel.

        offset: what the channel and the tap add to a run; ahead: a later channel, and the tap.
        """
        outer = self.image.k.outer
        stop = builder.udiv(builder.add(self.end, builder.sub(self.taps, I64(1))), self.taps)
        distance = builder.mul(builder.add(builder.udiv(I64(AHEAD), self.taps), I64(1)), outer)

        def channel(c):
            row = builder.add(builder.sub(builder.mul(c, self.taps), self.step), self.begin)
            first, left = builder.neg(row), builder.sub(builder.sub(self.end, self.step), row)
            low = builder.select(builder.icmp_signed(">", first, I64(0)), first, I64(0))
            high = builder.select(builder.icmp_signed("<", left, self.count), left, self.count)
            of_channel = builder.mul(c, outer)

            def tap(t):
                of_tap = builder.load(slot(builder, self.room.other_offsets, t, I64), typ=I64)
                offset = builder.add(of_channel, of_tap)
                emit(t, offset, builder.add(offset, distance), builder.add(row, t))

            each(builder, high, 1, tap, low)

        each(builder, stop, 1, channel, builder.udiv(self.step, self.taps))

    def _fetch(self, builder, origin, offset):
        place = builder.inttoptr(place_of(builder, self.image, origin, offset), POINTER)
        self.image.operand.vector.prefetch(builder, place)

    def _set_masks(self, builder, v):
        """For each tap the lanes of vector ``v`` that it leaves in the image."""
        image, room, lanes = self.image, self.room, self.image.lanes
        run, exist = room.kept(builder, v, lanes, I1(0)), builder.sub(self.exist, builder.mul(v, I64(lanes)))

        def tap(t):
            taps = [builder.load(slot(builder, array, t, I32), typ=I32) for array in room.other_taps]
            exists = lanes_inside(builder, image, run, image.operand.vector.mask(builder, exist), taps)
            keep_mask(builder, room.other_masks, self._mask_at(builder, t, v), exists, room.mask)

        each(builder, self.count, 1, tap)

    def _mask(self, builder, t, v):
        return kept_mask(builder, self.room.other_masks, self._mask_at(builder, t, v), self.room.mask)

    def _mask_at(self, builder, t, v):
        return builder.add(builder.mul(t, I64(self.room.runs)), v)
