"""The measuring engine, installed as `matmul_grad.bench`; `compare` is for shapes and functions of your own.

The files of `matmul-grad bench`, from the top down:

commands, options                     what the command line accepts; exit codes
workloads, shapes                     what is compared
runner                                workloads to rows, over pipes to the sessions
session, worker                       one process for each pool of threads: prepares, checks and times the backends
backends, inputs, correctness         who multiplies, on which operands, and whether the result is correct
timer, roofline, devices              interleaved timing, peak FLOP/s and bandwidth, what the machine reports
memory                                what a call takes
results                               rows on disk, resumed runs, CSV
stats, targets                        rows to ratios, means and differences; to the figures that have targets
tables, plots, html, readme           the same as Markdown, PNG and SVG, HTML, and in docs/results.md
comparison                            `compare`

conv is `python -m bench conv`: layers and targets are in conv_layers, calls and their check in conv_calls, the
processes in conv_session; timer, worker and results are the ones above.

The other commands are faces of it, with workloads, a table and options of their own: cpu_ratio is `python -m bench
cpu-ratio`; gpu_report and its stages `matmul-grad gpu-report`; tune `matmul-grad tune`. What these two do on a GPU
besides comparisons is in gpu_tasks, gpu_calls and sanitizer. packing and switch_overhead compare what is no backend,
with timer alone. test_mm.py and conftest.py are `make bench`.
"""

from matmul_grad.bench.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
