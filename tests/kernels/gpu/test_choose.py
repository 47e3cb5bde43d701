"""choose is pure, total and valid over every shape that matters; tuned configurations take precedence."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from gpu_targets import DTYPE_NAMES, TARGETS

from matmul_grad.kernels.gpu import choose as module
from matmul_grad.kernels.gpu import tuned_configs
from matmul_grad.kernels.gpu.choose import (
    FP8_TMA_TILES,
    SPLITS,
    TILES,
    TMA_TILES,
    VECTOR_TILES,
    candidates,
    choose,
    choose_backward,
    choose_padded,
    fastest_fused,
    fastest_predicted,
    gradients,
    is_valid_backward,
    predicted_seconds,
)
from matmul_grad.kernels.gpu.config import Problem, TileConfig, is_valid

CUBES = [(n, n, n) for n in (64, 128, 256, 512, 1024, 2048, 4096)]
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
WEIGHTS = (
    (768, 768), (3072, 768), (768, 3072), (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336),
    (4608, 3584), (37888, 3584), (3584, 18944),
)  # fmt: skip
DEEPGEMM = ((2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
ODD = [(4095, 4095, 4095), (4097, 4097, 4097), (1000, 1000, 1000), (257, 129, 513), (16, 2, 30_000_000)]
SMALL = list(itertools.product((0, 1, 17, 64, 129), repeat=3))
HUGE = [(2**31, 1, 1), (1, 2**31, 1), (1, 1, 2**31), (2**35, 1, 2**40)]
FORWARD = (
    CUBES
    + [(tokens, n, k) for tokens in TOKENS for n, k in WEIGHTS]
    + [(m, n, k) for m in (1, 128, 4096) for n, k in DEEPGEMM]
    + ODD
)
# dgrad is (m, n) . (n, k), wgrad is (k, m) . (m, n).
SHAPES = [product for m, n, k in FORWARD for product in ((m, n, k), (m, k, n), (k, n, m))] + SMALL + HUGE


@pytest.fixture(autouse=True)
def tuned_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No configurations of the user's, but those that a test writes."""
    monkeypatch.setenv("MATMUL_GRAD_TUNED", str(tmp_path / "tuned.json"))
    forget()
    yield tmp_path / "tuned.json"
    forget()


def forget() -> None:
    for cached in (tuned_configs.read_files, fastest_predicted, fastest_fused):
        cached.cache_clear()


# Layouts, 16-byte loads, TMA.
WAYS = (("NN", True, True), ("NN", True, False), ("TS", False, False))


def problems(dtype_name: str, **fields: bool) -> list[Problem]:
    dtype, precision = DTYPE_NAMES[dtype_name]
    return [
        Problem(m, n, k, dtype, letters[0], letters[1], precision, aligned, tma, **fields)
        for (m, n, k), (letters, aligned, tma) in itertools.product(SHAPES, WAYS)
    ]


def whole(tile: TileConfig) -> TileConfig:
    """As it stands in the tables."""
    return replace(tile, split_k=1, group_m=TileConfig.group_m)


@pytest.mark.parametrize("dtype_name", DTYPE_NAMES)
@pytest.mark.parametrize("arch", TARGETS)
def test_choose_is_total_and_valid(arch: str, dtype_name: str) -> None:
    target = TARGETS[arch]
    chosen = {problem: choose(problem, target) for problem in problems(dtype_name)}
    assert [problem for problem, tile in chosen.items() if not is_valid(tile, problem, target)] == []
    depths = {tile.block_k for tile in chosen.values() if tile.path != "vector"}
    assert len(depths) == 1


@pytest.mark.parametrize("dtype_name", DTYPE_NAMES)
def test_choose_is_pure(dtype_name: str) -> None:
    first = [choose(problem, TARGETS["sm90"]) for problem in problems(dtype_name)]
    fastest_predicted.cache_clear()
    again = [choose(problem, TARGETS["sm90"]) for problem in reversed(problems(dtype_name))]
    assert first == again[::-1]


