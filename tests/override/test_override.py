"""The override on and off: blocks, decorators, exceptions, counts; exactly undone."""

import pytest
import torch
from dtypes import ACCELERATED
from processes import assert_runs
from switch import registrations, runs_on_ours

import matmul_grad
from matmul_grad import cli
from matmul_grad.kernels.native.op_table import ABOVE_AUTOGRAD, OVERLOADS

pytestmark = pytest.mark.usefixtures("off_before_and_after")

# --- on and off ----------------------------------------------------------------------------------------------


def test_only_these_kernels_change_and_come_back() -> None:
    before = registrations()
    matmul_grad.enable()
    during = registrations()
    matmul_grad.disable()
    assert registrations() == before
    for name in OVERLOADS:
        *old, _ = before[name]
        *new, _ = during[name]
        changed = [line for line in new if line not in old]
        above = ["AutogradCPU"] if name in ABOVE_AUTOGRAD else []
        assert [line.split(":")[0] for line in changed] == ["CPU", "CPU (inactive)", *above], changed
        for key, line in zip(("CPU", *above), (changed[0], *changed[2:]), strict=True):
            assert line == f"{key}: registered at matmul_grad:0 :: (none) [ boxed ]"


def test_enable_and_disable_may_be_called_again() -> None:
    before = registrations()
    for _ in range(3):
        matmul_grad.enable()
        matmul_grad.enable()
        assert runs_on_ours()
        assert matmul_grad.info()["on"] == ["cpu"]
        matmul_grad.disable()
        matmul_grad.disable()
        assert not runs_on_ours()
        assert matmul_grad.info()["on"] == []
    assert registrations() == before


def test_every_overload_is_overridden() -> None:
    a, batch = torch.ones(3, 3), torch.ones(2, 3, 3)
    with matmul_grad.enabled():
        for operands, operator in (
            ((a, a), "mm"),
            ((a, a, a), "addmm"),
            ((batch,) * 2, "bmm"),
            ((batch,) * 3, "baddbmm"),
        ):
            before = matmul_grad.info()["accelerated"].get(operator, {}).get("float32", 0)
            getattr(torch, operator)(*operands)
            getattr(torch, operator)(*operands, out=torch.empty_like(operands[0]))
            calls = 2
            if "add" in operator:
                getattr(operands[0].clone(), f"{operator}_")(*operands[1:])
                calls = 3
            assert matmul_grad.info()["accelerated"][operator]["float32"] - before == calls


def test_blocks_nest_and_restore() -> None:
    with matmul_grad.enabled():
        assert runs_on_ours()
        with matmul_grad.enabled():
            assert runs_on_ours()
        assert runs_on_ours()
        matmul_grad.disable()
        assert not runs_on_ours()
        with matmul_grad.enabled():
            assert runs_on_ours()
        assert not runs_on_ours()
    assert not runs_on_ours()
    matmul_grad.enable()
    with matmul_grad.enabled():
        matmul_grad.disable()
    assert runs_on_ours()
    matmul_grad.disable()


def test_enabled_works_as_a_decorator() -> None:
    decorated = matmul_grad.enabled()(runs_on_ours)
    assert (decorated(), decorated(), runs_on_ours()) == (True, True, False)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_exceptions_restore(kind: type[BaseException]) -> None:
    with pytest.raises(kind), matmul_grad.enabled(), matmul_grad.enabled():
        assert runs_on_ours()
        raise kind
    assert not runs_on_ours()


# --- quiet, counted, strict ----------------------------------------------------------------------------------


def test_torch_warning_is_not_shown() -> None:
    """Not on stderr and not as a warning of Python's; with warnings as errors, and under modes of Python's."""
    assert_runs(
        """
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.overrides import TorchFunctionMode

        class Refuse(TorchDispatchMode):
            def __torch_dispatch__(self, *_):
                raise AssertionError("the switch is none of a mode's business")

        class RefuseFunctions(TorchFunctionMode):
            def __torch_function__(self, *_):
                raise AssertionError("the switch is none of a mode's business")

        with Refuse(), RefuseFunctions():
            matmul_grad.enable()
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).tolist() == [[2.0, 2.0], [2.0, 2.0]]
        matmul_grad.disable()
        """,
        "-W", "error",
    )  # fmt: skip


def test_importing_and_asking_brings_in_no_compiler() -> None:
    assert_runs(
        """
        matmul_grad.info(), matmul_grad.disable()
        assert not {"numba", "llvmlite", "triton"} & set(sys.modules)
        """
    )


def test_calls_are_counted_by_operator_and_dtype() -> None:
    before = matmul_grad.info()
    a = torch.ones(3, 3)
    torch.mm(a, a)
    assert matmul_grad.info() == before, "nothing is counted while it is off"
    with matmul_grad.enabled():
        for dtype in (*ACCELERATED.values(), torch.int64):
            for _ in range(3):
                torch.addmm(a.to(dtype), a.to(dtype), a.to(dtype))
        with pytest.raises(RuntimeError):
            torch.mm(a, a[:2])
        torch.mm(a[:0], a)
    after = matmul_grad.info()

    def grown(outcome: str) -> dict[str, int]:
        old, new = before[outcome].get("addmm", {}), after[outcome]["addmm"]
        return {dtype: calls - old.get(dtype, 0) for dtype, calls in new.items() if calls != old.get(dtype, 0)}

    assert grown("accelerated") == dict.fromkeys(
        (str(dtype).removeprefix("torch.") for dtype in ACCELERATED.values()), 3
    )
    assert grown("handed_over") == {"int64": 3}
    assert after["accelerated"].get("mm") == before["accelerated"].get("mm")


def test_info_prints_whether_the_override_is_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert "\nswitch           off" in capsys.readouterr().out
    with matmul_grad.enabled():
        torch.mm(torch.ones(3, 3), torch.ones(3, 3))
        torch.mm(torch.ones(3, 3).int(), torch.ones(3, 3).int())
        assert cli.main(["info"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("switch"))
    assert line.startswith("switch           on for cpu; accelerated ")
    assert "handed over" in line
    for part in ("mm float32 ", "mm int32 "):
        assert part in line
