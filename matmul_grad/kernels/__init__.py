"""The kernels: ``cpu`` (Numba), ``gpu`` (Triton), ``native``, which binds those of the CPU to torch's dispatcher.

Their sources lie in kernels/ of the repository, and in this package once it is installed. A checkout that is imported
as it is, without an installation or beside one, finds them by the path that is added here.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
_sources = _here.parents[1] / "kernels"
if not (_here / "cpu").is_dir() and (_sources / "cpu").is_dir():
    __path__.append(str(_sources))
