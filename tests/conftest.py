"""For the whole suite: counts printed at its end, time limits that fit the machine, -x for workers of pytest-xdist."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from limits import scaled

COUNTS = pytest.StashKey[Counter[str]]()
STOP = pytest.StashKey[Path]()  # a file that exists once as many tests have failed as -x or --maxfail allows
FOLDER = pytest.StashKey["tempfile.TemporaryDirectory[str]"]()
# Files of -m smoke: every entry, device and kind of input, a minute in all.
SMOKE = {
    "test_coverage", "test_derivation", "test_docs", "test_exceptions", "test_fallback", "test_functions", "test_gemm",
    "test_gradient_layout", "test_gradients", "test_nn_attention", "test_override_cuda", "test_override_errors",
    "test_override_products", "test_override_vectors", "test_storages", "test_vectors",
}  # fmt: skip
TIMEOUT = 1800  # seconds of a test on the reference machine of helpers/limits.py; it ends what hangs


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COUNTS] = Counter()
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
    if item.path.stem in SMOKE:
        item.add_marker(pytest.mark.smoke)


@pytest.fixture(scope="session")
def counts(request: pytest.FixtureRequest) -> Counter[str]:
    """Add to it: what it holds is printed below the tests, summed over all workers."""
    return request.config.stash[COUNTS]


def pytest_sessionfinish(session: pytest.Session) -> None:
    told: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if told is not None:
        told["counts"] = dict(session.config.stash[COUNTS])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[COUNTS].update(getattr(node, "workeroutput", {}).get("counts", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[COUNTS]:
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(config.stash[COUNTS].items()))
        terminalreporter.write_line(f"op_db, compared with torch: {counted}")
