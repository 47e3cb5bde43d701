"""torch's dispatcher over compiled kernels: entries for this package's operators and aten's."""
