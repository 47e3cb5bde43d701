"""What each of several processes does with the operators sharded by DTensor, for tests/integration/test_distributed.py.

Operands are integers, so every sharding has the same bits.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import matmul_grad
from matmul_grad import sharding
from matmul_grad.testing import assert_same_bits, integers

Placings = Callable[..., Iterable[tuple[Placement, ...]]]  # of operands with these choices each
R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)

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


def pairs(*choices: list[Placement]) -> Iterator[tuple[Placement, ...]]:
    """Of the placements of two or three operands as few as hold each two of them together."""
    if len(choices) < 3:
        yield from itertools.product(*choices)
        return
    order = sorted(range(3), key=lambda i: -len(choices[i]))
    first, second, last = (choices[i] for i in order)
    for (i, x), (j, y) in itertools.product(enumerate(first), enumerate(second)):
        found = dict(zip(order, (x, y, last[(i + j) % len(last)]), strict=True))
        yield found[0], found[1], found[2]


def whole_numbers(size: tuple[int, ...], seed: int, device: str) -> Tensor:
    return integers(1, math.prod(size), torch.float32, seed).view(size).to(device)


def operator_case(name: str, every: Placings) -> Callable[[DeviceMesh], None]:
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
            for placing in every(*(placements(len(size)) for size in sizes)):
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


def placements_case(name: str, every: Placings) -> Callable[[DeviceMesh], None]:
    """Whatever the placements of the operands: the result and the gradients lie as torch's do, for as much traffic."""
    theirs = nn.functional.linear if name == "linear" else getattr(torch, name)

    def case(mesh: DeviceMesh) -> None:
        sizes = FUNCTIONS[name]
        values = [whole_numbers(size, seed, mesh.device_type) for seed, size in enumerate(sizes)]
        for placing in every(*(placements(len(size)) for size in sizes)):
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


def cases(every: Placings) -> dict[str, Callable[[DeviceMesh], None]]:
    return {
        **{f"operator-{name}": operator_case(name, every) for name in sharding.EQUATIONS},
        "convolution": case_convolution,
        "operator-grouped_mm": case_grouped,
        **{f"operator-{name}": activated_case(name) for name in ACTIVATED},
        "operator-mm_dtype": case_out_dtype,
        "nothing-moves": case_nothing_moves_that_need_not,
        **{f"placements-{name}": placements_case(name, every) for name in FUNCTIONS},
    }
