"""`matmul-grad gpu-report` from its options to its files, on the fake GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from matmul_grad import cli, cli_common
from matmul_grad.bench import gpu_calls, gpu_report, gpu_session, gpu_worker, gpu_workloads, stages
from matmul_grad.bench.gpu_workloads import GpuWorkload
from matmul_grad.bench.stages import STAGES, Outcome

TINY = [GpuWorkload("products", product, "f32", 16, 16, 16) for product in ("forward", "dgrad", "step")]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DEVICE_SECONDS", "CALL_SECONDS", "LAUNCH_SECONDS"):
        monkeypatch.setattr(gpu_session, name, 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_session, "QUEUE", 3)
    monkeypatch.setattr(gpu_workloads, "ratios", lambda: TINY)
    monkeypatch.setattr(gpu_worker, "MEMORY", TINY[2:])
    monkeypatch.setattr(gpu_worker, "LAUNCHES", (("f32", 8),))
    monkeypatch.setattr(gpu_report, "checkout", lambda: None)


Run = Callable[..., int]


@pytest.fixture
def run(launcher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command with these options, on the launcher, in a folder of its own."""

    def act(*options: str) -> int:
        original = gpu_report.run
        with monkeypatch.context() as patch:
            patch.setattr(gpu_report, "run", lambda parsed: original(parsed, launcher))
            return cli.main(["gpu-report", "--out", str(tmp_path / "out"), *options])

    return act


def written(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((folder / "out").iterdir())}


def result(folder: Path) -> Any:
    (text,) = (text for name, text in written(folder).items() if name.endswith(".json"))
    return json.loads(text)


SOME = "--steps=ratios,launch,memory"


