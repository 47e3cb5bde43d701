"""torch's dispatcher over compiled kernels: entries for operators of this package and of aten, and their registration."""
