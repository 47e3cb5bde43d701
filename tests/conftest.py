"""For the whole suite: counts and budget at its end, -m smoke, limits of time that fit the machine, -x for workers."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import work
from limits import scaled

COUNTS = pytest.StashKey[Counter[str]]()
WORK = pytest.StashKey[Counter[str]]()
STOP = pytest.StashKey[Path]()  # a file that exists once as many tests have failed as -x or --maxfail allows
FOLDER = pytest.StashKey["tempfile.TemporaryDirectory[str]"]()
# Files of -m smoke: every entry, device and kind of input. The others are not even imported.
SMOKE = {
    "test_autocast", "test_batch", "test_config", "test_cow", "test_coverage", "test_derivation", "test_docs_names",
    "test_exact", "test_exceptions", "test_fallback", "test_function_overrides", "test_functions", "test_functions_out",
    "test_gradient_layout", "test_gradients", "test_nn", "test_nn_attention", "test_override",
    "test_override_cuda", "test_override_errors", "test_override_products", "test_override_vectors",
    "test_same_bits", "test_storages", "test_strict", "test_vectors",
}  # fmt: skip
HERE = Path(__file__).parent
# The threads of two workers are more than the cores: one that waits must not keep a core by trying all the time. Read
# when a process loads OpenMP, with torch, which nothing has done yet.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # or each worker starts processes, which import torch
TIMEOUT = 1800  # seconds of a test on the reference machine of helpers/limits.py; it ends what hangs


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COUNTS] = Counter()
    counting = work.Work(HERE)
    config.stash[WORK] = counting.counts
    config.pluginmanager.register(counting)
    given: dict[str, Any] | None = getattr(config, "workerinput", None)
    if given is not None:
        config.stash[STOP] = Path(given["stop"])
    else:
        config.stash[FOLDER] = tempfile.TemporaryDirectory()
        config.stash[STOP] = Path(config.stash[FOLDER].name, "stop")
    config.pluginmanager.register(StopWorkers(config))


def pytest_unconfigure(config: pytest.Config) -> None:
    if FOLDER in config.stash:
        config.stash[FOLDER].cleanup()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["stop"] = str(node.config.stash[STOP])


class StopWorkers:
    """pytest-xdist lets its workers finish their queues when the allowed failures are reached; here they stop."""

    def __init__(self, config: pytest.Config) -> None:
        self.stop, self.allowed, self.failed = config.stash[STOP], config.getvalue("maxfail"), 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed += report.failed
        if self.allowed and self.failed >= self.allowed:
            self.stop.touch()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if not self.stop.exists():
            return None
        item.session.shouldstop = "as many tests have failed as are allowed"
        return True


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("timeout") is None:
        item.add_marker(pytest.mark.timeout(scaled(TIMEOUT)))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    name = collection_path.stem
    left_out = config.getoption("markexpr") == "smoke" and name.startswith("test_") and name not in SMOKE
    return True if left_out and collection_path.suffix == ".py" else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a grid marked pairwise, the cases that hold two words of an id together for the first time; the rest is slow.

    In a smoke run a test has as few cases as hold every word once: every dtype, shape and layout.
    """
    pairs: dict[str, set[Any]] = {}
    words: dict[str, set[Any]] = {}
    for item in items:
        test, _, case = item.nodeid.rstrip("]").partition("[")
        found = case.split("-")
        together = [*found, *itertools.combinations(found, 2)]
        if item.get_closest_marker("pairwise") and not has_new(pairs, test, together):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow") is None and item.path.stem in SMOKE and has_new(words, test, found):
            item.add_marker(pytest.mark.smoke)


def has_new(seen: dict[str, set[Any]], test: str, found: Iterable[Any]) -> bool:
    """Whether a test meets one of these for the first time; now it has met them all."""
    known, before = seen.setdefault(test, set()), len(seen[test])
    known.update(found)
    return len(known) > before


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing that torch.compile kept is there before the test, nor after it."""
    import torch  # not above: the process that starts the workers does without

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def counts(request: pytest.FixtureRequest) -> Counter[str]:
    """Add to it: what it holds is printed below the tests, summed over all workers."""
    return request.config.stash[COUNTS]


def pytest_sessionfinish(session: pytest.Session) -> None:
    told: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if told is not None:
        told["counts"], told["work"] = dict(session.config.stash[COUNTS]), dict(session.config.stash[WORK])
    elif work.exceeded(session.config.stash[WORK], work.load(HERE)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    output = getattr(node, "workeroutput", {})
    node.config.stash[COUNTS].update(output.get("counts", {}))
    node.config.stash[WORK].update(output.get("work", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[COUNTS]:
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(config.stash[COUNTS].items()))
        terminalreporter.write_line(f"op_db, compared with torch: {counted}")
    if work.load(HERE):
        terminalreporter.write_line(f"work: {work.summary(config.stash[WORK])}")
    for line in work.exceeded(config.stash[WORK], work.load(HERE)):
        terminalreporter.write_line(line, red=True)
