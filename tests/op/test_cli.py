"""The command: what it prints, what it finds, what it returns."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import torch
from switch import recorded_by_functions
from torch import Tensor

from matmul_grad import __version__, api, autograd, check, check_products, check_timing, check_training, cli, warmup
from matmul_grad.bench import commands as bench

MAIN = sys.executable, "-m", "matmul_grad"
REPORT = Path(__file__).parents[2] / "bench" / "results" / "bench-cpu-amd-epyc-avx512" / "bench.json"
QUICK = ["check", "--no-train", "--no-time"]
Mm = Callable[[Tensor, Tensor], Tensor]


def last_line(text: str) -> str:
    return text.rstrip().splitlines()[-1]


def test_check_prints_the_example_and_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(QUICK) == 0
    printed = capsys.readouterr().out
    for row in ("-5 -17   4", "50  83  29", "24", "0.167 0.167 0.167", "1  2 -1  0", "0.5 0.5 0.5"):
        assert [line.count(row) for line in printed.splitlines() if line.count(row) == 3], row
    for layout in ("NN", "NT", "TN", "TT", "sliced", "expanded"):
        assert printed.count(f"\n {layout} ") == len(check_products.dtypes("cpu"))
    assert " NO" not in printed
    assert last_line(printed).startswith("all agree, in ")


def test_check_prints_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    from matmul_grad.kernels.cpu import driver, host

    cli.main(QUICK)
    printed = capsys.readouterr().out
    assert driver.config("float32").name in printed
    assert driver.config("float64").name in printed
    assert f"{host.cpu().isa} of " in printed
    assert f"torch {torch.__version__}" in printed


def test_whole_check_agrees(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check_timing.SIZES, "cpu", (32, 48))
    before = torch.get_num_threads()
    assert cli.main(["check", "--seed", "3", "--threads", "1"]) == 0
    assert torch.get_num_threads() == before
    printed = capsys.readouterr().out
    assert "loss, matmul_grad  █" in printed
    for product in ("forward", "dgrad", "wgrad"):
        for case in ("f32-32", "f64-48"):
            assert printed.count(f"{product}-{case}") == 1


def plant(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    right = api.mm
    monkeypatch.setattr(api, "mm", lambda a, b: change(right(a, b)))


def test_one_wrong_bit_is_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def nudge(c: Tensor) -> Tensor:
        if c.shape != (31, 37):
            return c
        step = torch.zeros_like(c)
        step[30, 36] = torch.nextafter(c[30, 36].detach(), torch.tensor(torch.inf, dtype=c.dtype)) - c[30, 36]
        return c + step.detach()

    plant(monkeypatch, nudge)
    assert cli.main(QUICK) == 1
    printed = last_line(capsys.readouterr().out)
    assert printed.startswith("DISAGREES: forward-f32-NN-31x37x41: 1 of 1147 elements differ, first at (30, 36)")
    rows = len(check_products.LAYOUTS) * len(check_products.dtypes("cpu"))
    assert printed.endswith(f"(and {rows - 1} more)")


def test_wrong_example_is_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda c: c + 1e-9 if c.shape == (2, 3) else c)
    assert cli.main(QUICK) == 1
    assert "DISAGREES: example: C differs" in last_line(capsys.readouterr().out)


def test_wrong_gradient_is_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = autograd.Mm.backward

    def negated(ctx, grad):
        dgrad, wgrad = right(ctx, grad)
        return dgrad, None if wgrad is None else -wgrad

    monkeypatch.setattr(autograd.Mm, "backward", staticmethod(negated))
    with recorded_by_functions():
        assert cli.main(QUICK) == 1
    printed = capsys.readouterr().out
    assert "DISAGREES: example: dB differs" in last_line(printed)
    assert "NO, " in printed


def test_raising_operator_is_a_disagreement(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(a: Tensor, b: Tensor) -> Tensor:
        raise RuntimeError("no kernel\nsecond line")

    monkeypatch.setattr(api, "mm", refuse)
    assert cli.main(QUICK) == 1
    assert last_line(capsys.readouterr().out).startswith("DISAGREES: example: no kernel (and ")


def test_wrong_result_is_not_timed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check_timing.SIZES, "cpu", (32, 48))
    plant(monkeypatch, lambda c: c + 1 if c.shape == (32, 32) else c)
    assert cli.main(["check", "--no-train"]) == 1
    printed = capsys.readouterr().out
    assert "forward-f32-32 " not in printed
    assert "forward-f32-48 " in printed
    assert "DISAGREES: timing f32 32: step-f32-NN-32x32x32-1t, forward: on integers 32 of 32 rows" in last_line(printed)


@pytest.mark.parametrize(
    ("linear", "expected"),
    [
        (lambda x, w, b: check_training.torch_linear(x, w, b) * 1.01, "losses are"),
        (lambda x, w, b: check_training.torch_linear(x, w, b) * torch.nan, "losses are nan apart"),
    ],
)
def test_wrong_training_is_found(
    linear: check_training.Linear,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check_training, "our_linear", linear)
    assert cli.main(["check", "--no-time"]) == 1
    assert f"DISAGREES: training: {expected}" in last_line(capsys.readouterr().out)


def test_training_that_learns_nothing_is_found() -> None:
    flat = check_training.Curve([2.3, 2.3], [0.1])
    assert check_training.compare(flat, flat) == ["training: accuracy 10.00%, wanted over 90%"]


def test_missing_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["check", "--device", "cuda"]) == 2
    refused = capsys.readouterr()
    assert refused.out == ""
    assert refused.err.count("\n") == 1
    assert "no CUDA device" in refused.err


def test_missing_package_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["check"]) == 2
    refused = capsys.readouterr()
    assert refused.out == ""
    assert refused.err == "matmul-grad: scikit-learn is missing: pip install scikit-learn\n"


def test_commands_work_without_rich(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(check_timing.SIZES, "cpu", (32,))
    assert cli.main(["check", "--no-train"]) == 0
    printed = capsys.readouterr().out
    assert "| NN | f32 | " in printed and "| forward-f32-32 | " in printed
    for command in (["info"], ["warmup"]):
        assert cli.main(command) == 0


def test_help_of_the_bench_needs_neither_rich_nor_matplotlib(tmp_path: Path) -> None:
    code = """
