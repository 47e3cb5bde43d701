"""Where a C++ node of torch records products: after a self-test, beside every kernel that torch has."""

import textwrap

import processes
import pytest
import torch
from recorded import on_this_system

import matmul_grad
from matmul_grad.kernels.native import graph, state

pytestmark = on_this_system


def test_the_kernels_of_torch_are_where_they_were() -> None:
    code = """
        import torch, matmul_grad
        from matmul_grad.kernels.native import state
        backward = ("matmul_backward", "linear_backward", "mkldnn_linear_backward")
        forward = ("matmul", "linear", "mkldnn_linear")
        names = (*forward, *backward, "mm", "bmm", "addmm")
        before = {name: torch._C._dispatch_dump(f"aten::{name}").splitlines() for name in names}
        x = torch.ones(2, 2, requires_grad=True)
        matmul_grad.mm(x, x)
        assert state.words[state.RECORD] == 1
        after = {name: torch._C._dispatch_dump(f"aten::{name}").splitlines() for name in names}
        new = [(name, line.split(":")[0]) for name in names for line in after[name] if line not in before[name]]
        assert not [line for name in names for line in before[name] if line not in after[name]]
        keys = ("CPU", "AutogradCPU", "FuncTorchBatched", "Batched")
        expected = [(name, "PrivateUse3") for name in forward] + [(name, key) for name in backward for key in keys]
        assert sorted(new) == sorted(expected), new
        assert type(torch.matmul(x, x).grad_fn).__name__ == "MmBackward0"
        """
    done = processes.run(textwrap.dedent(code))
    assert done.returncode == 0, done.stderr[-2000:]


UNFIT = {
    "no such function": ("GRAPH_MANGLED['linear'] = 'no_such_function'", "has no linear"),
    "hooks elsewhere": ("FIRST_HOOK = 6", "hooks are not where they are expected"),
    "a kernel of another library": (
        "lib = torch.library.Library('aten', 'IMPL'); lib.impl('matmul', lambda a, b: a, 'PrivateUse3')",
        "has a kernel",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_functions_record_on_a_torch_that_is_not_as_expected(name: str) -> None:
    change, reason = UNFIT[name]
    target = "torch_layout." if not change.startswith("lib") else ""
    code = f"""
        import re, torch, matmul_grad
        from matmul_grad import autograd
        from matmul_grad.kernels.native import graph, state, torch_layout
        {target}{change}
        x = torch.ones(2, 2, requires_grad=True)
        for _ in range(2):
            c = matmul_grad.mm(x, x)
            assert type(c.grad_fn).__name__ == "MmBackward", c.grad_fn
        c.sum().backward()
        assert x.grad.tolist() == [[4, 4], [4, 4]]
        assert state.words[state.RECORD] == 0
        assert re.search({reason!r}, graph.reason()), graph.reason()
        """
    done = processes.run(textwrap.dedent(code))
    assert done.returncode == 0, done.stderr[-2000:]


def test_it_is_on_here() -> None:
    x = torch.ones(2, 2, requires_grad=True)
    matmul_grad.mm(x, x)  # the first one, by a Function, tries the others
    assert type(matmul_grad.mm(x, x).grad_fn).__name__ == "MatmulBackward0"
    assert state.words[state.RECORD] == 1
    assert graph.reason() == ""
