"""The kernels, one package a device: ``cpu`` (Numba), ``gpu`` (Triton), and ``native``, which binds them to torch. The sources lie in kernels/."""
