"""Settings of the GPU kernels for the whole process; matmul_grad/settings.py sets them."""

invariant = False  # a row of C has the same bits for any m: k is never split, and a vector is multiplied as a matrix
float32 = "ieee"  # how float32 is multiplied where torch's setting is full precision: "ieee" or "tf32x3"
