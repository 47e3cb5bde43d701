"""Epilogues, C = alpha * (A . B) + beta * source, under Triton's interpreter: no launch more, one rounding."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from case_process import CaseProcess, assert_no_complaint
from epilogue_cases import launched, on, operands
from gpu_cases import (
    DENSE,
    DTYPES,
    assert_same_bits,
    at_arch,
    embed,
    integers,
    rows_alike,
    serve_cases,
    tile,
)
from torch import Tensor

SCALES = ((1, 1), (-0.5, 2), (3, -1))  # beta and alpha: exact for integers
SOME, REST = ((1, 1), (2, 1), (0.5, 2)), ((0, 1), (0, -1))


def sources(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """What expands to a shape: whole in every layout, transposed, of stride 0, a row, a column, a number."""
    whole = integers(shape[-2], shape[-1], dtype, 7)
    found = [embed(whole, layout) for layout in "NTSRC"]
    found += [embed(whole[:1], "N")[0], embed(whole[:, :1], "S"), whole[-1, -1]]
    if len(shape) == 3:
        each = [integers(*shape[-2:], dtype, seed) for seed in range(8, 8 + shape[0])]
        found = [*found[3:6], torch.stack(each), torch.stack(each).mT.contiguous().mT, torch.stack(each)[:, :1]]
    return found


def check_epilogue(sizes: tuple, dtype: str, layouts: str, config: Any, arch: int = 80, batch: int = 0) -> None:
    """Exact for every source that expands to the result: into new memory, into canaries, into the source."""
    from matmul_grad.kernels.gpu import launch

    a, b = operands(*sizes, dtype, layouts, batch)
    exact = (a.long() @ b.long()).double()
    scales = itertools.cycle(SCALES)
    cases = [(source, *next(scales)) for source in sources(tuple(exact.shape), a.dtype)]
    wants = [(alpha * exact + beta * source.double()).to(a.dtype) for source, beta, alpha in cases]
    out_layouts = "N" if config is not None and config.path == "tma" else "NTS"
    targets = itertools.cycle(("new", "out", "own", "contiguous") if not batch else ("new", "contiguous"))
    with at_arch(arch), launched(1 if config is None or config.split_k == 1 else 2):
        for (source, beta, alpha), want, layout, target in zip(cases, wants, itertools.cycle(out_layouts), targets):
            if target == "new":
                got = launch.addmm(a, b, launch.Epilogue(alpha, beta, source), config=config)
                assert got.is_contiguous() and got.dtype == a.dtype
            else:
                values = source.expand(want.shape)
                got = embed(values, layout) if target == "own" else values.clone(memory_format=torch.contiguous_format)
                if target == "out":
                    got = embed(torch.full_like(want, float("nan")), layout)
                added = source if target == "out" else got
                assert launch.addmm(a, b, launch.Epilogue(alpha, beta, added), got, config=config) is got
            assert_same_bits(got, want)
            if target in ("out", "own"):
                assert got._base is not None
                got.fill_(float("nan"))
                assert bool(got._base.isnan().all()), "written outside of out"
        spoilt = torch.full_like(wants[0], float("nan"))
        assert_same_bits(
            launch.addmm(a, b, launch.Epilogue(2, 0, spoilt), config=config), exact.to(a.dtype) + exact.to(a.dtype)
        )
        assert_same_bits(launch.addmm(a, b, launch.Epilogue(1, 0, spoilt), spoilt, config=config), exact.to(a.dtype))


def check_float32(sizes: tuple, dtype: str, layouts: str, config: Any, arch: int = 80, batch: int = 0) -> None:
    """Sums of 16-bit operands, stored in float32 and added to there: they have more bits than 16 hold."""
    from matmul_grad.kernels.gpu import launch

    a, b = operands(*sizes, dtype, layouts, batch)
    a = a * {"bf16": 255, "fp16": 1023}[dtype]
    exact = (a.long() @ b.long()).float()
    assert not torch.equal(exact, exact.to(a.dtype).float())
    out_layouts = "N" if batch or (config is not None and config.path == "tma") else "NTS"
    with at_arch(arch), launched(1 if config is None or config.split_k == 1 else 2):
        for layout in out_layouts:
            out = torch.full_like(exact, float("nan")) if batch else embed(torch.full_like(exact, float("nan")), layout)
            assert launch.mm(a, b, out=out, config=config) is out
            assert_same_bits(out, exact)
            for times in (2, 3):
                launch.addmm(a, b, launch.Epilogue(1, 1, out), out, config=config)
                assert_same_bits(out, times * exact)
            row = torch.arange(sizes[1], dtype=torch.float32)
            assert_same_bits(launch.addmm(a, b, launch.Epilogue(2, -1, row), out, config=config), 2 * exact - row)
            if not batch:
                out.fill_(float("nan"))
                assert bool(out._base.isnan().all()), "written outside of out"
        with pytest.raises(ValueError, match="cannot add"):
            launch.addmm(a, b, launch.Epilogue(1, 1, exact.to(a.dtype)), exact.clone(), config=config)


def check_vector(m: int, n: int, dtype: str, parts: int) -> None:
    from matmul_grad.kernels.gpu.config import TileConfig

    check_epilogue((m, n, 530), dtype, "NN", TileConfig(32, 1, 64, 2, 4, split_k=parts, path="vector"))


def check_one_rounding(dtype: str, config: Any) -> None:
    """A product that the dtype cannot represent, and a source with which the result can be."""
    from matmul_grad.kernels.gpu import launch

    odd = 2 ** {"fp16": 11, "bf16": 8}[dtype] + 1  # exact neither in the dtype nor, halved, in the one place less
    a, b = torch.zeros(64, 256, dtype=DTYPES[dtype]), torch.zeros(256, 64, dtype=DTYPES[dtype])
    a[:, 0], a[:, 200], b[0], b[200] = odd - 1, 1, 1, 1
    with at_arch(90):
        for beta, alpha in ((1, 1), (2, 2)):
            got = launch.addmm(a, b, launch.Epilogue(alpha, beta, torch.ones(64, dtype=a.dtype)), config=config)
            assert_same_bits(got, torch.full_like(got, alpha * (odd + 1)))


def check_scales(dtype: str, config: Any) -> None:
    """alpha and beta keep the precision of the accumulator, float64 or float32; every value reuses the launch."""
    from matmul_grad.kernels.gpu import launch

    kind = torch.float64 if dtype == "fp64" else torch.float32
    a, b = operands(64, 16, 256, dtype, "NN")
    source = integers(64, 16, a.dtype, 9) * 3
    values = [1 / 3, -0.1, 3.141592653589793, float("inf"), 1 + 2**-30, 5e-324, -1e300, 2.0**31]
    with at_arch(90), np.errstate(invalid="ignore", over="ignore", under="ignore"):
        for value in values if dtype == "fp64" else values[:5]:
            scale = torch.tensor(value, dtype=kind)
            launch.addmm(a, b, launch.Epilogue(1, value, source), config=config)
            kept = len(launch._launches)
            got = launch.addmm(torch.zeros_like(a), b, launch.Epilogue(1, value, source), config=config)
            want = (scale * source.to(kind)).to(a.dtype)
            assert torch.equal(got.nan_to_num(7), want.nan_to_num(7)), value
            assert len(launch._launches) == kept, "a launch for each beta"
            launch.addmm(a, b, launch.Epilogue(7, 0, source), config=config)
            kept = len(launch._launches)
            got = launch.addmm(a, b, launch.Epilogue(value, 0, source), config=config)
            want = (scale * (a.long() @ b.long()).to(kind)).to(a.dtype)
            assert torch.equal(got.nan_to_num(7), want.nan_to_num(7)), value
            assert len(launch._launches) == kept, "a launch for each alpha"
        nan = launch.addmm(a, b, launch.Epilogue(1, float("nan"), source), config=config)
        assert bool(nan.isnan().all())
        assert_same_bits(launch.addmm(a, b, launch.Epilogue(-0.0, 0, source), config=config), torch.zeros_like(nan))


def check_wide() -> None:
    """64-bit offsets inside a block give the same bits. Those of a vector's source and result always have 64 bits."""
    from matmul_grad.kernels.gpu import plan
    from matmul_grad.kernels.gpu.arguments import Strides
    from matmul_grad.kernels.gpu.choose import VECTOR_TILES
    from matmul_grad.kernels.gpu.config import Problem, Target

    problem, epilogue = Problem(4096, 1, 64, "float32"), plan.Epilogue(source=Strides(2**40, 1))
    for row, wide in ((64, False), (2**28, True)):
        strides = Strides(row, 1), Strides(1, 1), Strides(2**40, 1)
        (made,) = plan.plans(problem, VECTOR_TILES["N"], Target(80, 2, 227 << 10), strides, epilogue=epilogue)
        assert made.constants["WIDE"] is wide
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "is_wide", lambda extents: True)
        check_epilogue((17, 15, 33), "fp32", "NN", tile())
        check_vector(1, 37, "fp32", 1)


