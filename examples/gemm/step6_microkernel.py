"""Step 6: the microkernel. A tile of C stays in vector registers for a block of KC steps of k.

It reads panels: MR rows of A and NR columns of B, packed in the order of use and padded with zeros, so that a tile has
one size. Numba has no vector types, so the innermost loop is LLVM IR: 6 rows of 2 vectors of 8 float32 are 12
accumulators. With 2 vectors of B and one broadcast element of A they fill 15 of the 16 registers of AVX2.
It takes float32 only.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

MR, NR, LANES = 6, 16, 8
MC, KC, NC = 96, 256, 4096
F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR = ir.VectorType(F32, LANES)
VECTORS = NR // LANES


@njit
def pack_rows(a, panels):
    """panels[i, p, r] = A[i·MR + r, p], and zeros below the last row."""
    m, k = a.shape
    for i in range((m + MR - 1) // MR):
        for p in range(k):
            for r in range(MR):
                row = i * MR + r
                panels[i, p, r] = a[row, p] if row < m else 0


@njit
def pack_columns(b, panels):
    """panels[j, p, s] = B[p, j·NR + s], and zeros beside the last column."""
    k, n = b.shape
    for j in range((n + NR - 1) // NR):
        for p in range(k):
            for s in range(NR):
                column = j * NR + s
                panels[j, p, s] = b[p, column] if column < n else 0


def broadcast(builder, scalar):
    """A vector that holds ``scalar`` in every lane."""
    one = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))


def vector_at(builder, pointer, index):
    """The address of ``index`` elements behind ``pointer``, as that of a vector."""
    return builder.bitcast(builder.gep(pointer, [index]), VECTOR.as_pointer())


def k_step(builder, a, b, accumulators):
    """One step of k: VECTORS loads of B, MR broadcasts of A, MR · VECTORS multiply-adds."""
    columns = [builder.load(vector_at(builder, b, I64(v * LANES)), align=4) for v in range(VECTORS)]
    sums = []
    for r in range(MR):
        x = broadcast(builder, builder.load(builder.gep(a, [I64(r)])))
        for v, y in enumerate(columns):
            product = builder.fmul(x, y, flags=("contract",))
            sums.append(builder.fadd(product, accumulators[r * VECTORS + v], flags=("contract",)))
    return sums


@intrinsic
def multiply_panels(typingctx, depth, a, b, tile):
    """tile[MR, NR] = A · B, of panels given by their addresses, over ``depth`` steps of k."""

    def generate(context, builder, signature, arguments):
        depth, *addresses = arguments
        a, b, tile = (builder.inttoptr(address, F32.as_pointer()) for address in addresses)
        before, loop, after = builder.block, builder.append_basic_block("k"), builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        p = builder.phi(I64)
        accumulators = [builder.phi(VECTOR) for _ in range(MR * VECTORS)]
        a_step = builder.gep(a, [builder.mul(p, I64(MR))])
        b_step = builder.gep(b, [builder.mul(p, I64(NR))])
        sums = k_step(builder, a_step, b_step, accumulators)
        following = builder.add(p, I64(1))
        zero = ir.Constant(VECTOR, [0.0] * LANES)
        for phi, first, later in zip([p, *accumulators], [I64(0)] + [zero] * len(sums), [following, *sums]):
            phi.add_incoming(first, before)
            phi.add_incoming(later, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
        builder.position_at_end(after)
        for index, total in enumerate(sums):
            builder.store(total, vector_at(builder, tile, I64(index * LANES)), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@njit
def add_tile(tile, c):
    """C += the part of the tile that lies inside C."""
    for r in range(c.shape[0]):
        for s in range(c.shape[1]):
            c[r, s] += tile[r, s]


@njit
def gemm(a, b):
    """The five loops: jc, pc and ic over blocks, j and i over tiles."""
    (m, k), n = a.shape, b.shape[1]
    c = np.zeros((m, n), np.float32)
    tile = np.empty((MR, NR), np.float32)
    a_panels = np.empty((MC // MR, KC, MR), np.float32)
    b_panels = np.empty((NC // NR, KC, NR), np.float32)
    for jc in range(0, n, NC):
        for pc in range(0, k, KC):
            depth = min(KC, k - pc)
            pack_columns(b[pc : pc + depth, jc : jc + NC], b_panels)
            for ic in range(0, m, MC):
                pack_rows(a[ic : ic + MC, pc : pc + depth], a_panels)
                for j in range(jc, min(jc + NC, n), NR):
                    for i in range(ic, min(ic + MC, m), MR):
                        a_panel, b_panel = a_panels[(i - ic) // MR], b_panels[(j - jc) // NR]
                        multiply_panels(depth, a_panel.ctypes.data, b_panel.ctypes.data, tile.ctypes.data)
                        add_tile(tile, c[i : i + MR, j : j + NR])
    return c


if __name__ == "__main__":
    from verify import verify

    verify(gemm)