import sys
sys.modules |= {"rich": None, "matplotlib": None, "sklearn": None}
from matmul_grad import cli
sys.exit(cli.main(sys.argv[1:]))
"""
    result = REPORT.read_text(encoding="utf-8")
    (tmp_path / "a.json").write_text(result, encoding="utf-8")
    for arguments in (["--help"], ["bench", "--help"], ["bench", "compare", "a.json", "a.json"]):
        done = processes.run(code, arguments=tuple(arguments), folder=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), arguments


def test_a_cpu_without_conversions_of_float16() -> None:
    """Float16 has no kernel there, which is told, and nothing fails. On `generic` itself: the slow test below."""
    code = """
from dataclasses import replace
from matmul_grad.kernels.cpu import host
host.cpu = lambda isa=None, found=host.cpu(): replace(found, has_fp16_convert=False)
from matmul_grad import check_products, cli, warmup
assert cli.main(["info"]) == 0
assert [name[0] for name, _ in warmup.steps()] == ["o", "o", "s", "d", "b"]
assert check_products.dtypes("cpu") == ["f32", "f64", "bf16"]
"""
    done = processes.run(code)
    assert done.returncode == 0, done.stderr
    assert "float16 falls back to torch (no instructions that convert it)" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [["warmup"], ["info"], QUICK], ids=" ".join)
def test_commands_on_a_cpu_without_conversions_of_float16(command: list[str]) -> None:
    environment = os.environ | {"MATMUL_GRAD_ISA": "generic"}
    done = subprocess.run([*MAIN, *command], capture_output=True, text=True, env=environment)
    told = [line for line in done.stderr.splitlines() if "compiling CPU kernels" not in line]  # where none are kept yet
    assert (done.returncode, told) == (0, [])
    assert "float16 falls back to torch" in done.stdout
    assert command == ["warmup"] or "generic of " in done.stdout


def test_unknown_instruction_set(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MATMUL_GRAD_ISA", "mmx")
    for command in (QUICK, ["info"], ["warmup"]):
        assert cli.main(command) == 2
        assert "got mmx" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["verify"],
        ["check", "--fast"],
        ["check", "extra"],
        ["check", "--device", "tpu"],
        ["check", "--threads", "0"],
        ["check", "--threads", "two"],
        ["check", "--threads", "100000000000"],
        ["check", "--seed", "9" * 5000],
        ["check", "--seed", "-1"],
        ["info", "--seed", "1"],
    ],
    ids=" ".join,
)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert "usage: matmul-grad" in capsys.readouterr().err


def test_interrupt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(options: check.Options, console: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "run", interrupted)
    assert cli.main(QUICK) == 130
    assert capsys.readouterr().err == "matmul-grad: interrupted\n"


def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MATMUL_GRAD_CACHE", str(tmp_path))
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    names = [line.split("  ")[0] for line in printed.splitlines()]
    assert names[0] == "CPU"
    assert {"instruction set", "GPU", "operator", "threads", "versions"} < set(names)
    assert last_line(printed).endswith(f"{tmp_path} (0 kernels, 0.0 MB)")


def test_warmup(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["warmup"]) == 0
    printed = capsys.readouterr().out
    assert "sgemm_" in printed
    assert "dgemm_" in printed
    assert last_line(printed).startswith("cache: ")


def test_warmup_where_nothing_can_be_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MATMUL_GRAD_CACHE", str(tmp_path / "file" / "cache"))
    assert cli.main(["warmup"]) == 2
    refused = capsys.readouterr()
    assert refused.out == ""
    assert refused.err == f"matmul-grad: compiled kernels cannot be kept in {tmp_path}/file/cache: Not a directory\n"


def test_kernels_are_compiled_on_all_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Once the first had to be compiled, processes on the other cores compile a share of the others."""
    monkeypatch.setenv("MATMUL_GRAD_CACHE", str(tmp_path))
    monkeypatch.setattr(warmup.machine, "usable_cores", lambda: 2)
    begun: list[list[str]] = []

    class Helper:
        def __init__(self, command: list[str], **_: object) -> None:
            begun.append(command[1:])

        def __enter__(self) -> "Helper":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def wait(self) -> int:
            (tmp_path / "waited").touch()
            return 1

        kill = wait

    calls: list[str] = []

    def compile_one(name: str) -> Callable[[], None]:
        def compile_it() -> None:
            calls.append(name)
            (tmp_path / f"{name}.o").touch()

        return compile_it

    monkeypatch.setattr(warmup.subprocess, "Popen", Helper)
    monkeypatch.setattr(warmup, "steps", lambda: [(name, compile_one(name)) for name in "abcde"])
    assert [name for name, _ in warmup.compiled()] == calls == list("abcde")
    assert begun == [["-m", "matmul_grad.warmup", "c", "e"]] and (tmp_path / "waited").exists()
    begun.clear()
    assert [name for name, _ in warmup.compiled()] == list("abcde") and begun == []  # all is there now


