"""Numba as these kernels need it, whatever its environment variables or ``numba.config`` ask for elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

# By name in numba.config. Those that only print are set to 0 too, see ``_needed``.
NEEDED = {
    "BOUNDSCHECK": None,
    "DEBUGINFO_DEFAULT": 0,
    "DISABLE_JIT": 0,
    "ENABLE_PROFILING": 0,
    "EXTEND_VARIABLE_LIFETIMES": 0,
    "JIT_COVERAGE": 0,
    "LLVM_PASS_TIMINGS": 0,
    "LLVM_REFPRUNE_PASS": 1,
    "LOOP_VECTORIZE": 1,
    "NRT_STATS": 0,
    "OPT": 3,
    "SLP_VECTORIZE": 0,
    "TRACE": 0,
}
PRINTING = ("DUMP_", "DEBUG")
# Fixed for the process at Numba's first compilation: code compiled under them may be slower, and is kept apart.
FIXED = ("NUMBA_OPT", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")


def fixed_settings() -> list[str]:
    """Those of the environment that ``needed_settings`` cannot change, for the key of the cache."""
    return [f"{name}={os.environ[name]}" for name in FIXED if os.environ.get(name)]


@contextlib.contextmanager
def needed_settings() -> Iterator[None]:
    """For a block that imports kernels and compiles them; then the settings are as they were.

    Numba's compiler lock is held, so nothing else is compiled with these settings. The CPU that Numba generates code
    for is left alone: it is fixed for the process at the first compilation, and ``build.to_module`` sets another.
    """
    from numba.core import config
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.registry import cpu_target

    with global_compiler_lock:
        config.reload_config()  # Numba does so at each compilation, and would undo what is set here
        _ = cpu_target.target_context  # made by the first compilation, from the settings that the process asked for
        before = {name: getattr(config, name) for name in _needed(config)}
        try:
            for name, value in _needed(config).items():
                setattr(config, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(config, name, value)


def _needed(config: object) -> dict[str, object]:
    """Names that this Numba has, and their values."""
    printing = {name: 0 for name, value in vars(config).items() if name.startswith(PRINTING) and isinstance(value, int)}
    needed = printing | {name: value for name, value in NEEDED.items() if hasattr(config, name)}
    level: Any = type(getattr(config, "OPT", 3))
    return needed | {"OPT": level(3)}
