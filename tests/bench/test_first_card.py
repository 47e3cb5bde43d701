"""tools/first_card.py: the calls for a first GPU are commands that exist, and their variants differ in one line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from matmul_grad import cli

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("first_card", ROOT / "tools/first_card.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run them")
def test_reports_are_commands_that_end_for_want_of_a_gpu(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = [words for call in tool.CALLS if (words := tool.arguments(call, tmp_path))[1] == "matmul_grad"]
    assert len(reports) == len(tool.CALLS) - 1
    for words in reports:
        assert cli.main(words[2:]) == 2
        assert "no CUDA device" in capsys.readouterr().err, words


def test_figures_come_before_tests(tool: Any) -> None:
    names = [call.name for call in tool.CALLS]
    assert names[:2] == ["look", "ratios"] and names[-3:] == ["tests", "memory", "every tile"]
    assert all(call.minutes < 10 for call in tool.CALLS)


def test_variants_differ_in_one_line(tool: Any, tmp_path: Path) -> None:
    edits = [call.edit for call in tool.CALLS if call.edit]
    assert len(edits) == 2
    for number, edit in enumerate(edits):
        copy = tool.variant(edit, ROOT, tmp_path / str(number))
        before, after = ((root / edit.file).read_text().splitlines() for root in (ROOT, copy))
        assert sum(x != y for x, y in zip(before, after, strict=True)) == 1
    with pytest.raises(ValueError, match="0 times"):
        tool.variant(edits[0]._replace(old="no such line"), ROOT, tmp_path / "none")


LOOK = "from matmul_grad.kernels.gpu import choose; print(choose.__file__, choose.FUSED_WAVES)"


def test_a_variant_runs_its_own_sources(tool: Any, tmp_path: Path) -> None:
    for name, edit, waves in (("usual", None, "2"), ("two launches", tool.TWO_LAUNCHES, "0")):
        assert tool.run(tool.Call(name, "", 1, f"-c '{LOOK}'", edit), tmp_path) == "status 0"
        file, found = (tmp_path / f"{name.replace(' ', '-')}.log").read_text().split()
        assert found == waves and Path(file).is_relative_to(ROOT) == (edit is None)


def test_a_call_that_hangs_is_ended_with_what_it_started(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "ENDING", 0)
    code = 'import subprocess, sys, time; subprocess.Popen([sys.executable, "-c", "import time; time.sleep(10**6)"])'
    call = tool.Call("hangs", "", 0.05, f"-c '{code}; time.sleep(10**6)'")
    assert tool.run(call, tmp_path) == "ended after 0.05 minutes"


def test_only_some_calls(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(tool, "run", lambda call, out: ran.append(call.name) or "status 0")
    assert tool.main(["--out", str(tmp_path), "--only", "2,7"]) == 0
    assert ran == ["ratios", "tests"] and "2 ratios, 9 minutes" in capsys.readouterr().out
