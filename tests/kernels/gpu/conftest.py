"""Cases of Triton's interpreter can take a second each: their grids run pairwise, dtype with layout and so on."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    if getattr(item, "originalname", "") == "test_interpreted":
        item.add_marker(pytest.mark.pairwise)
