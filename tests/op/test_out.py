"""``out=``: storages that are shared, freed, too small or growing, and operands that are the result."""

import contextlib
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import processes
import pytest
import torch
from outcomes import outcome
from torch import Tensor

import matmul_grad
from matmul_grad import out_variants
from matmul_grad.dispatch_state import is_plain
from matmul_grad.testing import assert_same_bits, integers

NAMES = ("mm", "bmm", "addmm", "baddbmm", "matmul", "mv", "addmv", "dot", "vdot")


def square(name: str, size: int = 4) -> list[Tensor]:
    """Operands of which every one may be the result of mm, bmm, addmm and baddbmm."""
    batch = (2,) if "bmm" in name else ()
    count = 3 if "add" in name else 2
    whole = [torch.stack([integers(size, size, torch.float32, 10 * i + j) for j in range(2)]) for i in range(count)]
    return [x if batch else x[0].clone() for x in whole]


def quiet(call: Callable[..., Tensor], *arguments: Any, **named: Any) -> Tensor:
    """Without torch's warning that it resizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*arguments, **named)


@pytest.mark.parametrize("name", ["mm", "bmm", "addmm", "baddbmm"])
def test_out_is_a_matrix(name: str) -> None:
    """Where torch overwrites what it has yet to read."""
    for place, transposed in itertools.product((-2, -1), (False, True)):
        operands = square(name)
        expected = getattr(torch, name)(*[x.clone() for x in operands])
        out = operands[place].mT if transposed else operands[place]
        with matmul_grad.strict():
            assert getattr(matmul_grad, name)(*operands, out=out) is out
        assert_same_bits(out, expected, f"{place} {transposed}")


@pytest.mark.parametrize("name", ["mm", "bmm", "addmm", "baddbmm"])
def test_out_overlaps_a_matrix(name: str) -> None:
    for place in (-2, -1):
        operands = square(name)
        expected = getattr(torch, name)(*[x.clone() for x in operands])
        base = torch.cat([operands[place].flatten(), torch.zeros(9)])
        operands[place] = base[: expected.numel()].view_as(expected)
        out = base[3 : 3 + expected.numel()].view_as(expected)
        with matmul_grad.strict():
            getattr(matmul_grad, name)(*operands, out=out)
        assert_same_bits(out, expected)


@pytest.mark.parametrize("entry", ["function", "switch"])
def test_out_between_the_elements_of_an_operand(entry: str) -> None:
    """Its elements are distinct, though its strides do not step over each other's."""
    base = integers(1, 12, torch.float32)[0]
    a, b = base[:4].view(2, 2, 1), integers(2, 2, torch.float32, 2).view(2, 1, 2)
    expected = torch.bmm(a.clone(), b)
    out = base.as_strided((2, 2, 2), (2, 3, 4))
    with matmul_grad.enabled(), matmul_grad.strict():
        (matmul_grad if entry == "function" else torch).bmm(a, b, out=out)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("name", ["mm", "bmm", "addmm", "baddbmm"])
def test_out_that_repeats_an_element_where_nothing_is_multiplied(name: str) -> None:
    operands = square(name)
    operands[-2:] = [operands[-2][..., :0], operands[-1][..., :0, :]]
    results = [
        outcome(getattr(home, name), *operands, out=torch.zeros(()).expand(operands[-1].shape))
        for home in (matmul_grad, torch)
    ]
    if isinstance(results[1], Tensor):
        assert_same_bits(*results)
    else:
        assert results[0] == results[1]


def test_out_that_repeats_an_element_of_an_operand() -> None:
    """torch's bmm does not look for it; its mm does."""
    operands = square("mm")
    before = operands[0].clone()
    out = operands[0][..., :1].expand(operands[0].shape)
    for home in (matmul_grad, torch):
        with matmul_grad.enabled():
            result = outcome(home.mm, *operands, out=out)
        assert result == outcome(torch.mm, *operands, out=out)
        assert "single memory location" in result[1]
        assert operands[0].equal(before)


@pytest.mark.parametrize("entry", ["function", "switch"])
@pytest.mark.parametrize("name", ["mm", "bmm", "addmm", "baddbmm", "mv", "addmv"])
def test_out_that_repeats_an_element_and_overlaps_a_matrix(name: str, entry: str) -> None:
    """torch takes some of these calls and refuses the others."""

    def call(function: Callable[..., Tensor]) -> tuple[Any, list[float]]:
        operands = [x.clone() for x in square("addmm" if name == "addmv" else "mm" if name == "mv" else name)]
        if name in ("mv", "addmv"):
            operands = [x if index == len(operands) - 2 else x[0] for index, x in enumerate(operands)]
        matrix = operands[-2]
        out = matrix[..., 0] if name in ("mv", "addmv") else matrix
        found = outcome(function, *operands, out=out[..., :1].expand(out.shape))
        return found.tolist() if isinstance(found, Tensor) else found, matrix.tolist()

    expected = call(getattr(torch, name))
    with matmul_grad.enabled() if entry == "switch" else contextlib.nullcontext():
        assert call(getattr(torch if entry == "switch" else matmul_grad, name)) == expected


