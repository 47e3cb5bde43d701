"""A configuration as the compiled code reads it: int64 words behind the symbol ``matmul_grad_config`` of a dtype.

One driver serves all dtypes, so tile, blocks and sizes of elements are words too; so are the addresses of what is
compiled for a dtype. Sizes that follow from the caches are nowhere else, so that code serves CPUs with any caches.
"""

from __future__ import annotations

import ctypes

from .config import CHAIN, SHORT_CHAIN, SIZES, SUMS_BYTES, BlockConfig, round_up, tile_sizes

GEMM = 0  # address of the driver
SIZE, LANE_BYTES = 1, 2  # bytes of an element in memory, and of a lane of a panel
CONVERTS, PAIRS = 3, 4  # 1 where a lane is not the element itself; where it holds two steps of k
LANES, LANE_BITS = 5, 6  # lanes of a vector, a power of 2, and its logarithm
MR, NR, ROW_SIZES, VECTOR_SIZES = range(7, 11)  # the register tile; how many sizes tiles have in rows, and in vectors
MC, KC, NC = range(11, 14)
CHUNK, PANEL_CHAIN = 14, 15  # in steps of k
SHORT, LONG = 16, 17  # lanes along k in a chain
PARTIAL_LANES, THREAD_BYTES = 18, 19
A_LANES = 20  # room in a thread's buffer for a block of A
B_OFFSET = 21  # bytes behind which that buffer holds a panel of B
ROW_COLUMNS = 22  # lanes whose sums are kept while one row of C is computed
DIRECT_ROWS, ALIASED_ROWS, TRANSPOSED_ROWS = 23, 24, 25  # rows of C up to which B is read in place
SEQUENTIAL_BYTES, DIRECT_PANELS = 26, 27
FUNCTIONS = ("microkernel", "transposed", "row", "pack_steps", "pack_rows", "add", "store")
MICROKERNEL, TRANSPOSED, ROW, PACK_STEPS, PACK_ROWS, ADD, STORE = range(28, 35)  # their addresses
DERIVATIVE, BACKWARD = 35, 36  # addresses of that of activations, and of what runs it on all threads, 0 until loaded
STORE_WIDE = 37  # address of what stores float32, of 16-bit operands
PACK_PATCH_STEPS, PACK_PATCH_ROWS = 38, 39  # addresses of patches.py, 0 until they are loaded
CONFIG_WORDS = 40


def config_words(config: BlockConfig) -> ctypes.Array[ctypes.c_int64]:
    """The words of ``config``, without addresses."""
    words = (ctypes.c_int64 * CONFIG_WORDS)()
    words[SIZE], words[LANE_BYTES] = SIZES[config.dtype], config.lane_bytes
    words[CONVERTS], words[PAIRS] = config.accumulates_wider, config.bf16_dot
    words[LANES], words[LANE_BITS] = config.lanes, config.lanes.bit_length() - 1
    words[MR], words[NR] = config.mr, config.nr
    words[ROW_SIZES], words[VECTOR_SIZES] = len(tile_sizes(config.mr)), len(tile_sizes(config.vectors))
    words[MC], words[KC], words[NC] = config.mc, config.kc, config.nc
    words[CHUNK], words[PANEL_CHAIN] = config.chunk, config.chain
    words[LONG] = CHAIN[config.dtype]
    words[SHORT] = CHAIN[config.dtype] if config.bf16_dot else SHORT_CHAIN[config.dtype]
    words[PARTIAL_LANES], words[THREAD_BYTES] = config.partial_lanes, config.thread_bytes
    words[A_LANES], words[B_OFFSET] = config.a_bytes // config.lane_bytes, round_up(config.a_bytes, 64)
    words[ROW_COLUMNS] = min(SUMS_BYTES, config.b_bytes) // config.lane_bytes // config.lanes * config.lanes
    words[DIRECT_ROWS], words[ALIASED_ROWS] = config.direct_rows * config.mr, config.aliased_rows * config.mr
    words[TRANSPOSED_ROWS], words[SEQUENTIAL_BYTES] = config.transposed_rows, config.sequential_bytes
    words[DIRECT_PANELS] = config.direct_panels
    return words
