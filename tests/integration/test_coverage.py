"""docs/coverage.md: its table is what is counted here and now."""

import pytest
import torch

from .. import coverage_table

PAGE = coverage_table.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*coverage_table.FUNCTIONS, *coverage_table.MODULES])
@pytest.mark.filterwarnings("ignore")
def test_row(name: str) -> None:
    row = coverage_table.function_row if name in coverage_table.FUNCTIONS else coverage_table.module_row
    line = coverage_table.line(row(name))
    assert line in PAGE or not torch.__version__.startswith("2.13"), line  # the page's counts are of this torch
    if name == "`nn.Linear`":
        assert line == "| `nn.Linear` | 1 · 2 | 1 |\n"
