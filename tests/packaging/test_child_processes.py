"""Child processes of tests: no call gets the answer to another, and a failure tells what was printed."""

import os
import select
from pathlib import Path
from typing import Any

import pytest
from processes import Server, assert_runs, linux, run


@linux
def test_an_interrupted_call_leaves_no_answer_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    server, environment = Server(()), dict(os.environ)
    assert server.run("", (), environment, Path.cwd())[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(select, "select", interrupted)
        with pytest.raises(KeyboardInterrupt):
            server.run("import sys; sys.exit(3)", (), environment, Path.cwd())
    assert not server.is_usable(environment), "the next call would read the answer to this one"


@linux
def test_the_code_starts_with_the_names_of_a_program() -> None:
    done = run("print([name for name in globals() if not name.startswith('__')])")
    assert done.stdout == "[]\n"


def test_a_notice_of_compiling_is_no_error() -> None:
    assert assert_runs("print('compiling CPU kernels', file=sys.stderr)") == ""


def test_what_was_printed_is_reported() -> None:
    with pytest.raises(AssertionError, match="something else"):
        assert_runs("print('something else', file=sys.stderr)")