@pytest.mark.parametrize("name", ["addmm", "baddbmm"])
def test_out_overlaps_what_is_added(name: str) -> None:
    """torch refuses where both are dense, and elsewhere reads what it has written."""
    operands = square(name)
    expected = getattr(torch, name)(*[x.clone() for x in operands])
    count = expected.numel()
    base = torch.cat([operands[0].flatten(), torch.zeros(9)])
    operands[0] = base[:count].view_as(expected)
    for out in (operands[0].mT, base[3 : 3 + count].view_as(expected)):
        errors = [outcome(getattr(home, name), *operands, out=out) for home in (matmul_grad, torch)]
        assert errors[0] == errors[1]
        assert "single memory location" in errors[0][1]
        assert base[:count].equal(square(name)[0].flatten())
    sparse = torch.zeros(2 * count + 9)
    operands[0] = sparse[: 2 * count : 2].view_as(expected)
    for out in (sparse[1 : 1 + count].view_as(expected), sparse[2 : 2 + 2 * count : 2].view_as(expected)):
        operands[0].copy_(square(name)[0])
        with matmul_grad.strict():
            getattr(matmul_grad, name)(*operands, out=out)
        assert_same_bits(out, expected)


@pytest.mark.parametrize("name", ["addmm", "baddbmm"])
def test_out_overlaps_what_is_added_under_the_switch(name: str) -> None:
    """torch's kernel would read what it has written where they are not dense."""
    operands = square(name)
    expected = getattr(torch, name)(*[x.clone() for x in operands])
    count = expected.numel()
    sparse = torch.zeros(2 * count + 9)
    operands[0] = sparse[: 2 * count : 2].view_as(expected)
    for out in (sparse[1 : 1 + count].view_as(expected), sparse[2 : 2 + 2 * count : 2].view_as(expected)):
        operands[0].copy_(square(name)[0])
        with matmul_grad.enabled(), matmul_grad.strict():
            getattr(torch, name)(*operands, out=out)
        assert_same_bits(out, expected)
    dense = torch.cat([square(name)[0].flatten(), torch.zeros(9)])
    operands[0] = dense[:count].view_as(expected)
    with matmul_grad.enabled(), pytest.raises(RuntimeError, match="single memory location"):
        getattr(torch, name)(*operands, out=dense[3 : 3 + count].view_as(expected))


@pytest.mark.parametrize("name", ["addmm", "baddbmm"])
def test_out_overlaps_a_matrix_and_an_input_that_is_not_read(name: str) -> None:
    """torch does not look at an input whose beta is 0."""
    operands = square(name)
    expected = getattr(torch, name)(*[x.clone() for x in operands], beta=0)
    count = expected.numel()
    base = torch.cat([operands[2].flatten(), torch.zeros(9)])
    operands[0] = operands[2] = base[:count].view_as(expected)
    out = base[3 : 3 + count].view_as(expected)
    with matmul_grad.strict():
        getattr(matmul_grad, name)(*operands, beta=0, out=out)
    assert_same_bits(out, expected)


def test_out_overlaps_the_vector_that_is_added() -> None:
    """As of matrices: torch refuses where both are dense and the vector is read."""
    matrix, vector = integers(5, 6, torch.float32, 1), integers(6, 1, torch.float32, 2)[:, 0]
    for source, target in ((slice(0, 5), slice(1, 6)), (slice(0, 10, 2), slice(1, 6)), (slice(0, 1), slice(0, 5))):
        for beta in (0, 1):
            base = integers(1, 20, torch.float32, 3)[0]
            before, expected = base.clone(), torch.addmv(base[source], matrix, vector, beta=beta)
            given = outcome(matmul_grad.addmv, base[source], matrix, vector, beta=beta, out=base[target])
            if beta and source == slice(0, 5):
                assert given == outcome(torch.addmv, base[source], matrix, vector, out=base[target])
                assert "single memory location" in given[1]
                assert base.equal(before)
            else:
                assert_same_bits(given, expected)


