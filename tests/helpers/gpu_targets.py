"""What the GPU tests choose and compile for: GPUs in their largest common form, dtypes, layouts; imports no triton."""

from matmul_grad.kernels.gpu.config import Target

# Every kind of product by its short name: dtype and precision.
DTYPE_NAMES = {
    "fp16": ("float16", "ieee"),
    "bf16": ("bfloat16", "ieee"),
    "fp32": ("float32", "ieee"),
    "tf32": ("float32", "tf32"),
    "tf32x3": ("float32", "tf32x3"),
    "fp64": ("float64", "ieee"),
}
DENSE = ("NN", "NT", "TN", "TT")

# Compute capability, multiprocessors, shared bytes that one block may have (CUDA programming guide).
TARGETS = {
    "sm80": Target(80, 108, 163 << 10),
    "sm86": Target(86, 84, 99 << 10),
    "sm89": Target(89, 128, 99 << 10),
    "sm90": Target(90, 132, 227 << 10),
    "sm100": Target(100, 148, 227 << 10),
    "sm120": Target(120, 170, 99 << 10),
}
