"""`python -m bench conv`: its layers are torch's, its results are checked, its tables say what its rows do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from matmul_grad.bench import __main__ as command
from matmul_grad.bench import conv, conv_calls, conv_layers, conv_session, results
from matmul_grad.bench.conv_calls import DIRECTIONS, FORWARD, Comparison, Operands
from matmul_grad.bench.conv_layers import Layer, Target
from matmul_grad.bench.workloads import OURS, TORCH

LAYERS = {layer.name: layer for layers in conv_layers.MODELS.values() for layer in layers}
SMALL = (
    Layer("small", 3, 5, (7, 6), (3, 2), 2, 1),
    Layer("small", 4, 6, (9,), (4,), 2, 1, transposed=True),
    Layer("small", 3, 4, (3, 4, 5), (3, 3, 3), 1, 1),
)
QUICK = ["conv", "--quick", "--models=hifigan", "--dtypes=f32", "--seconds=0.001"]


@pytest.mark.parametrize("name", LAYERS)
def test_sizes_and_operations_are_those_of_torch(name: str) -> None:
    layer = LAYERS[name]
    x = torch.empty((2, layer.ci, *layer.size), device="meta")
    w = torch.empty(layer.weight, device="meta")
    with FlopCounterMode(display=False) as counted:
        y = conv_calls.function(TORCH, layer)(x, w, None, stride=layer.stride, padding=layer.padding)
    assert y.shape == (2, layer.co, *layer.output)
    assert counted.get_total_flops() == 2 * layer.flops


def test_layers_are_of_the_models() -> None:
    assert {name: len(layers) for name, layers in conv_layers.MODELS.items()} == {
        "resnet": 23, "vgg": 9, "whisper": 2, "hifigan": 4, "vit": 3, "r3d": 4,
    }  # fmt: skip
    assert len(LAYERS) == 45, "each has a name of its own"
    for name, layers in conv_layers.QUICK.items():
        assert set(layers) <= set(conv_layers.MODELS[name])


def settings(**more: Any) -> dict[str, Any]:
    every = {"threads": [1, 2], "dtypes": ["f32", "f64", "bf16", "f16"], "models": list(conv_layers.MODELS)}
    return every | {"batches": [1, 8], "limit": 4.0, "quick": False, "seconds": 0.3, "pinned": True} | more


def test_every_target_is_measured_in_each_direction_and_batch() -> None:
    planned, left_out = conv.plan(settings())
    assert len(planned) + left_out == 45 * 3 * 4 * 2 * 2
    assert left_out == sum(one.torch_seconds > 4 for one in conv.plan(settings(limit=1e9))[0]) > 0
    rows = [one.row for one in planned]
    for target in conv_layers.TARGETS:
        mine = [row for row in rows if target.takes(row)]
        assert {(r["direction"], r["batch"], r["threads"]) for r in mine} == {
            (direction, batch, threads) for direction in DIRECTIONS for batch in (1, 8) for threads in (1, 2)
        }, target.name


def test_a_target_takes_its_layers_alone() -> None:
    (three,) = [target for target in conv_layers.TARGETS if target.wide]
    taken = {name for name, layer in LAYERS.items() if three.takes(Comparison(layer, FORWARD, "f32").row)}
    assert taken and all(" 3×3" in name and "×3×3" not in name.replace(" 3×3", "") for name in taken)
    assert not any("3→64" in name.split() for name in taken)
    assert not three.takes(Comparison(LAYERS[taken.pop()], FORWARD, "f64").row)


def test_16_bits_have_another_target_where_the_cpu_multiplies_them() -> None:
    bf16, f32 = Target("", "bf16", 10, with_instructions=0.8), Target("", "f32", 0.95)
    assert [bf16.of(False), bf16.of(True), f32.of(False), f32.of(True)] == [10, 0.8, 0.95, 0.95]


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layer", SMALL, ids=lambda layer: layer.name)
def test_results_are_checked(layer: Layer, direction: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Comparison(layer, direction, dtype, batch=2)
    operands = conv_calls.draw(one, integers=True)
    right = conv_calls.expected(one, operands)
    conv_calls.assert_correct(OURS, one, operands, right)
    wrong = right.clone()
    wrong[-1, -1] += 1
    with pytest.raises(AssertionError, match=f"on integers {right[-1, -1].numel()} of {right.numel()} elements differ"):
        conv_calls.assert_correct(OURS, one, operands, wrong)


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = conv_calls.function

    def wrong(name: str, layer: Layer) -> Callable[..., torch.Tensor]:
        convolve = right(name, layer)
        return convolve if name == TORCH else lambda *given, **how: convolve(*given, **how) + 1

    monkeypatch.setattr(conv_calls, "function", wrong)
    found = conv_session.timed(Comparison(SMALL[0], FORWARD, "f32"), 0.001)
    assert list(found) == ["wrong"] and "on integers" in found["wrong"][OURS]


def test_what_falls_back_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Comparison(Layer("small", 3, 5, (7, 6), (3, 2)), FORWARD, "f32")
    assert conv_session.timed(one, 0.001)["runs on kernels"]
    torchs = conv_calls.function(TORCH, one.layer)

    def refuse(*given: Any, **how: Any) -> torch.Tensor:
        from matmul_grad import strict_mode

        strict_mode.note_fallback(None, None)
        return torchs(*given, **how)

    monkeypatch.setattr(conv_calls, "function", lambda name, layer: refuse if name == OURS else torchs)
    assert not conv_session.timed(one, 0.001)["runs on kernels"]


def test_normal_operands_are_of_the_dtype_and_integers_small() -> None:
    one = Comparison(SMALL[0], FORWARD, "bf16", batch=3)
    assert [x.shape for x in conv_calls.draw(one)] == [(3, 3, 7, 6), (5, 3, 3, 2), (3, 5, 4, 4)]
    whole: Operands = conv_calls.draw(one, integers=True)
    assert all(x.dtype == torch.bfloat16 and x.abs().max() == 2 for x in whole)


def row(ratio: float, layer: Layer, direction: str = FORWARD, dtype: str = "f32", **more: Any) -> dict[str, Any]:
    spread = dict.fromkeys(("low", "median", "high"), ratio)
    one = {name: {"median": seconds} for name, seconds in ((OURS, 1.0), (TORCH, ratio))}
    found = {"step": conv.TIMES, "seconds": one, "ratio": {TORCH: spread}, "runs on kernels": True}
    return Comparison(layer, direction, dtype).row | found | more


def test_figures_are_geometric_means_and_the_worst() -> None:
    vit, vgg = LAYERS["ViT-B/16 3→768 16×16/16 at 224×224"], LAYERS["VGG-16 64→64 3×3 at 224×224"]
    rows = [row(2.0, vit), row(8.0, vgg), row(0.5, vgg, "dgrad")]
    found = {line[0]: line[1:] for line in conv.figures(rows)}
    assert found["float32"] == ["1", "0.95", "4.000", "0.500", "–", "2.000", "met"]
    assert found["float32 1×1 and patches"] == ["1", "1.1", "2.000", "–", "–", "2.000", "met"]
    assert found["float32 3×3, 64 channels or more"][-2:] == ["2.000", "met"]
    assert found["worst float32"][-2:] == ["0.500", vgg.name]
    assert not any(name.startswith("float64") for name in found)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    def save(rows: list[dict[str, Any]]) -> Path:
        stamp = {"date": "2026-01-01", "time": "12:00:00", "device": "cpu", "CPU": "Some CPU, 2 cores"}
        stamp |= {"instruction set": "avx2 of avx2", "versions": "torch 2"}
        result = results.begin("conv", stamp, settings(), len(rows), 7) | {"rows": rows}
        return results.Record(tmp_path, result).finish(True)

    return save


def test_saved_rows_are_printed(saved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved([row(2.0, LAYERS["ViT-B/16 3→768 16×16/16 at 224×224"])])
    assert command.main(["conv", "--from", str(path), "--layers"]) == 0
    printed = capsys.readouterr().out
    assert "ViT-B/16 3→768" in printed and "2.000" in printed
    assert "7 comparisons" in " ".join(printed.split())


@pytest.mark.parametrize("kind", ["wrong", "failed"])
def test_what_is_wrong_or_failed_ends_with_1(kind: str, saved: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bad = Comparison(SMALL[0], FORWARD, "f32").row | {"step": conv.TIMES, kind: {OURS: "reasons"}}
    assert command.main(["conv", "--from", str(saved([bad]))]) == 1
    assert f"conv: {kind}: matmul_grad, times, small 3→5" in capsys.readouterr().err


def test_nothing_within_the_limit_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*QUICK, "--limit=1e-9"]) == 2
    assert "nothing to measure" in capsys.readouterr().err


def test_quick_run_is_kept_and_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*QUICK, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in ("float32 transposed", "most MiB beside a result", "HiFi-GAN transposed 128→64 4/2, f32 "):
        assert text in printed
    (path,) = tmp_path.glob("*-conv-*-quick.json")
    whole = json.loads(path.read_text(encoding="utf-8"))
    steps = [row["step"] for row in whole["rows"]]
    assert steps == ["times"] * 3 + ["memory"] * 3 + ["lengths"] * 2 and whole["planned"] == len(steps)
    assert all(row["seconds"][OURS]["median"] > 0 for row in whole["rows"][:3])
    assert all(set(row["peak bytes"]) == {OURS, TORCH} for row in whole["rows"][3:6])
    # The last row of an unfinished run is missing: one measurement is left, and the others stay.
    cut = whole | {"rows": whole["rows"][:-1]}
    results.write(path.with_name(path.name.replace("-quick", f"-{results.UNFINISHED}")), results.as_json(cut))
    assert command.main([*QUICK, "--out", str(tmp_path)]) == 2, "--resume is asked for"
    assert command.main([*QUICK, "--out", str(tmp_path), "--resume"]) == 0
    again = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert again[:-1] == whole["rows"][:-1] and again[-1]["name"] == whole["rows"][-1]["name"]
