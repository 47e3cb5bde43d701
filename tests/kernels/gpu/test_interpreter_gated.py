"""Gated products under Triton's interpreter: exact bits, canaries, bits of plain products; no GPU needed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from case_process import CaseProcess, assert_no_complaint
from gpu_cases import DTYPES, at_arch, embed, embed_aligned, integers, pointers, rows_alike, serve_cases, tile, tma
from products import assert_exact
from torch import Tensor

import matmul_grad
from matmul_grad.activation_formulas import BY_TORCH, NAMES
from matmul_grad.testing import assert_same_bits

M, N, K = 37, 35, 40
TMA_SIZES = 72, 40, 80
Sizes = tuple[int, int, int]


def operands(dtype: torch.dtype, layouts: str, sizes: Sizes, place: Callable[[Tensor, str], Tensor]) -> list[Tensor]:
    """A, B and G of -1, 0 and 1, in canaries."""
    m, n, k = sizes
    shapes = (m, k), (k, n), (k, n)
    return [place(integers(*shape, dtype, seed), layouts[seed]) for seed, shape in enumerate(shapes)]


def addends(kind: str, dtype: torch.dtype, sizes: Sizes) -> list[Tensor | None]:
    """What is added to S, and to P."""
    m, n, _ = sizes
    row, column, whole = (integers(*shape, dtype, 7) for shape in ((1, n), (m, 1), (m, n)))
    both = {
        "none": (None, None),
        "rows": (row[0], row[:, :1]),
        "column": (column, None),
        "whole": (None, embed(whole, "T")),
        "number": (row[0, 0], column[:1]),
    }
    return list(both[kind])


def sums(given: list[Tensor], added: list[Tensor | None], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """S in float64, and P, rounded."""
    a, b, gate = (x.double() for x in given)
    value, pre = a @ b, a @ gate
    value = value if added[0] is None else value + added[0].double()
    pre = pre if added[1] is None else pre + added[1].double()
    return value, pre.to(dtype).double()


def in_canaries(dtype: torch.dtype, sizes: Sizes) -> list[Tensor]:
    """Three results, as they lie in new memory, in the middle of NaN."""
    m, n, _ = sizes
    return [torch.full((m * n + 64,), math.nan, dtype=dtype)[32:-32].view(m, n) for _ in range(3)]


def check_exact(name: str, layouts: str, kind: str, config: Any, sizes: Sizes = (M, N, K)) -> None:
    """Of relu, C, P and S to the bit; nothing is read or written outside of the tensors."""
    from matmul_grad.kernels.gpu import gated, launch

    dtype, place = DTYPES[name], embed if config.path == "pointers" else embed_aligned
    given, added = operands(dtype, layouts, sizes, place), addends(kind, dtype, sizes)
    value, pre = sums(given, added, dtype)
    what = gated.Gated(*given, *added, "relu", True)
    found = gated.product(what, config=config)
    assert found is not None
    results = in_canaries(dtype, sizes)
    tensors = {name: x for name, x in what._asdict().items() if isinstance(x, Tensor)}
    made = gated._make_launch(what, "ieee", config)
    launch.run_kernels(made, tensors | {"pre": results[1], "value": results[2]}, results[0])
    for one, other, want in zip(found, results, (pre.relu() * value, pre, value), strict=True):
        assert one is not None and one.is_contiguous()
        assert_exact(one, want.to(dtype))
        assert_exact(other, want.to(dtype))
        buffer = other._base
        assert buffer is not None
        other.fill_(math.nan)
        assert bool(buffer.isnan().all()), "written outside of a result"
    alone = gated.product(what._replace(keep=False), config=config)
    assert alone is not None and alone[1:] == (None, None)
    assert_exact(alone[0], (pre.relu() * value).to(dtype))


def check_pointers(name: str, layouts: str, kind: str) -> None:
    with at_arch(80):
        check_exact(name, layouts, kind, tile())


def check_tma(name: str, layouts: str, kind: str) -> None:
    """Programs have several tiles each; sizes end inside of blocks."""
    with at_arch(90):
        check_exact(name, layouts, kind, tma(), TMA_SIZES)


def check_wide() -> None:
    """64-bit offsets inside a tile give the bits that 32-bit ones give."""
    from matmul_grad.kernels.gpu import gated_plan

    with pytest.MonkeyPatch.context() as patch, at_arch(80):
        patch.setattr(gated_plan, "is_wide", lambda extents: True)
        check_exact("fp32", "NTS", "rows", tile())


def draw(sizes: Sizes, dtype: torch.dtype) -> list[Tensor]:
    m, n, k = sizes
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((m, k), (k, n), (k, n), (n,), (n,))]


def check_activation(activation: str) -> None:
    """Of the rounded P, in float32, and rounded once after the multiplication."""
    from matmul_grad.kernels.gpu import gated

    for name in ("fp16", "fp32", "fp64"):
        a, b, gate, source, gate_source = draw((M, N, K), DTYPES[name])
        with at_arch(80), np.errstate(over="ignore"):  # of exp, where a sigmoid is 0
            found = gated.product(gated.Gated(a, b, gate, source, gate_source, activation, True), config=tile())
        assert found is not None and found[1] is not None and found[2] is not None
        exact = BY_TORCH[activation](found[1].double()) * (a.double() @ b.double() + source.double())
        scale = exact.abs().max() * torch.finfo(a.dtype).eps
        assert (found[0].double() - exact).abs().max() <= 4 * scale, (name, activation)


def check_roundings() -> None:
    """P is rounded before it is activated, to 2048; S is not before the multiplication: 2049 * 3 = 6147, to 6148."""
    from matmul_grad.kernels.gpu import gated

    a, sum_, three = (torch.tensor([row], dtype=torch.float16) for row in ((1, 1), (2048, 1), (3, 0)))
    for b, gate, want in ((three.t(), sum_.t(), (6144, 2048, 3)), (sum_.t(), three.t(), (6148, 3, 2048))):
        with at_arch(80):
            found = gated.product(gated.Gated(a, b, gate, None, None, "relu", True), config=tile())
        assert found is not None
        assert tuple(x.item() for x in found if x is not None) == want


def check_bits(name: str) -> None:
    """P and S are the bits of plain products, and a row's do not depend on the others, on the tile or on `keep`."""
    from matmul_grad.kernels.gpu import gated, launch
    from matmul_grad.kernels.gpu.epilogue import Epilogue

    a, b, gate, source, gate_source = draw((M, N, K), DTYPES[name])
    with at_arch(80), rows_alike():
        what = gated.Gated(a, b, gate, source, gate_source, "silu", True)
        found = gated.product(what, config=tile())
        assert found is not None and found[1] is not None and found[2] is not None
        for got, x, added in ((found[1], gate, gate_source), (found[2], b, source)):
            assert_same_bits(got, launch.addmm(a, x, Epilogue(1, 1, added), config=tile()))
        for other, rows in ((what._replace(keep=False), M), (what._replace(a=a[:5]), 5)):
            again = gated.product(other, config=pointers())
            assert again is not None
            assert_same_bits(again[0], found[0][:rows])