@pytest.mark.parametrize("name", NAMES)
def test_an_out_that_was_made_in_inference_mode(name: str) -> None:
    """torch writes to it nowhere else: nothing would tell autograd."""
    operands = square("addmm" if name == "addmv" else name)
    if name in ("mv", "addmv"):
        operands = [x if index == len(operands) - 2 else x[0] for index, x in enumerate(operands)]
    elif name in ("dot", "vdot"):
        operands = [x[0] for x in operands]
    expected = getattr(torch, name)(*operands)
    for shape in (expected.shape, (0,)):
        with torch.inference_mode():
            out = torch.full(shape, 7.0)
        for block in (contextlib.nullcontext, torch.no_grad):
            with block():
                errors = [outcome(getattr(home, name), *operands, out=out) for home in (matmul_grad, torch)]
            assert errors[0] == errors[1]
            assert "Inplace update to inference tensor" in errors[0][1]
        with torch.inference_mode(), matmul_grad.strict():
            assert quiet(getattr(matmul_grad, name), *operands, out=out.resize_(shape)) is out
        assert_same_bits(out, expected)


def test_an_interrupt_after_the_product_leaves_out_marked_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first product with an out compiles what writes the next ones, for seconds."""

    def interrupt(out: Tensor) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(out_variants, "write_compiled", lambda *call: False)
    monkeypatch.setattr(out_variants, "expect_more", interrupt)
    out = torch.zeros(4, 4)
    with pytest.raises(KeyboardInterrupt):
        matmul_grad.mm(*square("mm"), out=out)
    assert out.any()
    assert out._version > 0


def test_bmm_of_a_batch_and_its_transpose_into_itself() -> None:
    q = torch.arange(10.0).view(2, 1, 5)
    expected = torch.bmm(q.clone(), q.clone().transpose(1, 2))
    with matmul_grad.strict():
        assert quiet(matmul_grad.bmm, q, q.transpose(1, 2), out=q) is q
    assert_same_bits(q, expected)


@pytest.mark.parametrize("name", NAMES)
def test_out_grows_in_the_storage_of_an_operand(name: str) -> None:
    """The storage moves while it grows."""
    size = 8
    vector = name in ("mv", "addmv", "dot", "vdot")
    plain = {
        "mv": [integers(size, size, torch.float32), integers(1, size, torch.float32, 2)[0]],
        "addmv": [integers(1, size, torch.float32)[0], *square("mm", size)[:1], integers(1, size, torch.float32, 2)[0]],
        "dot": [integers(1, size, torch.float32, i)[0] for i in range(2)],
    }
    plain["vdot"] = plain["dot"]
    plain["matmul"] = [torch.stack(square("mm", size)), square("mm", size)[1]]
    operands = plain[name] if vector or name == "matmul" else square(name, size)
    expected = getattr(torch, name)(*[x.clone() for x in operands])
    for place in range(len(operands)):
        given = [x.clone() for x in operands]
        base = given[place].flatten()
        given[place] = base.view(operands[place].shape)
        out = base[base.numel() :] if base.numel() % 2 == 0 else base[-1:]
        with matmul_grad.strict():
            assert quiet(getattr(matmul_grad, name), *given, out=out) is out
        assert_same_bits(out, expected, f"{place}")
        assert_same_bits(given[place], operands[place], "the operand has changed")


@pytest.mark.parametrize("name", NAMES)
def test_wrong_call_leaves_out_as_it_was(name: str) -> None:
    out = torch.full((3,), 7.0)
    for wrong in (torch.ones(2, 3), torch.ones(3).to("meta")):
        operands = [torch.ones(4, 4)] * (3 if "add" in name else 2)
        operands[-1] = wrong
        with pytest.raises(Exception) as ours:
            getattr(matmul_grad, name)(*operands, out=out)
        with pytest.raises(type(ours.value)) as theirs:
            getattr(torch, name)(*operands, out=out.clone())
        assert str(ours.value) == str(theirs.value)
        assert out.tolist() == [7.0] * 3


FREED = """
import sys, torch, matmul_grad
name, kind = sys.argv[1:]
one = torch.ones
made = {
    "mm": lambda: [one(4, 4), one(4, 4)], "bmm": lambda: [one(2, 4, 4), one(2, 4, 4)],
    "addmm": lambda: [one(4, 4), one(4, 4), one(4, 4)], "baddbmm": lambda: [one(2, 4, 4)] + [one(2, 4, 4)] * 2,
    "matmul": lambda: [one(2, 4, 4), one(4, 4)], "linear": lambda: [one(2, 4, 4), one(4, 4), one(4)],
    "mv": lambda: [one(4, 4), one(4)], "addmv": lambda: [one(4), one(4, 4), one(4)],
    "dot": lambda: [one(4), one(4)], "vdot": lambda: [one(4), one(4)], "mm_backward": lambda: [one(4, 4)] * 3,
}[name]
call = getattr(matmul_grad, name)
shape = None if name == "mm_backward" else call(*made()).shape
size = {"freed": 0, "small": 4}[kind]
for place in range(len(made()) + (name not in ("linear", "mm_backward"))):
    for with_out in (False, True):
        operands = [x.clone() for x in made()]
        out = one(shape) if shape is not None else None
        if with_out and (name in ("linear", "mm_backward")) or (not with_out and place == len(operands)):
            continue
        victim = (*operands, out)[place]
        if kind == "small" and victim.numel() == 1:
            continue
        victim.untyped_storage().resize_(size)
        print("operand", place, "with out" if with_out else "", flush=True)
        try:
            call(*operands, **({"out": out} if with_out else {}))
            sys.exit("nothing was raised")
        except RuntimeError:
            pass
