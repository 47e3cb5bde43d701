"""The kernels: ``cpu`` (Numba), ``gpu`` (Triton), and ``native``, which binds them to torch; sources in kernels/."""