def check_operator(name: str, activation: str) -> None:
    """`gated_linear` and its gradients as on a GPU: one launch forward."""
    from matmul_grad import gated as operator
    from matmul_grad.kernels.gpu import gated

    a, b, gate, source, gate_source = draw((M, N, K), DTYPES[name])
    given = [x.requires_grad_() for x in (a.view(1, M, K), b.t(), gate.t(), source, gate_source)]
    wide = [x.detach().double().requires_grad_() for x in given]
    exact = BY_TORCH[activation](wide[0] @ wide[2].t() + wide[4]) * (wide[0] @ wide[1].t() + wide[3])
    launches: list[bool] = []
    run = gated.run_kernels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "is_on_gpu", lambda tensor: True)
        patch.setattr(gated, "run_kernels", lambda *of: launches.append(True) or run(*of))
        found = matmul_grad.gated_linear(*given, activation=activation)
        with torch.no_grad():
            assert_same_bits(matmul_grad.gated_linear(*given, activation=activation), found.detach())
    assert launches == [True] * 2
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    for one, other in zip(torch.autograd.grad(found.sum(), given), torch.autograd.grad(exact.sum(), wide), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3)


def check_two_products() -> None:
    """Where those are predicted to be faster, and where there is nothing to multiply, the operator composes."""
    from matmul_grad import gated as operator
    from matmul_grad.kernels.gpu import gated

    given = draw((M, N, K), torch.float32)
    what = gated.Gated(*given, "silu", True)
    with pytest.MonkeyPatch.context() as patch, at_arch(80):
        patch.setattr(gated, "choose_gated", lambda *_: None)
        assert gated.product(what) is None
        a, b, gate, source, gate_source = given
        found = operator._on_gpu(source, gate_source, a, b, gate, "silu", keep=True)
        expected = torch.nn.functional.silu(torch.addmm(gate_source, a, gate)) * torch.addmm(source, a, b)
        torch.testing.assert_close(found[0], expected)
        torch.testing.assert_close(found[1:], (torch.addmm(gate_source, a, gate), torch.addmm(source, a, b)))
    empty = gated.Gated(given[0][:0], *given[1:], "silu")
    assert gated.product(empty) is None
    assert gated.product(gated.Gated(given[0][:, :0], given[1][:0], given[2][:0], None, None, "silu")) is None


