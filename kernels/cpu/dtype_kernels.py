"""What is compiled for each dtype, as IR: its entries, and the functions whose inner loops depend on its elements.

Everything else is the driver (gemm.py), which is compiled once and calls these by the addresses in a configuration.
"""

from __future__ import annotations

from llvmlite import ir

from .config import BlockConfig, tile_sizes
from .config_words import BACKWARD, GEMM
from .derivative_ir import derivative_ir
from .epilogue_ir import add_ir, store_ir
from .microkernel import microkernel_ir
from .operand import operand_of
from .pack import pack_rows_ir, pack_steps_ir
from .row import row_ir
from .simd import I64, function_ir
from .transposed import transposed_ir

CONFIG = "matmul_grad_config"


def make_kernels(config: BlockConfig) -> dict[str, str]:
    """IR by C name: the entry ``config.name``, and each of ``config_words.FUNCTIONS``, without activations.

    Of a dtype of 16 bits also what stores results in float32.
    """
    operand, name = operand_of(config), config.name
    rows = tile_sizes(config.mr)
    wide = {f"{name}_store_wide": store_ir(f"{name}_store_wide", config, config.accumulator, activates=False)}
    return {
        name: entry_ir(name, GEMM),
        f"{name}_microkernel": microkernel_ir(f"{name}_microkernel", operand.vector, rows, tile_sizes(config.vectors)),
        f"{name}_transposed": transposed_ir(f"{name}_transposed", operand, rows),
        f"{name}_row": row_ir(f"{name}_row", operand),
        f"{name}_pack_steps": pack_steps_ir(f"{name}_pack_steps", operand),
        f"{name}_pack_rows": pack_rows_ir(f"{name}_pack_rows", operand),
        f"{name}_add": add_ir(f"{name}_add", operand),
        f"{name}_store": store_ir(f"{name}_store", config, config.dtype, activates=False),
        **(wide if config.accumulates_wider else {}),
    }


def make_activation_kernels(config: BlockConfig) -> dict[str, str]:
    """Likewise what stores with activations, and their gradients, with the entry ``…_backward``."""
    name = config.name
    wide = {f"{name}_store_wide": store_ir(f"{name}_store_wide", config, config.accumulator)}
    return {
        f"{name}_store": store_ir(f"{name}_store", config, config.dtype),
        **(wide if config.accumulates_wider else {}),
        f"{name}_derivative": derivative_ir(f"{name}_derivative", config),
        f"{name}_backward": entry_ir(f"{name}_backward", BACKWARD),
    }


def entry_ir(name: str, word: int) -> str:
    """IR of ``int64 name(args, count, threads)``: the driver at a word of this dtype's configuration, given that."""

    def emit(builder: ir.IRBuilder, args: ir.Value, count: ir.Value, threads: ir.Value) -> ir.Value:
        words = ir.GlobalVariable(builder.module, I64, CONFIG)
        driver = builder.load(builder.gep(words, [I64(word)], source_etype=I64), typ=I64)
        kind = ir.FunctionType(I64, [I64] * 4)
        arguments = [builder.ptrtoint(words, I64), args, count, threads]
        return builder.call(builder.inttoptr(driver, kind.as_pointer()), arguments, tail=True)

    return function_ir(name, 3, emit, I64)
