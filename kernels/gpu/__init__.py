"""GPU kernels in Triton: one GEMM for every dtype, layout and product. Importing it imports no Triton."""
