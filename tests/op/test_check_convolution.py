"""The part of `check` about convolutions: it agrees, and each of its three sources is caught when it is wrong."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from matmul_grad import check_convolution as check
from matmul_grad import strict
from matmul_grad.console import PlainConsole


def run(capsys: pytest.CaptureFixture[str], device: str = "cpu") -> tuple[list[str], str]:
    with strict():
        found = check.run(PlainConsole(), device)
    return found, capsys.readouterr().out


def test_all_agree_and_the_example_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    found, printed = run(capsys)
    assert found == []
    for row in ("0 15", "24 -7", "2  3 -2", "7  4  5", "3 10  3", "13  3", "12 20"):
        assert [line for line in printed.splitlines() if line.count(row) == 3], row
    manual = sum("groups" not in layer.how for layer in check.LAYERS)
    assert printed.count("exact") == manual + len(check.LAYERS) * len(check.kernels("cpu"))
    assert " NO" not in printed


def wrong(change: Callable[[Tensor], Tensor], operation: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    ours, theirs = check.OPERATIONS[operation]
    return (lambda *given, **how: change(ours(*given, **how))), theirs


@pytest.mark.parametrize("operation", list(check.OPERATIONS))
def test_one_wrong_element_is_found(
    operation: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nudge(y: Tensor) -> Tensor:
        last = torch.zeros_like(y)
        last[-1, -1, -1, -1] = 1
        return y + last if y.numel() > 4 and y.dtype == torch.float64 else y

    monkeypatch.setitem(check.OPERATIONS, operation, wrong(nudge, operation))
    found, printed = run(capsys)
    layers = [layer for layer in check.LAYERS if layer.operation == operation]
    assert len(found) == len(layers) == printed.count(" NO")
    assert found[0].startswith(f"convolution {layers[0].name}, f64, Y: 1 of ")


def test_wrong_gradient_is_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(y: Tensor) -> Tensor:
        return 2 * y - y.detach()  # the value of y, twice its gradient

    monkeypatch.setitem(check.OPERATIONS, "conv2d", wrong(doubled, "conv2d"))
    found, _ = run(capsys)
    assert found[:2] == [f"convolution: {name} matmul_grad differs from torch's" for name in ("dX", "dW")]


def test_wrong_product_by_hand_is_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = check.api.bmm
    monkeypatch.setattr(check.api, "bmm", lambda a, b: right(a, b) + 1)
    found, printed = run(capsys)
    assert found[0] == "convolution: Y by hand differs from torch's"
    assert printed.count(" NO") == sum("groups" not in layer.how for layer in check.LAYERS)


def test_an_error_is_a_disagreement(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Tensor, **how: object) -> Tensor:
        raise RuntimeError("no kernel\nsecond line")

    monkeypatch.setitem(check.OPERATIONS, "conv2d", (refuse, check.OPERATIONS["conv2d"][1]))
    found, _ = run(capsys)
    assert found[0] == "convolution: no kernel"


def test_without_kernels_the_column_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "kernels", lambda device: [])
    found, printed = run(capsys)
    assert found == [] and "matmul_grad" not in printed
