"""Child processes of tests: no call gets the answer to another, and a failure tells what was printed."""

import os
import select
from pathlib import Path
from typing import Any

import processes
import pytest
from processes import SERVER, Server, assert_runs, linux, run


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that are ready at once."""
    without = SERVER.replace("\nimport torch\n", "\ntorch = None\n")
    assert without != SERVER
    monkeypatch.setattr(processes, "SERVER", without)


@linux
@pytest.mark.usefixtures("without_torch")
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
@pytest.mark.usefixtures("without_torch")
def test_a_changed_environment_takes_one_new_server_and_what_a_call_adds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What libraries set where they are imported, such as KMP_INIT_AT_FORK, would else cost each call a new process."""
    started: list[Any] = []

    class Counting(Server):
        def __init__(self, *arguments: Any) -> None:
            started.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(processes, "Server", Counting)
    monkeypatch.setattr(processes, "_servers", {})
    show = "import os; print(os.environ.get('SET_BY_A_LIBRARY'), os.environ.get('OF_ONE_CALL'), os.getppid())"
    parents = []
    for value, count in ((None, 1), ("1", 2), ("2", 3)):
        if value is not None:
            monkeypatch.setenv("SET_BY_A_LIBRARY", value)
        for more in ({}, {"MATMUL_GRAD_TUNED": "x"}, {}):
            *found, parent = run(show, **more).stdout.split()
            assert found == [str(value), "None"]
            parents.append(parent)
        assert run(show, OF_ONE_CALL="y").stdout.split() == [str(value), "y", str(os.getpid())]
        assert len(started) == count and len({*parents}) == count


@linux
def test_the_code_starts_with_the_names_of_a_program() -> None:
    done = run("print([name for name in globals() if not name.startswith('__')])")
    assert done.stdout == "[]\n"


def test_a_notice_of_compiling_is_no_error() -> None:
    assert assert_runs("print('compiling CPU kernels', file=sys.stderr)") == ""


def test_what_was_printed_is_reported() -> None:
    with pytest.raises(AssertionError, match="something else"):
        assert_runs("print('something else', file=sys.stderr)")
