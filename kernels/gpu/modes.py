"""Settings of the GPU kernels that hold for the process; matmul_grad/settings.py sets them."""

invariant = False  # a row of C has the same bits for any m: k is never cut and vectors are no path of their own
float32 = "ieee"  # how float32 is multiplied where torch asks for its full precision: "ieee" or "tf32x3"
