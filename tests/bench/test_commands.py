"""What holds for every command: bad input, a folder that is none, wrong kernels, interruption, resumption."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from matmul_grad import cli, cli_common
from matmul_grad.bench import __main__ as benchmarks
from matmul_grad.bench import backends, options, results, runner, workloads
from matmul_grad.bench.shapes import SETS

ROOT = Path(__file__).parents[2]
BENCH = "bench --suite=small --dtype=f32 --pass=forward --seconds=0.001 --rivals=torch --no-pin"
RATIO = "cpu-ratio --quick --threads=1 --dtypes=f32 --rows=step,overhead --seconds=0.001 --no-pin"
REPORT = "gpu-report --steps=ratios"
TUNE = "tune --dtype=f32 --shapes=8,8,8"
Run = Callable[..., int]


@pytest.fixture
def run(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command in ``tmp_path``; what it compares is small."""
    monkeypatch.setitem(SETS, "small", ((16, 16, 16), (8, 8, 8)))
    monkeypatch.setattr(workloads, "gpu_targets", lambda: [workloads.on_gpu(p, "f32", (16, 16, 16)) for p in "ab"])
    return act


def act(command: str, *more: str) -> int:
    arguments = [*command.split(), *more]
    try:
        return benchmarks.main(arguments) if arguments[0] == "cpu-ratio" else cli.main(arguments)
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("bench --suite big", "argument --suite: invalid choice: 'big'"),
        ("bench --device cuda", "finds no CUDA device here"),
        ("bench --device tpu", "argument --device: invalid choice: 'tpu'"),
        ("bench --dtype f8", "--dtype: some of f32,f64,f16,bf16, got f8"),
        ("bench --threads 0", "--threads: numbers from 1 to"),
        ("bench --threads 1,x", "--threads: numbers from 1 to"),
        ("bench --pass backward", "--pass: some of forward,dgrad,wgrad,step, got backward"),
        ("bench --rivals mkl", "--rivals: some of none,torch,"),
        ("bench --rivals flag_gems", "it does not run on cpu"),
        ("bench --seconds nan", "--seconds: a number above 0, got nan"),
        ("bench --minutes 0", "--minutes: a number above 0, got 0"),
        ("bench --max-gflop 1e-9", "all of the suite quick is larger"),
        ("bench --fast", "unrecognized arguments: --fast"),
        ("bench compare a.json", "the following arguments are required: B.json"),
        ("bench compare nowhere.json nowhere.json", "nowhere.json: No such file"),
        ("bench compare pyproject.toml pyproject.toml", "pyproject.toml: broken JSON: "),
        ("bench report nowhere.json", "nowhere.json: No such file"),
        ("cpu-ratio --threads one", "--threads: numbers from 1 to"),
        ("cpu-ratio --dtypes f8", "--dtypes: some of f32,f64,bf16,f16, got f8"),
        ("cpu-ratio --rows openblas --dtypes f16", "there is nothing to measure"),
        ("cpu-ratio --from nowhere", "--from nowhere: No such file"),
        ("cpu-ratio --from pyproject.toml", "--from pyproject.toml: broken JSON: "),
        ("cpu-ratio --fast", "unrecognized arguments: --fast"),
        ("gpu-report", "finds no CUDA device here"),
        ("tune", "finds no CUDA device here"),
        ("bench --out pyproject.toml", "--out pyproject.toml: File exists"),
        ("cpu-ratio --out pyproject.toml", "--out pyproject.toml: File exists"),
    ],
)  # fmt: skip
def test_unusable_arguments_get_one_line(
    arguments: str, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert act(arguments) == cli_common.EXIT_USAGE
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert why in line and captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        "gpu-report --minutes 0", "gpu-report --minutes nan", "gpu-report --steps ratios,nothing", "gpu-report --fast",
        "tune --dtype int8", "tune --shapes 1,2", "tune --shapes 0,1,1", "tune --suite x", "tune --minutes -1",
        "tune --shapes 1,1,1 --suite core",
    ],
)  # fmt: skip
def test_options_that_are_none(arguments: str) -> None:
    assert act(arguments) == cli_common.EXIT_USAGE


