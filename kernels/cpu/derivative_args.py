"""The arguments of the gradient of an activation: int64, sizes and strides in elements.

    OUT = GRAD · activation'(KEPT)

KEPT is the argument of the activation, or its result for those of BY_RESULT. Columns of OUT are adjacent.
"""

M, N, GRAD, GRAD_RS, GRAD_CS, KEPT, KEPT_RS, KEPT_CS, OUT, OUT_RS, ACTIVATION = range(11)
DERIVATIVE_ARGS = 11