def test_every_tile_is_chosen_somewhere() -> None:
    """A tile that no problem gets on any GPU has no place in the tables."""
    eight_bits = [
        Problem(m, n, k, "float8_e4m3fn", "N", "T", tma=True, result="bfloat16")
        for m, n, k in itertools.product((16, 512, 2048, 8192), repeat=3)
    ]
    missing = {tile for tiles in TILES.values() for tile in tiles} | {
        *TMA_TILES,
        *FP8_TMA_TILES,
        *VECTOR_TILES.values(),
    }
    asked = {dtype_name: problems(dtype_name) for dtype_name in DTYPE_NAMES}
    # As soon as every tile was met, the rest need not be asked; these three are enough today.
    for target in sorted(TARGETS.values(), key=lambda target: target.arch not in (80, 90, 120)):
        if target.arch >= 89:
            missing -= {whole(choose(problem, target)) for problem in eight_bits}
        for every in asked.values():
            missing -= {whole(choose(problem, target)) for problem in every}
            if not missing:
                return
        missing -= {choose_backward(problem, "N", target) for problem in asked["bf16"]}
    assert missing == set()


def test_every_number_of_splits_is_chosen_somewhere() -> None:
    shapes = [(m, n, 64 << i) for m in (16, 64, 256) for n in (64, 512) for i in range(20)]
    chosen = {choose(Problem(*shape, "bfloat16", tma=True), TARGETS["sm90"]).split_k for shape in shapes}
    assert chosen >= {1, 4, 8, 64, 128}
    assert chosen <= set(SPLITS)


@pytest.mark.parametrize("dtype_name", ["bf16", "fp32"])
def test_invariant_problems_have_one_order_of_k(dtype_name: str) -> None:
    """Where the bits of a row may not depend on m, k is never split and a vector is a matrix."""
    for problem in problems(dtype_name, invariant=True):
        tile = choose(problem, TARGETS["sm90"])
        assert tile.split_k == 1 and tile.path != "vector"


def test_a_large_problem_gets_a_large_tile_and_a_small_one_fills_the_gpu() -> None:
    target = TARGETS["sm90"]
    large = Problem(8192, 8192, 8192, "bfloat16", tma=True)
    assert (choose(large, target).block_m, choose(large, target).block_n) == (128, 256)
    decode = choose(replace(large, m=16, n=4096, k=4096), target)
    assert (decode.block_m, decode.block_n) == (64, 32)
    assert choose(replace(large, m=1, b="T"), target) == VECTOR_TILES["N"]
    assert choose(replace(large, m=64, n=64, k=1 << 20), target).split_k == 128


