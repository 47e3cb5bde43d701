"""What each of several processes does with models in parallel, for tests/integration/test_distributed.py."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from switch import accelerated
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import matmul_grad
from matmul_grad.testing import assert_model_within_budget, normal

WIDTH, HIDDEN, TOKENS, BATCH = 24, 40, 5, 8


def model(dtype: torch.dtype, device: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, 3, bias=False)
    return nn.Sequential(*layers).to(device, dtype)


def data(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    x = normal(BATCH * TOKENS, WIDTH, dtype, seed=1).view(BATCH, TOKENS, WIDTH)
    return x.to(device), normal(BATCH * TOKENS, 3, dtype, seed=2).view(BATCH, TOKENS, 3).to(device)


def step(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The loss and the gradient of each parameter, whole."""
    loss = nn.functional.mse_loss(net(x), y)
    loss.backward()
    grads = {name.removeprefix("module."): p.grad for name, p in net.named_parameters()}
    found = {"loss": loss.detach(), **grads}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items() if x is not None}


def tensor_parallel(net: nn.Sequential, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def data_parallel(net: nn.Sequential, mesh: DeviceMesh) -> nn.Module:
    return nn.parallel.DistributedDataParallel(net)


def sharded_data_parallel(net: nn.Sequential, mesh: DeviceMesh) -> nn.Module:
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


PARALLEL = {"tensor": tensor_parallel, "ddp": data_parallel, "fsdp": sharded_data_parallel}


@contextmanager
def switched(net: nn.Module) -> Iterator[None]:
    before = accelerated()
    with matmul_grad.enabled(), matmul_grad.strict():
        yield
    after = accelerated()
    assert after["addmm"] > before["addmm"] and after["mm"] > before["mm"], matmul_grad.info()


@contextmanager
def converted(net: nn.Module) -> Iterator[None]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, matmul_grad.strict():
        yield
    ran = {event.key for event in profile.key_averages()}
    assert ran & {"matmul_grad::linear", "matmul_grad::addmm"}, ran
    if isinstance(net, FSDPModule | nn.parallel.DistributedDataParallel):  # the other one asks aten for shapes
        assert ran & {"matmul_grad::mm_backward", "aten::matmul_backward", "aten::linear_backward"}, ran
        assert not ran & {"aten::addmm", "aten::mm"}, ran


WAYS = {"switched": switched, "converted": converted}


def model_case(parallel: str, way: str) -> Callable[[DeviceMesh], None]:
    """A training step of two processes on these kernels and on torch's, and of one process in float64."""

    def case(mesh: DeviceMesh) -> None:
        device, whole_batch = mesh.device_type, parallel == "tensor"
        truth = step(model(torch.float64, device), *data(torch.float64, device))

        def together(context: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
            net = model(torch.float32, device)
            net = PARALLEL[parallel](matmul_grad.convert(net) if context is converted else net, mesh)
            parts = [t if whole_batch else t.chunk(mesh.size())[mesh.get_local_rank()]
                     for t in data(torch.float32, device)]  # fmt: skip
            with context(net):
                found = step(net, *parts)
            if not whole_batch:
                dist.all_reduce(found["loss"])
                found["loss"] /= mesh.size()
            return found

        theirs = together(unchanged)
        assert_model_within_budget(together(WAYS[way]), theirs, truth, f"{parallel}, {way}")

    return case


@contextmanager
def unchanged(net: nn.Module) -> Iterator[None]:
    yield


def case_fully_shard_and_convert(mesh: DeviceMesh) -> None:
    """In either order; ``restore`` leaves FSDP's classes and methods, with or without it."""
    for convert_first in (True, False):
        net, (x, y) = model(torch.float32, mesh.device_type), data(torch.float32, mesh.device_type)
        if convert_first:
            matmul_grad.convert(net)
        sharded_data_parallel(net, mesh)
        classes = [type(module) for module in net.modules()]
        names = matmul_grad.converted(net if convert_first else matmul_grad.convert(net))
        assert names == ["0", "2", "3"], names
        with converted(net):
            step(net, x, y)
        assert matmul_grad.converted(matmul_grad.restore(net)) == []
        assert [type(module) for module in net.modules()] == classes
        assert isinstance(net[0], FSDPModule) and type(net[0]).__name__ == "FSDPLinear"
        net[0].unshard()
        net[0].reshard()
        step(net, x, y)


CASES: dict[str, Callable[[DeviceMesh], None]] = {
    "fully-shard": case_fully_shard_and_convert,
    **{f"{parallel}-{way}": model_case(parallel, way) for parallel in PARALLEL for way in WAYS},
}