# The first argument is the file that is written to, or `closed` for a pipe that nobody reads.
ENDS_EARLY = """
import os, runpy, sys
(reader, writer), out = os.pipe(), sys.argv.pop(1)
os.close(reader)
os.dup2(writer if out == "closed" else os.open(out, os.O_WRONLY), 1)
sys.stdout = open(1, "w", closefd=False)
runpy.run_module("matmul_grad", run_name="__main__", alter_sys=True)
"""
has_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="tests need /dev/full")


def assert_told_in_a_line(said: str, status: int) -> None:
    expected = "the output cannot be written: No space left on device\n"
    assert said.startswith("matmul-grad") and said.endswith(expected) and said.count("\n") == 1 and status == 2


@has_full
@pytest.mark.parametrize(
    "command", [["info"], ["--help"], ["bench", "--help"], ["bench", "compare", str(REPORT), str(REPORT)]], ids=" ".join
)
def test_output_that_ends_early(command: list[str]) -> None:
    """A reader that goes away, as `head` does, and a full disk: one line at most, and no traceback."""
    closed, filled = (processes.run(ENDS_EARLY, arguments=(out, *command)) for out in ("closed", "/dev/full"))
    assert (closed.stderr, closed.returncode) == ("", 141)
    assert_told_in_a_line(filled.stderr, filled.returncode)


@has_full
def test_output_of_a_process_that_ends_early() -> None:
    """What the interpreter itself still writes at its end is told in the same way."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        filled = subprocess.run([*MAIN, "info"], stdout=full, stderr=subprocess.PIPE, env=environment, text=True)
    assert_told_in_a_line(filled.stderr, filled.returncode)


def test_kernel_that_does_not_compile(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("bad lanes\nmore")

    monkeypatch.setattr(warmup, "steps", lambda: [("sgemm", fail)])
    expected = "sgemm cannot be compiled: ValueError: bad lanes"
    assert cli.main(QUICK) == 1
    assert last_line(capsys.readouterr().out) == f"DISAGREES: {expected}"
    assert cli.main(["warmup"]) == 1
    assert capsys.readouterr().err == f"matmul-grad: {expected}\n"


def test_bench_names_the_missing_package(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench"]) == 2
    assert capsys.readouterr().err == "matmul-grad bench: matplotlib is missing: pip install matplotlib\n"


def test_bench_takes_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[str]] = []
    monkeypatch.setattr(bench, "main", lambda arguments, program: taken.append([program, *arguments]) or 5)
    assert cli.main(["bench", "report", "x.json", "--readme"]) == 5
    assert cli.main(["bench", "--suite", "small"]) == 5
    assert taken == [["matmul-grad bench", "report", "x.json", "--readme"], ["matmul-grad bench", "--suite", "small"]]


def test_console_script() -> None:
    version = subprocess.run([Path(sys.executable).parent / "matmul-grad", "--version"], capture_output=True, text=True)
    assert (version.returncode, version.stdout) == (0, f"matmul_grad {__version__}\n")


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["check", "--help"])
    assert exit.value.code == 0
    helped = capsys.readouterr().out
    for option in ("--no-train", "--no-time", "--device", "--seed", "--threads"):
        assert option in helped
