"""`once.py`: what interrupts a caller reaches it."""

import threading

import pytest

from matmul_grad.kernels.cpu.once import Once


class Late(Exception):
    """What a signal handler raises."""


def test_what_a_handler_raises_while_a_thread_starts_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        entries: dict[threading.Thread, threading.Thread] = {}
        try:
            raise Late
        except Late:
            del entries[thread]  # as threading does, whose entry the thread has removed itself

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    once = Once(lambda: 3)
    with pytest.raises(Late):
        once.result()
    monkeypatch.undo()
    assert once.result() == 3
