"""The words that describe a product, or a batch of them, to the driver: int64, sizes and strides in elements.

    C = alpha · (A · B) + beta · INPUT

INPUT is 0 where there is none, and may be C itself. ALPHA and BETA hold the bits of a float64.
"""

from __future__ import annotations

M, N, K, A, A_RS, A_CS, B, B_RS, B_CS, C, C_RS, C_CS = range(12)
BATCH, A_BS, B_BS, C_BS = range(12, 16)  # so many products, and the distances between them
INPUT, I_RS, I_CS, I_BS, ALPHA, BETA = range(16, 22)
PRODUCT = 22
ONE = 0x3FF0000000000000  # 1.0, as ALPHA holds it
