"""Numba as these kernels need it, whatever its environment variables or ``numba.config`` ask for elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# By name in numba.config. Those that only print are set to 0 too, see ``_needed``.
NEEDED = {
    "BOUNDSCHECK": None,
    "DEBUGINFO_DEFAULT": 0,
    "DISABLE_JIT": 0,
    "EXTEND_VARIABLE_LIFETIMES": 0,
    "JIT_COVERAGE": 0,
    "TRACE": 0,
}
PRINTING = ("DUMP_", "DEBUG")


@contextlib.contextmanager
def needed_settings() -> Iterator[None]:
    """For a block that imports kernels and compiles them; then the settings are as they were.

    Numba's compiler lock is held, so nothing else is compiled with these settings. How Numba optimises, and for which
    CPU, is not among them: of Numba only the front end is used.
    """
    from numba.core import config
    from numba.core.compiler_lock import global_compiler_lock

    with global_compiler_lock:
        config.reload_config()  # Numba does so at each compilation, and would undo what is set here
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
    return {**printing, **{name: value for name, value in NEEDED.items() if hasattr(config, name)}}
