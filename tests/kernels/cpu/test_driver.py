"""One driver for all dtypes: what it reads of a configuration, and how little a dtype adds to what is compiled."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from blocks import DTYPES

from matmul_grad.kernels.cpu import config, config_words, driver, gemm, host
from matmul_grad.kernels.cpu.config import TILES, BlockConfig, Cpu, choose, compiled_for
from matmul_grad.kernels.cpu.dtype_kernels import make_activation_kernels, make_kernels

CASES = list(itertools.product(DTYPES, TILES))


@pytest.mark.parametrize(("dtype", "isa"), CASES)
def test_a_dtype_adds_no_function_for_numba(dtype: str, isa: str) -> None:
    block = choose(dtype, Cpu(isa, bf16_dot=isa == "avx512"))
    kernels = make_kernels(block)
    wide = ["store_wide"] * block.accumulates_wider
    assert set(kernels) == {block.name, *(f"{block.name}_{function}" for function in (*config_words.FUNCTIONS, *wide))}
    activations = make_activation_kernels(block)
    assert set(activations) == {f"{block.name}_{function}" for function in ("store", *wide, "derivative", "backward")}
    for name, text in (*kernels.items(), *activations.items()):
        assert isinstance(text, str) and f'@"{name}"' in text


def test_drivers_of_all_dtypes_are_one() -> None:
    assert all(name.startswith("matmul_grad_") for name in gemm.KERNELS)
    dtypes = [dtype for dtype in DTYPES if driver.supports(dtype)]
    assert all(driver.address(dtype) for dtype in dtypes)
    assert host.cpu().isa in driver._drivers
    assert len({driver.address(dtype) for dtype in dtypes}) == len(dtypes)


@pytest.mark.parametrize(("dtype", "isa"), CASES)
def test_what_compiled_code_depends_on_is_no_word(dtype: str, isa: str) -> None:
    """A size that only the words have may differ, and the compiled code is the same."""
    block = choose(dtype, Cpu(isa, bf16_dot=isa == "avx512"))
    compiled = compiled_for(block)
    assert make_kernels(compiled) == make_kernels(block)
    assert make_activation_kernels(compiled) == make_activation_kernels(block)
    for field in dataclasses.fields(BlockConfig):
        if getattr(compiled, field.name) == getattr(block, field.name):
            continue
        changed = dataclasses.replace(block, **{field.name: 2 * getattr(block, field.name)})
        assert compiled_for(changed) == compiled
        assert list(config_words.config_words(changed)) != list(config_words.config_words(block)), field.name


def test_every_word_has_one_place() -> None:
    named = {name: value for name, value in vars(config_words).items() if isinstance(value, int)}
    numbers = {name: value for name, value in named.items() if getattr(config, name, None) != value}  # not imported
    assert sorted(value for name, value in numbers.items() if name != "CONFIG_WORDS") == list(
        range(numbers["CONFIG_WORDS"])
    )
