"""docs/derivation.md, formula by formula: each has a case that holds its text and evaluates it."""

import re

import pytest

from .formulas import gradients, jacobians  # noqa: F401  # their import fills the table of cases
from .formulas.tools import PAGE, cases, stated


def test_page_and_cases_have_the_same_ids() -> None:
    assert list(stated()) == [f"D{i}" for i in range(1, len(stated()) + 1)]
    assert set(stated()) == set(cases)


def test_page_refers_only_to_ids_that_it_has() -> None:
    assert set(re.findall(r"\((D\d+)\)", PAGE.read_text(encoding="utf-8"))) <= set(stated())


def test_page_states_nothing_without_an_id() -> None:
    prose = re.sub(r"```math\n.*?\n```", "", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "$$" not in prose
    relations = [inline for inline in re.findall(r"\$([^$]+)\$", prose) if re.search(r"=|<|>|\\[lg]e\b", inline)]
    assert not relations


@pytest.mark.parametrize("name", list(cases))
def test_formula(name: str) -> None:
    text, case = cases[name]
    assert stated()[name] == text, "the page and this case state different formulas"
    case()
