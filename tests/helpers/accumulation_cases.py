"""Models whose weight gradients are added to in the product, in two processes: cases of ``test_distributed.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import matmul_grad
from matmul_grad import weight_gradients
from matmul_grad.testing import assert_same_bits, integers

WIDTH, HIDDEN, ROWS, PARTS, STEPS = 6, 10, 4, 3, 3


@contextmanager
def additions() -> Iterator[list[bool]]:
    """Of each weight gradient of a block, whether it was added in the product."""
    found: list[bool] = []
    real = weight_gradients._add

    def add(*operands: Tensor) -> bool:
        found.append(real(*operands))
        return found[-1]

    weight_gradients._add = add
    try:
        yield found
    finally:
        weight_gradients._add = real


def model(device: str, dtype: torch.dtype = torch.float32, accumulate: bool = True) -> nn.Sequential:
    """Two layers of integers without anything between them, so that every sum is exact."""
    layers = [matmul_grad.Linear(*size, dtype=dtype, accumulate=accumulate) for size in ((WIDTH, HIDDEN), (HIDDEN, 3))]
    for seed, p in enumerate(p for layer in layers for p in layer.parameters()):
        with torch.no_grad():
            p.copy_(integers(1, p.numel(), dtype, seed).view(p.shape))
    return nn.Sequential(*layers).to(device)


def parts(rank: int, device: str) -> list[Tensor]:
    """The microbatches of a process."""
    return list(integers(PARTS * ROWS, WIDTH, torch.float32, 20 + rank).to(device).split(ROWS))


def expected(mesh: DeviceMesh) -> list[Tensor]:
    """The mean over the processes of the gradients of all microbatches, by torch in float64."""
    net = model(mesh.device_type, torch.float64, accumulate=False)
    for rank in range(mesh.size()):
        for x in parts(rank, mesh.device_type):
            nn.functional.linear(
                nn.functional.linear(x.double(), *net[0].parameters()), *net[1].parameters()
            ).sum().backward()
    return [p.grad / mesh.size() for p in net.parameters() if p.grad is not None]


def check(net: nn.Module, synchronises: Callable[[bool], Any], mesh: DeviceMesh, fewest: int) -> None:
    """Steps of several microbatches, of which the last one is communicated; gradients removed or zeroed in between."""
    wanted = expected(mesh)
    with additions() as added:
        for step in range(STEPS):
            for index, x in enumerate(parts(mesh.get_local_rank(), mesh.device_type)):
                with synchronises(index == PARTS - 1):
                    net(x).sum().backward()
            for p, want in zip(net.parameters(), wanted, strict=True):
                grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                assert grad is not None
                assert_same_bits(grad + 0.0, want.to(grad.dtype) + 0.0, f"step {step}")
            net.zero_grad(set_to_none=step == 0)
    assert added.count(True) >= fewest, added


def ddp_case(bucket_view: bool) -> Callable[[DeviceMesh], None]:
    def case(mesh: DeviceMesh) -> None:
        net = nn.parallel.DistributedDataParallel(model(mesh.device_type), gradient_as_bucket_view=bucket_view)
        check(net, lambda last: nullcontext() if last else net.no_sync(), mesh, 2 * PARTS * STEPS)

    return case


def fsdp_case(reshard: bool, accumulates_in_float32: bool) -> Callable[[DeviceMesh], None]:
    def case(mesh: DeviceMesh) -> None:
        net = model(mesh.device_type)
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if accumulates_in_float32 else None)
        for layer in net:
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
        fully_shard(net, mesh=mesh, mp_policy=policy)

        @contextmanager
        def synchronises(last: bool) -> Iterator[None]:
            net.set_requires_gradient_sync(last)
            yield

        check(net, synchronises, mesh, 2 * PARTS * STEPS)

    return case


CASES: dict[str, Callable[[DeviceMesh], None]] = {
    **{f"accumulate-ddp-{'views' if view else 'copies'}": ddp_case(view) for view in (True, False)},
    "accumulate-fsdp": fsdp_case(True, False),
    "accumulate-fsdp-float32": fsdp_case(False, True),
}
