"""A storage that does not hold its tensor: freed, as FSDP frees parameters, or shrunk. No entry goes past it."""

import sys
import tempfile
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import processes
import pytest
import torch
from torch import Tensor

import matmul_grad

own = torch.ops.matmul_grad
m, one, v = torch.ones(4, 4), torch.ones(1, 4, 4), torch.ones(4)

# By name: a call of three tensors that a storage is taken from in turn, and what they are.
ENTRIES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "op-mm": (lambda a, b: own.mm(a, b), (m, m)),
    "op-bmm": (lambda a, b: own.bmm(a, b), (one, one)),
    "op-addmm": (lambda x, a, b: own.addmm(x, a, b), (m, m, m)),
    "op-baddbmm": (lambda x, a, b: own.baddbmm(x, a, b, beta=2), (one, one, one)),
    "op-mm_backward": (lambda g, a, b: own.mm_backward(g, a, b, [True, True]), (m, m, m)),
    "mm": (matmul_grad.mm, (m, m)),
    "mm-out": (lambda a, b, out: matmul_grad.mm(a, b, out=out), (m, m, m)),
    "addmm": (matmul_grad.addmm, (m, m, m)),
    "addmm-out": (lambda x, a, b, out: matmul_grad.addmm(x, a, b, out=out), (m, m, m, m)),
    "bmm": (matmul_grad.bmm, (one, one)),
    "bmm-out": (lambda a, b, out: matmul_grad.bmm(a, b, out=out), (one, one, one)),
    "baddbmm": (matmul_grad.baddbmm, (one, one, one)),
    "matmul": (matmul_grad.matmul, (m, v)),
    "linear": (matmul_grad.linear, (m, m, v)),
    "mm_backward": (matmul_grad.mm_backward, (m, m, m)),
}
OVERRIDDEN: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "mm": (torch.mm, (m, m)),
    "mm.out": (lambda a, b, out: torch.mm(a, b, out=out), (m, m, m)),
    "addmm": (torch.addmm, (m, m, m)),
    "addmm.out": (lambda x, a, b, out: torch.addmm(x, a, b, out=out), (m, m, m, m)),
    "addmm_": (lambda x, a, b: x.addmm_(a, b), (m, m, m)),
    "bmm": (torch.bmm, (one, one)),
    "bmm.out": (lambda a, b, out: torch.bmm(a, b, out=out), (one, one, one)),
    "baddbmm": (torch.baddbmm, (one, one, one)),
    "baddbmm.out": (lambda x, a, b, out: torch.baddbmm(x, a, b, out=out), (one, one, one, one)),
    "baddbmm_": (lambda x, a, b: x.baddbmm_(a, b), (one, one, one)),
    "mv": (torch.mv, (m, v)),
    "mv.out": (lambda a, x, out: torch.mv(a, x, out=out), (m, v, v)),
    "addmv": (torch.addmv, (v, m, v)),
    "addmv_": (lambda x, a, b: x.addmv_(a, b), (v, m, v)),
    "dot": (torch.dot, (v, v)),
    "vdot": (torch.vdot, (v, v)),
}


def with_storage(tensor: Tensor, size: int) -> Tensor:
    """A copy whose storage is resized to so many bytes."""
    copy = tensor.clone()
    copy.untyped_storage().resize_(size)
    return copy


def broken(entries: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]) -> list[Any]:
    cases = []
    for name, (call, tensors) in entries.items():
        for index in range(len(tensors)):
            for size in (0, 4, 12):
                cases.append(pytest.param(call, tensors, index, size, id=f"{name}-{index}-{size}"))
    return cases


@pytest.mark.parametrize(("call", "tensors", "index", "size"), broken(ENTRIES))
def test_a_storage_that_is_too_small_raises(call: Any, tensors: Any, index: int, size: int) -> None:
    operands = [with_storage(x, size) if i == index else x.clone() for i, x in enumerate(tensors)]
    with pytest.raises(RuntimeError, match=r"not allocated yet|out of bounds"):
        call(*operands)
    assert all(torch.equal(x, y) for i, (x, y) in enumerate(zip(operands, tensors)) if i != index)