def test_a_new_number_of_tokens_costs_no_new_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where m is tokens, and where k is: they are rounded up, and the tile is valid for every number of them."""
    target, predicted = TARGETS["sm90"], []
    real = predicted_seconds
    monkeypatch.setattr(module, "predicted_seconds", lambda *args: predicted.append(1) or real(*args))
    for dtype, letters in (("bfloat16", "NT"), ("float32", "NN")):
        problem = Problem(1024, 4096, 4096, dtype, letters[0], letters[1], tma=dtype == "bfloat16")
        chosen = choose(problem, target)
        assert predicted
        predicted.clear()
        for m in range(1024 - 63, 1024):
            assert choose(replace(problem, m=m), target) == chosen and is_valid(chosen, replace(problem, m=m), target)
        assert predicted == []
    wgrad = Problem(768, 768, 8192, "bfloat16", "T", "N", tma=True)
    chosen = choose(wgrad, target)
    assert chosen.split_k > 1
    predicted.clear()
    for k in range(8192 - 63, 8192):
        assert choose(replace(wgrad, k=k), target) == chosen and is_valid(chosen, replace(wgrad, k=k), target)
    choose_backward(Problem(1024, 1024, 1024, "bfloat16", tma=True), "N", target)
    predicted.clear()
    choose_backward(Problem(1000, 1024, 1024, "bfloat16", tma=True), "N", target)
    assert predicted == []


def test_rounded_sizes_choose_what_is_valid_for_the_exact_ones() -> None:
    """Each side of every border: of a tile, of a number of steps, of a number of splits."""
    sizes = sorted({size + more for size in (1, 16, 64, 256, 1024, 16384) for more in (-1, 0, 1)} - {0})
    for (m, n, k), dtype in itertools.product(itertools.product(sizes, (1, 64, 65), sizes), ("bfloat16", "float32")):
        problem = Problem(m, n, k, dtype)
        assert is_valid(choose(problem, TARGETS["sm90"]), problem, TARGETS["sm90"]), problem


def test_unaligned_operands_are_copied_where_the_product_is_large() -> None:
    target, both = TARGETS["sm90"], (True, True)
    problem = Problem(4097, 4097, 4097, "bfloat16", "S", "T", aligned=False)
    tile = choose_padded(problem, target, both)
    assert tile is not None and tile.path == "tma"
    for left_alone in (
        replace(problem, m=640, n=640, k=640),  # fewer than 2**28 multiplications
        replace(problem, m=1, n=1 << 15, k=1 << 15),  # the copy takes longer than the product
        replace(problem, dtype="float32"),
        replace(problem, invariant=True),
    ):
        assert choose_padded(left_alone, target, both) is None, left_alone
    assert choose_padded(problem, target, (False, False)) is None
    assert choose_padded(problem, TARGETS["sm80"], both) is None
    assert choose_padded(replace(problem, batch=8), target, (True, False)) is not None


def test_the_model_grows_with_the_work_and_shrinks_with_the_gpu() -> None:
    tile, problem, target = TMA_TILES[0], Problem(4096, 4096, 4096, "bfloat16", tma=True), TARGETS["sm90"]
    once = predicted_seconds(tile, problem, target)
    assert 1.9 < predicted_seconds(tile, replace(problem, k=8192), target) / once < 2.1
    assert 3.5 < predicted_seconds(tile, replace(problem, batch=4), target) / once < 4.5
    assert predicted_seconds(tile, problem, replace(target, sms=66)) > 1.8 * once


def test_candidates_hold_every_path() -> None:
    found = candidates(Problem(1, 4096, 4096, "bfloat16", "N", "T", tma=True), TARGETS["sm90"])
    assert {tile.path for tile in found} == {"tma", "pointers", "vector"}
    assert {tile.split_k for tile in found} >= {1, 2, 16}
    assert len(set(found)) == len(found)


def test_tiles_of_a_wave_are_nearly_a_square_of_the_result() -> None:
    """Where the operands do not stay in the L2 cache: 16 rows of 128 x 256 tiles, 8 of 256 x 128."""
    target, large = TARGETS["sm90"], Problem(8192, 8192, 8192, "bfloat16", tma=True)
    tile = choose(large, target)
    assert (tile.block_m, tile.block_n, tile.group_m) == (128, 256, 16)
    other = replace(TMA_TILES[1], group_m=16)
    assert (other.block_m, other.block_n) == (256, 128)
    assert predicted_seconds(TMA_TILES[1], large, target) < predicted_seconds(other, large, target)
    small = replace(large, m=2048, n=2048, k=2048)
    assert choose(small, target).group_m == 8  # it fits, and the first of equals is taken
    assert choose(replace(large, m=1024), target).group_m == 8


def test_orders_of_tiles_are_candidates_where_they_differ() -> None:
    target, large = TARGETS["sm90"], Problem(8192, 8192, 65536, "bfloat16", tma=True)
    found = {(tile.path, tile.split_k > 1, tile.group_m) for tile in candidates(large, target)}
    assert found == {("tma", False, 8), ("tma", False, 16), ("pointers", False, 8)}
    few = candidates(replace(large, m=512, n=512), target)
    assert {tile.group_m for tile in few} == {8} and len(set(few)) == len(few)


def test_gradients_are_the_products_of_the_derivation() -> None:
    dgrad, wgrad = gradients(Problem(2, 3, 5, "bfloat16", "N", "T"))
    assert (dgrad.m, dgrad.n, dgrad.k, dgrad.a + dgrad.b) == (2, 5, 3, "NN")
    assert (wgrad.m, wgrad.n, wgrad.k, wgrad.a + wgrad.b) == (5, 3, 2, "TN")


@pytest.mark.parametrize("arch", TARGETS)
def test_one_launch_for_both_gradients_is_valid_for_both(arch: str) -> None:
    target, found = TARGETS[arch], []
    for problem in problems("bf16"):
        tile = choose_backward(problem, "N", target)
        if tile is not None:
            found.append(tile)
            assert is_valid_backward(tile, problem, "N", target) and tile.split_k == 1
            assert all(is_valid(tile, product, target) for product in gradients(problem))
    assert bool(found) == (90 <= target.arch < 120)


@pytest.mark.parametrize(
    ("limit", "without", "shape"), [("FUSED_WAVES", 1 << 40, (256, 1024, 8192)), ("FUSED_GAIN", 9, (256, 2048, 256))]
)
def test_one_launch_for_both_gradients_only_of_few_tiles_and_for_a_gain(
    limit: str, without: float, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond two waves the persistent loops of two launches lose less than one launch saves."""
    target, problem = TARGETS["sm90"], Problem(*shape, "bfloat16", tma=True)
    assert choose_backward(replace(problem, m=1024, n=1024, k=1024), "N", target) is not None
    assert choose_backward(replace(problem, m=8192, n=8192, k=8192), "N", target) is None
    assert choose_backward(problem, "N", target) is None
    monkeypatch.setattr(module, limit, without)
    fastest_fused.cache_clear()
    assert choose_backward(problem, "N", target) is not None  # nothing else refuses it


