"""The two ceilings of a machine, measured: peak FLOP/s and memory bandwidth.

Peak on CPU is a loop of fused multiply-adds on registers alone. Clocks drift, so it is timed in the same rounds as the
products, and what a product reaches is a share of it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from llvmlite import ir

from .. import testing
from ..kernels.cpu import build, config, driver, host
from . import timer
from .devices import Cpu, Gpu

Device = Cpu | Gpu

LARGE = 8192  # a cube that keeps every multiprocessor busy
PAST = 8  # times the last cache: what is read and written to measure memory
LEAST = 256 << 20  # bytes of it
SECONDS = 0.5
TURNS = 1 << 19  # about 4 ms on Zen 4: a thousand times what waking a second thread costs
# Independent chains: what the registers hold, and more than latency × units (8 on x86, 16 on the widest ARM).
CHAINS = {"avx512": 24, "avx2": 12, "neon": 24, "generic": 12}
LINE = 64  # bytes from one thread's result to the next one's, so that none waits for another's cache line


class Peak(NamedTuple):
    """``call()`` makes ``flops`` operations on all of torch's threads, and gives their sums, LINE bytes each."""

    call: Callable[[], torch.Tensor]
    flops: int


def peak_flops(dtype: str, device: Device) -> Peak | None:
    """What the units that multiply give: on CPU on registers alone; on a GPU torch's largest product of ``dtype``.

    None where there is no such loop (float16 on CPU, which is multiplied as float32).
    """
    kind = testing.DTYPES[dtype]
    if isinstance(device, Cpu):
        return loop(str(kind).removeprefix("torch."))
    n = LARGE if 3 * kind.itemsize * LARGE**2 < device.free_bytes() // 2 else LARGE // 4
    x, y = torch.randn(2, n, n, device=device.device).to(kind)
    out = torch.empty_like(x)
    return Peak(lambda: torch.mm(x, y, out=out), 2 * n**3)


def bandwidth(device: Device, seconds: float = SECONDS) -> dict[str, Any]:
    """GB/s of memory: the better of reading (the dot product of two vectors) and copying, on all of torch's threads.

    >>> found = bandwidth(Cpu(), seconds=0.0)
    >>> found["how"] in ("read", "copy") and 0 < found["low"] <= found["median"] <= found["high"]
    True
    """
    count = max(LEAST, PAST * device.cache_bytes()) // 8
    x, y = torch.randn(2, count, device=device.device)
    ways = {"read": lambda: torch.dot(x, y), "copy": lambda: x.copy_(y)}
    batches = {}
    for name, call in ways.items():
        call()
        batches[name] = device.graph([call] * 4) if isinstance(device, Gpu) else once(call)
    times = timer.time_interleaved(batches, seconds)
    how = min(times, key=lambda name: timer.quartiles(times[name]).median)
    rates = [8 * count / s / 1e9 for s in times[how]]
    return {"how": how, **timer.summary(rates)}


def once(call: Any) -> timer.Batch:
    return lambda: timer.batch(call, 1, timer.nothing)


def loop(dtype: str) -> Peak | None:
    """The loop for ``dtype`` on as many threads as torch has now.

    None for a dtype that is multiplied as another one is, and where torch does not lend its threads.
    """
    threads = torch.get_num_threads()
    block = driver.config(dtype)
    run = _run_on_threads()
    if run is None or (dtype != block.accumulator and not block.bf16_dot):
        return None
    lanes = block.lanes
    generator = torch.Generator().manual_seed(0)
    # Values whose bits differ, since constant ones take less power and so clock higher than a product can; and
    # with sums that grow by about 1 a turn, so that none is denormal or infinite.
    kind = torch.bfloat16 if block.bf16_dot else getattr(torch, dtype)
    x, y = torch.randn(2, lanes * (2 if block.bf16_dot else 1), generator=generator).to(kind)
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
    """torch's pool, which the products run on too: a second pool would fight it for the cores."""
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

    vector = Vector(block.accumulator, block.lanes, block.fused, block.bf16_dot)
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
