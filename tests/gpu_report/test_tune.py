"""`matmul-grad tune` from its options to its table, on the fake GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from matmul_grad import cli
from matmul_grad.bench import gpu_calls, gpu_workloads, process, tune, tune_worker
from matmul_grad.bench import gpu_worker as reporting
from matmul_grad.bench.tune_results import Table
from matmul_grad.kernels.gpu.config import Problem, Target, TileConfig

DEFAULT = TileConfig(128, 128, 64, stages=4, warps=8)
FAST, SLOW, WRONG, ILL = (replace(DEFAULT, block_n=n) for n in (256, 64, 32, 16))
TARGET = Target(90, 132, 227 << 10)
FACTS = {"GPU": "NVIDIA Fake 9000", "compute capability": "9.0", "triton": reporting.machine.version("triton")}


class Tuning:
    """In place of ``process.run``: the child in this process, until ``scripts`` says otherwise."""

    def __init__(self, gpu: Any) -> None:
        self.gpu = gpu
        self.plans: list[dict[str, Any]] = []
        self.scripts: list[Callable[..., process.ExitStatus]] = []
        self.compiled: list[int] = []
        self.seconds = 1e9

    def __call__(self, arguments: Sequence[str], heard: Callable[[str], None], **limits: Any) -> process.ExitStatus:
        assert arguments[:3] == [sys.executable, "-m", "matmul_grad.bench.tune_worker"]
        self.plans.append(json.loads(Path(arguments[3]).read_text()))
        if self.scripts:
            return self.scripts.pop(0)(heard)
        status = tune_worker.serve(
            self.plans[-1],
            self.gpu,
            self.seconds,
            lambda message: heard(json.dumps(message)),
            lambda workload, configs: self.compiled.append(len(configs)),
        )
        return process.ExitStatus(status, "")


@pytest.fixture
def kernels(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    """Five candidates: one wrong, one that does not run. What they are can be changed by a test."""
    monkeypatch.setattr(tune_worker, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(tune_worker, "FINAL_SECONDS", 0.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    state: dict[str, Any] = {"candidates": [FAST, DEFAULT, SLOW, WRONG, ILL], "calls": []}

    def with_config(a: Tensor, b: Tensor, precision: str, config: TileConfig) -> Tensor:
        state["calls"].append(config)
        if config == ILL:
            raise RuntimeError("out of resource: shared memory\nmore")
        return torch.mm(a, b) + (config == WRONG)

    def describe(a: Tensor, b: Tensor, precision: str) -> tuple[Problem, Target]:
        letters = ("N" if x.stride(1) == 1 else "T" for x in (a, b))
        return Problem(len(a), b.shape[1], len(b), "float32", *letters, precision), TARGET

    monkeypatch.setattr(gpu_calls, "with_config", with_config)
    monkeypatch.setattr(gpu_calls, "describe", describe)
    monkeypatch.setattr(gpu_calls, "choose", lambda problem, target: DEFAULT)
    monkeypatch.setattr(gpu_calls, "candidates", lambda problem, target: state["candidates"])
    monkeypatch.setattr(gpu_calls, "key", lambda p, target: f"{p.m}x{p.n}x{p.k}-{p.a}{p.b}")
    state["times"] = {DEFAULT: 3e-6, FAST: 1e-6, SLOW: 5e-6}

    def times_of(calls: Sequence[Callable[[], object]]) -> list[float]:
        calls[0]()
        return [state["times"][state["calls"][-1]]]

    monkeypatch.setattr(gpu, "times_of", times_of)
    return state


@pytest.fixture
def tuning(gpu: Any) -> Tuning:
    return Tuning(gpu)


@pytest.fixture
def run(kernels: Any, tuning: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def act(*options: str) -> int:
        original = tune.run
        with monkeypatch.context() as patch:
            patch.setattr(tune, "run", lambda parsed: original(parsed, tuning))
            return cli.main(["tune", "--out", str(tmp_path / "deep" / "winners.json"), "--dtype=f32", *options])

    return act


def table(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "deep" / "winners.json").read_text())


def test_winner_and_where_it_comes_from(
    run: Any, tuning: Tuning, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--shapes", "48,32,16") == 0
    found = table(tmp_path)
    assert found["version"] == 1 and list(found) == ["version", "provenance", "winners"]
    assert list(found["winners"]) == ["48x32x16-NN", "48x16x32-NT", "16x32x48-TN"]
    assert TileConfig(**found["winners"]["48x32x16-NN"]) == FAST
    assert FACTS.items() < found["provenance"].items() and found["provenance"]["date"]
    measured = found["provenance"]["measured"]["48x32x16-NN"]
    assert (measured["seconds"], measured["default seconds"]) == (1e-6, 3e-6)
    assert measured["default"] == asdict(DEFAULT) and measured["name"] == "forward-f32-48x32x16"
    assert (measured["candidates"], measured["timed"]) == (5, 3)
    assert tuning.compiled == [5, 5, 5]
    said = capsys.readouterr()
    assert said.err.count("dropped block_m=128 block_n=32") == said.err.count(": wrong, ") == 3
    assert "block_n=16 block_k=64 stages=4 warps=8" in said.err
    assert "RuntimeError: out of resource: shared memory\n" in said.err
    assert "1.00 µs, 3.000 × the default" in said.err
    assert said.out.startswith("3 measured, 0 known before; written: ")


def test_less_than_noise_leaves_the_default(run: Any, kernels: Any, tmp_path: Path) -> None:
    kernels["times"][DEFAULT] = 1.01e-6
    assert run("--shapes", "48,32,16") == 0
    assert TileConfig(**table(tmp_path)["winners"]["48x32x16-NN"]) == DEFAULT


def test_default_that_is_wrong_does_not_win(
    run: Any, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_calls, "choose", lambda problem, target: WRONG)
    assert run("--shapes", "48,32,16") == 0
    measured = table(tmp_path)["provenance"]["measured"]["48x32x16-NN"]
    assert measured["default seconds"] is None and measured["seconds"] == 1e-6


def test_many_candidates_end_in_a_final(run: Any, gpu: Any, kernels: Any, tmp_path: Path) -> None:
    kernels["candidates"] = [replace(DEFAULT, group_m=g) for g in range(1, 11)]
    kernels["times"] = {config: config.group_m * 1e-6 for config in kernels["candidates"]}
    assert run("--shapes", "48,32,16") == 0
    assert table(tmp_path)["winners"]["48x32x16-NN"]["group_m"] == 1
    turns = gpu.turns[: gpu.turns.index(10)]  # those of the first problem: three rounds of ten, three of five
    assert len(turns) == 45 and set(turns[30:]) == {0, 1, 2, 3, 4}


def test_what_is_measured_is_not_measured_again(
    run: Any, kernels: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--shapes", "48,32,16") == 0
    kernels["calls"].clear()
    before = table(tmp_path)
    assert run("--shapes", "48,32,16", "9,8,7") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 measured, 3 known before")
    after = table(tmp_path)
    assert len(after["winners"]) == 6 and before["winners"].items() < after["winners"].items()
    assert run("--shapes", "48,32,16") == 0


def test_interruption_keeps_what_is_measured(
    run: Any, tuning: Tuning, kernels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, seen = gpu_calls.with_config, []

    def interrupted(a: Tensor, b: Tensor, precision: str, config: TileConfig) -> Tensor:
        seen.append(tuple(a.shape))
        if seen[-1] != (48, 16):
            raise KeyboardInterrupt
        return right(a, b, precision, config)

    with monkeypatch.context() as patch:
        patch.setattr(gpu_calls, "with_config", interrupted)
        assert run("--shapes", "48,32,16") == 130
    assert list(table(tmp_path)["winners"]) == ["48x32x16-NN"]
    assert run("--shapes", "48,32,16") == 0
    assert list(table(tmp_path)["winners"]) == ["48x32x16-NN", "48x16x32-NT", "16x32x48-TN"]
    assert tuning.plans[-1]["known"] == ["48x32x16-NN"]


def begun(name: str, *tried: TileConfig) -> list[dict[str, Any]]:
    facts = FACTS | {"matmul-grad": reporting.machine.version("matmul-grad")}
    return [{"facts": facts}, {"begin": 0, "name": name}, {"candidates": 5}, *({"try": asdict(c)} for c in tried)]


@pytest.mark.parametrize("status", [-11, None], ids=["dies", "hangs"])
def test_candidate_that_ends_the_process_is_not_tried_again(
    status: int | None, run: Any, tuning: Tuning, says: Any, kernels: Any, tmp_path: Path, capsys: Any
) -> None:
    tuning.scripts = [says(*begun("forward-f32-48x32x16", DEFAULT, FAST), status=status)]
    assert run("--shapes", "48,32,16") == 0
    assert tuning.plans[1]["bad"] == {"forward-f32-48x32x16": [asdict(FAST)]}
    assert TileConfig(**table(tmp_path)["winners"]["48x32x16-NN"]) == DEFAULT
    assert TileConfig(**table(tmp_path)["winners"]["48x16x32-NT"]) == FAST
    assert "forward-f32-48x32x16: dropped block_m=128 block_n=256" in capsys.readouterr().err


def test_candidate_that_breaks_the_context(run: Any, tuning: Tuning, gpu: Any, kernels: Any, monkeypatch: Any) -> None:
    right = gpu_calls.with_config

    def breaks(a: Tensor, b: Tensor, precision: str, config: TileConfig) -> Tensor:
        gpu.broken = config == ILL and len(tuning.plans) == 1
        return right(a, b, precision, config)

    monkeypatch.setattr(gpu_calls, "with_config", breaks)
    original = tuning.__class__.__call__

    def mended(self: Tuning, *arguments: Any, **more: Any) -> process.ExitStatus:
        gpu.broken = False
        return original(self, *arguments, **more)

    monkeypatch.setattr(Tuning, "__call__", mended)
    assert run("--shapes", "48,32,16") == 0
    assert len(tuning.plans) == 2 and tuning.plans[1]["bad"]["forward-f32-48x32x16"] == [asdict(ILL)]


def test_problem_without_a_right_candidate(
    run: Any, kernels: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(gpu_calls, "with_config", lambda a, b, precision, config: torch.mm(a, b) + 1)
    assert run("--shapes", "48,32,16") == 1
    assert "forward-f32-48x32x16: failed: none of 5 candidates is right" in capsys.readouterr().err
    assert not (tmp_path / "deep" / "winners.json").exists()


def test_problem_that_is_too_large(run: Any, gpu: Any, capsys: Any) -> None:
    gpu.free = 1000
    assert run("--shapes", "48,32,16") == 0
    assert "forward-f32-48x32x16: skipped: needs" in capsys.readouterr().err


def test_time_is_up(run: Any, tuning: Tuning, capsys: Any) -> None:
    tuning.seconds = -1
    assert run("--shapes", "48,32,16") == 0
    assert "no time for 3 more: the same command goes on from here" in capsys.readouterr().out


def test_child_that_never_begins(run: Any, tuning: Tuning, says: Any, capsys: Any) -> None:
    tuning.scripts = [says(status=1, said="ImportError: no triton\n")]
    assert run("--shapes", "48,32,16") == 2
    assert capsys.readouterr().err == (
        "matmul-grad: tune: no measurement can be begun: status 1: ImportError: no triton\n"
    )


def test_crash_while_all_are_timed_is_nobodys_fault(run: Any, tuning: Tuning, says: Any, capsys: Any) -> None:
    begun_and_tried = [*begun("forward-f32-48x32x16", DEFAULT, FAST), {"try": None}]
    tuning.scripts = [says(*begun_and_tried, status=-11)]
    assert run("--shapes", "48,32,16") == 1
    assert "forward-f32-48x32x16: failed: killed by SIGSEGV" in capsys.readouterr().err
    assert tuning.plans[1]["bad"] == {} and len(tuning.plans[1]["jobs"]) == 2


def test_winners_of_another_gpu_are_left_alone(
    run: Any, gpu: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    assert run("--shapes", "48,32,16") == 0
    before = table(tmp_path)
    monkeypatch.setattr(gpu, "facts", lambda: {"GPU": "NVIDIA Other", "compute capability": "9.0"})
    assert run("--shapes", "9,8,7") == 2
    assert "holds winners of GPU NVIDIA Fake 9000, and this is NVIDIA Other" in capsys.readouterr().err
    assert table(tmp_path) == before


@pytest.mark.parametrize("text", ["no json", "[]", '{"version": 2}', '{"version": 1, "winners": {"x": {}}}'])
def test_file_that_is_no_table(text: str, run: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "winners.json").write_text(text)
    assert run("--shapes", "9,8,7") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "deep" / "winners.json").read_text() == text


def test_table_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "winners.json"
    whole = Table(path)
    whole.put({"key": "a", "winner": {"block_m": 1}, "seconds": 1.0})
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        whole.put({"key": "b", "winner": {"block_m": 2}, "seconds": 1.0})
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
    assert Table(path).keys == ["a"]


def test_problems_of_a_suite() -> None:
    parsed = cli.parse(["tune", "--dtype", "bf16,tf32", "--suite", "core"])
    found = tune.planned(parsed)
    assert len(found) == len(gpu_workloads.CORE) * 2 * 3
    assert {workload.precision for workload in found} == {"ieee", "tf32"} and {workload.part for workload in found} == {
        "products"
    }


@pytest.mark.parametrize(
    "options",
    [["--dtype", "int8"], ["--shapes", "1,2"], ["--shapes", "0,1,1"], ["--suite", "x"], ["--minutes", "-1"],
     ["--shapes", "1,1,1", "--suite", "core"]],
    ids=" ".join,
)  # fmt: skip
def test_bad_options(options: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["tune", *options])
    assert exit.value.code == 2


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_table_that_cannot_be_written(run: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "deep").write_text("")
    assert run("--shapes", "9,8,7") == 2
    assert "File exists" in capsys.readouterr().err


def test_compilers_go_on_after_one_that_ended(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    made: list[Any] = []

    killed: list[int] = []

    class Process:
        def kill(self) -> None:
            killed.append(len(made))

    class Pool:
        def __init__(self, processes: int, mp_context: Any) -> None:
            made.append(self)
            self._processes = {1: Process(), 2: Process()}

        def map(self, *arguments: Any, timeout: float) -> list[None]:
            assert timeout == tune_worker.COMPILING < tune.SILENCE
            if len(made) == 1:
                raise RuntimeError("a process ended")
            return [None]

        def shutdown(self, **options: Any) -> None:
            pass

    monkeypatch.setattr(tune_worker, "ProcessPoolExecutor", Pool)
    compilers = tune_worker.Compilers(2)
    workload = gpu_workloads.GpuWorkload("products", "forward", "f32", 8, 8, 8)
    compilers(workload, [DEFAULT])
    assert "a process ended" in capsys.readouterr().err
    compilers(workload, [DEFAULT])
    assert len(made) == 2 and killed == [1, 1]


REAL = """
import contextlib, json, sys
from pathlib import Path
from matmul_grad.bench import gpu_calls, gpu_workloads, tune_worker
from matmul_grad.bench.tune_results import Table
from matmul_grad.kernels.gpu import tuned_configs
from matmul_grad.kernels.gpu.config import TileConfig
sys.path.insert(0, sys.argv[1])
from conftest import FakeGpu

every = gpu_calls.candidates
gpu_calls.candidates = lambda problem, target: every(problem, target)[:3]
tune_worker.FIRST_SECONDS = tune_worker.FINAL_SECONDS = 0.0
gpu, said, table = FakeGpu(), [], Table(Path(sys.argv[2]))
for product in ("forward", "dgrad", "wgrad"):
    workload = gpu_workloads.GpuWorkload("products", product, "f32", 17, 33, 20)
    row = tune_worker.tune(workload, set(), [], gpu, said.append, lambda workload, configs: None)
    problem, target = gpu_calls.describe(*tune_worker.gpu_backends.draw(workload, "cpu").of(product), "ieee")
    table.put(row | {"name": workload.name})
    assert tuned_configs.load(table.path)[tuned_configs.key(problem, target)] == TileConfig(**row["winner"]), row
print(len(table.keys), sum("dropped" in message for message in said))
"""


def test_real_kernels_and_their_table(tmp_path: Path) -> None:
    """Under the interpreter: what is written is what `choose` looks up."""
    arguments = [sys.executable, "-c", REAL, str(Path(__file__).parent), str(tmp_path / "winners.json")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.stdout == "3 0\n", done.stderr
