"""A process is heard line by line, and whatever it does it is gone in time."""

import os
import sys
import time
from pathlib import Path

import pytest
from limits import scaled

from matmul_grad.bench import process


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_lines_arrive_and_the_last_words_are_kept() -> None:
    heard: list[str] = []
    text = "import sys; print('one'); print('two', flush=True); print('why', file=sys.stderr); sys.exit(4)"
    ended = process.run(script(text), heard.append, seconds=scaled(300))
    assert heard == ["one", "two"]
    assert ended == process.ExitStatus(4, "why\n") and ended.reason == "status 4: why"


def test_environment_and_folder(tmp_path: Path) -> None:
    heard: list[str] = []
    text = "import os; print(os.environ['MARK'], os.getcwd())"
    process.run(script(text), heard.append, seconds=scaled(300), environment={"MARK": "x"}, folder=tmp_path)
    assert heard == [f"x {tmp_path}"]


def test_child_finds_this_package(tmp_path: Path) -> None:
    heard: list[str] = []
    text = "import matmul_grad; print(matmul_grad.__file__)"
    assert process.run(script(text), heard.append, seconds=scaled(300), folder=tmp_path).status == 0
    assert heard == [sys.modules["matmul_grad"].__file__]


def test_one_that_dies_names_the_signal() -> None:
    ended = process.run(script("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"), print, seconds=scaled(300))
    assert ended.reason == "killed by SIGSEGV"


def gone(pid: int) -> bool:
    end = time.monotonic() + scaled(60)
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return True
        time.sleep(0.02)
    return False


GRANDCHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(10_000)"])
print(child.pid, flush=True)
time.sleep(10_000)
"""


@pytest.mark.parametrize("silent", [False, True], ids=["late", "silent"])
def test_one_that_does_not_end_is_ended_with_all_that_it_started(silent: bool) -> None:
    heard: list[str] = []
    for limit in (1.5, 10, 60, 300):  # the child has to come as far as its one line
        given = {"seconds": scaled(3000), "silence": limit} if silent else {"seconds": limit}
        ended = process.run(script(GRANDCHILD), heard.append, **given)
        assert ended.status is None and ended.reason == "its time was up"
        if heard:
            break
    assert gone(int(heard[0]))


def test_what_the_listener_raises_ends_the_process() -> None:
    heard: list[str] = []

    def refuse(line: str) -> None:
        heard.append(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process.run(script(GRANDCHILD), refuse, seconds=scaled(300))
    assert gone(int(heard[0]))
