"""The measuring engine, installed as `matmul_grad.bench`; `compare` is for shapes and functions of your own.

The files of `matmul-grad bench`, from the top down:

commands, options                     what the command line accepts; exit codes
workloads, shapes                     what is compared
runner                                workloads to rows, over pipes to the sessions
session, worker                       one process for each pool of threads: prepares, checks and times the backends
backends, calls, inputs, correctness  who multiplies, on which operands, and whether the result is correct
timer, roofline, devices              interleaved timing, peak FLOP/s and bandwidth, what the machine reports
results, files                        rows on disk, resumed runs, CSV
stats                                 rows to ratios, means, worst cases and differences, without side effects
tables, plots, html, readme, run_files   the same as Markdown, PNG and SVG, HTML, and in README.md
comparison                            `compare`

gpu_*, stages, process and sanitizer are `matmul-grad gpu-report`; tune* is `matmul-grad tune`; cpu_ratio and ratio_*
are `python -m bench cpu-ratio`; packing and switch_overhead are commands beside it; test_mm.py and conftest.py are
`make bench`.
"""

from matmul_grad.bench.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
