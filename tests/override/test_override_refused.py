"""Where the override cannot be installed: refused with the reason; and others' kernels, which it keeps."""

from collections.abc import Iterator

import pytest
from processes import assert_runs
from switch import runs_on_ours

import matmul_grad
from matmul_grad import aten_override
from matmul_grad.kernels.cpu.once import Once
from matmul_grad.kernels.native import override_cpu, override_probe, torch_layout

pytestmark = pytest.mark.usefixtures("off_before_and_after")

# --- where it cannot be --------------------------------------------------------------------------------------


def assert_cannot_be_switched_on(reason: str) -> None:
    with pytest.raises(RuntimeError, match=rf"matmul_grad\.enable\(\): torch's products cannot be replaced.*{reason}"):
        matmul_grad.enable()
    with pytest.raises(RuntimeError, match=reason), matmul_grad.enabled():
        pytest.fail("the block must not run")
    assert not runs_on_ours()
    assert not aten_override._blocks


@pytest.fixture
def unloaded() -> Iterator[None]:
    """The compiled entries are looked for anew."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(override_cpu, "_loaded", Once(override_cpu._load_entries))
        yield


def test_torch_that_fails_the_probe_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(override_probe, "_verdict", lambda: "exit code -11, no message")
    assert_cannot_be_switched_on("does not pass the test of the override: exit code -11, no message")


@pytest.mark.usefixtures("unloaded")
def test_missing_c_function_is_named_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_layout.OVERRIDE_MANGLED, "matmul_grad_library_impl", "no_such_function")
    assert_cannot_be_switched_on("has no matmul_grad_library_impl")


def test_unknown_kernel_record_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(override_cpu, "_own", {})
    monkeypatch.setattr(override_cpu, "_is_library_code", lambda address: False)
    assert_cannot_be_switched_on("keeps its kernel of aten::mm in a way that is not known")


# --- others' kernels -----------------------------------------------------------------------------------------


def test_kernel_of_another_library_is_kept_and_called() -> None:
    """What another library has put there takes what these kernels do not, and is there again afterwards."""
    assert_runs(
        """
        import warnings
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library.impl("mm", lambda a, b: torch.full((1,), 7), "CPU", allow_override=True)
        a = torch.ones(2, 2)
        assert torch.mm(a, a).tolist() == [7]
        with matmul_grad.enabled():
            assert torch.mm(a, a).tolist() == [[2.0, 2.0], [2.0, 2.0]]
            assert torch.mm(a.int(), a.int()).tolist() == [7]
        assert torch.mm(a, a).tolist() == [7]
        """
    )
