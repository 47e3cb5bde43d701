"""`matmul-grad tune` from its options to its table, on the GPU that is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from matmul_grad import cli, machine
from matmul_grad.bench import gpu_calls, gpu_tasks, results, shapes, tune, worker
from matmul_grad.kernels.gpu import choose, tuned_configs
from matmul_grad.kernels.gpu.config import Problem, Target, TileConfig

DEFAULT = TileConfig(128, 128, 64, stages=4, warps=8)
FAST, SLOW, WRONG, ILL = (replace(DEFAULT, block_n=n) for n in (256, 64, 32, 16))
TARGET = Target(90, 132, 227 << 10)
FACTS = {"GPU": "NVIDIA Fake 9000", "compute capability": "9.0", "triton": machine.version("triton")}
NAME = "forward-f32-NN-48x32x16-cuda"
Run = Callable[..., int]


@pytest.fixture
def kernels(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Five candidates: one wrong, one that does not run. What they are can be changed by a test."""
    state: dict[str, Any] = {"candidates": [FAST, DEFAULT, SLOW, WRONG, ILL], "calls": [], "compiled": []}
    state["times"] = {DEFAULT: 3e-6, FAST: 1e-6, SLOW: 5e-6}

    def with_config(a: Tensor, b: Tensor, precision: str, config: TileConfig) -> Tensor:
        state["calls"].append(config)
        if config == ILL:
            raise RuntimeError("out of resource: shared memory\nmore")
        return torch.mm(a, b) + (config == WRONG)

    def describe(a: Tensor, b: Tensor, precision: str) -> tuple[Problem, Target]:
        letters = ("N" if x.stride(1) == 1 else "T" for x in (a, b))
        return Problem(len(a), b.shape[1], len(b), "float32", *letters, precision), TARGET

    def times_of(calls: Sequence[Callable[[], object]]) -> list[float]:
        calls[0]()
        return [state["times"][state["calls"][-1]]]

    monkeypatch.setattr(gpu_calls, "with_config", with_config)
    monkeypatch.setattr(gpu_calls, "describe", describe)
    monkeypatch.setattr(choose, "choose", lambda problem, target: DEFAULT)
    monkeypatch.setattr(choose, "candidates", lambda problem, target: state["candidates"])
    monkeypatch.setattr(tuned_configs, "key", lambda p, target: f"{p.m}x{p.n}x{p.k}-{p.a}{p.b}")
    monkeypatch.setattr(gpu_tasks, "compile_all", lambda parts, seconds: state["compiled"].append(len(parts)) or {})
    monkeypatch.setattr(gpu, "times_of", times_of)
    return state


@pytest.fixture
def run(kernels: Any, tmp_path: Path) -> Run:
    place = str(tmp_path / "deep" / "winners.json")
    return lambda *options: cli.main(["tune", "--out", place, "--dtype=f32", *(options or ["--shapes", "48,32,16"])])


def table(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "deep" / "winners.json").read_text(encoding="utf-8"))


def winner(folder: Path, key: str = "48x32x16-NN") -> TileConfig:
    return TileConfig(**table(folder)["winners"][key])