@pytest.mark.parametrize("command", [BENCH, RATIO, REPORT, TUNE])
def test_place_that_cannot_be_written(
    command: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    place = tmp_path / "file" / "below" if command == TUNE else tmp_path / "file"
    assert run(command, f"--out={place}") == 2
    said = capsys.readouterr().err
    assert (said.count("\n") == 1 and "File exists" in said) or "Not a directory" in said
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert run(command, f"--out={tmp_path / 'other'}") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_missing_rival_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert act("bench --rivals=blis") == 2
    assert capsys.readouterr().err.endswith("--rivals blis: blis is missing: pip install blis\n")


LONG = [BENCH, RATIO, REPORT]


def written(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text(encoding="utf-8")) | {"path": path}


@pytest.fixture
def here_on(here: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """The device of the command."""
    from matmul_grad.bench import devices, html

    monkeypatch.setattr(html, "write_all", lambda result, place: None)

    def choose(command: str) -> None:
        monkeypatch.setattr(here, "device", gpu if command == REPORT else devices.Cpu())
        products = ["forward", "dgrad", "wgrad"]
        planned = [workloads.on_gpu(product, "f32", (16, 16, 16)) for product in products]
        monkeypatch.setattr(workloads, "gpu_targets", lambda: planned)

    return choose


@pytest.mark.parametrize("command", LONG)
def test_wrong_kernel_is_status_1_and_has_no_time(
    command: str, run: Run, here_on: Any, plant: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here_on(command)
    plant("matmul_grad", lambda a, b: a @ b + 1)
    assert run(command, f"--out={tmp_path}") == 1
    said = capsys.readouterr()
    assert "wrong: matmul_grad, " in said.out + said.err
    first = written(tmp_path)["rows"][0]
    assert set(first["seconds"]) == {"torch"} and "on integers" in first["wrong"]["matmul_grad"]


@pytest.mark.parametrize("command", LONG)
def test_interrupted_run_keeps_its_rows_and_goes_on(
    command: str, run: Run, here_on: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    here_on(command)
    measure, seen = runner.WorkerPool.measure, []

    def stop(self: Any, workload: Any, seconds: float) -> Any:
        seen.append(workload)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return measure(self, workload, seconds)

    monkeypatch.setattr(runner.WorkerPool, "measure", stop)
    assert run(command, f"--out={tmp_path}") == cli_common.EXIT_INTERRUPTED
    found = written(tmp_path)
    assert not found["whole"] and len(found["rows"]) == 1 and found["path"].stem.endswith("-unfinished")
    before = found["path"].read_bytes()
    assert run(command, f"--out={tmp_path}") == 2  # it would be written over
    assert "--resume goes on with it" in capsys.readouterr().err
    other = before.replace(b'"CPU": "', b'"CPU": "another ')
    found["path"].write_bytes(other)
    assert run(command, f"--out={tmp_path}", "--resume") == 2
    assert "has another CPU: another " in capsys.readouterr().err and found["path"].read_bytes() == other
    found["path"].write_bytes(before)
    other_settings = command.replace(" --no-pin", "").replace("ratios", "ratios,launch")
    assert run(other_settings, f"--out={tmp_path}", "--resume") == 2
    assert "was begun with another " in capsys.readouterr().err
    assert run(command, f"--out={tmp_path}", "--resume") == 0
    whole = written(tmp_path)
    assert whole["rows"][0] == found["rows"][0] and not whole["path"].stem.endswith("-unfinished")
    assert [workloads.of_row(row) for row in whole["rows"]] == [seen[0], *seen[2:]]


@pytest.mark.parametrize("command", LONG)
def test_disk_that_is_full_loses_no_row(
    command: str, run: Run, here_on: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    here_on(command)
    write = results.write

    def full(path: Path, text: str) -> Path:
        if path.suffix == ".json" and json.loads(text)["rows"][1:]:
            raise OSError(28, "No space left on device")
        return write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(results, "write", full)
        assert run(command, f"--out={tmp_path}") == 2
    assert "No space left on device; --resume goes on with what is there" in capsys.readouterr().err
    assert len(written(tmp_path)["rows"]) == 1
    assert run(command, f"--out={tmp_path}", "--resume") == 0


def test_terminated_is_interrupted() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with options.interrupted_by_sigterm() as interrupted:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert interrupted and signal.getsignal(signal.SIGTERM) == before
    with options.interrupted_by_sigterm() as interrupted:
        pass
    assert not interrupted


def test_this_is_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert results.checkout() == ROOT and results.folder(None) == ROOT / "bench" / "results"
    monkeypatch.setattr(results, "checkout", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert results.folder(None) == tmp_path
