"""The examples run, and train alike on torch's kernels and on these."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from limits import scaled
from scripts import load
from torch import nn

import matmul_grad

EXAMPLES = Path(__file__).parents[2] / "examples"
APART = 1e-5  # of losses around 3, in the first steps: some roundings of float32
LIMIT = scaled(600)
GEMM = EXAMPLES / "gemm"
STEPS = sorted(GEMM.glob("step*.py"))


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """One of the scripts as a module, its folder on the path as Python puts it for a script."""
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module(request.param)
    monkeypatch.setattr(module, "SAMPLE", 10, raising=False)  # characters that the GPT writes at the end
    return module


def calls(operator: str) -> int:
    return matmul_grad.info()["accelerated"].get(operator, {}).get("float32", 0)


@pytest.mark.parametrize("example", ["train_digits", "train_char_gpt", "train_experts"], indirect=True)
def test_both_backends_train_alike(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = {}
    for backend in ("torch", "matmul_grad"):
        plot = tmp_path / f"{backend}.png"
        losses[backend] = example.main(["--backend", backend, "--steps", "3", "--plot", str(plot)])
        assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000
        assert "3/3" in capsys.readouterr().out
    assert len(losses["torch"]) == 3 and len(set(losses["torch"])) == 3
    assert losses["matmul_grad"] == pytest.approx(losses["torch"], abs=APART)
    assert matmul_grad.info()["on"] == []


@pytest.mark.parametrize("example", ["train_char_gpt"], indirect=True)
def test_all_of_the_gpt_runs_on_these_kernels(example: ModuleType, tmp_path: Path) -> None:
    before = {operator: calls(operator) for operator in ("mm", "addmm", "bmm")}
    with matmul_grad.strict():
        example.main(["--steps", "1", "--plot", str(tmp_path / "loss.png")])
    layers, batched = 4 * example.LAYERS + 1, 2 * example.LAYERS
    forwards = 1 + example.SAMPLE
    assert calls("addmm") - before["addmm"] == forwards * layers
    assert calls("mm") - before["mm"] == 2 * layers
    assert calls("bmm") - before["bmm"] == (forwards + 2) * batched


@pytest.mark.parametrize("example", ["train_char_gpt"], indirect=True)
def test_the_gpt_trains_in_16_bits_as_in_float32(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "LAYERS", 1)
    plot = tmp_path / "loss.png"
    losses = example.main(["--dtype", "bfloat16", "--accumulate", "--steps", "6", "--plot", str(plot)])
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    alone = example.main(["--accumulate", "--steps", "6", "--plot", str(plot)])
    ends = [sum(curve) / len(curve) for curve in (alone, losses)]
    assert f"loss at the end: {ends[0]:.4f} in float32, {ends[1]:.4f} in bfloat16" in said
    assert losses != alone and losses == pytest.approx(alone, rel=0.02)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("example", ["train_digits", "train_experts"], indirect=True)
def test_it_learns(example: ModuleType, tmp_path: Path) -> None:
    losses = example.main(["--steps", "60", "--plot", str(tmp_path / "loss.png")])
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize("example", ["train_unet"], indirect=True)
def test_unet_trains_alike_on_both(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "loss.png"
    with matmul_grad.strict():
        losses = example.main(["--steps", "3", "--plot", str(plot)])
    assert list(losses) == ["torch", "matmul_grad"]
    assert len(losses["torch"]) == 3 and len(set(losses["torch"])) == 3
    assert losses["matmul_grad"] == pytest.approx(losses["torch"], abs=APART)
    layers = sum(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in example.UNet().modules())
    printed = capsys.readouterr().out
    assert layers == 13 and f"{layers} convolutions on these kernels" in printed
    assert printed.count("dB cleaned") == 2
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 10_000


@pytest.mark.parametrize("example", ["train_unet"], indirect=True)
def test_unet_learns(example: ModuleType) -> None:
    torch.manual_seed(0)
    model = matmul_grad.convert(example.UNet(widths=(8, 16)), kinds=(nn.Conv2d, nn.ConvTranspose2d))
    losses = example.fit(model, example.photographs()[0], 40, seed=0)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *map(str, command)], cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip


def test_runs_as_a_script_from_anywhere(tmp_path: Path) -> None:
    done = run(EXAMPLES / "train_digits.py", "--steps", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "on these kernels: layer 0, layer 3, layer 5" in done.stdout
    assert (tmp_path / "train_digits.png").exists()


@pytest.mark.parametrize("script", ["train_digits", "train_char_gpt", "train_unet", "train_experts", "tensor_parallel"])
def test_missing_packages_are_named_in_one_line(script: str, tmp_path: Path) -> None:
    code = f"""
