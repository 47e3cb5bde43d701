"""The table of docs/coverage.md: how many products of each torch operation run on these kernels, counted as they run.

python -m tests.coverage_table    writes it anew
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import matmul_grad

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
START, END = "<!-- table: python -m tests.coverage_table -->\n", "<!-- end of the table -->\n"


def matrix(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def symmetric(n: int) -> Tensor:
    return matrix(n, n) @ matrix(n, n).T + n * torch.eye(n)


# By what a reader looks for: a function and its operands.
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "`mm`, `@` of matrices": (torch.mm, (matrix(4, 5), matrix(5, 3))),
    "`addmm`": (torch.addmm, (matrix(3), matrix(4, 5), matrix(5, 3))),
    "`bmm`, `@` of batches": (torch.bmm, (matrix(2, 4, 5), matrix(2, 5, 3))),
    "`baddbmm`": (torch.baddbmm, (matrix(3), matrix(2, 4, 5), matrix(2, 5, 3))),
    "`addbmm`": (torch.addbmm, (matrix(4, 3), matrix(2, 4, 5), matrix(2, 5, 3))),
    "`mv`, `@` of matrix and vector": (torch.mv, (matrix(4, 5), matrix(5))),
    "`addmv`": (torch.addmv, (matrix(4), matrix(4, 5), matrix(5))),
    "`dot`, `@` of vectors": (torch.dot, (matrix(5), matrix(5))),
    "`vdot`": (torch.vdot, (matrix(5), matrix(5))),
    "`matmul`, broadcast batches": (torch.matmul, (matrix(3, 1, 4, 5), matrix(2, 5, 3))),
    "`einsum(\"ij,jk->ik\")`": (lambda a, b: torch.einsum("ij,jk->ik", a, b), (matrix(4, 5), matrix(5, 3))),
    "`einsum(\"bhqd,bhkd->bhqk\")`": (
        lambda a, b: torch.einsum("bhqd,bhkd->bhqk", a, b), (matrix(2, 3, 4, 5), matrix(2, 3, 6, 5)),
    ),
    "`tensordot`": (lambda a, b: torch.tensordot(a, b, 1), (matrix(4, 5), matrix(5, 3))),
    "`inner`": (torch.inner, (matrix(4, 5), matrix(3, 5))),
    "`chain_matmul`, `linalg.multi_dot`": (
        lambda *x: torch.linalg.multi_dot(x), (matrix(4, 5), matrix(5, 3), matrix(3, 6)),
    ),
    "`linalg.matrix_power`": (lambda a: torch.linalg.matrix_power(a, 3), (matrix(4, 4),)),
    "`linalg.vecdot`": (torch.linalg.vecdot, (matrix(4, 5), matrix(4, 5))),
    "`outer`, `ger`": (torch.outer, (matrix(4), matrix(5))),
    "`addr`": (torch.addr, (matrix(4, 5), matrix(4), matrix(5))),
    "`kron`": (torch.kron, (matrix(2, 3), matrix(4, 5))),
    "`cdist`": (torch.cdist, (matrix(30, 5), matrix(30, 5))),
    "`matrix_exp`": (torch.linalg.matrix_exp, (matrix(4, 4) / 9,)),
    "`linalg.solve`": (torch.linalg.solve, (symmetric(4), matrix(4, 3))),
    "`linalg.inv`": (torch.linalg.inv, (symmetric(4),)),
    "`linalg.cholesky`": (torch.linalg.cholesky, (symmetric(4),)),
    "`linalg.qr`": (lambda a: torch.linalg.qr(a)[1], (matrix(5, 4),)),
    "`linalg.svd`": (lambda a: torch.linalg.svdvals(a), (matrix(5, 4),)),
    "`linalg.eigh`": (lambda a: torch.linalg.eigvalsh(a), (symmetric(4),)),
    "`functional.linear`": (F.linear, (matrix(4, 5), matrix(3, 5), matrix(3))),
    "`functional.bilinear`": (F.bilinear, (matrix(4, 5), matrix(4, 6), matrix(3, 5, 6))),
    "`functional.scaled_dot_product_attention`": (
        F.scaled_dot_product_attention, (matrix(2, 3, 4, 8), matrix(2, 3, 6, 8), matrix(2, 3, 6, 8)),
    ),
    "`functional.conv1d`": (F.conv1d, (matrix(2, 3, 9), matrix(4, 3, 3))),
    "`functional.conv2d`": (F.conv2d, (matrix(2, 3, 9, 9), matrix(4, 3, 3, 3))),
    "`functional.conv2d`, float64": (F.conv2d, (matrix(2, 3, 9, 9).double(), matrix(4, 3, 3, 3).double())),
    "`functional.conv_transpose2d`": (F.conv_transpose2d, (matrix(2, 3, 9, 9), matrix(3, 4, 3, 3))),
}  # fmt: skip

# A module, whether it is in evaluation, and its inputs.
MODULES: dict[str, tuple[Callable[[], nn.Module], bool, tuple[Tensor, ...]]] = {
    "`nn.Linear`": (lambda: nn.Linear(5, 3), False, (matrix(4, 5),)),
    "`nn.Bilinear`": (lambda: nn.Bilinear(5, 6, 3), False, (matrix(4, 5), matrix(4, 6))),
    "`nn.MultiheadAttention`": (lambda: nn.MultiheadAttention(8, 2), False, (matrix(5, 2, 8),) * 3),
    "`nn.TransformerEncoderLayer`": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), False, (matrix(2, 5, 8),),
    ),
    "`nn.TransformerEncoderLayer`, `eval()`, no gradient": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), True, (matrix(2, 5, 8),),
    ),
    "`nn.TransformerDecoderLayer`": (
        lambda: nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True), False, (matrix(2, 5, 8), matrix(2, 6, 8)),
    ),
    "`nn.RNN`": (lambda: nn.RNN(5, 4), False, (matrix(3, 2, 5),)),
    "`nn.GRU`": (lambda: nn.GRU(5, 4), False, (matrix(3, 2, 5),)),
    "`nn.LSTM`": (lambda: nn.LSTM(5, 4), False, (matrix(3, 2, 5),)),
    "`nn.LSTMCell`": (lambda: nn.LSTMCell(5, 4), False, (matrix(2, 5),)),
    "`nn.Conv2d`": (lambda: nn.Conv2d(3, 4, 3), False, (matrix(2, 3, 9, 9),)),
    "`nn.ConvTranspose2d`": (lambda: nn.ConvTranspose2d(3, 4, 3), False, (matrix(2, 3, 9, 9),)),
    "`nn.Embedding`": (lambda: nn.Embedding(7, 5), False, (torch.tensor([1, 2]),)),
}  # fmt: skip


def under_the_override() -> int:
    """Products of aten that these kernels have computed so far."""
    return sum(sum(dtypes.values()) for dtypes in matmul_grad.info()["accelerated"].values())


def counted(count: Callable[[], int], call: Callable[..., Any], leaves: list[Tensor]) -> tuple[int, int]:
    """Products in a call and in its backward."""
    before = count()
    result = call()
    result = result[0] if isinstance(result, tuple) else result
    forward = count() - before
    if result.requires_grad:
        torch.autograd.grad(result.sum(), leaves, allow_unused=True)
    return forward, count() - before - forward


def function_row(name: str) -> tuple[str, str, str]:
    function, operands = FUNCTIONS[name]
    leaves = [x.detach().requires_grad_() for x in operands]
    with matmul_grad.enabled():
        products = counted(under_the_override, lambda: function(*leaves), leaves)
    return name, shown(products), "–"


def module_row(name: str) -> tuple[str, str, str]:
    make, in_evaluation, inputs = MODULES[name]
    torch.manual_seed(0)
    model = make().train(not in_evaluation).requires_grad_(not in_evaluation)
    leaves = [x.detach().requires_grad_(x.is_floating_point() and not in_evaluation) for x in inputs]
    needed = [x for x in (*leaves, *model.parameters()) if x.requires_grad]
    with matmul_grad.enabled():
        products = counted(under_the_override, lambda: model(*leaves), needed)
    matmul_grad.convert(model)
    layers, _ = counted(converted_layers, lambda: model(*leaves), needed)
    return name, shown(products), str(layers or "–")


def converted_layers() -> int:
    """Calls of converted layers so far."""
    return sum(sum(dtypes.values()) for dtypes in matmul_grad.nn.calls().values())


def shown(products: tuple[int, int]) -> str:
    return " · ".join(str(count) if count else "–" for count in products)


def line(row: tuple[str, str, str]) -> str:
    return f"| {' | '.join(row)} |\n"


def table() -> str:
    """The rows, as Markdown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [*map(function_row, FUNCTIONS), *map(module_row, MODULES)]
    return "| operation | under `enable()` | under `convert()` |\n|---|--:|--:|\n" + "".join(map(line, rows))


def page(text: str, rows: str) -> str:
    """The page with the table in its place."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return before + START + rows + END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), table()), encoding="utf-8")
