"""The description of an operand that is found by digits instead of two strides: int64, sizes and strides in elements.

    element (i, p) = image[o · FREE_OUTER + o' · K_OUTER + Σ_d c_d · STRIDE_d]
    c_d = i_d · FREE_STEP_d + p_d · K_STEP_d + START_d

for the free index i = (o, i_z, i_y, i_x), a row of A or a column of B, and the step of k p = (o', p_z, p_y, p_x):
numbers whose digits count to the extents of their side. An element with a coordinate outside [0, SIZE_d) is 0, and is
not read.

| product                  | free index        | step of k       | image    |
|--------------------------|-------------------|-----------------|----------|
| a convolution            | sample, pixel     | channel, tap    | input    |
| gradient of its input    | sample, pixel     | channel, tap    | gradient |
| gradient of its filter   | channel, tap      | sample, pixel   | input    |

In the arguments of a product the address of such an operand is 0 and its strides are FREE_STRIDE and K_STRIDE, so that
what blocks and loops add to it tells the indices at which they start.
"""

ADDRESS, FREE_OUTER, K_OUTER = range(3)
FREE_EXTENT, K_EXTENT, FREE_STEP, K_STEP, START, SIZE, STRIDE = range(3, 24, 3)  # of z, y and x
DIMENSIONS = 3
PATCHES_ARGS = 24
FREE_STRIDE, K_STRIDE = 2, 2 << 32  # none is 1, so that no loop reads the operand in place

# Columns of C that are not at one distance: n = (o, z, y, x), which count to the extents of z, y and x, are elements
# o · OUTER + z · STRIDE_z + y · STRIDE_y + x · STRIDE_x of C, to which element o · SOURCE of the source is added.
# Rows of C likewise, without a source.
RUN_EXTENT, RUN_OUTER, RUN_STRIDE, RUN_SOURCE = 0, 3, 4, 7
RUNS_ARGS = 8