def test_some_steps(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(SOME) == 0
    found = result(tmp_path)
    date = found["stamp"]["date"]
    assert list(written(tmp_path)) == [f"{date}-gpu-report-nvidia-fake-9000-part.{end}" for end in ("json", "md")]
    assert [(step["name"], step["status"]) for step in found["steps"]] == [
        (name, "complete") for name in ("environment", "ratios", "launch", "memory")
    ]
    assert (found["schema"], found["whole"], found["stamp"]["driver_version"]) == (1, False, "1.2")
    timed = [row for row in found["rows"] if row["step"] == "ratios"]
    assert [row["name"] for row in timed] == [workload.name for workload in TINY]
    assert timed[0]["device"]["ratio"] == 2.0
    printed = capsys.readouterr()
    assert "forward, geometric mean" not in printed.out  # float32 is not in it
    assert printed.out.splitlines()[-1].endswith("-part.md")
    assert "ratios: complete: 3 done" in printed.err


def test_every_step(run: Run, launcher: Any, tmp_path: Path, says: Any) -> None:
    row = {"begin": 0, "of": 1, "name": "x"}, {"row": {"name": "x"}}
    launcher.scripts = {name: [says(*row)] for name in ("sanitized", "compile", "rivals")}
    assert run() == 0
    found = result(tmp_path)
    assert found["whole"] and [step["name"] for step in found["steps"]] == [step.name for step in STAGES]
    assert {step["status"] for step in found["steps"]} == {"complete", "missing"}
    assert all("part" not in name for name in written(tmp_path))


def test_wrong_product_is_status_1(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_calls, "mm", lambda precision: lambda a, b: torch.mm(a, b) + 1)
    assert run(SOME) == 1
    assert "ratios, forward-f32-16x16x16: wrong: forward: error 1" in capsys.readouterr().out
    rows = [row for row in result(tmp_path)["rows"] if row["step"] == "ratios"]
    assert "wrong" in rows[0] and "device" not in rows[0]
    (page,) = (text for name, text in written(tmp_path).items() if name.endswith(".md"))
    assert "## Wrong or failed" in page


def test_step_that_fails_is_status_1_and_the_rest_goes_on(run: Run, launcher: Any, says: Any, tmp_path: Path) -> None:
    launcher.scripts["ratios"] = [says(status=-9)]
    assert run(SOME) == 1
    done = {step["name"]: step["status"] for step in result(tmp_path)["steps"]}
    assert done == {"environment": "complete", "ratios": "failed", "launch": "complete", "memory": "complete"}


def test_wrong_row_counts_in_a_step_that_is_complete(tmp_path: Path) -> None:
    record = gpu_report.Record(tmp_path, whole=True)
    record.ended("rivals", Outcome(stages.COMPLETE), 1.0)
    assert not record.is_bad
    record.keep({"step": "rivals", "name": "x", "wrong": "forward: error 1"})
    assert record.is_bad


def test_step_that_cannot_even_be_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(given: Any) -> Outcome:
        raise OSError("no memory to fork")

    replaced = tuple(step._replace(do=broken) if step.name == "launch" else step for step in STAGES)
    monkeypatch.setattr(gpu_report, "STAGES", replaced)
    assert run("--steps=launch,memory") == 1
    done = {step["name"]: (step["status"], step["note"]) for step in result(tmp_path)["steps"]}
    assert done["launch"] == ("failed", "OSError: no memory to fork")
    assert done["memory"][0] == "complete"


def test_interruption_keeps_what_is_there(run: Run, launcher: Any, says: Any, tmp_path: Path) -> None:
    begun = {"begin": 0, "of": 1, "name": "a"}, {"row": {"name": "a", "x": 1}}
    launcher.scripts["ratios"] = [says(*begun, KeyboardInterrupt())]
    assert run(SOME) == 130
    found = result(tmp_path)
    assert [step["status"] for step in found["steps"]] == ["complete", "interrupted", "interrupted", "interrupted"]
    assert {"step": "ratios", "name": "a", "x": 1} in found["rows"]
    assert all(Path(name).stem.endswith("-interrupted") for name in written(tmp_path))


def test_files_are_there_before_the_end(
    run: Run, launcher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each step, and while rows come in: what ends this without a word loses at most EACH seconds."""
    monkeypatch.setattr(gpu_report, "EACH", 0.0)
    seen: list[tuple[str, int]] = []

    def look(heard: Any) -> Any:
        heard(json.dumps({"begin": 0, "of": 1, "name": "a"}))
        heard(json.dumps({"row": {"name": "a"}}))
        seen.extend((name, text.count('"name": "a"')) for name, text in written(tmp_path).items())
        return stages.process.ExitStatus(0, "")

    launcher.scripts["ratios"] = [look]
    assert run(SOME) == 0
    assert [(Path(name).suffix, "unfinished" in name, count) for name, count in seen] == [
        (".json", True, 1), (".md", True, 0)
    ]  # fmt: skip
    assert not any("unfinished" in name for name in written(tmp_path))


def test_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["gpu-report", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "gpu-report: torch " in said.err and "finds no CUDA device here" in said.err
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["gpu-report", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"matmul-grad: --out {tmp_path / 'file'}: File exists\n"


@pytest.mark.parametrize(
    "options", [["--minutes", "0"], ["--minutes", "nan"], ["--steps", "ratios,nothing"], ["--fast"]], ids=" ".join
)
def test_bad_options(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["gpu-report", *options])
    assert exit.value.code == 2


def test_without_rich(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert run("--steps=memory") == 0
    assert "memory: complete: 1 done" in capsys.readouterr().err


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert gpu_report.output(None) == tmp_path
    monkeypatch.setattr(gpu_report, "checkout", lambda: tmp_path / "repo")
    assert gpu_report.output(None) == tmp_path / "repo" / "bench" / "results"
    with pytest.raises(cli_common.UsageError, match="--out"):
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        gpu_report.output(tmp_path)


def test_this_is_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert gpu_report.checkout() == Path(__file__).parents[2]


def test_terminated_is_interrupted() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), gpu_report.terminated_as_interrupted():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert signal.getsignal(signal.SIGTERM) == before


def test_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "matmul_grad", "gpu-report", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--minutes" in done.stdout and done.stdout.startswith("usage: matmul-grad")
