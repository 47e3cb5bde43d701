"""Vector instructions as LLVM IR: one builder per instruction, each named beside the assembly it becomes.

Numba has no vector types, so the inner loops are written here as IR over ``<lanes x float>`` and reach Numba
code as intrinsics. An address is an int64 in Numba code and becomes a pointer only here.

| builder         | AVX-512                     | AVX2                       | NEON      |
|-----------------|-----------------------------|----------------------------|-----------|
| load / store    | vmovups zmm                 | vmovups ymm                | ldr / str |
| broadcast       | vbroadcastss or {1to16}     | vbroadcastss ymm           | ld1r      |
| fma             | vfmadd231ps zmm             | vfmadd231ps ymm            | fmla      |
| masked load     | vmovups zmm {k}{z}          | vmaskmovps                 | (scalars) |
| transpose       | vunpcklps, vshuff, vpermt2  | vunpcklps, vperm2f128      | zip, trn  |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir
from numba.core import cgutils

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
POINTER = ir.PointerType()
SCALARS = {
    "float32": (ir.FloatType(), 4, "f32"),
    "float64": (ir.DoubleType(), 8, "f64"),
    "float16": (ir.HalfType(), 2, "f16"),
    "int16": (I16, 2, "i16"),
}


class _BFloat(ir.FloatType):
    """LLVM's bfloat, which llvmlite does not know."""

    intrinsic_name = "bfloat"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()


# LLVM's constraint for any vector register. "x", of the other instruction sets, is the first 16 of them: here half.
REGISTERS = {"avx512": "v", "neon": "w"}


@dataclass(frozen=True)
class Vector:
    """``lanes`` elements of ``dtype`` in one register.

    fused: the CPU has a fused multiply-add. bf16_dot: a lane holds two bfloat16, and ``fma`` adds both products to
    the float32 lane. registers: what LLVM calls those that may hold one (see ``REGISTERS``).
    """

    dtype: str
    lanes: int
    fused: bool = True
    bf16_dot: bool = False
    registers: str = "x"

    @property
    def scalar(self) -> ir.Type:
        return SCALARS[self.dtype][0]

    @property
    def size(self) -> int:
        """Bytes of one element."""
        return SCALARS[self.dtype][1]

    @property
    def type(self) -> ir.VectorType:
        return ir.VectorType(self.scalar, self.lanes)

    @property
    def suffix(self) -> str:
        return f"v{self.lanes}{SCALARS[self.dtype][2]}"

    def zero(self) -> ir.Constant:
        return ir.Constant(self.type, None)

    def at(self, builder: ir.IRBuilder, address: ir.Value, index: ir.Value | int = 0) -> ir.Value:
        """Pointer to element ``index`` behind ``address`` (an int64)."""
        pointer = builder.inttoptr(address, POINTER) if address.type == I64 else address
        offset = I64(index) if isinstance(index, int) else index
        return builder.gep(pointer, [offset], source_etype=self.scalar)

    def load(self, builder: ir.IRBuilder, pointer: ir.Value) -> ir.Value:
        """``vmovups zmm, [pointer]``"""
        return builder.load(pointer, typ=self.type, align=self.size)

    def store(self, builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value) -> None:
        """``vmovups [pointer], zmm``"""
        builder.store(value, pointer, align=self.size)

    def broadcast(self, builder: ir.IRBuilder, pointer: ir.Value) -> ir.Value:
        """``vbroadcastss zmm, [pointer]``, or folded into the fma as ``{1to16}``"""
        return splat(builder, builder.load(pointer, typ=self.scalar, align=self.size), self.lanes)

    def fma(self, builder: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """``vfmadd231ps``: x·y + z with one rounding (two where the CPU has no such instruction).

        With ``bf16_dot`` ``vdpbf16ps``: z + x₁·y₁ + x₀·y₀, a rounding each, denormals taken as 0.
        """
        if self.bf16_dot:
            both = ir.VectorType(_BFloat(), 2 * self.lanes)
            name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * self.lanes}"
            callee = self._declare(builder, name, self.type, [self.type, both, both])
            return builder.call(callee, [z, builder.bitcast(x, both), builder.bitcast(y, both)])
        name = f"llvm.{'fma' if self.fused else 'fmuladd'}.{self.suffix}"
        return builder.call(self._declare(builder, name, self.type, [self.type] * 3), [x, y, z])

    def mask(self, builder: ir.IRBuilder, count: ir.Value, skipped: int = 0) -> ir.Value:
        """``<lanes x i1>``: lane i is on where skipped + i < count."""
        wide = ir.VectorType(I64, self.lanes)
        lanes = ir.Constant(wide, [I64(skipped + i) for i in range(self.lanes)])
        return builder.icmp_signed("<", lanes, splat(builder, count, self.lanes))

    def masked_load(self, builder: ir.IRBuilder, pointer: ir.Value, mask: ir.Value) -> ir.Value:
        """``vmovups zmm {k}{z}, [pointer]``: lanes that are off read nothing and give 0."""
        name = f"llvm.masked.load.{self.suffix}.p0"
        callee = self._declare(builder, name, self.type, [POINTER, I32, mask.type, self.type])
        return builder.call(callee, [pointer, I32(self.size), mask, self.zero()])

    def masked_store(self, builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value, mask: ir.Value) -> None:
        """``vmovups [pointer] {k}, zmm``: lanes that are off write nothing."""
        name = f"llvm.masked.store.{self.suffix}.p0"
        callee = self._declare(builder, name, ir.VoidType(), [self.type, POINTER, I32, mask.type])
        builder.call(callee, [value, pointer, I32(self.size), mask])

    def prefetch(self, builder: ir.IRBuilder, pointer: ir.Value, level: int = 1) -> None:
        """``prefetcht0 [pointer]``, or ``prefetcht1`` where ``level`` is 2, the cache to fetch into."""
        callee = self._declare(builder, "llvm.prefetch.p0", ir.VoidType(), [POINTER, I32, I32, I32])
        builder.call(callee, [pointer, I32(0), I32(4 - level), I32(1)])

    def transpose(self, builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
        """``lanes`` rows of ``lanes`` become columns, in log2(lanes) rounds of two-register shuffles.

        Round d swaps bit d of the row number with bit d of the lane number, so that after the last round
        element (i, j) has become (j, i).
        """
        distance = 1
        while distance < self.lanes:
            low = [lane + (self.lanes - distance if lane & distance else 0) for lane in range(self.lanes)]
            high = [lane + (self.lanes if lane & distance else distance) for lane in range(self.lanes)]
            swapped = list(rows)
            for i in range(self.lanes):
                if not i & distance:
                    x, y = rows[i], rows[i | distance]
                    swapped[i] = self._shuffle(builder, x, y, low)
                    swapped[i | distance] = self._shuffle(builder, x, y, high)
            rows = swapped
            distance *= 2
        return rows

    def _shuffle(self, builder: ir.IRBuilder, x: ir.Value, y: ir.Value, lanes: list[int]) -> ir.Value:
        mask = ir.Constant(ir.VectorType(I32, self.lanes), [I32(lane) for lane in lanes])
        return builder.shuffle_vector(x, y, mask)

    @staticmethod
    def _declare(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
        return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def splat(builder: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    """``vbroadcastss zmm, xmm``: a vector of one number."""
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, lanes), [I32(0)] * lanes))


