"""GPUs as sold in their largest common form, to choose tiles and compile for without one; imports no triton."""

from matmul_grad.kernels.gpu.config import Target

# Compute capability, multiprocessors, shared bytes that one block may have (CUDA programming guide).
TARGETS = {
    "sm80": Target(80, 108, 163 << 10),
    "sm86": Target(86, 84, 99 << 10),
    "sm89": Target(89, 128, 99 << 10),
    "sm90": Target(90, 132, 227 << 10),
    "sm100": Target(100, 148, 227 << 10),
    "sm120": Target(120, 170, 99 << 10),
}
