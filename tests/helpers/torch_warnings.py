"""Warnings that only some versions of torch raise, for the tests that meet them."""

import pytest

# torch 2.11, at the first profiler of a process.
PROFILER = pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