def check_invariant() -> None:
    """In batch-invariant mode a row has the same bits for any m, and k is not split."""
    from matmul_grad.kernels.gpu import launch, settings

    generator = torch.Generator().manual_seed(8)
    a, b, bias = (torch.randn(shape, generator=generator) for shape in ((70, 4100), (4100, 16), (16,)))
    with pytest.MonkeyPatch.context() as patch, launched(1), rows_alike():
        patch.setattr(settings, "invariant", True)
        whole = launch.addmm(a, b, launch.Epilogue(0.7, 0.3, bias))
        assert_same_bits(launch.addmm(a[:1], b, launch.Epilogue(0.7, 0.3, bias)), whole[:1])
        assert_same_bits(launch.addmm(a[9:], b, launch.Epilogue(0.7, 0.3, bias)), whole[9:])


def check_empty() -> None:
    """Without a source alpha still applies; with nothing to multiply the result is beta * source, in place too."""
    from matmul_grad.kernels.gpu import launch

    assert_same_bits(launch.addmm(torch.ones(2, 3), torch.ones(3, 4), launch.Epilogue(2)), torch.full((2, 4), 6.0))
    none = torch.ones(3, 0), torch.ones(0, 4)
    row, own = torch.arange(4.0), torch.arange(12.0).view(3, 4)
    assert_same_bits(launch.addmm(*none, launch.Epilogue(3, 2, row)), 2 * row.expand(3, 4))
    assert_same_bits(launch.addmm(*none, launch.Epilogue(3, 0, row)), torch.zeros(3, 4))
    want = 2 * own
    assert launch.addmm(*none, launch.Epilogue(3, 2, own), own) is own
    assert_same_bits(own, want)
    assert launch.addmm(torch.ones(0, 2), torch.ones(2, 4), launch.Epilogue(source=row)).shape == (0, 4)


