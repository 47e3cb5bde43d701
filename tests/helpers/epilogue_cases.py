"""What the tests of epilogues share: operands, tiles by name, and the number of launches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_cases import DTYPES, embed, integers, pointers, tile, tma
from torch import Tensor


@contextlib.contextmanager
def launched(times: int) -> Iterator[None]:
    """Every call takes so many launches, and no function of torch changes the result."""
    from matmul_grad.kernels.gpu import launch

    def run(runners: tuple, tensors: dict[str, Any], on: Tensor) -> None:
        assert len(runners) == times, f"{len(runners)} launches"
        real(runners, tensors, on)

    real = launch._run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_run", run)
        for name in ("add_", "mul_", "add", "mul"):
            patch.setattr(Tensor, name, None)
        yield


def operands(m: int, n: int, k: int, dtype: str, layouts: str, batch: int = 0) -> tuple[Tensor, Tensor]:
    """Contiguous, or transposed, or with canaries around them ("S"); a batch of them where asked."""
    found = []
    for letter, shape in zip(layouts, ((m, k), (k, n)), strict=True):
        seeds = [ord(letter) + n + seed for seed in range(max(batch, 1))]
        x = torch.stack([integers(*shape, DTYPES[dtype], seed) for seed in seeds])
        x = x.mT.contiguous().mT if letter == "T" else x
        found.append(x if batch else embed(x[0], "S") if letter == "S" else x[0])
    return found[0], found[1]


def configs() -> dict[str, Any]:
    return {
        "pointers": tile(),
        "pointers-90": pointers(),
        "pointers-split": pointers(3),
        "tma": tma(),
        "tma-halves": tma(subtiles=2),
        "tma-quarters": replace(tma(), block_n=256),
        "tma-split": tma(3),
    }


def on(path: str, check: Callable[..., None], *arguments: Any, **named: Any) -> None:
    check(*arguments, configs()[path], **named)