def check_refusals() -> None:
    from matmul_grad.kernels.gpu import gated
    from matmul_grad.kernels.gpu.config import TileConfig

    a, b, gate, source, _ = draw((M, N, K), torch.float32)
    for wrong, message in (
        (gated.Gated(a, b[1:], gate, None, None, "silu"), "cannot multiply shapes"),
        (gated.Gated(a, b, gate[:, 1:], None, None, "silu"), "cannot gate the product of"),
        (gated.Gated(a, b, gate.double(), None, None, "silu"), "cannot gate the product of"),
        (gated.Gated(a, b, gate, source[1:], None, "silu"), "cannot add"),
        (gated.Gated(a, b, gate, None, source.double(), "silu"), "cannot add"),
    ):
        with pytest.raises(ValueError, match=message):
            gated.product(wrong)
    split, large = TileConfig(16, 16, 16, 2, 4, split_k=2), TileConfig(256, 256, 64, 3, 4)
    for config in (TileConfig(16, 8, 16, 2, 4), split, large):
        with pytest.raises(ValueError, match="is not valid for"):
            gated.product(gated.Gated(a, b, gate, None, None, "silu"), config=config)


KINDS = ("none", "rows", "column", "whole", "number")
CASES: dict[str, Callable[[], None]] = {
    **{
        f"exact-{name}-{layouts}-{kind}": partial(check_pointers, name, layouts, kind)
        for (layouts, kind), name in zip(
            zip(("NNN", "NTT", "TNS", "STN", "RCN", "NNT", "TTC", "SSS"), itertools.cycle(KINDS)),
            itertools.cycle(DTYPES),
        )
    },
    **{
        f"tma-{name}-{layouts}-{kind}": partial(check_tma, name, layouts, kind)
        for name, layouts, kind in (
            ("bf16", "NTT", "rows"), ("fp16", "NNT", "whole"), ("fp16", "TTN", "none"), ("bf16", "TNN", "column"),
        )
    },
    "wide": check_wide,
    **{f"activation-{name}": partial(check_activation, name) for name in NAMES},
    "roundings": check_roundings,
    **{f"bits-{name}": partial(check_bits, name) for name in ("fp32", "fp16")},
    "operator-fp32": partial(check_operator, "fp32", "silu"),
    "operator-fp64": partial(check_operator, "fp64", "gelu"),
    "two-products": check_two_products,
    "refusals": check_refusals,
}  # fmt: skip


SLOW = {
    *(
        "exact-bf16-NNT-none",
        "exact-fp32-TTC-rows",
        "exact-fp64-SSS-column",
        "tma-fp16-TTN-none",
        "tma-bf16-TNN-column",
    ),
    *("activation-gelu_tanh", "activation-tanh", "activation-relu", "operator-fp64", "wide"),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_interpreted(case: str, interpreter: CaseProcess) -> None:
    assert_no_complaint(interpreter.complaint(case))


if __name__ == "__main__":
    serve_cases(CASES)