@pytest.mark.parametrize(("call", "tensors", "index", "size"), broken(OVERRIDDEN))
def test_a_storage_that_is_too_small_raises_under_the_override(call: Any, tensors: Any, index: int, size: int) -> None:
    operands = [with_storage(x, size) if i == index else x.clone() for i, x in enumerate(tensors)]
    with matmul_grad.enabled(), pytest.raises(RuntimeError, match=r"not allocated yet|out of bounds"):
        call(*operands)
    assert all(torch.equal(x, y) for i, (x, y) in enumerate(zip(operands, tensors)) if i != index)


@pytest.mark.parametrize("name", [name for name in OVERRIDDEN if "out" not in name and not name.endswith("_")])
def test_a_copy_on_write_operand_stays_shared(name: str) -> None:
    call, tensors = OVERRIDDEN[name]
    operands = [x._lazy_clone() for x in tensors]
    with matmul_grad.enabled(), matmul_grad.strict():
        call(*operands)
    assert all(torch._C._is_cow_tensor(x) for x in operands)


@pytest.mark.parametrize("name", [name for name in ENTRIES if "out" not in name])
def test_a_copy_on_write_operand_stays_shared_by_our_operators(name: str) -> None:
    call, tensors = ENTRIES[name]
    operands = [x._lazy_clone() for x in tensors]
    with matmul_grad.strict():
        call(*operands)
    assert all(torch._C._is_cow_tensor(x) for x in operands)


def test_a_copy_on_write_result_is_written_alone() -> None:
    kept = m.clone()
    out, place = kept._lazy_clone(), kept._lazy_clone()
    with matmul_grad.enabled(), matmul_grad.strict():
        torch.mm(m, m, out=out)
        place.addmm_(m, m)
    assert torch.equal(kept, m)
    assert torch.equal(out, 4 * m) and torch.equal(place, 5 * m)


@pytest.mark.parametrize("size", [1, 40, 400])
def test_an_out_that_grows_within_an_operands_storage(size: int) -> None:
    """Growing moves the storage, and the operands in it, which torch then overwrites."""
    for switched in (False, True):
        base = torch.arange(60.0)
        a, out = base[:36].view(6, 6), base[60 - min(size, 60) :]
        expected = a.clone() @ a.clone()
        with matmul_grad.enabled(), pytest.warns(UserWarning, match="resized"):
            (torch if switched else matmul_grad).mm(a, a, out=out)
        assert torch.equal(out, expected)


def test_an_out_that_is_an_operand_of_another_shape() -> None:
    for switched in (False, True):
        q = torch.arange(10.0).view(2, 1, 5)
        with matmul_grad.enabled(), pytest.warns(UserWarning, match="resized"):
            (torch if switched else matmul_grad).bmm(q, q.transpose(1, 2), out=q)
        assert q.flatten().tolist() == [30.0, 255.0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="maps a file that cannot be written")
def test_read_only_operands_are_accepted() -> None:
    """From NumPy arrays over a file that is mapped to be read alone: one write is a crash, in a process of its own."""
    code = """
        import mmap, sys, warnings, numpy, torch, matmul_grad
        warnings.simplefilter("ignore")
        with open(sys.argv[1], "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        flat = torch.from_numpy(numpy.frombuffer(memory, numpy.float32))
        a, b, c = flat[:35].view(5, 7), flat[35:91].view(7, 8), flat[91:131].view(5, 8)
        x, y = a.clone(), b.clone()
        for switched in (False, True):
            (matmul_grad.enable if switched else matmul_grad.disable)()
            one = torch if switched else matmul_grad
            assert torch.equal(one.mm(a, b), one.mm(x, y))
            assert torch.equal(one.mm(b.t(), a.t()), one.mm(y.t(), x.t()))
            assert torch.equal(one.addmm(c, a, b), one.addmm(c.clone(), x, y))
            assert torch.equal(one.bmm(a[None], b[None]), one.bmm(x[None], y[None]))
            assert torch.equal(one.matmul(a, b[:, 0]), one.matmul(x, y[:, 0]))
        matmul_grad.mm_backward(c, a, b)
        print("done")
    """
    with tempfile.NamedTemporaryFile() as file:
        np.arange(131, dtype=np.float32).tofile(file.name)
        done = processes.run(textwrap.dedent(code), arguments=(file.name,))
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
