"""Cases in a child process: one that fails, crashes or hangs is reported alone, and the rest go on."""

from collections.abc import Iterator
from pathlib import Path

import case_process
import pytest
from case_process import CaseProcess
from limits import scaled

PROGRAM = """
import os, sys, time
from case_process import serve
def run(case):
    print("noise on stdout")
    assert case != "wrong", "the case is wrong"
    if case == "exit":
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)
    if case == "hang":
        time.sleep(10_000)
serve(run, forked={forked})
"""


@pytest.fixture(params=[False, True], ids=["process", "fork"])
def process(request: pytest.FixtureRequest) -> Iterator[CaseProcess]:
    environment = {"PYTHONPATH": str(Path(case_process.__file__).parent)}
    made = CaseProcess(["-c", PROGRAM.format(forked=request.param)], environment, limit=scaled(120))
    yield made
    made.close()


def test_each_case_is_reported_alone(process: CaseProcess) -> None:
    assert process.complaint("right") == ""
    assert "AssertionError: the case is wrong" in process.complaint("wrong")
    assert process.complaint("right") == ""
    assert process.starts == 1


def test_a_crash_fails_one_case(process: CaseProcess) -> None:
    assert process.complaint("right") == ""
    assert "crashed" in (said := process.complaint("exit")) and "status 3" in said
    assert process.complaint("right") == ""
    assert process.starts <= 2


def test_a_hang_fails_one_case(process: CaseProcess) -> None:
    assert process.complaint("right") == ""
    process.limit, usual = 0.2, process.limit
    assert "no answer in" in process.complaint("hang")
    process.limit = usual
    assert process.complaint("right") == ""
    assert process.starts == 2


def test_stderr_of_a_crash_is_reported() -> None:
    program = PROGRAM.format(forked=False)
    made = CaseProcess(["-c", program], {"PYTHONPATH": str(Path(case_process.__file__).parent)}, limit=scaled(120))
    assert "last words" in made.complaint("exit")
    made.close()