def test_tuned_config_takes_precedence_over_the_model(tuned_file: Path) -> None:
    problem, target = Problem(512, 512, 512, "bfloat16", tma=True), TARGETS["sm90"]
    usual = choose(problem, target)
    tuned = next(tile for tile in candidates(problem, target) if tile != usual)
    write(tuned_file, {tuned_configs.key(problem, target): asdict(tuned)})
    assert choose(problem, target) == tuned
    assert choose(replace(problem, m=513), target) != tuned
    fewer = replace(target, sms=78)
    assert choose(problem, fewer) == fastest_predicted(problem, fewer) != tuned


def test_invalid_tuned_config_is_ignored(tuned_file: Path) -> None:
    problem, target = Problem(512, 512, 512, "bfloat16"), TARGETS["sm90"]
    usual = choose(problem, target)
    write(tuned_file, {tuned_configs.key(problem, target): asdict(TMA_TILES[0])})
    assert choose(problem, target) == usual


def test_file_that_tune_wrote_before_is_read(tuned_file: Path) -> None:
    """The format of version 1, word for word: users have such files."""
    problem, target = Problem(512, 512, 512, "bfloat16", tma=True), TARGETS["sm90"]
    usual = choose(problem, target)
    tuned_file.write_text(
        """{"version": 1, "provenance": {"GPU": "NVIDIA H100", "triton": "3.6.0", "measured": {
        "sm90x132 512 512 512 bfloat16 N N ieee aligned tma 1": {"best": 1e-05, "default": 2e-05}}}, "winners": {
        "sm90x132 512 512 512 bfloat16 N N ieee aligned tma 1": {"block_m": 64, "block_n": 64, "block_k": 64,
        "stages": 4, "warps": 4, "group_m": 8, "split_k": 2, "path": "pointers", "subtiles": 1}}}""",
        encoding="utf-8",
    )
    forget()
    assert choose(problem, target) == TileConfig(64, 64, 64, 4, 4, 8, 2, "pointers", 1) != usual


@pytest.mark.parametrize(
    "text", ["", "[]", '{"version": 2, "winners": {}}', '{"version": 1, "winners": {"x": {"y": 1}}}']
)
def test_invalid_file_is_ignored_with_one_message(
    text: str, tuned_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = choose(Problem(512, 512, 512, "bfloat16"), TARGETS["sm90"])
    tuned_file.write_text(text, encoding="utf-8")
    forget()
    assert choose(Problem(512, 512, 512, "bfloat16"), TARGETS["sm90"]) == usual
    assert capsys.readouterr().err.count("\n") == 1


def write(path: Path, entries: dict[str, object]) -> None:
    content = {"version": tuned_configs.VERSION, "provenance": {}, "winners": entries}
    path.write_text(json.dumps(content), encoding="utf-8")
    forget()
