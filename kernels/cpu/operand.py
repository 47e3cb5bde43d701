"""Conversions: elements of an operand to vector lanes of a panel, and lanes of a result to its elements.

| stored as           | a lane of a panel holds            | by                                          |
|---------------------|------------------------------------|---------------------------------------------|
| float32, float64    | the element                        | vmovups                                     |
| float16             | the element as float32             | vcvtph2ps                                   |
| bfloat16            | the element as float32             | vpmovzxwd, vpslld                           |
| bfloat16, bf16_dot  | two elements, k and k+1, low first | as in memory, or zero-extended and or-ed    |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llvmlite import ir

from .config import SIZES, BlockConfig
from .simd import I1, I16, I32, I64, REGISTERS, Vector, choose


def operand_of(config: BlockConfig) -> Operand:
    registers = REGISTERS.get(config.isa, "x")
    return Operand(Vector(config.accumulator, config.lanes, config.fused, config.bf16_dot, registers), config.dtype)


@dataclass(frozen=True)
class Operand:
    """Elements of ``dtype`` in memory, lanes of ``vector`` in a panel."""

    vector: Vector
    dtype: str

    @property
    def size(self) -> int:
        """Bytes of an element in memory."""
        return SIZES[self.dtype]

    @property
    def k_per_lane(self) -> int:
        """Steps of k in one lane."""
        return 2 if self.vector.bf16_dot else 1

    @property
    def converts(self) -> bool:
        """Whether a lane is anything but the element itself."""
        return self.dtype != self.vector.dtype

    def read(self, builder: ir.IRBuilder, address: ir.Value, count: ir.Value | None = None) -> ir.Value:
        """One vector of lanes from adjacent elements; those from ``count`` on are not read and give 0."""
        vector = self.vector
        if not self.converts:
            return self._load(builder, vector, address, count)
        if vector.bf16_dot:
            return builder.bitcast(self._load(builder, self._stored(2 * vector.lanes), address, count), vector.type)
        return self._widen(builder, self._load(builder, self._stored(vector.lanes), address, count))

    @property
    def has_masks(self) -> bool:
        """Whether one instruction reads adjacent elements under a mask: under AVX2, of 32 and 64 bits."""
        return not self.converts or self.vector.lanes * self.vector.size == 64

    def read_masked(self, builder: ir.IRBuilder, address: ir.Value, mask: ir.Value) -> ir.Value:
        """One vector of lanes, an element in each; those whose mask is off are not read and give 0."""
        if not self.converts:
            return self.vector.masked_load(builder, self.vector.at(builder, address), mask)
        stored = self._stored(self.vector.lanes)
        return self._widen(builder, stored.masked_load(builder, stored.at(builder, address), mask))

    @property
    def splits(self) -> bool:
        """Whether two elements share a lane in a transpose, which moves half as many lanes, and are split after it.

        Without a fused multiply-add there are too few registers.
        """
        return self.dtype == "bfloat16" and self.k_per_lane == 1 and self.vector.fused

    @property
    def block_steps(self) -> int:
        """Steps of k (or pairs) in a block that is transposed."""
        return self.vector.lanes * (2 if self.splits else 1)

    def read_block(self, builder: ir.IRBuilder, address: ir.Value, count: ir.Value | None = None) -> ir.Value:
        """As ``read``, for a transpose: of an operand that splits, lanes of two elements."""
        if not self.splits:
            return self.read(builder, address, count)
        pairs = self._load(builder, self._stored(2 * self.vector.lanes), address, count)
        return builder.bitcast(pairs, self.vector.type)

    def steps_of_block(self, builder: ir.IRBuilder, columns: list[ir.Value]) -> Iterator[ir.Value]:
        """The steps of k of ``lanes`` columns from ``read_block``, one vector each."""
        wide = ir.VectorType(I32, self.vector.lanes)
        for lanes in self.vector.transpose(builder, columns):
            if not self.splits:
                yield lanes
                continue
            pair = builder.bitcast(lanes, wide)
            low = builder.shl(pair, ir.Constant(wide, [I32(16)] * self.vector.lanes))
            yield builder.bitcast(low, self.vector.type)
            high = builder.and_(pair, ir.Constant(wide, [I32(0xFFFF0000)] * self.vector.lanes))
            yield builder.bitcast(high, self.vector.type)

    def interleave(
        self,
        builder: ir.IRBuilder,
        low: ir.Value,
        high: ir.Value,
        count: ir.Value | None,
        has_high: ir.Value | None = None,
    ) -> ir.Value:
        """Lanes of pairs from two rows: elements of ``low`` below those of ``high``, 0 where ``has_high`` is false."""
        stored, wide = self._stored(self.vector.lanes), ir.VectorType(I32, self.vector.lanes)

        def pairs() -> list[ir.Value]:
            halves = builder.zext(self._load(builder, stored, high, count), wide)
            halves = builder.shl(halves, ir.Constant(wide, [I32(16)] * self.vector.lanes))
            return [builder.or_(lows, halves)]

        lows = builder.zext(self._load(builder, stored, low, count), wide)
        (lanes,) = pairs() if has_high is None else choose(builder, has_high, pairs, lambda: [lows])
        return builder.bitcast(lanes, self.vector.type)

    @property
    def of_steps(self) -> Operand:
        """The same elements, one step of k in a lane."""
        return replace(self, vector=replace(self.vector, bf16_dot=False))

    def store_step(self, builder: ir.IRBuilder, value: ir.Value, column: ir.Value, width: ir.Value, step: ir.Value):
        """Store lanes of ``of_steps`` in the row of a panel that holds ``step``: of pairs, their half of each lane.

        column: the address of the first lane in the panel's first row; width: lanes from one row to the next.
        """
        vector = self.vector
        row = builder.lshr(step, I64(1)) if vector.bf16_dot else step
        at = vector.at(builder, column, builder.mul(row, width))
        if not vector.bf16_dot:
            vector.store(builder, value, at)
            return
        halves, lanes = self._stored(2 * vector.lanes), ir.VectorType(I32, vector.lanes)
        is_high = builder.trunc(step, I1)
        high = builder.bitcast(value, lanes)
        low = builder.lshr(high, ir.Constant(lanes, [I32(16)] * vector.lanes))
        masks = [
            ir.Constant(ir.VectorType(I1, halves.lanes), [I1(i % 2 == x) for i in range(halves.lanes)]) for x in (1, 0)
        ]
        mask = builder.select(is_high, *masks)
        halves.masked_store(builder, builder.bitcast(builder.select(is_high, high, low), halves.type), at, mask)

    def store_in_row(self, builder: ir.IRBuilder, value: ir.Value, row: ir.Value, step: ir.Value) -> None:
        """Store lanes of ``of_steps`` from ``step`` on in a row of a block of A, whose steps of k are adjacent."""
        vector = self.vector
        if not vector.bf16_dot:
            vector.store(builder, value, vector.at(builder, row, step))
            return
        stored, lanes = self._stored(vector.lanes), ir.VectorType(I32, vector.lanes)
        high = builder.lshr(builder.bitcast(value, lanes), ir.Constant(lanes, [I32(16)] * vector.lanes))
        stored.store(builder, builder.trunc(high, stored.type), stored.at(builder, row, step))

    def store_one_in_row(self, builder: ir.IRBuilder, value: ir.Value, row: ir.Value, step: ir.Value) -> None:
        """Likewise of the first lane alone."""
        first = builder.extract_element(value, I32(0))
        if not self.vector.bf16_dot:
            builder.store(first, self.vector.at(builder, row, step))
            return
        high = builder.trunc(builder.lshr(builder.bitcast(first, I32), I32(16)), I16)
        builder.store(high, self._stored(1).at(builder, row, step))

    def write(self, builder: ir.IRBuilder, value: ir.Value, address: ir.Value, count: ir.Value | None = None) -> None:
        """Round lanes to the stored dtype, to nearest and even, and store them, or those below ``count``."""
        stored = self._stored(self.vector.lanes) if self.converts else self.vector
        pointer = stored.at(builder, address)
        value = self._round(builder, value) if self.converts else value
        if count is None:
            stored.store(builder, value, pointer)
        else:
            stored.masked_store(builder, value, pointer, stored.mask(builder, count))

    def _stored(self, lanes: int) -> Vector:
        """float16 as it is; bfloat16, which LLVM's IR builder has no type for, as 16-bit integers."""
        return Vector(self.dtype if self.dtype == "float16" else "int16", lanes)

    @staticmethod
    def _load(builder: ir.IRBuilder, kind: Vector, address: ir.Value, count: ir.Value | None) -> ir.Value:
        pointer = kind.at(builder, address)
        if count is None:
            return kind.load(builder, pointer)
        return kind.masked_load(builder, pointer, kind.mask(builder, count))

    def _widen(self, builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
        if self.dtype == "float16":
            return builder.fpext(value, self.vector.type)
        wide = ir.VectorType(I32, self.vector.lanes)
        shift = ir.Constant(wide, [I32(16)] * self.vector.lanes)
        return builder.bitcast(builder.shl(builder.zext(value, wide), shift), self.vector.type)

    def _round(self, builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
        if self.dtype == "float16":
            return builder.fptrunc(value, ir.VectorType(ir.HalfType(), self.vector.lanes))
        lanes = self.vector.lanes
        wide, narrow = ir.VectorType(I32, lanes), ir.VectorType(I16, lanes)

        def constant(number: int) -> ir.Constant:
            return ir.Constant(wide, [I32(number)] * lanes)

        bits = builder.bitcast(value, wide)
        odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
        rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))
        # Adding could carry a NaN into infinity: keep its upper half and make it quiet.
        nan = builder.fcmp_unordered("uno", value, value)
        chosen = builder.select(nan, builder.or_(bits, constant(0x400000)), rounded)
        return builder.trunc(builder.lshr(chosen, constant(16)), narrow)
