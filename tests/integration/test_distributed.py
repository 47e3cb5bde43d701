"""Two processes against one: DTensor's sharding of the operators, and models in parallel, on these kernels.

The tests start this file as a script in each process, by torchrun's module; what a case there says comes back as JSON.
"""

import datetime
import itertools
import json
import math
import os
import subprocess
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import accumulation_cases
import limits
import pytest
import torch
import torch.distributed as dist
from gpu_required import require_gpu
from limits import scaled
from switch import accelerated
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import matmul_grad
from matmul_grad import sharding
from matmul_grad.testing import assert_model_within_budget, assert_same_bits, integers, normal

LIMIT = 240  # seconds on the reference machine for all cases of one backend
R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)

# --- operators: integers, so every sharding has the same bits -----------------------------------------------

# Of each operand the size. What does not divide by two is sharded all the same; an input may be repeated.
SIZES: dict[str, list[tuple[tuple[int, ...], ...]]] = {
    "mm": [((4, 7), (7, 6))],
    "bmm": [((3, 4, 5), (3, 5, 2))],
    "addmm": [(size, (4, 7), (7, 6)) for size in [(4, 6), (6,), (4, 1), (1, 6), (1,), ()]],
    "baddbmm": [(size, (2, 4, 3), (2, 3, 5)) for size in [(2, 4, 5), (4, 5), (2, 1, 5)]],
}
SCALES: dict[str, dict[str, float]] = {name: {"beta": 2.0, "alpha": -3.0} if "add" in name else {} for name in SIZES}