import runpy, sys
sys.modules |= {{"sklearn": None, "matplotlib": None, "rich": None}}
sys.path.insert(0, {str(EXAMPLES)!r})
runpy.run_path({str(EXAMPLES / script)!r} + ".py", run_name="__main__")
"""
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "missing for the examples: pip install rich scikit-learn matplotlib\n"


@pytest.mark.parametrize("example", ["train_digits"], indirect=True)
def test_unsupported_arguments_are_named(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, said in (
        (["--steps", "0"], "0 is not a positive number"),
        (["--steps", "x"], "x is not a positive number"),
        (["--backend", "numpy"], "invalid choice: 'numpy'"),
    ):
        with pytest.raises(SystemExit) as end:
            example.main(wrong)
        assert end.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("example", ["tensor_parallel"], indirect=True)
def test_tensor_parallel_gives_what_one_process_does(example: ModuleType, tmp_path: Path) -> None:
    launch = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"
    done = run(*launch, EXAMPLES / "tensor_parallel.py", "--steps", "20", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    said = re.sub(r"\s+", " ", done.stdout)
    assert "2 processes, matmul_grad" in said and "(128, 64) of the (256, 64)" in said
    first, last = map(float, re.findall(r"\d\.\d{4}", said))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, example.HIDDEN), nn.ReLU(), nn.Linear(example.HIDDEN, 10))
    losses = example.fit(model, seed=0, steps=20, device="cpu")
    assert (first, last) == pytest.approx((losses[0], losses[-1]), abs=1e-4), "rounded to four digits"


@pytest.fixture
def in_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the steps on the path, as Python puts it for a script."""
    monkeypatch.syspath_prepend(GEMM)


def test_there_are_six_steps() -> None:
    assert [path.name[:5] for path in STEPS] == [f"step{number}" for number in range(1, 7)]


@pytest.mark.parametrize("script", STEPS, ids=lambda path: path.stem)
def test_step_towards_the_microkernel_is_exact(script: Path, in_gemm: None, capsys: pytest.CaptureFixture[str]) -> None:
    load("examples/gemm/verify.py").verify(load(f"examples/gemm/{script.name}").gemm)
    assert "products are exact" in capsys.readouterr().out


def test_a_wrong_step_is_found() -> None:
    def gemm(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        c = a @ b
        c[-1, -1] += 1
        return c

    with pytest.raises(AssertionError, match="1×1×1"):
        load("examples/gemm/verify.py").verify(gemm)


def test_steps_are_measured_and_the_table_is_written(in_gemm: None) -> None:
    measure = load("examples/gemm/measure.py")
    assert [step.__name__ for step in measure.STEPS.values()] == [path.stem for path in STEPS]
    text = measure.table([16], seconds=0.01)
    rows = re.findall(r"^\| (.+) \| (\d+\.\d) \|$", text, re.MULTILINE)
    assert [name for name, _ in rows] == [*measure.STEPS, "`matmul_grad.mm`", "`torch.mm`"]
    page = measure.with_table(measure.PAGE.read_text(encoding="utf-8"), text)
    assert f"{measure.BEGIN}\n{text}\n{measure.END}" in page and "Not measured yet" not in page


def test_every_cell_of_the_notebook_runs() -> None:
    notebook = json.loads((EXAMPLES / "derivation.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    namespace: dict[str, object] = {"__name__": "notebook"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        assert cell["outputs"] == [], "committed without results"
        exec(compile("".join(cell["source"]), f"derivation.ipynb, cell {number}", "exec"), namespace)
    assert len(cells) == 7 and "last" in namespace