print("done")
"""


@pytest.mark.parametrize("kind", ["freed", "small"])
@pytest.mark.parametrize("name", [*NAMES, "linear", "mm_backward"])
def test_storages_that_do_not_hold_their_tensors(name: str, kind: str) -> None:
    """In a process of its own, which would end here."""
    done = processes.run(FREED, arguments=(name, kind))
    assert done.returncode == 0, f"{done.returncode} after {done.stdout.splitlines()[-1:]}: {done.stderr[-500:]}"
    assert done.stdout.endswith("done\n")


REPEATING = """
import sys, torch, matmul_grad
name, k = sys.argv[1], int(sys.argv[2])
one = torch.ones
operands, shape = {
    "mm": lambda: ([one(4, k), one(k, 4)], (4, 4)), "bmm": lambda: ([one(2, 4, k), one(2, k, 4)], (2, 4, 4)),
    "addmm": lambda: ([one(4, 4), one(4, k), one(k, 4)], (4, 4)),
    "baddbmm": lambda: ([one(2, 4, 4), one(2, 4, k), one(2, k, 4)], (2, 4, 4)),
    "matmul": lambda: ([one(2, 4, k), one(k, 4)], (2, 4, 4)),
    "mv": lambda: ([one(4, k), one(k)], (4,)), "addmv": lambda: ([one(4), one(4, k), one(k)], (4,)),
}[name]()
for strides in {(0,) * len(shape), (0,) * (len(shape) - 1) + (1,)}:
    out = torch.as_strided(one(16), shape, strides)
    out.untyped_storage().resize_(0)
    try:
        getattr(matmul_grad, name)(*operands, out=out)
        sys.exit("nothing was raised")
    except RuntimeError:
        pass
print("done")
"""


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize("name", ["mm", "bmm", "addmm", "baddbmm", "matmul", "mv", "addmv"])
def test_an_out_that_repeats_elements_of_a_freed_storage(name: str, k: int) -> None:
    """In a separate process: torch.mv writes to it, and crashes."""
    done = processes.run(REPEATING, arguments=(name, str(k)))
    assert (done.returncode, done.stdout) == (0, "done\n"), f"{done.returncode}: {done.stdout} {done.stderr[-500:]}"


@pytest.mark.skipif(not hasattr(torch, "_lazy_clone"), reason="this torch makes no copy-on-write tensors")
@pytest.mark.parametrize("name", NAMES)
def test_copy_on_write_operands_are_not_copied(name: str) -> None:
    operands = [x[..., 0].clone() if name in ("dot", "vdot") else x.clone() for x in square(name)]
    if name in ("mv", "addmv"):
        operands = [x[0] if x is not operands[-2] else x for x in operands] if name == "addmv" else [
            operands[0], operands[1][0],
        ]  # fmt: skip
    expected = getattr(torch, name)(*operands)
    lazy = [torch._lazy_clone(x.clone()) for x in operands]
    for named in ({}, {"out": torch.zeros_like(expected)}, {"out": torch.zeros(0)}):
        assert_same_bits(getattr(matmul_grad, name)(*lazy, **named), expected)
        assert all(torch._C._is_cow_tensor(x) for x in lazy), named


@pytest.mark.parametrize("of_zeros", [False, True], ids=["negative-view", "zeros-without-memory"])
@pytest.mark.parametrize("name", ["mm", "bmm", "addmm", "baddbmm"])
def test_tensors_whose_memory_does_not_hold_their_elements(name: str, of_zeros: bool) -> None:
    """A result that is a negative view, too; what writes past autograd would read or write the memory as it is."""
    operands = square(name)
    for place in range(len(operands)):
        view = torch.complex(operands[place], operands[place]).conj().imag
        assert view.is_neg()
        given = [*operands]
        given[place] = torch._efficientzerotensor(view.shape) if of_zeros else view
        assert not is_plain(given[place])
        expected = getattr(torch, name)(*given)
        for out in (torch.zeros_like(operands[-1]), torch.complex(operands[-1], operands[-1]).conj().imag):
            assert getattr(matmul_grad, name)(*given, out=out) is out
            assert_same_bits(out.resolve_neg(), expected, f"{place} {out.is_neg()}")