def arranged(values: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    """The tensor, placed so; of a partial sum the first process holds all."""
    if placement != Partial():
        return distribute_tensor(values, mesh, [placement])
    mine = values if mesh.get_local_rank() == 0 else torch.zeros_like(values)
    return DTensor.from_local(mine, mesh, [Partial()])


def placements(dimensions: int) -> list[Placement]:
    return [R, Partial(), *(Shard(dimension) for dimension in range(dimensions))]


def whole_numbers(size: tuple[int, ...], seed: int, device: str) -> Tensor:
    return integers(1, math.prod(size), torch.float32, seed).view(size).to(device)


def operator_case(name: str) -> Callable[[DeviceMesh], None]:
    """Each sharding of each operand: the product and its gradients as if nothing were sharded."""
    operator = getattr(torch.ops.matmul_grad, name)

    def case(mesh: DeviceMesh) -> None:
        device, found = mesh.device_type, []
        for sizes in SIZES[name]:
            values = [whole_numbers(size, seed, device) for seed, size in enumerate(sizes)]
            whole = [x.clone().requires_grad_() for x in values]
            product = operator(*whole, **SCALES[name])
            grad = whole_numbers(tuple(product.shape), 9, device)
            expected = [product, *torch.autograd.grad(product, whole, grad)]
            for placing in itertools.product(*(placements(len(size)) for size in sizes)):
                parts = [arranged(x, mesh, p).requires_grad_() for x, p in zip(values, placing, strict=True)]
                sharded = operator(*parts, **SCALES[name])
                grads = torch.autograd.grad(sharded, parts, distribute_tensor(grad, mesh, [R]))
                found.append((f"{name} {sizes} {placing}", expected, [x.full_tensor() for x in (sharded, *grads)]))
        for what, expected, got in found:
            for x, y in zip(got, expected, strict=True):
                assert_same_bits(x.detach() + 0.0, y.detach() + 0.0, what)  # sums of parts have no -0.0

    return case


LOCAL: dict[str, list[tuple[tuple[Placement, ...], Placement]]] = {
    "mm": [((R, R), R), ((S0, R), S0), ((R, S1), S1), ((S1, S0), Partial())],
    "bmm": [((R, R), R), ((S0, S0), S0), ((S1, R), S1), ((R, S2), S2), ((S2, S1), Partial())],
    "addmm": [((R, R, R), R), ((S0, S0, R), S0), ((S1, R, S1), S1), ((Partial(), S1, S0), Partial())],
    "baddbmm": [((S0, S0, S0), S0), ((S1, S1, R), S1), ((S2, R, S2), S2), ((Partial(), S2, S1), Partial())],
}


def case_nothing_moves_that_need_not(mesh: DeviceMesh) -> None:
    """What is sharded by a rule is multiplied where it lies."""
    if mesh.size() == 1:
        return
    for name, rules in LOCAL.items():
        for placing, expected in rules:
            values = [whole_numbers(size, 1, mesh.device_type) for size in SIZES[name][0]]
            parts = [arranged(x, mesh, p) for x, p in zip(values, placing, strict=True)]
            with CommDebugMode() as moved:
                product = getattr(torch.ops.matmul_grad, name)(*parts)
            assert product.placements == (expected,), f"{name} {placing}: {product.placements}"
            assert moved.get_total_counts() == 0, f"{name} {placing}: {moved.get_comm_counts()}"


GROUPED = {"rows": ((7, 4), (3, 4, 6)), "columns": ((3, 4, 6), (6, 7)), "steps": ((4, 7), (7, 6))}


def case_grouped(mesh: DeviceMesh) -> None:
    """Each sharding of both operands: the grouped product and its gradients as if nothing were sharded."""
    offs = torch.tensor([2, 2, 6], dtype=torch.int32, device=mesh.device_type)
    ends = distribute_tensor(offs, mesh, [R])
    for name, sizes in GROUPED.items():
        values = [whole_numbers(size, seed, mesh.device_type) for seed, size in enumerate(sizes)]
        whole = [x.clone().requires_grad_() for x in values]
        product = matmul_grad.grouped_mm(*whole, offs=offs)
        grad = whole_numbers(tuple(product.shape), 9, mesh.device_type)
        expected = [product, *torch.autograd.grad(product, whole, grad)]
        for placing in itertools.product(*(placements(len(size)) for size in sizes)):
            parts = [arranged(x, mesh, p).requires_grad_() for x, p in zip(values, placing, strict=True)]
            sharded = matmul_grad.grouped_mm(*parts, offs=ends)
            grads = torch.autograd.grad(sharded, parts, distribute_tensor(grad, mesh, [R]))
            for x, y in zip((sharded, *grads), expected, strict=True):
                assert_same_bits(x.full_tensor().detach() + 0.0, y.detach() + 0.0, f"{name} {placing}")


ACTIVATED = {"addmm_activation": [(6,), (4, 8), (8, 6)], "addmm_gated": [(6,), (4, 6), (4, 8), (8, 6), (8, 6)]}


def activated_case(name: str) -> Callable[[DeviceMesh], None]:
    """Each sharding of the input and of the weights, of relu: the results as if nothing were sharded."""
    operator = getattr(torch.ops.matmul_grad, name)

    def case(mesh: DeviceMesh) -> None:
        values = [whole_numbers(size, seed, mesh.device_type) for seed, size in enumerate(ACTIVATED[name])]
        whole = [x.clone().requires_grad_() for x in values]
        result = operator(*whole, "relu")
        grad = whole_numbers(tuple(result.shape), 9, mesh.device_type)
        expected = [result, *torch.autograd.grad(result, whole, grad)]
        for placing in itertools.product(placements(2), placements(2)):
            places = [*[R] * (len(values) // 2), placing[0], *[placing[1]] * (len(values) // 2)]
            parts = [arranged(x, mesh, p).requires_grad_() for x, p in zip(values, places, strict=True)]
            sharded = operator(*parts, "relu")
            grads = torch.autograd.grad(sharded, parts, distribute_tensor(grad, mesh, [R]))
            for x, y in zip((sharded, *grads), expected, strict=True):
                assert_same_bits(x.full_tensor().detach() + 0.0, y.detach() + 0.0, f"{name} {placing}")

    return case


def case_out_dtype(mesh: DeviceMesh) -> None:
    """Each sharding of 16-bit operands: the float32 product as if nothing were sharded."""
    operator = torch.ops.matmul_grad.mm_dtype
    a, b = (whole_numbers(size, 1, mesh.device_type).bfloat16() for size in SIZES["mm"][0])
    expected = operator(a, b, torch.float32)
    for placing in itertools.product(placements(2), placements(2)):
        parts = [arranged(x, mesh, p) for x, p in zip((a, b), placing, strict=True)]
        assert_same_bits(operator(*parts, torch.float32).full_tensor() + 0.0, expected + 0.0, f"{placing}")


FUNCTIONS: dict[str, list[tuple[int, ...]]] = {
    "mm": [(4, 8), (8, 6)],
    "bmm": [(2, 4, 8), (2, 8, 6)],
    "addmm": [(6,), (4, 8), (8, 6)],
    "baddbmm": [(4, 6), (2, 4, 8), (2, 8, 6)],
    "matmul": [(2, 4, 8), (8, 6)],
    "linear": [(2, 4, 8), (6, 8), (6,)],
}


def results_of(function: Callable[..., Tensor], parts: list[DTensor]) -> tuple[list[tuple[Placement, ...]], int]:
    """Placements of a function's result and gradients, and how much was communicated for them."""
    with CommDebugMode() as moved:
        leaves = [part.detach().requires_grad_() for part in parts]
        result = function(*leaves)
        grads = torch.autograd.grad(result.sum(), leaves)
    return [x.placements for x in (result, *grads)], moved.get_total_counts()


def placements_case(name: str) -> Callable[[DeviceMesh], None]:
    """Whatever the placements of the operands: the result and the gradients lie as torch's do, for as much traffic."""
    theirs = nn.functional.linear if name == "linear" else getattr(torch, name)

    def case(mesh: DeviceMesh) -> None:
        sizes = FUNCTIONS[name]
        values = [whole_numbers(size, seed, mesh.device_type) for seed, size in enumerate(sizes)]
        for placing in itertools.product(*(placements(len(size)) for size in sizes)):
            parts = [arranged(x, mesh, p) for x, p in zip(values, placing, strict=True)]
            try:
                expected = results_of(theirs, parts)
            except RuntimeError as error:
                if "Attempted to flatten multiple dimensions" not in str(error):
                    raise
                continue  # torch 2.11 refuses this placement
            found = results_of(getattr(matmul_grad, name), parts)
            assert found == expected, f"{name} {placing}: {found}, torch {expected}"

    return case


def case_convolution(mesh: DeviceMesh) -> None:
    """Each device convolves its samples, with the filters whole; nothing is communicated."""
    for name, size in (("conv2d", (4, 3, 2, 2)), ("conv_transpose2d", (3, 4, 2, 2))):
        values = [whole_numbers(s, seed, mesh.device_type) for seed, s in enumerate([(4, 3, 5, 5), size, (4,)])]
        whole = [x.clone().requires_grad_() for x in values]
        expected = getattr(nn.functional, name)(*whole, stride=2, padding=1)
        expected = [expected, *torch.autograd.grad(expected, whole, torch.ones_like(expected))]
        parts = [arranged(x, mesh, p).requires_grad_() for x, p in zip(values, (S0, R, R), strict=True)]
        with CommDebugMode() as moved:
            result = getattr(matmul_grad, name)(*parts, stride=2, padding=1)
            grads = torch.autograd.grad(result, parts, torch.ones_like(result))
        assert moved.get_total_counts() == 0, moved.get_comm_counts()
        assert [x.placements for x in (result, *grads)] == [(S0,), (S0,), (Partial(),), (Partial(),)]
        for x, y in zip((result, *grads), expected, strict=True):
            assert_same_bits(x.detach().full_tensor() + 0.0, y.detach() + 0.0, name)


# --- models --------------------------------------------------------------------------------------------------

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
    **{f"operator-{name}": operator_case(name) for name in sharding.EQUATIONS},
    "convolution": case_convolution,
    "operator-grouped_mm": case_grouped,
    **{f"operator-{name}": activated_case(name) for name in ACTIVATED},
    "operator-mm_dtype": case_out_dtype,
    "nothing-moves": case_nothing_moves_that_need_not,
    **{f"placements-{name}": placements_case(name) for name in FUNCTIONS},
    "fully-shard": case_fully_shard_and_convert,
    **accumulation_cases.CASES,
    **{f"{parallel}-{way}": model_case(parallel, way) for parallel in PARALLEL for way in WAYS},
}


# --- in each process, and in the test ------------------------------------------------------------------------


def main(backend: str, folder: Path) -> None:
    """Every case, one after the other; what each raised, or nothing, to a file of this process."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="Warning: Profiler clears events")  # torch 2.11, once
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # of any linear layer: its result is a view
    rank, device = int(os.environ["RANK"]), "cuda" if backend == "nccl" else "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=scaled(60)))
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    raised = {}
    for name, case in CASES.items():
        try:
            case(mesh)
            raised[name] = ""
        except Exception:
            raised[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(raised))
    # Until all have written; then at once, since torch's way out may abort ("terminate called without an active
    # exception", once in some twenty runs), and torchrun would take that for a failed test.
    with suppress(Exception):
        dist.barrier()
    os._exit(0)


def torchrun(processes: int, *command: str | Path) -> str:
    """The script in so many processes of this machine, which find the tests' helpers; what they printed."""
    paths = filter(None, (str(Path(limits.__file__).parent), os.environ.get("PYTHONPATH")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*launch, *map(str, command)], capture_output=True, text=True, timeout=scaled(LIMIT),
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of each process, what each case raised. With one GPU its process is alone."""
    processes = 2
    if request.param == "nccl":
        require_gpu()
        processes = min(2, torch.cuda.device_count())
    folder = tmp_path_factory.mktemp(request.param)
    torchrun(processes, __file__, request.param, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("name", CASES)
def test_case_of_two_processes(name: str, outcomes: list[dict[str, str]]) -> None:
    for rank, raised in enumerate(outcomes):
        assert not raised[name], f"process {rank}:\n{raised[name]}"


@pytest.mark.parametrize("name", LOCAL)
def test_rules_for_a_torch_whose_strategies_are_not_found(name: str) -> None:
    rules = sharding.shardings(sharding.EQUATIONS[name], list(SIZES[name][0]))
    for operands, result in LOCAL[name]:
        assert ([result], list(operands)) in rules


def test_strategies_are_shared_or_rules_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Propagator:
        def __init__(self) -> None:
            self.op_strategy_funcs, self.op_to_schema_info = {"aten": "strategy"}, {"aten": "info"}

    full, empty = Propagator(), Propagator()
    assert sharding.share_strategy(full, "ours", "aten")
    assert (full.op_strategy_funcs["ours"], full.op_to_schema_info["ours"]) == ("strategy", "info")
    empty.op_strategy_funcs.clear()
    assert not sharding.share_strategy(empty, "ours", "aten")
    registered: list[str] = []
    monkeypatch.setattr(sharding, "register_rules", lambda name, equation: registered.append(name))
    sharding.register_with(types.SimpleNamespace(DTensor=types.SimpleNamespace()))  # type: ignore[arg-type]  # in a module's place
    assert registered == list(sharding.EQUATIONS)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