def test_winner_and_where_it_comes_from(
    run: Run, kernels: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    found = table(tmp_path)
    assert found["version"] == 1 and list(found) == ["version", "provenance", "winners"]
    assert list(found["winners"]) == ["48x32x16-NN", "48x16x32-NT", "16x32x48-TN"]
    assert winner(tmp_path) == FAST
    assert FACTS.items() < found["provenance"].items() and found["provenance"]["date"]
    measured = found["provenance"]["measured"]["48x32x16-NN"]
    assert (measured["seconds"], measured["default seconds"]) == (1e-6, 3e-6)
    assert measured["default"] == asdict(DEFAULT) and measured["name"] == NAME
    assert (measured["candidates"], measured["timed"]) == (5, 3)
    assert kernels["compiled"] == [5, 5, 5]
    said = capsys.readouterr()
    assert said.err.count("dropped block_m=128 block_n=32") == said.err.count(": wrong, ") == 3
    assert "block_n=16 block_k=64 stages=4 warps=8" in said.err
    assert "RuntimeError: out of resource: shared memory\n" in said.err
    assert "1.00 µs, 3.000 × the default" in said.err
    assert said.out.startswith("3 measured, 0 known before; written: ")


def test_less_than_noise_leaves_the_default(run: Run, kernels: Any, tmp_path: Path) -> None:
    kernels["times"][DEFAULT] = 1.01e-6
    assert run() == 0 and winner(tmp_path) == DEFAULT


def test_default_that_is_wrong_does_not_win(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "choose", lambda problem, target: WRONG)
    assert run() == 0
    measured = table(tmp_path)["provenance"]["measured"]["48x32x16-NN"]
    assert measured["default seconds"] is None and measured["seconds"] == 1e-6


def test_many_candidates_end_in_a_final(run: Run, gpu: Any, kernels: Any, tmp_path: Path) -> None:
    kernels["candidates"] = [replace(DEFAULT, group_m=g) for g in range(1, 11)]
    kernels["times"] = {config: config.group_m * 1e-6 for config in [*kernels["candidates"], DEFAULT]}
    assert run() == 0 and winner(tmp_path).group_m == 1
    turns = gpu.turns[: gpu.turns.index(len(kernels["times"]))]  # those of the first problem
    assert len(turns) == 3 * len(kernels["times"]) + 3 * len(set(turns[30:])) and len(set(turns[30:])) in (4, 5)


def test_what_is_measured_is_not_measured_again(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    before = table(tmp_path)
    assert run("--shapes", "48,32,16", "9,8,7") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 measured, 3 known before")
    after = table(tmp_path)
    assert len(after["winners"]) == 6 and before["winners"].items() < after["winners"].items()


def at(here: Any, monkeypatch: pytest.MonkeyPatch, what: Any, error: BaseException) -> None:
    """Raise the error at the first task that has these fields."""
    left = [error]

    def act(task: Any) -> None:
        if left and what.items() <= task.items():
            raise left.pop()

    monkeypatch.setattr(here, "before", act)


def test_interruption_keeps_what_is_measured(
    run: Run, here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = {"do": "problem", "workload": asdict(tune.on_gpu("dgrad", "f32", (48, 32, 16)))}
    at(here, monkeypatch, second, KeyboardInterrupt())
    assert run() == 130
    assert list(table(tmp_path)["winners"]) == ["48x32x16-NN"]
    assert run() == 0
    assert list(table(tmp_path)["winners"]) == ["48x32x16-NN", "48x16x32-NT", "16x32x48-TN"]


def test_candidate_that_ends_the_process_is_dropped(
    run: Run, here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at(here, monkeypatch, {"do": "candidate", "tile": asdict(FAST)}, worker.WorkerExited("killed by SIGSEGV"))
    assert run() == 0
    assert winner(tmp_path) == DEFAULT and winner(tmp_path, "48x16x32-NT") == FAST
    assert f"{NAME}: dropped block_m=128 block_n=256" in capsys.readouterr().err
    assert len(here.begun) == 2


def test_candidate_that_breaks_the_context(
    run: Run, here: Any, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gpu_calls.with_config

    def breaks(a: Tensor, b: Tensor, precision: str, config: TileConfig) -> Tensor:
        gpu.broken = config == ILL
        return right(a, b, precision, config)

    def mended(task: Any) -> None:
        gpu.broken = False

    monkeypatch.setattr(gpu_calls, "with_config", breaks)
    monkeypatch.setattr(here, "before", mended)
    assert run() == 0 and winner(tmp_path) == FAST
    assert len(here.begun) == 4  # another process behind each of three


def test_crash_while_all_are_timed_is_nobodys_fault(
    run: Run, here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at(here, monkeypatch, {"do": "candidates timed"}, worker.WorkerExited("killed by SIGSEGV"))
    assert run() == 1
    assert f"{NAME}: failed: killed by SIGSEGV" in capsys.readouterr().err
    assert list(table(tmp_path)["winners"]) == ["48x16x32-NT", "16x32x48-TN"]


def test_candidates_that_all_end_their_process_end_the_run(
    run: Run, here: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def die(task: Any) -> None:
        if task.get("do") == "candidate":
            raise worker.WorkerExited("killed by SIGSEGV")

    monkeypatch.setattr(here, "before", die)
    assert run("--shapes", *(f"{n},8,8" for n in range(1, 9))) == 1
    assert len(here.begun) == tune.AGAIN + 1
    assert "no time for" in capsys.readouterr().out


def test_problem_without_a_right_candidate(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_calls, "with_config", lambda a, b, precision, config: torch.mm(a, b) + 1)
    assert run() == 1
    assert f"{NAME}: failed: none of 5 candidates is right" in capsys.readouterr().err
    assert not (tmp_path / "deep" / "winners.json").exists()


def test_problem_that_is_too_large(run: Run, gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.free = 1000
    assert run() == 0
    assert f"{NAME}: skipped: needs" in capsys.readouterr().err


def test_time_is_up(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tune.Clock, "left", lambda self: 0.0)
    assert run() == 0
    assert "no time for 3 more: the same command goes on from here" in capsys.readouterr().out


def test_process_that_never_begins(
    run: Run, here: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at(here, monkeypatch, {"facts": True}, worker.WorkerExited("status 1: ImportError: no triton"))
    assert run() == 2
    assert capsys.readouterr().err == (
        "matmul-grad: tune: no measurement can be begun: status 1: ImportError: no triton\n"
    )


def test_winners_of_another_gpu_are_left_alone(
    run: Run, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    before = table(tmp_path)
    monkeypatch.setattr(gpu, "facts", lambda: {"GPU": "NVIDIA Other", "compute capability": "9.0"})
    assert run("--shapes", "9,8,7") == 2
    assert "holds winners of GPU NVIDIA Fake 9000, and this is NVIDIA Other" in capsys.readouterr().err
    assert table(tmp_path) == before


@pytest.mark.parametrize("text", ["no json", "[]", '{"version": 2}', '{"version": 1, "winners": {"x": {}}}'])
def test_file_that_is_no_table(text: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "winners.json").write_text(text, encoding="utf-8")
    assert run("--shapes", "9,8,7") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "deep" / "winners.json").read_text(encoding="utf-8") == text


def test_table_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "winners.json"
    whole = tune.Table(path)
    whole.put("a", {"block_m": 1}, {"seconds": 1.0})
    before = path.read_text(encoding="utf-8")
    monkeypatch.setattr(results.os, "replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        whole.put("b", {"block_m": 2}, {"seconds": 1.0})
    assert path.read_text(encoding="utf-8") == before and list(tmp_path.iterdir()) == [path]
    assert tune.Table(path).keys == ["a"]


def test_problems_of_a_suite() -> None:
    found = tune.planned(cli.parse(["tune", "--dtype", "bf16,tf32", "--suite", "core"]))
    assert len(found) == len(shapes.GPU_CORE) * 2 * 3
    assert {(workload.dtype, workload.precision) for workload in found} == {("bf16", "ieee"), ("f32", "tf32")}


REAL = """
import sys
from pathlib import Path
from matmul_grad.bench import gpu_calls, gpu_tasks, runner, session, tune, worker
from matmul_grad.kernels.gpu import choose, tuned_configs
from matmul_grad.kernels.gpu.config import TileConfig
sys.path.insert(0, sys.argv[1])
from conftest import FakeGpu, Here

every = choose.candidates
choose.candidates = lambda problem, target: every(problem, target)[:3]
gpu_tasks.FIRST_SECONDS = gpu_tasks.FINAL_SECONDS = 0.0
gpu_tasks.compile_all = lambda parts, seconds: {}
Here.device, runner.Worker = FakeGpu(), Here
tuner = tune.Tuner(tune.Table(Path(sys.argv[2])), lambda news: None, 1e9)
problems = [tune.on_gpu(product, "f32", (17, 33, 20)) for product in ("forward", "dgrad", "wgrad")]
tuner.run(problems)
table = tuned_configs.load(Path(sys.argv[2]))
for workload in problems:
    key = tuned_configs.key(*gpu_calls.describe(*gpu_tasks.drawn(workload, "cpu").of(workload.product), "ieee"))
    assert isinstance(table[key], TileConfig), key
print(tuner.found, tuner.failed)
"""


def test_real_kernels_and_their_table(tmp_path: Path) -> None:
    """Under the interpreter: what is written is what `choose` looks up."""
    arguments = [sys.executable, "-c", REAL, str(Path(__file__).parent), str(tmp_path / "winners.json")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.stdout == "3 0\n", done.stderr
