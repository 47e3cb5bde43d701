"""Options of the suite, and the stamp that its JSON carries.

python -m pytest bench                          cubes from 64 to 2048, one thread
python -m pytest bench --shapes layers --threads 2 --max-gflop 100
python -m pytest bench --sizes 256,1024 -k f32
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from matmul_grad import machine
from matmul_grad.bench import timer, workloads
from matmul_grad.bench.shapes import SETS


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("matmul_grad")
    group.addoption("--shapes", choices=sorted(SETS), default="cubes", help="default: cubes")
    group.addoption("--sizes", help="cubes of these sizes in place of a set: 64,128")
    group.addoption("--threads", type=int, default=1, help="torch's threads; default: 1")
    group.addoption("--max-gflop", type=float, default=20, help="leave out larger products; default: 20")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        option = metafunc.config.getoption
        sizes = option("--sizes")
        shapes = [(int(n),) * 3 for n in sizes.split(",")] if sizes else SETS[option("--shapes")]
        limit = option("--max-gflop") * 1e9
        kept = [shape for shape in shapes if workloads.flops(*shape, "forward") <= limit]
        metafunc.parametrize("shape", kept, ids=["x".join(map(str, shape)) for shape in kept])


@pytest.fixture(autouse=True, scope="session")
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    with timer.threads(request.config.getoption("--threads")):
        yield


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # which machine it is concerns nobody; what machine it is does
    with timer.threads(config.getoption("--threads")):
        machine_info["matmul_grad"] = machine.describe()
    machine_info["torch"] = torch.__config__.show()
