"""The arguments of the gradient of an activation: int64, sizes and strides in elements.

    OUT = GRAD · activation'(KEPT)
    OUT = GRAD · VALUE · activation'(KEPT), OUT_VALUE = GRAD · activation(KEPT)     of activation(KEPT) · VALUE

KEPT is the argument of the activation, or without VALUE, which is 0 then, its result for those of BY_RESULT. Columns of
OUT and of OUT_VALUE are adjacent, and the rows of both OUT_RS apart.
"""

M, N, GRAD, GRAD_RS, GRAD_CS, KEPT, KEPT_RS, KEPT_CS, OUT, OUT_RS, ACTIVATION = range(11)
VALUE, VALUE_RS, VALUE_CS, OUT_VALUE = range(11, 15)
DERIVATIVE_ARGS = 15