def check_refusals() -> None:
    """A source that cannot be added raises ValueError and leaves out unchanged."""
    from matmul_grad.kernels.gpu import launch

    x, y, out = torch.ones(2, 3), torch.ones(3, 4), torch.full((2, 4), 7.0)
    for message, source in {
        "cannot add (3,) to (2, 4)": torch.ones(3),
        "cannot add (1, 2, 4) to (2, 4)": torch.ones(1, 2, 4),
        "cannot add torch.float64 on cpu to torch.float32 on cpu": torch.ones(4, dtype=torch.float64),
        "cannot add torch.float32 on meta to torch.float32 on cpu": torch.ones(4, device="meta"),
    }.items():
        with pytest.raises(ValueError) as error:
            launch.addmm(x, y, launch.Epilogue(source=source), out)
        assert str(error.value) == message
    with pytest.raises(ValueError, match="cannot multiply shapes"):
        launch.addmm(x, x, launch.Epilogue(source=out), out)
    assert_same_bits(out, torch.full((2, 4), 7.0))


def check_addmm(dtype: str) -> None:
    """Of matrices and of batches, with what expands to them, scaled; into new memory, into out, into what is added."""
    from matmul_grad.kernels.gpu import launch

    a = torch.stack([integers(20, 24, DTYPES[dtype], seed) for seed in (1, 2)])
    b = torch.stack([integers(24, 18, DTYPES[dtype], seed) for seed in (3, 4)])
    for x, y, ranks in ((a, b, 3), (a[0], b[0], 2)):
        product = (x.long() @ y.long()).double()
        whole = torch.stack([integers(20, 18, DTYPES[dtype], seed) for seed in (5, 6)])
        whole = whole if ranks == 3 else whole[0]
        added = whole, whole.mT.contiguous().mT, whole[..., :1, :], whole[..., :1], whole.flatten()[0]
        for place, source in enumerate(added):
            # Every source with a beta that is 0 and one that is not: the dtypes and ranks go on where another ends.
            for beta, alpha in (SOME[(place + ranks + list(DTYPES).index(dtype)) % 3], REST[place % 2]):
                want = (alpha * product + beta * source.double()).to(x.dtype)
                assert_same_bits(launch.addmm(x, y, launch.Epilogue(alpha, beta, source)), want)
                out = torch.full_like(want.mT, float("nan")).mT
                assert launch.addmm(x, y, launch.Epilogue(alpha, beta, source), out) is out
                assert_same_bits(out, want)
        spoilt = torch.full_like(whole, float("nan"))
        assert_same_bits(launch.addmm(x, y, launch.Epilogue(1, 0, spoilt), spoilt), product.to(x.dtype))
        own = whole.clone()
        launch.addmm(x, y, launch.Epilogue(1, 2, own), own)
        assert_same_bits(own, (product + 2 * whole.double()).to(x.dtype))