def opaque(builder: ir.IRBuilder, value: ir.Value, registers: str = "r") -> ir.Value:
    """``value`` in a separate register of these, which LLVM neither recomputes nor decomposes."""
    return builder.asm(ir.FunctionType(value.type, [value.type]), "", f"={registers},0", [value], False)


def choose(
    builder: ir.IRBuilder,
    condition: ir.Value,
    then: Callable[[], list[ir.Value]],
    otherwise: Callable[[], list[ir.Value]],
) -> list[ir.Value]:
    """``then() if condition else otherwise()``"""
    blocks = [builder.append_basic_block(f"choose.{part}") for part in ("then", "else")]
    done = builder.append_basic_block("choose.done")
    builder.cbranch(condition, *blocks)
    results = []
    for block, branch in zip(blocks, (then, otherwise), strict=True):
        builder.position_at_end(block)
        results.append((branch(), builder.block))
        builder.branch(done)
    builder.position_at_end(done)
    chosen = [builder.phi(value.type) for value in results[0][0]]
    for values, block in results:
        for phi, value in zip(chosen, values, strict=True):
            phi.add_incoming(value, block)
    return chosen


def function_ir(name: str, arguments: int, emit: Callable[..., ir.Value | None], result: ir.Type | None = None) -> str:
    """IR of a function of int64 that consists of ``emit(builder, *arguments)``, and returns its value or nothing."""
    module = ir.Module(name)
    function = ir.Function(module, ir.FunctionType(result or ir.VoidType(), [I64] * arguments), name)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    value = emit(builder, *function.args)
    if value is None:
        builder.ret_void()
    else:
        builder.ret(value)
    return str(module)


def each(
    builder: ir.IRBuilder,
    end: ir.Value | int,
    step: int,
    body: Callable[[ir.Value], None],
    start: ir.Value | int = 0,
) -> None:
    """``for i in range(start, end, step): body(i)``"""

    def once(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        body(i)
        return []

    first, last = (I64(x) if isinstance(x, int) else x for x in (start, end))
    repeat(builder, first, last, step, [], once)


def repeat(
    builder: ir.IRBuilder,
    start: ir.Value,
    end: ir.Value,
    step: int | ir.Value,
    state: list[ir.Value],
    body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> tuple[ir.Value, list[ir.Value]]:
    """``for p in range(start, end, step): state = body(p, state)``, held in registers; the last p and state.

    All phis of a block stand before its first other instruction, as LLVM requires.
    """
    before = builder.block
    head, inside, done = (builder.append_basic_block(f"loop.{part}") for part in ("head", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    p, *now = [builder.phi(value.type) for value in (start, *state)]
    builder.cbranch(builder.icmp_signed("<", p, end), inside, done)
    builder.position_at_end(inside)
    new = [builder.add(p, I64(step) if isinstance(step, int) else step), *body(p, list(now))]
    for phi, first, again in zip((p, *now), (start, *state), new, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(again, builder.block)
    builder.branch(head)
    builder.position_at_end(done)
    return p, now


def repeat_to(
    builder: ir.IRBuilder,
    start: ir.Value,
    end: ir.Value,
    state: list[ir.Value],
    body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> None:
    """``while p < end: p, *state = body(p, state)`` from p = start on, held in registers."""
    before = builder.block
    head, inside, done = (builder.append_basic_block(f"while.{part}") for part in ("head", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    now = [builder.phi(value.type) for value in (start, *state)]
    builder.cbranch(builder.icmp_signed("<", now[0], end), inside, done)
    builder.position_at_end(inside)
    new = body(now[0], now[1:])
    for phi, first, again in zip(now, (start, *state), new, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(again, builder.block)
    builder.branch(head)
    builder.position_at_end(done)
