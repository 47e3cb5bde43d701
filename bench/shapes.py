"""Shapes (m, n, k) to measure, each in forward, dgrad and wgrad."""

from __future__ import annotations

Shape = tuple[int, int, int]

CUBES: tuple[Shape, ...] = tuple((n, n, n) for n in (64, 128, 256, 512, 1024, 2048, 4096))

# Linear layers, (n, k) = (out, in): widths of 768, then Llama-3-8B, then Qwen2.5-7B.
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
LAYERS_NK = (
    (768, 768), (3072, 768), (768, 3072),
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336),
    (4608, 3584), (37888, 3584), (3584, 18944),
)  # fmt: skip
LAYERS: tuple[Shape, ...] = tuple((m, n, k) for n, k in LAYERS_NK for m in TOKENS)

# DeepSeek-V3, as DeepGEMM measures it.
DEEPSEEK_NK = (
    (2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048),
)  # fmt: skip
DEEPSEEK: tuple[Shape, ...] = tuple((m, n, k) for n, k in DEEPSEEK_NK for m in (1, 128, 4096))

ODD: tuple[Shape, ...] = (
    (4095, 4095, 4095), (4097, 4097, 4097), (1000, 1000, 1000), (257, 129, 513),
    (1, 1024, 1024), (1024, 1, 1024), (16, 2, 30_000_000),
)  # fmt: skip

# One size at a time next to nothing, the other two large.
SKINNY: tuple[Shape, ...] = tuple(
    shape for thin in (1, 2, 8, 32) for shape in ((thin, 2048, 2048), (2048, thin, 2048), (2048, 2048, thin))
)

# Where a call is mostly overhead.
SMALL: tuple[Shape, ...] = tuple((n, n, n) for n in (1, 2, 4, 8, 16, 32, 48))

# A few of each kind: minutes on one core.
QUICK: tuple[Shape, ...] = (
    *CUBES[:5], (8, 8, 8), (32, 32, 32), (1, 768, 768), (32, 3072, 768), (512, 768, 3072), (1000, 1000, 1000),
    (257, 129, 513), (1024, 1, 1024), (1024, 1024, 8),
)  # fmt: skip
# A GPU has its peak behind larger ones.
QUICK_GPU: tuple[Shape, ...] = (
    (256, 256, 256), (1024, 1024, 1024), (4096, 4096, 4096), (8, 8, 8), (1, 4096, 4096), (128, 4096, 4096),
    (2048, 3072, 768), (257, 129, 513),
)  # fmt: skip

SETS = {"cubes": CUBES, "layers": LAYERS, "deepseek": DEEPSEEK, "odd": ODD, "skinny": SKINNY, "small": SMALL}

# The targets of the CPU: above 2048 a comparison takes minutes, and shows what the size below it shows.
CPU_TARGETS: tuple[Shape, ...] = (
    *CUBES[:6], *((m, n, k) for n, k in LAYERS_NK[:3] for m in TOKENS if m <= 2048),
)  # fmt: skip
CPU_QUICK: tuple[Shape, ...] = ((64, 64, 64), (256, 256, 256), (1024, 1024, 1024), (1, 768, 768), (32, 768, 768))
CPU_CUBES: tuple[Shape, ...] = CUBES[2:6]
CPU_SMALL: tuple[Shape, ...] = ((8, 8, 8), (16, 16, 16), (32, 32, 32), (64, 64, 64))
# One row, one column, k of one and two: the matrix is read, or C is written, once. Some of one row are layers, above.
CPU_THIN: tuple[Shape, ...] = (
    (1, 4096, 4096), (768, 1, 768), (3072, 1, 768), (768, 1, 3072), (4096, 1, 4096),
    (2048, 2048, 1), (2048, 2048, 2), (1024, 1024, 1),
)  # fmt: skip

# The targets of a GPU. A few of each kind first, so that a run that is cut short has seen every kind. The longest sum
# comes last: it is gigabytes to read, and shows nothing of any layer.
GPU_CORE: tuple[Shape, ...] = (
    *((n, n, n) for n in (256, 512, 1024, 2048, 4096, 8192)),
    (1, 4096, 4096), (8, 4096, 4096), (128, 6144, 4096), (2048, 4096, 4096), (2048, 3072, 768), (4096, 7168, 2048),
    (128, 2112, 7168), (4097, 4097, 4097), (257, 129, 513), (1, 1024, 1024), (1024, 1, 1024),
)  # fmt: skip
GPU_LAYERS: tuple[Shape, ...] = tuple((m, n, k) for n, k in LAYERS_NK for m in (1, 8, 128, 2048))
GPU_EVERY: tuple[Shape, ...] = tuple(dict.fromkeys((*GPU_CORE, *GPU_LAYERS, *DEEPSEEK, *ODD)))
GPU_FLOAT32: tuple[Shape, ...] = (
    (1024, 1024, 1024), (4096, 4096, 4096), (2048, 3072, 768), (128, 4096, 4096), (512, 512, 512), (2048, 2048, 2048),
    (257, 129, 513), (1, 4096, 4096),
)  # fmt: skip
GPU_INVARIANT: tuple[Shape, ...] = (
    (4096, 4096, 4096), (128, 4096, 4096), (2048, 4096, 4096), (8, 4096, 4096), (1024, 1024, 1024), (2048, 3072, 768),
)  # fmt: skip
GPU_RIVALS: tuple[Shape, ...] = ((4096, 4096, 4096), (1024, 1024, 1024), (128, 4096, 4096), (2048, 4096, 4096))
GPU_MEMORY = (
    ("bf16", (2048, 4096, 4096)), ("bf16", (8192, 768, 768)), ("bf16", (128, 4096, 14336)), ("bf16", (257, 129, 513)),
    ("f32", (2048, 3072, 768)),
)  # fmt: skip
BATCHED = ((32, (512, 512, 512)), (64, (128, 128, 64)), (16, (2048, 128, 2048)))
