"""The peak of this CPU: fused multiply-adds on registers alone, as fast as they go.

What a product reaches is a share of this. Clocks drift, so the loop is timed in the same rounds as the products.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from llvmlite import ir

from ..kernels.cpu import build, config, driver, host

TURNS = 1 << 19  # about 4 ms on Zen 4: a thousand times what waking a second thread costs
# Independent chains: what the registers hold, and more than latency × units (8 on x86, 16 on the widest ARM).
CHAINS = {"avx512": 24, "avx2": 12, "neon": 24, "generic": 12}
LINE = 64  # bytes from one thread's result to the next one's, so that none waits for another's cache line


class Peak(NamedTuple):
    """``call()`` makes ``flops`` operations on all of torch's threads, and gives their sums, LINE bytes each."""

    call: Callable[[], torch.Tensor]
    flops: int


def loop(dtype: str) -> Peak | None:
    """The loop for ``dtype`` on as many threads as torch has now.

    None for a dtype that is multiplied as another one is, and where torch does not lend its threads.
    """
    threads = torch.get_num_threads()
    block = driver.config(dtype)
    run = _run_on_threads()
    if run is None or (dtype != block.accumulator and not block.pairs):
        return None
    lanes = block.lanes
    generator = torch.Generator().manual_seed(0)
    # Values whose bits differ, since constant ones take less power and so clock higher than a product can; and
    # with sums that grow by about 1 a turn, so that none is denormal or infinite.
    kind = torch.bfloat16 if block.pairs else getattr(torch, dtype)
    x, y = torch.randn(2, lanes * (2 if block.pairs else 1), generator=generator).to(kind)
    sums = torch.zeros(threads * LINE, dtype=torch.uint8)
    words = (ctypes.c_int64 * 4)(TURNS, x.data_ptr(), y.data_ptr(), sums.data_ptr())
    entry = _entry(dtype)

    def call(operands: tuple[torch.Tensor, ...] = (x, y)) -> torch.Tensor:  # they live as long as this
        if run(0, threads, 1, entry, ctypes.addressof(words)):
            raise RuntimeError("torch_parallel_for failed")
        return sums

    return Peak(call, 2 * TURNS * CHAINS[block.isa] * len(x) * threads)


@functools.cache
def _run_on_threads() -> Callable[..., int] | None:
    """torch's own pool, which the products run on too: a second pool would fight it for the cores."""
    function = getattr(ctypes.CDLL(torch._C.__file__), "torch_parallel_for", None)
    if function is not None:
        function.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 2
    return function


@functools.cache
def _entry(dtype: str) -> int:
    block = driver.config(dtype)
    name = f"peak_{dtype}_{block.isa}"
    text = _ir(name, block)
    loaded = build.load(text, name, lambda: {name: text}, host.machine(block.isa), {})
    _kept.append(loaded)
    return loaded.address(name)


_kept: list[build.Loaded] = []  # the code runs for as long as this refers to it


def _ir(name: str, block: config.BlockConfig) -> str:
    """IR of ``void name(begin, end, words)``, all int64: the loop once for each index from begin to end.

    words: turns, then the addresses of x, of y, and of the results, where index i has the LINE bytes from i·LINE.
    """
    from ..kernels.cpu.simd import I64, Vector, repeat

    vector = Vector(block.accumulator, block.lanes, block.fused, block.pairs)
    function = ir.Function(ir.Module(name), ir.FunctionType(ir.VoidType(), [I64] * 3), name)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    begin, end, words = function.args
    base = builder.inttoptr(words, ir.PointerType())
    turns, *addresses = (builder.load(builder.gep(base, [I64(i)], source_etype=I64), typ=I64) for i in range(4))
    x, y = (vector.load(builder, vector.at(builder, address)) for address in addresses[:2])

    def turn(_: ir.Value, chains: list[ir.Value]) -> list[ir.Value]:
        return [vector.fma(builder, x, y, chain) for chain in chains]

    def index(i: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
        # Chains that start alike would be one chain to the optimiser.
        starts = [ir.Constant(vector.type, [vector.scalar(float(c))] * vector.lanes) for c in range(CHAINS[block.isa])]
        _, (total, *others) = repeat(builder, I64(0), turns, 1, starts, turn)
        for other in others:
            total = builder.fadd(total, other)
        at = builder.add(addresses[2], builder.mul(i, I64(LINE)))
        vector.store(builder, total, vector.at(builder, at))
        return state

    repeat(builder, begin, end, 1, [], index)
    builder.ret_void()
    return str(function.module)
