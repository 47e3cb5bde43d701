"""Groups of rows, of columns and of steps of k: the driver itself, on every instruction set.

Exact integers between NaN, at the end of a page that is followed by one that cannot be read; and the bits of a group
beside those of its product alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import blocks
import pytest
import torch
from guards import with_guard
from torch import Tensor

from matmul_grad import testing
from matmul_grad.kernels.cpu.config import BlockConfig
from matmul_grad.kernels.native import direct, grouped

every_block = pytest.mark.parametrize("block", blocks.parameters())
M, N, K, WHOLE = 13, 21, 10, 90
ENDS = {
    "balanced": [30, 60, 90],
    "skewed": [1, 80, 81, 90],
    "empty": [0, 0, 7, 7, 64, 64],
    "none": [0, 0, 0],
    "one": [90],
    "many": list(range(1, 71)),
}
every_split = pytest.mark.parametrize("ends", [pytest.param(ends, id=name) for name, ends in ENDS.items()])
FORMS = ("rows", "columns", "steps")
every_form = pytest.mark.parametrize("form", FORMS)


def shapes(form: str, groups: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of a, b and out."""
    if form == "rows":
        return (WHOLE, K), (groups, K, N), (WHOLE, N)
    if form == "columns":
        return (groups, M, K), (K, WHOLE), (M, WHOLE)
    return (M, WHOLE), (WHOLE, N), (groups, M, N)


def parts(form: str, ends: Sequence[int], a: Tensor, b: Tensor, out: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The products of the groups that are not empty."""
    ranges = [(i, slice(*pair)) for i, pair in enumerate(zip([0, *ends], ends)) if pair[0] < pair[1]]
    if form == "rows":
        return [(a[part], b[i], out[part]) for i, part in ranges]
    if form == "columns":
        return [(a[i], b[:, part], out[:, part]) for i, part in ranges]
    return [(a[:, part], b[part], out[i]) for i, part in ranges]


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int, transposed: bool, real: bool = False) -> Tensor:
    """Small integers, or numbers, with the last two dimensions in either order of memory."""
    generator = torch.Generator().manual_seed(seed)
    order = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    random = torch.randn(order, generator=generator) if real else torch.randint(-4, 5, order, generator=generator)
    return random.to(dtype).mT if transposed else random.to(dtype)


@every_block
@every_form
@every_split
def test_groups_are_exact_and_nothing_else_is_touched(block: BlockConfig, form: str, ends: list[int]) -> None:
    dtype = getattr(torch, block.dtype)
    layouts = itertools.product((False, True), repeat=3)
    for index, (turn_a, turn_b, turn_out) in enumerate(layouts):
        threads = 1 + (index + index // 2) % 2
        shape_a, shape_b, shape_out = shapes(form, len(ends))
        a, _ = with_guard(draw(shape_a, dtype, 2 * index, turn_a))
        b, _ = with_guard(draw(shape_b, dtype, 2 * index + 1, turn_b))
        out, whole = with_guard(draw(shape_out, dtype, 0, turn_out))
        whole.fill_(float("nan"))
        grouped.multiply(block, [(a, b, out)], ends, threads)
        written = 0
        for one, other, result in parts(form, ends, a, b, out):
            testing.assert_same_bits(result + 0.0, testing.exact_product(one, other) + 0.0, f"{form} {ends} {index}")
            written += result.numel()
        assert int((~whole.isnan()).sum()) == written


@every_block
@every_form
def test_a_group_has_the_bits_of_its_product_alone(block: BlockConfig, form: str) -> None:
    """Whatever the others are, and by any number of threads; NaN of one group stays in it."""
    dtype = getattr(torch, block.dtype)
    for name, ends in ENDS.items():
        shape_a, shape_b, shape_out = shapes(form, len(ends))
        a, b = draw(shape_a, dtype, 1, False, real=True), draw(shape_b, dtype, 2, False, real=True)
        for threads in (1, 2, 3):
            out = torch.zeros(shape_out, dtype=dtype)
            grouped.multiply(block, [(a, b, out)], ends, threads)
            for one, other, result in parts(form, ends, a, b, out):
                alone = direct.multiply(block, one, other, torch.empty(result.shape, dtype=dtype))
                testing.assert_same_bits(result, alone, f"{form} {name} {threads} threads")
        found = parts(form, ends, a, b, out)
        if len(found) > 1:
            before = out.clone()
            found[0][0].fill_(float("nan"))
            grouped.multiply(block, [(a, b, out)], ends, 2)
            assert bool(found[0][2].isnan().all())
            found[0][2].copy_(parts(form, ends, a, b, before)[0][2])
            testing.assert_same_bits(out, before)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@every_form
def test_large_groups_are_cut_and_two_products_are_one_call(name: str, form: str) -> None:
    """More than one block a group, more than one chunk of k, and a second product in the call."""
    block, dtype, ends = direct.driver.config(name), getattr(torch, name), [3, 500, 500, 700]
    wide = {
        "rows": ((700, 700), (4, 700, 130)),
        "columns": ((4, 130, 700), (700, 700)),
        "steps": ((90, 700), (700, 70)),
    }
    a, b = (draw(shape, dtype, seed, False) for seed, shape in enumerate(wide[form]))
    groups = (4,) if form == "steps" else ()
    outs = [torch.zeros(*groups, a.shape[-2], b.shape[-1], dtype=dtype) for _ in range(4)]
    outs[2] = outs[2].mT.contiguous().mT
    grouped.multiply(block, [(a, b, outs[0])], ends, 1)
    grouped.multiply(block, [(a, b, outs[1]), (a, b, outs[2])], ends, 4)
    for one, other, result in parts(form, ends, a, b, outs[3]):
        result.copy_(testing.exact_product(one, other))
    testing.assert_same_bits(outs[0] + 0.0, outs[3] + 0.0)
    testing.assert_same_bits(outs[1], outs[0])
    testing.assert_same_bits(outs[2].contiguous(), outs[0])


def test_work_is_shared_where_one_group_has_most_of_it() -> None:
    """The table that the driver completes: a group is cut by its share, and an empty one has no block."""
    block = direct.driver.config("float32")
    a, b, out = torch.zeros(2048, 256), torch.zeros(5, 256, 256), torch.zeros(2048, 256)
    tables = []
    make = grouped._table

    def keep(*arguments: object) -> object:
        tables.append(make(*arguments))  # type: ignore[arg-type]  # what multiply passes
        return tables[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "_table", keep)
        grouped.multiply(block, [(a, b, out)], [1900, 1900, 1950, 2000, 2048], 2)
    rows = [list(tables[0][start : start + 4]) for start in range(2, len(tables[0]), 4)]
    counts = [rows_of * columns for _, _, rows_of, columns in rows]
    assert counts[0] >= 4 and counts[1] == 0 and counts[2:] == [1, 1, 1]
    assert [first for _, first, *_ in rows] == [sum(counts[:index]) for index in range(5)]
