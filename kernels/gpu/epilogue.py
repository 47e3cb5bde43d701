"""The epilogue of every kernel that stores a result: f(alpha * accumulator + beta * source), then the one rounding."""

import struct
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .activation import activate
from .arguments import Matrix
from .tiles import halves, store_rows, store_strided, store_subtile

# Scalar arguments of every kernel that stores a result; were they specialised, each alpha and beta would be compiled
# anew. They are no tuple, since Triton specialises the elements of a tuple whatever do_not_specialize names.
SCALARS = ("alpha_low", "alpha_high", "beta_low", "beta_high")
# So many columns of the source are loaded at a time: beside the largest tiles, more would spill registers.
COLUMNS = tl.constexpr(64)
ROWS = tl.constexpr(128)  # an activation of taller tiles takes half as many columns at a time


class Epilogue(NamedTuple):
    """f(alpha * (A . B) + beta * source), computed where the product is stored.

    source: a tensor that expands to the result; None adds nothing. In a plan, the `Strides` of that tensor, 0 where it
    repeats; alpha and beta are then scalar arguments of each call. activation: the name of f, "" for none. pre: a
    tensor like the result that gets the argument of f, rounded, or None; in a plan, whether there is one.
    """

    alpha: float = 1
    beta: float = 1
    source: Any = None
    activation: str = ""
    pre: Any = None

    @property
    def added(self) -> Any:
        """The source if it is read, which it is not where beta is 0."""
        return None if self.beta == 0 else self.source

    def scalars(self) -> dict[str, int]:
        """alpha and beta as the kernels take them: the two halves of their bits as float64.

        >>> Epilogue(1, -2.5).scalars()
        {'alpha_low': 0, 'alpha_high': 1072693248, 'beta_low': 0, 'beta_high': -1073479680}
        """
        halves = struct.unpack("=4i", struct.pack("=2d", self.alpha, self.beta))
        return dict(zip(SCALARS, halves, strict=True))


def columns_at_a_time(block_m: int, block_n: int) -> int:
    """Of a tile that is activated: the width of what `activate_and_store` stores at once."""
    return min(block_n, COLUMNS.value if block_m <= ROWS.value else COLUMNS.value // 2)


@triton.jit
def scale_from(low, high, SCALE: tl.constexpr):
    """alpha or beta, from the two halves of a float64's bits: Triton makes a float32 of a float argument."""
    bits = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return bits.to(tl.float64, bitcast=True).to(SCALE)


@triton.jit
def scale_by_alpha(acc, scalars):
    """alpha * acc, rounded to the type of acc; acc where there is no alpha."""
    if scalars[0] is not None:
        acc *= scale_from(scalars[0], scalars[1], acc.dtype)
    return acc


@triton.jit
def add_source(acc, source, scalars):
    """acc + beta * source in one multiply-add; acc where source is None."""
    if source is not None:
        acc = tl.fma(source.to(acc.dtype), scale_from(scalars[2], scalars[3], acc.dtype), acc)
    return acc


@triton.jit
def epilogue(acc, source, scalars):
    """alpha * acc + beta * source, for a source that is loaded already.

    source: the elements that are added, in the shape of acc; None adds nothing. scalars: the arguments `SCALARS`, in
    their order.
    """
    return add_source(scale_by_alpha(acc, scalars), source, scalars)


@triton.jit
def load_source(source, row, col, in_rows, in_cols):
    """The source of a tile; one row, column or number of it where the other stride is None."""
    if source.row is None and source.col is None:
        tile = tl.load(source.ptr)
    elif source.row is None:
        tile = tl.load(source.ptr + col * source.col, mask=in_cols, other=0.0)
    elif source.col is None:
        tile = tl.load(source.ptr + row * source.row, mask=in_rows, other=0.0)
    else:
        tile = tl.load(source.ptr + row * source.row + col * source.col, mask=in_rows & in_cols, other=0.0)
    return tile


@triton.jit
def add_source_to_tile(acc, source, row0, col0, rows, cols, scalars):
    """`add_source` of a whole tile, COLUMNS at a time.

    source: address and strides of the matrix that is added, of one batch; no address adds nothing.
    """
    if source.ptr is None:
        pass
    elif acc.shape[1] > COLUMNS:
        left, right = halves(acc)
        left = add_source_to_tile(left, source, row0, col0, rows, cols, scalars)
        right = add_source_to_tile(right, source, row0, col0 + acc.shape[1] // 2, rows, cols, scalars)
        acc = tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), acc.shape)
    else:
        row = row0.to(tl.int64) + tl.arange(0, acc.shape[0])[:, None]
        col = col0.to(tl.int64) + tl.arange(0, acc.shape[1])[None, :]
        acc = add_source(acc, load_source(source, row, col, row < rows, col < cols), scalars)
    return acc


@triton.jit
def tile_epilogue(acc, source, row0, col0, rows, cols, scalars):
    """`epilogue` of a whole tile. alpha precedes the halving: after it, it costs the largest tiles registers."""
    return add_source_to_tile(scale_by_alpha(acc, scalars), source, row0, col0, rows, cols, scalars)


@triton.jit
def tile_epilogue_and_store(acc, source, c, row0, col0, rows, cols, scalars):
    """`tile_epilogue` and `store_rows`."""
    add_source_and_store(scale_by_alpha(acc, scalars), source, c, row0, col0, rows, cols, scalars)


@triton.jit
def add_source_and_store(acc, source, c, row0, col0, rows, cols, scalars):
    """`add_source_to_tile` and `store_rows`, COLUMNS at a time: what is stored frees its registers for the next."""
    if source.ptr is not None and acc.shape[1] > COLUMNS:
        left, right = halves(acc)
        add_source_and_store(left, source, c, row0, col0, rows, cols, scalars)
        add_source_and_store(right, source, c, row0, col0 + acc.shape[1] // 2, rows, cols, scalars)
    else:
        acc = add_source_to_tile(acc, source, row0, col0, rows, cols, scalars)
        store_rows(acc, c, row0, col0, rows, cols)


@triton.jit
def activate_and_store(
    acc, source, c, c_desc, pre, batch, row0, col0, rows, cols, scalars, ACTIVATION: tl.constexpr, BATCHED: tl.constexpr
):  # fmt: skip
    """`tile_epilogue`, `activate`, and the stores of both, some columns at a time: what is stored frees its registers.

    Into c, a `Matrix`, and an address, or where there is a c_desc through that and a descriptor; nothing into a `pre`
    that is None.
    """
    if acc.shape[1] > (COLUMNS if acc.shape[0] <= ROWS else COLUMNS // 2):
        left, right = halves(acc)
        activate_and_store(left, source, c, c_desc, pre, batch, row0, col0, rows, cols, scalars, ACTIVATION, BATCHED)
        half = col0 + acc.shape[1] // 2
        activate_and_store(right, source, c, c_desc, pre, batch, row0, half, rows, cols, scalars, ACTIVATION, BATCHED)
    else:
        acc = tile_epilogue(acc, source, row0, col0, rows, cols, scalars)
        result = activate(acc, ACTIVATION)
        if c_desc is not None:
            if pre is not None:
                store_subtile(acc, pre, batch, row0, col0, BATCHED)
            store_subtile(result, c_desc, batch, row0, col0, BATCHED)
        else:
            if pre is not None:
                store_strided(acc, Matrix(pre, c.row, c.col, c.batch), row0, col0, rows, cols)
            store_strided(result, c, row0, col0, rows, cols)
