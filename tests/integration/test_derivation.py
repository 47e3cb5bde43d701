"""The tutorial, formula by formula: each has a case that holds its text and evaluates it."""

import re

import pytest

from .formulas import convolutions, gradients, jacobians, transposed  # noqa: F401  # their import fills the table
from .formulas.tools import PAGES, cases, stated, text_of


@pytest.mark.parametrize("letter", PAGES)
def test_page_and_cases_have_the_same_ids(letter: str) -> None:
    assert list(stated(letter)) == [f"{letter}{i}" for i in range(1, len(stated(letter)) + 1)]
    assert set(stated(letter)) == {name for name in cases if name[0] == letter}


@pytest.mark.parametrize("letter", PAGES)
def test_page_refers_only_to_ids_that_exist(letter: str) -> None:
    mentioned = set(re.findall(r"\(([A-Z]\d+)\)", text_of(letter)))
    assert mentioned and mentioned <= set(cases)


@pytest.mark.parametrize("letter", PAGES)
def test_page_states_nothing_without_an_id(letter: str) -> None:
    prose = re.sub(r"```math\n.*?\n```", "", text_of(letter), flags=re.DOTALL)
    assert "$$" not in prose
    relations = [inline for inline in re.findall(r"\$([^$]+)\$", prose) if re.search(r"=|<|>|\\[lg]e\b", inline)]
    assert not relations


@pytest.mark.parametrize("name", list(cases))
def test_formula(name: str) -> None:
    text, case = cases[name]
    assert stated(name[0])[name] == text, "the page and this case state different formulas"
    case()
