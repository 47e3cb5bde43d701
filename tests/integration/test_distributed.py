"""Two processes against one: DTensor's sharding of the operators, and models in parallel, on these kernels.

The tests start this file as a script in each process, by torchrun's module; what a case there says comes back as JSON.
"""

import datetime
import itertools
import json
import os
import subprocess
import sys
import traceback
import types
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import accumulation_cases
import limits
import parallel_cases
import pytest
import sharding_cases
import torch
import torch.distributed as dist
from gpu_required import require_gpu
from limits import scaled
from sharding_cases import LOCAL, SIZES
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from matmul_grad import sharding

LIMIT = 240  # seconds on the reference machine for all cases of one backend


def cases(every: bool) -> dict[str, Callable[[DeviceMesh], None]]:
    """With each combination of placements, or with as few as hold each two together."""
    placings = itertools.product if every else sharding_cases.pairs
    return sharding_cases.cases(placings) | accumulation_cases.CASES | parallel_cases.CASES


# --- in each process, and in the test ------------------------------------------------------------------------


def main(backend: str, every: bool, folder: Path) -> None:
    """Every case, one after the other; what each raised, or nothing, to a file of this process."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="Warning: Profiler clears events")  # torch 2.11, once
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # of any linear layer: its result is a view
    rank, device = int(os.environ["RANK"]), "cuda" if backend == "nccl" else "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=scaled(60)))
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    raised = {}
    for name, case in cases(every).items():
        try:
            case(mesh)
            raised[name] = ""
        except Exception:
            raised[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(raised))
    # Until all have written; then at once, since torch's way out may abort ("terminate called without an active
    # exception", once in some twenty runs), and torchrun would take that for a failed test.
    with suppress(Exception):
        dist.barrier()
    os._exit(0)


def torchrun(processes: int, *command: str | Path) -> str:
    """The script in so many processes of this machine, which find the tests' helpers; what they printed."""
    paths = filter(None, (str(Path(limits.__file__).parent), os.environ.get("PYTHONPATH")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*launch, *map(str, command)], capture_output=True, text=True, timeout=scaled(LIMIT),
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr[-6000:]}"
    return done.stdout


BACKENDS = [
    "gloo",
    pytest.param("gloo-every", marks=pytest.mark.slow),
    pytest.param("nccl", marks=pytest.mark.gpu),
    pytest.param("nccl-every", marks=[pytest.mark.gpu, pytest.mark.slow]),
]


@pytest.fixture(scope="module", params=BACKENDS)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of each process, what each case raised. With one GPU its process is alone."""
    backend, _, every = request.param.partition("-")
    processes = 2
    if backend == "nccl":
        require_gpu()
        processes = min(2, torch.cuda.device_count())
    folder = tmp_path_factory.mktemp(request.param)
    torchrun(processes, __file__, backend, every or "pairs", folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("name", cases(every=False))
def test_case_of_two_processes(name: str, outcomes: list[dict[str, str]]) -> None:
    for rank, raised in enumerate(outcomes):
        assert not raised[name], f"process {rank}:\n{raised[name]}"


@pytest.mark.parametrize("name", LOCAL)
def test_rules_for_a_torch_whose_strategies_are_not_found(name: str) -> None:
    rules = sharding.shardings(sharding.EQUATIONS[name], list(SIZES[name][0]))
    for operands, result in LOCAL[name]:
        assert ([result], list(operands)) in rules


def test_strategies_are_shared_or_rules_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Propagator:
        def __init__(self) -> None:
            self.op_strategy_funcs, self.op_to_schema_info = {"aten": "strategy"}, {"aten": "info"}

    full, empty = Propagator(), Propagator()
    assert sharding.share_strategy(full, "ours", "aten")
    assert (full.op_strategy_funcs["ours"], full.op_to_schema_info["ours"]) == ("strategy", "info")
    empty.op_strategy_funcs.clear()
    assert not sharding.share_strategy(empty, "ours", "aten")
    registered: list[str] = []
    monkeypatch.setattr(sharding, "register_rules", lambda name, equation: registered.append(name))
    sharding.register_with(types.SimpleNamespace(DTensor=types.SimpleNamespace()))  # type: ignore[arg-type]  # in a module's place
    assert registered == list(sharding.EQUATIONS)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "every", Path(sys.argv[3]))
