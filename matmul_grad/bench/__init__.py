"""The measuring engine, as a checkout finds it: an installation has bench/ of the repository in this folder's place."""

from pathlib import Path

__path__[:] = [str(Path(__file__).resolve().parents[2] / "bench")]

from .comparison import Comparison, compare  # noqa: E402 -- found by the path above

__all__ = ["Comparison", "compare"]
