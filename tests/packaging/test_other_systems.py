"""Imports and products where functions of POSIX, Linux or torch are missing, as on Windows and macOS."""

import processes
import pytest

# What Python lacks on each system, of what anybody here might use; torch and Numba are loaded before it goes.
MISSING = {
    "darwin": "sched_getaffinity sched_setaffinity memfd_create",
    "win32": "sched_getaffinity sched_setaffinity memfd_create fork register_at_fork getuid geteuid uname getloadavg "
    "killpg setsid sysconf mkfifo O_NONBLOCK",
}
MODULES = {
    "darwin": [],
    "win32": ["fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "syslog", "readline", "posix", "triton"],
}
CODE = """
import importlib, os, pkgutil, sys, warnings
warnings.simplefilter("ignore")
import llvmlite, numba, torch, torch._dynamo
system, missing, modules = {system!r}, {missing!r}, {modules!r}
for name in missing.split():
    if hasattr(os, name):
        delattr(os, name)
for name in modules:
    sys.modules[name] = None  # an import of it fails

sys.platform = system
import matmul_grad
from matmul_grad.kernels.native import torch_layout
sys.platform = "linux"  # as Numba was set up
torch_layout.address = lambda name: 0  # no name of torch's libraries is mangled there as on Linux

for info in pkgutil.walk_packages(matmul_grad.__path__, "matmul_grad."):
    if "gpu" not in info.name and not info.name.endswith("__main__"):
        importlib.import_module(info.name)

a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 2, requires_grad=True)
with matmul_grad.strict():
    matmul_grad.mm(a, b).sum().backward()
torch.testing.assert_close(a.grad, b.detach().sum(1).expand(3, 4))
try:
    matmul_grad.enable()
except RuntimeError as refusal:
    assert "cannot be replaced here" in str(refusal), refusal
else:
    raise AssertionError("the switch is on")
print(matmul_grad.mm(a, b).shape)
"""


@pytest.mark.parametrize("system", MISSING)
def test_imports_and_multiplies(system: str) -> None:
    code = CODE.format(system=system, missing=MISSING[system], modules=MODULES[system])
    done = processes.run(code)
    assert (done.returncode, done.stdout) == (0, "torch.Size([3, 2])\n"), done.stderr[-3000:]
