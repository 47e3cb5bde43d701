"""What waits for a module of torch's: done once, at its import, whoever else asks about that module before."""

import sys
from pathlib import Path
from types import ModuleType

import processes
import pytest

from matmul_grad import import_hooks


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that can be imported and was not."""
    (tmp_path / "a_late_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_late_module", raising=False)
    return "a_late_module"


def test_waits_for_the_import(module: str) -> None:
    import importlib.util

    seen: list[ModuleType] = []
    import_hooks.on_import(module, seen.append)
    import_hooks.on_import(module, seen.append)
    assert importlib.util.find_spec(module) is not None, "asking where it is imports nothing"
    assert seen == []
    imported = __import__(module)
    assert seen == [imported, imported] and imported.value == 1
    import_hooks.on_import(module, seen.append)
    assert seen == [imported] * 3
    assert module not in import_hooks._waiting


def run(code: str) -> str:
    done = processes.run(code, "-W", "error")
    assert done.returncode == 0, done.stderr
    return done.stdout


SHARDS = """
from torch.distributed.tensor import DTensor
propagator = DTensor._op_dispatcher.sharding_propagator
known = {*propagator.op_strategy_funcs, *getattr(propagator, "op_single_dim_strategy_funcs", ())}
print(all(getattr(torch.ops.matmul_grad, name).default in known for name in sharding.EQUATIONS))
"""


def test_sharding_is_registered_when_dtensor_is_imported_later() -> None:
    code = "import sys, torch, matmul_grad\nprint([m for m in sys.modules if m.startswith('torch.distributed.tensor')])"
    assert run(f"{code}\nfrom matmul_grad import sharding\n{SHARDS}") == "[]\nTrue\n"


def test_sharding_is_registered_after_dtensor() -> None:
    code = "import torch, torch.distributed.tensor, matmul_grad\nfrom matmul_grad import sharding\n"
    assert run(code + SHARDS) == "True\n"


def test_sharding_is_registered_when_the_compiler_imports_dtensor() -> None:
    """torch._dynamo imports it halfway through its own import."""
    code = "import torch, matmul_grad, torch._dynamo\nfrom matmul_grad import sharding\n"
    assert run(code + SHARDS) == "True\n"
