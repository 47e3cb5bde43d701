"""Raw memory for Numba code: addresses are int64, and each intrinsic here is one load, store or call."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .front_end import jit as jit
from .simd import I8, I64, POINTER

INT64 = types.int64


def _pointer(builder: ir.IRBuilder, address: ir.Value, index: ir.Value, element: ir.Type) -> ir.Value:
    return builder.gep(builder.inttoptr(address, POINTER), [index], source_etype=element)


@intrinsic
def get(typingctx, address, index):
    """The int64 at ``address[index]``."""

    def codegen(context, builder, signature, args):
        return builder.load(_pointer(builder, *args, I64), typ=I64)

    return INT64(INT64, INT64), codegen


@intrinsic
def put(typingctx, address, index, value):
    """``address[index] = value``, int64."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], _pointer(builder, args[0], args[1], I64))
        return context.get_dummy_value()

    return types.void(INT64, INT64, INT64), codegen


@intrinsic
def bits_of(typingctx, number):
    """The bits of a float64, as int64."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], I64)

    return INT64(types.float64), codegen


@intrinsic
def number_of(typingctx, bits):
    """The float64 of these bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(INT64), codegen


@intrinsic
def fetch_increment(typingctx, address, index):
    """The int64 at ``address[index]``, and add 1 to it, atomically."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _pointer(builder, *args, I64), I64(1), "monotonic")

    return INT64(INT64, INT64), codegen


@intrinsic
def fetch_or(typingctx, address, index, bits):
    """The int64 at ``address[index]``, and set ``bits`` in it, atomically."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("or", _pointer(builder, *args[:2], I64), args[2], "monotonic")

    return INT64(INT64, INT64, INT64), codegen


@intrinsic
def claim(typingctx, address):
    """Atomically change the int64 at ``address`` from 0 to 1; False where it was not 0."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], POINTER)
        result = builder.cmpxchg(pointer, I64(0), I64(1), "acq_rel", "monotonic")
        return builder.extract_value(result, 1)

    return types.boolean(INT64), codegen


@intrinsic
def release(typingctx, address):
    """Atomically set the int64 at ``address`` back to 0."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], POINTER)
        builder.atomic_rmw("xchg", pointer, I64(0), "release")
        return context.get_dummy_value()

    return types.void(INT64), codegen


@intrinsic
def swap(typingctx, address, one, other):
    """Exchange ``address[one]`` and ``address[other]``."""

    def codegen(context, builder, signature, args):
        places = [_pointer(builder, args[0], index, I64) for index in args[1:]]
        values = [builder.load(place, typ=I64) for place in places]
        builder.store(values[1], places[0])
        builder.store(values[0], places[1])
        return context.get_dummy_value()

    return types.void(INT64, INT64, INT64), codegen


@intrinsic
def copy_words(typingctx, target, source, count):
    """Copy ``count`` int64 that do not overlap."""

    def codegen(context, builder, signature, args):
        to, at = (builder.inttoptr(address, POINTER) for address in args[:2])
        cgutils.raw_memcpy(builder, to, at, args[2], 8, align=8)
        return context.get_dummy_value()

    return types.void(INT64, INT64, INT64), codegen


@intrinsic
def floor_div(typingctx, value, step):
    """``value // step``, where neither is negative and step is not 0: without the checks that Python's rule needs."""

    def codegen(context, builder, signature, args):
        return builder.udiv(*args)

    return INT64(INT64, INT64), codegen


@intrinsic
def ceil_div(typingctx, value, step):
    """``value / step`` rounded up, for value ≥ 0 and step > 0; no division where one step is enough."""

    def codegen(context, builder, signature, args):
        value, step = args
        small = builder.zext(builder.icmp_signed(">", value, I64(0)), I64)
        before = builder.block
        with builder.if_then(builder.icmp_signed(">", value, step)):
            large = builder.add(builder.udiv(builder.sub(value, I64(1)), step), I64(1))
            divided = builder.block
        result = builder.phi(I64)
        result.add_incoming(small, before)
        result.add_incoming(large, divided)
        return result

    return INT64(INT64, INT64), codegen


def stack_words(count: int) -> Callable[[], int]:
    """Intrinsic ``()``: the address of ``count`` int64 on the caller's stack."""

    @intrinsic
    def words(typingctx):
        def codegen(context, builder, signature, args):
            block = cgutils.alloca_once(builder, ir.ArrayType(I64, count))
            return builder.ptrtoint(block, I64)

        return INT64(), codegen

    return words


def symbol(name: str) -> Callable[[], int]:
    """Intrinsic ``()``: the address that the linker gives to ``name``."""

    @intrinsic
    def address(typingctx):
        def codegen(context, builder, signature, args):
            kind = ir.IntType(8)
            known = builder.module.globals.get(name)
            return builder.ptrtoint(known or ir.GlobalVariable(builder.module, kind, name), I64)

        return INT64(), codegen

    return address


def text(message: str) -> Callable[[], int]:
    """Intrinsic ``()``: the address of ``message`` as a C string."""
    data = bytearray(message.encode() + b"\0")

    @intrinsic
    def address(typingctx):
        def codegen(context, builder, signature, args):
            kind = ir.ArrayType(I8, len(data))
            constant = ir.GlobalVariable(builder.module, kind, builder.module.get_unique_name("text"))
            constant.linkage, constant.global_constant = "private", True
            constant.initializer = ir.Constant(kind, data)
            return builder.ptrtoint(constant, I64)

        return INT64(), codegen

    return address


def call_address(arguments: int) -> Callable:
    """Intrinsic ``(address, x0, …)``: calls the function at ``address``, int64 throughout."""

    @intrinsic
    def call(typingctx, address, *values):
        def codegen(context, builder, signature, args):
            kind = ir.FunctionType(I64, [I64] * arguments)
            values = cgutils.unpack_tuple(builder, args[1], arguments)
            return builder.call(builder.inttoptr(args[0], kind.as_pointer()), values)

        return INT64(INT64, types.StarArgTuple([INT64] * arguments)), codegen

    return call


def call_kernel(arguments: int) -> Callable:
    """Intrinsic ``(address, x0, …)``: calls the function at ``address``, which takes int64 and returns nothing."""

    @intrinsic
    def call(typingctx, address, *values):
        def codegen(context, builder, signature, args):
            kind = ir.FunctionType(ir.VoidType(), [I64] * arguments)
            values = cgutils.unpack_tuple(builder, args[1], arguments)
            builder.call(builder.inttoptr(args[0], kind.as_pointer()), values)
            return context.get_dummy_value()

        return types.void(INT64, types.StarArgTuple([INT64] * arguments)), codegen

    return call