CASES: dict[str, Callable[[], None]] = {
    **{
        f"pointers-{dtype}-{layouts}": partial(on, "pointers", check_epilogue, (17, 19, 21), dtype, layouts)
        for dtype, layouts in (*itertools.product(("fp32", "fp16"), (*DENSE, "SS")), ("bf16", "NT"), ("fp64", "TN"))
    },
    **{f"chosen-{dtype}": partial(check_epilogue, (33, 18, 24), dtype, "NN", None) for dtype in DTYPES},
    **{
        f"{path}-{dtype}-{layouts}": partial(on, path, check_epilogue, (72, 40, 72), dtype, layouts, arch=90)
        for path, dtype, layouts in (
            *itertools.product(("tma-halves",), ("fp16",), DENSE),
            ("tma", "bf16", "NN"),
        )
    },
    "tma-quarters": partial(on, "tma-quarters", check_epilogue, (72, 200, 24), "fp16", "NN", arch=90),
    "tma-quarters-odd": partial(on, "tma-quarters", check_epilogue, (71, 199, 24), "fp16", "NT", arch=90),
    # Neither n nor the result's rows are whole chunks of 16 bytes: C is stored by pointers.
    "tma-odd": partial(on, "tma-halves", check_epilogue, (71, 39, 72), "fp16", "NT", arch=90),
    **{
        f"{path}-{dtype}": partial(on, path, check_epilogue, (72, 24, 232), dtype, "NN", arch=90)
        for path, dtype in (
            ("pointers-split", "fp32"),
            ("pointers-split", "fp16"),
            ("pointers-split", "fp64"),
            ("tma-split", "fp16"),
        )
    },
    **{
        f"vector-{dtype}-{m}x{n}-{parts}": partial(check_vector, m, n, dtype, parts)
        for (m, n), dtype, parts in itertools.product(((1, 70), (70, 1)), ("fp32", "fp16"), (1, 2))
        if dtype == "fp32" or parts == 2
    },
    **{
        f"batch-{path}-{dtype}": partial(on, path, check_epilogue, (72, 24, k), dtype, "NT", arch=arch, batch=2)
        for path, dtype, k, arch in (
            ("pointers", "fp32", 64, 80),
            ("pointers-split", "fp32", 192, 90),
            ("tma-halves", "fp16", 64, 90),
            ("tma-split", "fp16", 192, 90),
        )
    },
    **{
        f"one-rounding-{path}-{dtype}": partial(on, path, check_one_rounding, dtype)
        for path, dtype in (
            *itertools.product(("pointers-90", "tma", "tma-split"), ("fp16",)),
            ("pointers-split", "bf16"),
        )
    },
    **{f"scales-{dtype}": partial(on, "pointers-90", check_scales, dtype) for dtype in DTYPES},
    **{
        f"float32-{path}-{dtype}": partial(on, path, check_float32, (72, 40, k), dtype, "TN", arch=arch)
        for path, dtype, k, arch in (
            ("pointers", "bf16", 72, 80),
            ("pointers", "fp16", 72, 80),
            ("pointers-split", "fp16", 232, 90),
            ("tma-halves", "fp16", 72, 90),
            ("tma-halves", "bf16", 72, 90),
            ("tma-split", "fp16", 232, 90),
        )
    },
    "float32-chosen": partial(check_float32, (72, 40, 72), "bf16", "TN", None),
    "float32-batch": partial(on, "pointers", check_float32, (33, 24, 64), "fp16", "NT", batch=2),
    "float32-vector": partial(check_float32, (72, 1, 530), "fp16", "NN", None),
    "scales-split": partial(on, "pointers-split", check_scales, "fp64"),
    "scales-tma": partial(on, "tma-halves", check_scales, "fp16"),
    **{f"addmm-{dtype}": partial(check_addmm, dtype) for dtype in DTYPES},
    "wide": check_wide,
    "invariant": check_invariant,
    "empty": check_empty,
    "refusals": check_refusals,
}


@pytest.mark.pairwise
@pytest.mark.parametrize("case", CASES)
def test_interpreted(case: str, interpreter: CaseProcess) -> None:
    assert_no_complaint(interpreter.complaint(case))


if __name__ == "__main__":
    serve_cases(CASES)
