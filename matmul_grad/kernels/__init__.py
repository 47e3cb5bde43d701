"""The kernels, one package a device: ``cpu`` (Numba), ``gpu`` (Triton). The sources lie in kernels/."""
