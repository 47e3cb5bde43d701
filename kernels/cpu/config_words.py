"""What the compiled code reads of a configuration when it runs: int64 words behind ``matmul_grad_config``.

Sizes that follow from the caches are here, so that one compiled set serves every CPU of an instruction set.
"""

from __future__ import annotations

import ctypes

from .config import SUMS_BYTES, BlockConfig, round_up

MC, KC, NC = range(3)
PARTIAL_LANES, THREAD_BYTES = 3, 4
A_LANES = 5  # room in a thread's buffer for a block of A
B_OFFSET = 6  # bytes behind which that buffer holds a panel of B
ROW_COLUMNS = 7  # lanes whose sums are kept while one row of C is computed
CONFIG_WORDS = 8


def config_words(config: BlockConfig) -> ctypes.Array[ctypes.c_int64]:
    words = (ctypes.c_int64 * CONFIG_WORDS)()
    words[MC], words[KC], words[NC] = config.mc, config.kc, config.nc
    words[PARTIAL_LANES], words[THREAD_BYTES] = config.partial_lanes, config.thread_bytes
    words[A_LANES], words[B_OFFSET] = config.a_bytes // config.lane_bytes, round_up(config.a_bytes, 64)
    words[ROW_COLUMNS] = min(SUMS_BYTES, config.b_bytes) // config.lane_bytes // config.lanes * config.lanes
    return words
